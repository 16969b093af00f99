"""What the model of tests/helpers/sass_cost.py makes of other people's kernels, beside ours. A forecast.

    python -m tests.tools.forecast_peers FOLDER [--cards 120,89,90]

FOLDER holds their source files as they are published, by the names in PEERS; none is part of this repository, and one
that is missing is named. Only their Triton functions are taken out of a file, with the launches that it tries itself:
of several the fastest by the model counts. Writes benchmarks/results/forecast/peers.json, which docs/forecast.md shows.
"""

import argparse
import ast
import importlib.util
import json
import logging
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from tests.helpers import aot, machine_code, sass, shipped
from tests.helpers.sass_cost import Code, tile_cycles
from tests.helpers.sass_read import MACHINES

RECORD = machine_code.RECORD.with_name("peers.json")
M, N, K = shipped.LENGTH, 5120, 5120
HEADS, LENGTH, KEPT = shipped.HEADS, shipped.LENGTH, shipped.KEPT
INT8, BF16, FP16 = torch.int8, torch.bfloat16, torch.float16
WIDE = [(128, 256, 64, 3, 8), (64, 256, 32, 4, 4), (128, 128, 32, 4, 4), (128, 64, 32, 4, 4), (64, 128, 32, 4, 4)]
DEEP = [(128, 256, 128, 3, 8), (256, 128, 128, 3, 8), (256, 64, 128, 4, 4), (64, 256, 128, 4, 4), (128, 128, 128, 4, 4)]


class Peer(NamedTuple):
    file: str
    kernel: str
    beside: str  # what of ours does the same, by its name in the record
    arguments: object  # () -> those of the launch
    launches: list  # (rows, columns, depth, stages, warps) of a tile
    options: object  # the first three -> the kernel's own names for them


def _operands(dtype):
    return [torch.empty(16, dtype=dtype), torch.empty(16, dtype=dtype), torch.empty(16, dtype=BF16)]


def _scales():
    return [torch.empty(16), torch.empty(16)]


def _names(m, n, k, group):
    return lambda bm, bn, bk: {m: bm, n: bn, k: bk, **group}


def _attention(dtype, out):
    return [torch.empty(16, dtype=kind) for kind in (dtype, dtype, out)]


