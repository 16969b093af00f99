"""The verbs of turbo-core that train and evaluate: their arguments, and what they do with them."""

from pathlib import Path

from ..errors import TurboError
from ..tinywan.presets import PRESETS


def add_verbs(verbs, common) -> None:
    """Add train and evaluate to the parser's verbs; common: the parent parser with what all verbs take."""
    train = verbs.add_parser("train", parents=[common], help="distil or sparsify a Wan finetune; make TinyWan")
    stages = train.add_subparsers(dest="stage", required=True, metavar="STAGE")

    def stage(name, text):
        return stages.add_parser(name, parents=[common], help=text)

    _add_tiny(stage("tiny", "the whole small family from nothing; resumes"))
    _add_data(stage("data", "clips and their captions to one file of latents"))
    _add_teacher(stage("teacher", "finetune by flow matching"))
    _add_distill(stage("distill", "rCM: a model with guidance becomes a 4-step one without"))
    _add_sparsify(stage("sparsify", "SLA: a dense student learns proj_l"))
    _add_evaluate(verbs.add_parser("evaluate", parents=[common], help="the quality report of a TinyWan family"))


def _add_tiny(command) -> None:
    add = command.add_argument
    add("folder", type=Path, metavar="DIR")
    add("--preset", choices=PRESETS, default="cpu", help="default %(default)s; try: minutes, learns nothing")
    add("--pair", action="store_true", help="the image-to-video experts too")
    add("--seed", type=int, default=0)
    add("--device", default="cpu", help="of the transformer; default %(default)s")
    command.set_defaults(run=run_tiny)


def run_tiny(arguments) -> None:
    import torch

    from ..heap import keep_freed_memory
    from ..tinywan import recipe
    from ..train import engine, precision

    device, say = engine.start_processes(arguments.device), _say()
    keep_freed_memory(torch.device("cpu"))  # VAE and text encoder learn on the CPU wherever the transformer does
    for name in dict.fromkeys(["cpu", device.type]):
        say(precision.described(name))
    made = recipe.train(arguments.folder, arguments.preset, arguments.seed, arguments.device, arguments.pair, say)
    if engine.rank() == 0:
        print(*made, sep="\n")


def _add_data(command) -> None:
    add = command.add_argument
    add("videos", type=Path, metavar="DIR", help="video files, each with a .txt of the same name")
    add("--vae", type=Path, required=True)
    add("--text-encoder", type=Path, required=True)
    add("--tokenizer", type=Path)
    add("--size", default="832x480", help="default %(default)s")
    add("--frames", type=int, default=81, help="4n + 1, at 16 a second; default %(default)s")
    add("--image", action="store_true", help="their first frames too, for an image-to-video model")
    add("--device", help="default the best there is")
    add("-o", "--output", type=Path, required=True, metavar="DATA.safetensors")
    command.set_defaults(run=run_data)


def run_data(arguments) -> None:
    from ..checkpoint.write import check_target
    from ..devices import pick_device
    from ..files import check_apart
    from ..pipeline.sizes import parse_size
    from ..train import data, videos

    check_target(arguments.output, 0)  # encoding takes hours
    check_apart([arguments.output], [arguments.vae, arguments.text_encoder, arguments.tokenizer])
    size, device = parse_size(arguments.size), pick_device(arguments.device)
    made = videos.encode(
        arguments.videos, arguments.vae, arguments.text_encoder, arguments.tokenizer, size, arguments.frames, device,
        arguments.image, log=_say(),
    )  # fmt: skip
    data.save(made, arguments.output)
    print(f"{arguments.output}: {len(made.latents)} clips, latents {list(made.latents.shape[1:])}")


def _add_teacher(command) -> None:
    _add_stage(command, 0.002, 0.001)
    _add_shift(command)


def _add_distill(command) -> None:
    _add_stage(command, 5e-4, 2.5e-4)
    add = command.add_argument
    add("--alone", type=float, default=0.25, help="share of the steps with consistency only; default %(default)s")
    add("--guidance", type=float, default=3.0, help="of the teacher; default %(default)s")
    _add_start(command, "an earlier student of --model")
    _add_shift(command)


def _add_sparsify(command) -> None:
    _add_stage(command, 5e-4, 1e-3)
    add = command.add_argument
    add("--topk", type=float, default=0.15, help="share of key blocks in the end; default %(default)s")
    _add_start(command, "sparse attention for --model")


