"""What each command of turbo-core does with its arguments: the libraries come in when they are used."""

import json
import math
import sys
import time
from pathlib import Path

from .errors import TurboError


def generate(arguments) -> None:
    import torch

    from . import pipeline
    from .console import progress_bars
    from .sizes import parse_size
    from .video import check_sheet_path, check_video_path, write_contact_sheet, write_video

    size = parse_size(arguments.size)
    check_video_path(arguments.output)
    if arguments.contact_sheet:
        check_sheet_path(arguments.contact_sheet)
    _tell_of_world(arguments)
    start = time.perf_counter()
    try:
        with progress_bars() as progress:
            result = pipeline.generate(
                arguments.prompt,
                arguments.dit,
                arguments.vae,
                arguments.text_encoder,
                dit_low=arguments.dit_low,
                tokenizer=arguments.tokenizer,
                image=arguments.image,
                size=size,
                adaptive=arguments.adaptive,
                frames=arguments.frames,
                steps=arguments.steps,
                seed=arguments.seed,
                sigma_max=arguments.sigma_max,
                topk=None if arguments.dense else "auto" if arguments.topk is None else arguments.topk,
                precision=arguments.precision,
                ode=arguments.ode,
                boundary=arguments.boundary,
                device=arguments.device,
                dtype=arguments.dtype and getattr(torch, arguments.dtype),
                noise_device=arguments.noise_device,
                tiled=arguments.tiled,
                progress=progress,
            )
            progress("write", 0, 1)
            written = time.perf_counter()
            write_video(arguments.output, result.frames)
            if arguments.contact_sheet:
                write_contact_sheet(arguments.contact_sheet, result.frames)
            result.seconds["write"] = time.perf_counter() - written
            progress("write", 1, 1)
    except torch.OutOfMemoryError as error:
        raise TurboError(
            f"Out of device memory ({str(error).splitlines()[0]}). Use the -quant files, a smaller --size, fewer "
            "--frames or --tiled."
        ) from error
    _report(arguments, result, time.perf_counter() - start)


def _tell_of_world(arguments) -> None:
    """Say so when TinyWan is asked for more than it has ever seen: it renders something all the same."""
    from . import checkpoint
    from .train import clips

    world = checkpoint.inspect(arguments.dit).metadata.get(checkpoint.WORLD)
    if world == clips.WORLD and clips.is_outside(arguments.prompt):
        print(
            "TinyWan knows only its small world, and this prompt is not of it. Name a colour "
            f"({', '.join(clips.COLOURS)}), a shape ({', '.join(clips.SHAPES)}), a motion (moves left, right, up or "
            f"down, bounces, orbits, grows, shrinks) and a background ({', '.join(clips.BACKGROUNDS)}).",
            file=sys.stderr,
        )


def _report(arguments, result, total: float) -> None:
    from .console import human_bytes, table

    rows = [(name, str(value)) for name, value in result.settings.items() if value is not None]
    if "topk" in result.settings and result.settings["topk"] is None:
        rows.append(("attention", "dense"))
    rows += [(f"time: {stage}", f"{seconds:.2f} s") for stage, seconds in result.seconds.items()]
    rows.append(("time: each step", ", ".join(f"{seconds:.2f}" for seconds in result.step_seconds) + " s"))
    rows.append(("time: total", f"{total:.2f} s"))
    rows += [(f"peak memory: {where}", human_bytes(size)) for where, size in result.peak_memory.items()]
    table(str(arguments.output), rows)
    if arguments.json:
        report = {
            "output": str(arguments.output),
            "settings": result.settings,
            "seconds": result.seconds,
            "step_seconds": result.step_seconds,
            "total_seconds": total,
            "peak_memory": result.peak_memory,
        }
        _write_text(arguments.json, json.dumps(report, indent=2) + "\n")