UPPER = "BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K"
STRIDES = [K, 1, 1, K, N, 1]
PEERS = {
    "Triton's tutorial, bf16": Peer(
        "03-matrix-multiplication.py", "matmul_kernel", "row plain",
        lambda: [*_operands(BF16), M, N, K, *STRIDES], WIDE + DEEP,
        _names(*UPPER, {"GROUP_SIZE_M": 8, "ACTIVATION": ""}),
    ),
    "gn-kernels, int8 rows": Peer(
        "triton_mm.py", "triton_mm_kernel", "row plain",
        lambda: [*_operands(INT8), None, *_scales(), M, N, K, (K, 1), (1, K), (N, 1)], WIDE + DEEP,
        _names("BLOCK_M", "BLOCK_N", "BLOCK_K", {}),
    ),
    "comfy-kitchen, int8 rows": Peer(
        "quantization.py", "_int8_matmul_dequant_per_row_kernel", "row plain",
        lambda: [*_operands(INT8), *_scales(), torch.empty(16, dtype=BF16), M, N, K, *STRIDES], WIDE,
        _names("block_m", "block_n", "block_k", {"group_size_m": 8, "has_bias": True}),
    ),
    "sglang, int8 blocks": Peer(
        "int8_kernel.py", "_w8a8_block_int8_matmul", "block plain",
        lambda: [*_operands(INT8), *_scales(), M, N, K, 128, 128, *STRIDES, K // 128, 1, 1, K // 128],
        [(64, 128, 128, 3, 4), (128, 128, 128, 3, 8), (128, 128, 128, 4, 4)],
        _names(*UPPER, {"GROUP_SIZE_M": 32}),
    ),
    "SageAttention 1.0.6": Peer(
        "attn_qk_int8_per_block.py", "_attn_fwd", "attention SageSLA, int8 out",
        lambda: [*_attention(INT8, FP16), *_scales(), torch.empty(16, dtype=FP16),
                 *[LENGTH * HEADS * 128, LENGTH * 128, 128] * 4, LENGTH, LENGTH],
        [(128, 64, 128, 4, 8)],
        lambda bm, bn, d: {"H": HEADS, "num_kv_groups": 1, "HEAD_DIM": d, "BLOCK_M": bm, "BLOCK_N": bn, "STAGE": 1},
    ),
    "TurboDiffusion's SLA": Peer(
        "kernel.py", "_attn_fwd", "attention SLA bf16, int8 out",
        lambda: [*_attention(BF16, BF16)], [(128, 64, 128, 3, 8)],
        lambda bm, bn, d: {
            "qk_scale": d**-0.5, "topk": KEPT, "LUT": torch.empty(16, dtype=torch.int32), "LSE": torch.empty(16),
            "OS": torch.empty(16, dtype=BF16), "L": LENGTH, "M_BLOCKS": -(-LENGTH // bm), "D": d, "BLOCK_M": bm,
            "BLOCK_N": bn,
        },
    ),
}  # fmt: skip


def kernel_of(path: Path, name: str, folder: Path):
    """The Triton function of a file with those it calls, without what the file imports or tunes."""
    kept = []
    for node in ast.parse(path.read_text("utf-8")).body:
        marks = [ast.unparse(mark) for mark in getattr(node, "decorator_list", ())]
        if isinstance(node, ast.FunctionDef) and "triton.jit" in marks:
            node.decorator_list = [mark for mark in node.decorator_list if ast.unparse(mark) == "triton.jit"]
            kept.append(ast.unparse(node))
    target = folder / f"peer_{path.stem.replace('-', '_')}.py"
    target.write_text("import torch\nimport triton\nimport triton.language as tl\n\n\n" + "\n\n\n".join(kept), "utf-8")
    spec = importlib.util.spec_from_file_location(target.stem, target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def forecast(peer: Peer, kernel, capability, launch) -> int | None:
    """Cycles of a multiprocessor for 128 x 128 results of K products, or for 64 * KEPT keys of 128 queries; None
    where the launch does not compile or fit."""
    bm, bn, bk, stages, warps = launch
    options = peer.options(bm, bn, bk) | {"num_warps": warps, "num_stages": stages}
    try:
        compiled = aot.compile_for(capability, kernel, *peer.arguments(), **options)
    except Exception as error:  # whatever a compiler raises
        logging.warning("%s, sm_%d, %s: %s", peer.kernel, capability, launch, str(error).partition("\n")[0])
        return None
    if not aot.fits(capability, compiled):
        return None
    given = sass.registers(compiled), compiled.metadata.shared, compiled.metadata.num_warps
    code = Code(compiled.asm["sass"], capability, *given)
    if peer.beside.startswith("attention"):
        return round(tile_cycles(code, KEPT, 128 * 64 * (3 if peer.file.startswith("attn_qk") else 4)))
    dtype, machine = peer.arguments()[0].dtype, MACHINES[capability]
    rate = machine.half if dtype == BF16 else machine.int8
    busy = sum(one.busy for one in code.loop if one.pipe in ("tensor", "wgmma"))
    steps = max(1, round(busy * 4 * rate * max(1, code.warps // 4) / (bm * bn * bk)))  # that one turn holds
    load = (bm + bn) * bk * steps * dtype.itemsize
    return round(tile_cycles(code, round(K / bk / steps), load) * 128 * 128 / (bm * bn))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cards", type=lambda text: [int(card) for card in text.split(",")], default=[120, 89, 90])
    given = parser.parse_args()
    ours = machine_code.recorded()["now"]
    found = json.loads(RECORD.read_text("utf-8")) if RECORD.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for title, peer in PEERS.items():
            if not (given.folder / peer.file).exists():
                print(f"{title}: no {peer.file} in {given.folder}")
                continue
            kernel = kernel_of(given.folder / peer.file, peer.kernel, Path(folder))
            for card in given.cards:
                cycles = {launch: forecast(peer, kernel, card, launch) for launch in peer.launches}
                cycles = {launch: count for launch, count in cycles.items() if count}
                if cycles:
                    best = min(cycles, key=cycles.get)
                    mine = ours[f"{peer.beside}, sm_{card}"]["cycles"]
                    row = {"launch": best, "cycles": cycles[best], "ours": mine, "beside": peer.beside}
                    found[f"{title}, sm_{card}"] = row
                    print(title, card, best, cycles[best], "ours", mine, f"{cycles[best] / mine:.2f}x", flush=True)
                    RECORD.write_text(json.dumps(found, indent=0, sort_keys=True) + "\n", "utf-8")


if __name__ == "__main__":
    main()