def _add_stage(command, muon_lr: float, lr: float) -> None:
    add = command.add_argument
    add("--model", type=Path, required=True, metavar="FILE", help="float weights to start from")
    add("--model-low", type=Path, metavar="FILE", help="the low-noise expert's, where --model is the high-noise one's")
    add("--boundary", type=float, default=0.9, help="time at which the experts change; default %(default)s")
    add("--data", type=Path, required=True, metavar="DATA.safetensors", help="from turbo-core train data")
    add("--work", type=Path, required=True, metavar="DIR", help="checkpoints; started again it resumes from there")
    add("-o", "--output", type=Path, required=True, metavar="OUT.safetensors")
    add("--output-low", type=Path, metavar="OUT.safetensors", help="for the low-noise expert")
    add("--steps", type=int, default=1000, help="default %(default)s")
    add("--batch", type=int, default=8, help="clips a step, of each process; default %(default)s")
    add("--muon-lr", type=float, default=muon_lr, help="of the blocks' matrices; default %(default)s")
    add("--lr", type=float, default=lr, help="of the rest, AdamW; default %(default)s")
    add("--seed", type=int, default=0)
    add("--device", default="cpu", help="cpu or cuda; several processes by torchrun; default %(default)s")
    add("--shard", action="store_true", help="FSDP2: the weights are spread over the processes")
    add("--checkpointing", action="store_true", help="recompute blocks in the backward pass: less memory")
    command.set_defaults(run=run_stage)


def _add_start(command, what: str) -> None:
    add = command.add_argument
    add("--start", type=Path, metavar="FILE", help=f"{what} to go on from")
    add("--start-low", type=Path, metavar="FILE", help="the low-noise expert's")
    add("--sigma-max", type=float, help="of the first step; default as sampled: 80, I2V 200")


def _add_shift(command) -> None:
    command.add_argument("--shift", type=float, default=3.0, help="of the times; default %(default)s; 720p, experts: 5")


def run_stage(arguments) -> None:
    """teacher, distill or sparsify: a model, or two experts, and a data set in, the same out."""
    from .. import checkpoint
    from ..diagnostics import charts
    from ..train import data, distill, engine, models, precision, sparsify, teacher

    _check_numbers(arguments)
    files, outputs = _files(arguments)
    device = engine.start_processes(arguments.device)
    known = data.load(arguments.data)
    data.check_fits(known, *files)

    def load(sla=False, files=files):
        # a card need not hold a model whole that is to be spread
        where = "cpu" if arguments.shard and engine.processes() > 1 else device
        model = models.load_models(files, arguments.boundary, where, sla, arguments.checkpointing)
        return engine.spread(model, arguments.shard)

    sla = arguments.stage == "sparsify"
    start = _start(arguments, known, files)
    _claim(arguments, {"model": files, "start": start, "data": [arguments.data]})
    model = load(sla, start or files)
    # a teacher may learn new things, what is made of it does not
    world = "" if arguments.stage == "teacher" else checkpoint.inspect(files[0]).metadata.get(checkpoint.WORLD, "")
    _say()(precision.described(device))
    names = ("steps", "batch", "muon_lr", "lr", "seed", "shard")
    options = {name: getattr(arguments, name) for name in names} | {"device": device, "log": _say()}
    # what only some of the stages take
    options |= {
        name: getattr(arguments, name)
        for name in ("shift", "sigma_max", "guidance", "alone", "topk")
        if name in arguments
    }
    if arguments.stage == "teacher":
        average, history = teacher.train(model, known, arguments.work, **options)
    elif sla:
        if start and all(checkpoint.inspect(path).has_sla for path in start):
            options["start"] = arguments.topk  # what is sparse already needs no ramp
        average, history = sparsify.train(model, load(), known, arguments.work, **options)
    else:
        average, history = distill.train(model, load(), load(), known, arguments.work, **options)
    models.save_models(average, outputs, world)
    if engine.rank() == 0:
        charts.save(charts.history(arguments.stage, history), arguments.work / "curves.png")
        print(*outputs, sep="\n")


def _claim(arguments, made_from: dict[str, list[Path]]) -> None:
    """Raise TurboError where the folder of checkpoints belongs to another training than this one."""
    from ..files import digest
    from ..train import engine, record

    digests = [{name: digest(paths) for name, paths in made_from.items()}] if engine.rank() == 0 else []
    # what a training that goes on may not change
    names = ("stage", "seed", "batch", "boundary", "shift", "sigma_max", "guidance", "alone", "topk")
    settings = {name: getattr(arguments, name) for name in names if name in arguments}
    settings |= engine.gathered(digests)[0]
    record.claim(arguments.work / "made_from.json", settings, arguments.work / engine.CHECKPOINT)


