"""Measure how the int8 products are best cut up on this card, and keep the answer for it (`turbo-core tune`).

The pack ships a table that was chosen without a card (kernels/int8_configs.py). Every candidate is held to the result
of the plainest launch before it is timed; candidates take turns, so that a card that slows down slows all of them.
"""

import functools
import json
import logging
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch

from ..errors import TurboError
from ..files import write_whole
from ..selfcheck import prove

WARMUP, ROUNDS = 2, 7
# M of each length, (N, K) of each form: the 14B model's, see kernels.int8_configs.LENGTHS
ROWS = {"short": 512, "long": 32760}
SIZES = {"plain": (5120, 5120), "quantize": (13824, 5120), "residual": (5120, 13824), "qkv": (5120, 5120)}
TOLERANCE = 1e-2  # of the largest value: candidates add in the same order, their output type rounds


class Case(NamedTuple):
    """One entry of the table to be found."""

    form: str  # of kernels.int8_configs.FORMS
    length: str
    m: int
    n: int
    k: int


def default_cases() -> list[Case]:
    from ..kernels.int8_configs import FORMS

    return [Case(form, length, m, *SIZES[form.split()[1]]) for form in FORMS for length, m in ROWS.items()]


def candidates(form: str, kind: str | None) -> list:
    """The launches to try for a form on a kind of card, kernels.int8_configs.card_kind; the plainest first."""
    from ..kernels.int8_configs import DEFAULT

    plain = [DEFAULT._replace(warps=warps, stages=stages) for warps in (8, 4) for stages in (3, 4, 2)]
    plain += [DEFAULT._replace(group_m=4), DEFAULT._replace(group_m=16)]
    if kind == "hip":
        return [DEFAULT, *(c._replace(stages=2) for c in plain if c.stages == 3)]
    wide = DEFAULT._replace(block_n=256)
    if form != "block quantize":  # whose tile is one scale block
        plain += [DEFAULT._replace(block_m=64, warps=4, stages=stages) for stages in (3, 4)]
        plain += [wide._replace(stages=stages) for stages in (3, 4)] if form.startswith("row") else []
    if kind in ("sm_80", "sm_86", "sm_120"):
        plain += [c._replace(depth=64) for c in plain]
    if kind == "sm_100" and form != "block quantize":
        plain += [DEFAULT._replace(block_m=64), DEFAULT._replace(depth=64, stages=4)]
    if kind in ("sm_90", "sm_100", "sm_120"):
        apart = [DEFAULT._replace(warps=warps, stages=stages) for warps in (8, 4) for stages in (3, 4)]
        apart += [wide] if form.startswith("row") else []
        plain += [c._replace(variant="persistent") for c in apart]
        plain += [DEFAULT._replace(variant="converting")] if form.startswith("block") else []
    if kind == "sm_90" and form != "block quantize":  # Triton 3.9 fails on that one
        plain += [DEFAULT._replace(variant="specialized", warps=4, stages=stages) for stages in (3, 4)]
    return plain


def tune(device=None, shapes=None, progress=None, out=None) -> dict:
    """Find and write the launch table of one card.

    shapes: list of Case, default the 14B model's. progress: called with (cases done, cases in all, text). out: the
    file, default where the kernels look for it. Returns {"card", "file", "launches": {"form length": Config},
    "microseconds": {"form length": {"best", "shipped"}}}.
    Raises TurboError where the kernels cannot run.
    """
    device = torch.device("cuda" if device is None and torch.cuda.is_available() else device or "cpu")
    reason = prove(device, ("int8_mm",))["int8_mm"]
    if reason:
        raise TurboError(
            f"There is nothing to tune on {device}: {reason}. Tuning needs an NVIDIA or AMD card with Triton."
        )
    from ..kernels import int8_configs

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    path = Path(out) if out else int8_configs.table_path(name)
    cases = default_cases() if shapes is None else shapes
    table = int8_configs.read_table(path, name)  # what is not measured again stays
    launches, times = {}, {}
    for done, case in enumerate(cases):
        if progress:
            progress(done, len(cases), f"{case.form}, {case.m} x {case.n} x {case.k}")
        shipped = int8_configs.shipped(case.form, case.m, int8_configs.card_kind(device))
        tried = list(
            dict.fromkeys([int8_configs.DEFAULT, shipped, *candidates(case.form, int8_configs.card_kind(device))])
        )
        measured = _measure(case, tried, device)
        key = f"{case.form} {case.length}"
        if measured:
            table[key] = launches[key] = min(measured, key=measured.get)
            times[key] = {"best": 1e6 * measured[launches[key]], "shipped": 1e6 * measured.get(shipped, float("nan"))}
        else:
            table.pop(key, None)  # the plainest launch does not run here: the table has no row of that form
        write_table(path, name, table)  # what is done stays, whatever comes
    if progress:
        progress(len(cases), len(cases), str(path))
    return {"card": name, "file": str(path), "launches": launches, "microseconds": times}