def _write_text(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise TurboError(f"Could not write {path} ({error}). Check the folder and its rights.") from error


def inspect(arguments) -> None:
    from . import checkpoint
    from .console import human_bytes, table

    for path in arguments.files:
        found = checkpoint.inspect(path)
        table(
            str(path),
            [
                ("family", found.family),
                ("task", found.task),
                ("format", found.format),
                ("sparse-linear attention", "trained (proj_l)" if found.has_sla else "no proj_l"),
                ("blocks", f"{found.num_layers}, dim {found.dim}, ffn {found.ffn_dim}"),
                ("heads", f"{found.num_heads} x {found.head_dim}"),
                ("channels", f"{found.in_dim} in, {found.out_dim} out, text {found.text_dim}"),
                ("file", f"{found.container}, {found.tensors} tensors, {human_bytes(found.bytes)}"),
                *(("metadata", f"{key} = {_shorten(value)}") for key, value in found.metadata.items()),
                *(("note", note) for note in found.notes),
            ],
        )


def _shorten(value, length: int = 100) -> str:
    text = str(value)
    return text if len(text) <= length else f"{text[:length]}..."


def convert(arguments) -> None:
    from . import checkpoint
    from .console import human_bytes, progress_bars

    write = checkpoint.quantize if arguments.command == "quantize" else checkpoint.convert
    with progress_bars() as progress:
        done = write(
            arguments.source,
            arguments.target,
            arguments.format,
            progress=lambda count, total: progress(arguments.command, count, total),
        )
    for warning in done.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{arguments.target}: {human_bytes(Path(arguments.target).stat().st_size)}, {arguments.format}")


def merge(arguments) -> None:
    from .console import human_bytes, progress_bars
    from .merge import merge as merge_files

    with progress_bars() as progress:
        done = merge_files(
            arguments.finetune,
            arguments.base,
            arguments.turbo,
            arguments.output,
            arguments.format,
            arguments.strength or 1.0,
            progress=lambda count, total: progress("merge", count, total),
        )
    for warning in done.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    for path, apart in done.distances.items():
        print(f"{path}: {apart:.2%} from the original")
    print(f"{done.path}: {human_bytes(done.bytes)}, {arguments.format}")


def plan(arguments) -> None:
    from . import budget, checkpoint
    from .console import table
    from .sizes import latent_shape, parse_size

    model, format = budget.PUBLISHED[arguments.model], arguments.format or "int8_block"
    if arguments.dit:
        found = checkpoint.inspect(arguments.dit)
        stored = found.format if found.format in budget.FORMATS else "bf16"
        model, format = budget.model_of(found), arguments.format or stored
    if arguments.experts:
        model = model._replace(experts=arguments.experts)
    trained = 0.1 if model.has_sla and not arguments.dense else None
    topk = trained if arguments.topk is None else arguments.topk
    width, height = parse_size(arguments.size)
    frames, gib = arguments.frames, budget.GIB
    for memory in budget.CARDS if arguments.memory is None else [arguments.memory]:
        stages = budget.plan(model, width, height, frames, memory, format, topk, arguments.precision)
        rows = [
            (stage.name, f"{stage.weights / gib:.1f} + {stage.activations / gib:.1f} GiB", stage.verdict)
            for stage in stages
        ]
        table(f"{memory:g} GiB: {width}x{height}, {frames} frames, {format}", rows)
    tokens = math.prod(latent_shape(width, height, frames)) // 4
    linears = format if format in budget.INTEGERS else "float"
    total, moment, living = budget.step_peak(model, tokens, linears, topk, arguments.precision)
    rows = [(name, f"{size / gib:.2f} GiB") for name, size in living.items()]
    table(f"Sampling beside the weights, {tokens} tokens, {moment}: {total / gib:.2f} GiB", rows)
    print(
        "Weights + activations, computed from shapes: a forecast, not a measurement. ComfyUI takes about as much at "
        "most, and offloads by itself; turbo-core generate does not offload."
    )


def doctor(arguments) -> None:
    from .console import table
    from .doctor import examine

    findings = examine()
    if arguments.json:
        print(json.dumps(findings, indent=2))
        return
    for section, rows in findings.items():
        table(section, rows)


def make_tiny(arguments) -> None:
    from .tiny_family import make_tiny

    make_tiny(arguments.folder, arguments.seed, _say_file)


def install_tinywan(arguments) -> None:
    from .tinywan import install

    install(arguments.models, _say_file)


def _say_file(path: Path) -> None:
    from .console import human_bytes

    print(f"{path}: {human_bytes(path.stat().st_size)}")


def bench(arguments) -> int:
    import torch

    from . import bench_check, bench_report, bench_run
    from .bench_machine import slug
    from .devices import pick_device

    named = [arguments.what] if isinstance(arguments.what, str) else arguments.what
    groups = tuple(bench_run.GROUPS) if "all" in named else tuple(dict.fromkeys(named))
    sizes = bench_run.parse_shapes(arguments.shapes, groups) if arguments.shapes else None
    if arguments.seconds <= 0 or (arguments.threads or 1) < 1:
        raise TurboError(f"--seconds and --threads are above 0, got {arguments.seconds:g} and {arguments.threads}")
    device = pick_device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # events and libraries go by the current one
    wrong = 0
    with torch.no_grad():
        if arguments.check:
            found = bench_check.check(device, status=_status)
            _status("")
            wrong = sum(not one["ok"] for one in found)
            path = arguments.out / slug(device) / "check.json"
            bench_report.write(path, (json.dumps(found, indent=1) + "\n").encode())
            print(f"check: {len(found) - wrong} of {len(found)} right; {path}")
        reports = bench_run.run(
            groups, device, arguments.out, sizes, arguments.quick, arguments.seconds, status=_status
        )
    rows = [row for report in reports.values() for case in report["cases"] for row in case["rows"]]
    return int(wrong > 0 or any(row["status"] == "wrong" and "turbo-core" in row["name"] for row in rows))


def _status(text: str) -> None:
    """One line on stderr that the next one overwrites, where somebody is looking."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def tune(arguments) -> None:
    from .console import table
    from .devices import pick_device
    from .tune import tune as measure

    found = measure(
        pick_device(arguments.device),
        progress=lambda done, total, text: _status(f"tune {done} of {total}: {text}"),
        out=arguments.output,
    )
    _status("")
    rows = [("product", "best", "as shipped")]
    rows += [(key, f"{us['best']:.0f} us", f"{us['shipped']:.0f} us") for key, us in found["microseconds"].items()]
    table(f"{found['card']}: {found['file']}", rows)