def _files(arguments) -> tuple[list[Path], list[Path]]:
    """(models to read, files to write): one of each, or both experts'."""
    from ..checkpoint.write import check_target
    from ..files import check_apart

    if (arguments.model_low is None) != (arguments.output_low is None):
        raise TurboError("--model-low and --output-low belong together: give both for two experts, or neither.")
    files = [path for path in (arguments.model, arguments.model_low) if path is not None]
    outputs = [path for path in (arguments.output, arguments.output_low) if path is not None]
    for path in outputs:
        check_target(path, 0)
    start = (getattr(arguments, name, None) for name in ("start", "start_low"))
    check_apart(outputs, [*files, arguments.data, *start])
    return files, outputs


def _start(arguments, known, files: list[Path]) -> list[Path]:
    """Models to go on from, one or both experts'; none where training begins with --model itself."""
    from .. import checkpoint
    from ..train import data

    given = [getattr(arguments, name, None) for name in ("start", "start_low")]
    start = [path for path in given if path is not None]
    if start and [path is None for path in given] != [False, arguments.model_low is None]:
        raise TurboError("--start goes with --model, and --start-low with --model-low: give one for each expert.")
    if start:
        data.check_fits(known, *start)
    for path, model in zip(start, files):
        one, other = checkpoint.inspect(path), checkpoint.inspect(model)
        if arguments.stage == "distill" and one.has_sla != other.has_sla:
            raise TurboError(
                f"{path if one.has_sla else model} has sparse attention (proj_l) and the other file has not: distil "
                "the dense model, then go on with sparsify --start."
            )
        for name in ("dim", "ffn_dim", "num_heads", "num_layers"):
            here, there = getattr(one, name), getattr(other, name)
            if here != there:
                raise TurboError(
                    f"{path} and {model} differ in {name}, {here} and {there}: --start goes on from what was made of "
                    "--model."
                )
    return start


def _check_numbers(arguments) -> None:
    """Raise TurboError for numbers that no training can use."""
    from ..schedule import MAX_STEPS, rcm_sigmas

    for name in ("steps", "batch"):
        if getattr(arguments, name) < 1:
            raise TurboError(f"--{name} must be at least 1, got {getattr(arguments, name)}.")
    for name in ("muon_lr", "lr"):
        if not 0 < getattr(arguments, name) < 1:
            raise TurboError(f"--{name.replace('_', '-')} must be above 0 and below 1, got {getattr(arguments, name)}.")
    if getattr(arguments, "shift", 1.0) <= 0:
        raise TurboError(f"--shift must be above 0, got {arguments.shift}.")
    if getattr(arguments, "sigma_max", None) is not None:
        rcm_sigmas(MAX_STEPS, arguments.sigma_max)
    if not 0 < arguments.boundary < 1:
        raise TurboError(f"--boundary is a time between 0 and 1, got {arguments.boundary}.")
    if not 0 <= getattr(arguments, "alone", 0.0) <= 1:
        raise TurboError(f"--alone is a share of the steps, 0 to 1, got {arguments.alone}.")
    if not 0 < getattr(arguments, "topk", 1.0) <= 1:
        raise TurboError(f"--topk is the share of key blocks to keep, above 0 and up to 1, got {arguments.topk}.")


def _add_evaluate(command) -> None:
    add = command.add_argument
    add("folder", type=Path, metavar="DIR")
    add("-o", "--output", type=Path, required=True, metavar="DIR", help="quality.json, .md and .png")
    add("--prompts", type=int, default=320, help="default %(default)s")
    add("--again", action="store_true", help="measure rows of changed files again")
    command.set_defaults(run=run_evaluate)


def run_evaluate(arguments) -> None:
    from ..files import write_whole
    from ..tinywan import evaluate, report
    from ..train import engine
    from .console import table

    engine.start_processes("cpu")
    found = evaluate.evaluate(arguments.folder, arguments.output, arguments.prompts, again=arguments.again, log=_say())
    if engine.rank() == 0:
        write_whole(arguments.output / "quality.md", report.markdown(found))
        table("Quality", report.table(found))
        report.picture(found, arguments.folder, arguments.output / "quality.png")


def _say():
    """Lines of progress from the first process, at once."""
    from ..train import engine

    return lambda line: engine.rank() == 0 and print(line, flush=True)