def write_table(path: Path, card: str, launches: dict) -> None:
    """Write {"form length": Config} of the card of this name where kernels.int8_configs reads it: a reader sees the
    old table or the new one."""
    import triton

    from ..kernels import int8_configs

    path.parent.mkdir(parents=True, exist_ok=True)
    table = {"card": card, "triton": triton.__version__, "launches": launches}
    write_whole(path, json.dumps(table, indent=1), "Name another file with -o.")
    int8_configs.tuned_table.cache_clear()


def _measure(case, configs, device) -> dict:
    """{config: seconds} of those that run and compute what the first one does; median of interleaved rounds."""
    call = _operands(case, device)
    try:
        reference = _outputs(call(configs[0]))
    except Exception as error:  # of any kind: the other forms go on
        logging.warning("TurboWan: %s does not run here (%s): %s", case.form, configs[0], type(error).__name__)
        return {}
    able = [configs[0]]
    for config in configs[1:]:
        try:
            outputs = _outputs(call(config))
        except Exception as error:  # whatever a compiler or driver raises: the candidate is out
            logging.info("%s %s: %s", case.form, config, type(error).__name__)
            continue
        if all(map(_near, outputs, reference)):
            able.append(config)
        else:
            logging.warning("TurboWan: %s %s gives wrong results here and is left out", case.form, config)
        del outputs
    del reference
    for _ in range(WARMUP):
        for config in able:
            call(config)
    seconds = {config: [] for config in able}
    for _ in range(ROUNDS):
        for config in able:
            seconds[config].append(_time(lambda config=config: call(config), device))
    return {config: statistics.median(values) for config, values in seconds.items()}


def _time(call, device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.device(device):
        _busy(device).zero_()  # while the card has this to do the launch is prepared: its own time is left
        start.record()
        call()
        end.record()
        end.synchronize()
    return start.elapsed_time(end) / 1e3


@functools.cache
def _busy(device):
    """Memory that a card fills in longer than a launch takes to prepare."""
    return torch.empty(1 << 30, dtype=torch.uint8, device=device)


def _outputs(result):
    return [t for t in (result if isinstance(result, tuple) else (result,)) if t is not None]


def _near(a, b):
    a, b = a.flatten(), b.flatten()
    worst = largest = torch.zeros((), device=a.device)
    for part, other in zip(a.split(1 << 24), b.split(1 << 24)):  # float32 copies of the whole may not fit
        worst = torch.maximum(worst, (part.float() - other.float()).abs().max())  # keeps a NaN, where max() drops it
        largest = torch.maximum(largest, other.float().abs().max())
    return bool(worst <= TOLERANCE * largest)


def _operands(case, device):
    """A function of a launch config that runs the case's form."""
    from ..kernels import int8_mm

    fmt, form = case.form.split()
    generator = torch.Generator(device).manual_seed(0)

    def quantized(rows):
        q = torch.randint(-128, 128, (rows, case.k), dtype=torch.int8, generator=generator, device=device)
        shape = (rows, 1) if fmt == "row" else (-(-rows // 128), -(-case.k // 128))
        return q, torch.rand(shape, generator=generator, device=device) / 128

    x, w = quantized(case.m), quantized(case.n)
    bias = torch.zeros(case.n, dtype=torch.bfloat16, device=device)
    if form == "plain":
        return lambda config: int8_mm.int8_mm(*x, *w, bias, config=config)
    if form == "quantize":
        return lambda config: int8_mm.int8_mm_quantize(*x, *w, bias, config=config)
    if form == "residual":
        residual = torch.ones(case.m, case.n, dtype=torch.bfloat16, device=device)
        gate = torch.ones(1, case.n, device=device)
        stats = fmt == "block"  # as a block of the network launches it
        return lambda config: int8_mm.int8_mm_residual(*x, *w, bias, residual, gate, stats, config=config)
    (k, k_scale), (v, v_scale) = quantized(case.n), quantized(case.n)
    weights, scales = (w[0], k, v), (w[1], k_scale, v_scale)
    return lambda config: int8_mm.int8_mm_qkv(*x, weights, scales, [bias] * 3, config=config)
