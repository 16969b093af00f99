"""TurboConvert and TurboMerge: files in models/diffusion_models into new files there."""

import os
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
from comfy_api.latest import io, ui

from ..turbo_core import checkpoint
from ..turbo_core.checkpoint.formats import FORMATS
from ..turbo_core.checkpoint.merging import merge
from ..turbo_core.errors import TurboError
from ..turbo_core.files import human_bytes
from .host.inputs import check_name, check_number, model_file

MAX_STRENGTH = 2.0
_FORMAT_HELP = (
    "int8_block: 128x128 blocks as the published TurboWan files, for Turbo Loader. int8_row and fp8: ComfyUI's own "
    "formats, which its loaders read as well. bf16, fp16, fp32: unquantized."
)


def target_path(filename, overwrite):
    """Where a new file goes: below the folder named diffusion_models. Raises TurboError for any other place."""
    folders = [Path(folder) for folder in folder_paths.get_folder_paths("diffusion_models")]
    folder = next((f for f in folders if f.name == "diffusion_models"), folders[0])
    check_name(filename)
    if Path(filename).suffix.lower() != ".safetensors":
        filename += ".safetensors"
    target = Path(os.path.normpath(folder / filename))  # links are followed: models lie on other disks
    if not target.is_relative_to(os.path.normpath(folder)):
        raise TurboError(f"{filename!r} lies outside {folder}. Expected a file name, or a folder below it and a name.")
    if target.exists() and not overwrite:
        raise TurboError(f"{target} exists already. Choose another filename, or switch overwrite on.")
    return target


def progress_bar():
    """A callback (done, total) that moves the node's bar in the page and stops when the run is interrupted."""
    bar = comfy.utils.ProgressBar(1)

    def progress(done, total):
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    return progress


def _source(name):
    return model_file("diffusion_models", name)


def _output(done, *lines):
    return io.NodeOutput(done.path, ui=ui.PreviewText("\n".join([f"{done.path}: {human_bytes(done.bytes)}", *lines])))


def _file_input(name, tooltip):
    return io.Combo.Input(name, options=folder_paths.get_filename_list("diffusion_models"), tooltip=tooltip)


def _filename_input():
    return io.String.Input(
        "filename",
        default="",
        tooltip="Of the new file in models/diffusion_models; .safetensors is added. Empty: the source's name and the "
        "format. Press R afterwards and loaders list it.",
    )


def _overwrite_input():
    return io.Boolean.Input("overwrite", default=False, advanced=True, tooltip="Replace a file of that name.")


class TurboConvert(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TurboConvert",
            display_name="Turbo Convert",
            category="model/merging",
            description="Writes a TurboWan or Wan file (the published .pth too) as safetensors in another number "
            "format. Needs little memory. The file appears when it is complete; an interrupted run leaves nothing.",
            search_aliases=["TurboWan", "quantize file", "pth to safetensors", "int8", "fp8"],
            inputs=[
                _file_input("source", "A file in models/diffusion_models. The unquantized one is the better source."),
                io.Combo.Input("format", options=list(FORMATS), tooltip=_FORMAT_HELP),
                _filename_input(),
                _overwrite_input(),
            ],
            outputs=[io.String.Output("path", tooltip="Where the new file lies.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, source, format, filename="", overwrite=False) -> io.NodeOutput:
        path = _source(source)
        target = target_path((filename or "").strip() or f"{Path(source).stem}_{format}", overwrite)
        done = checkpoint.convert(path, target, format, progress_bar())
        return _output(done, *done.warnings)


class TurboMerge(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TurboMerge",
            display_name="Turbo Merge",
            category="model/merging",
            description="Carries TurboWan's acceleration over to a finetune of the same original: finetune + strength "
            "* (turbo - base), with TurboWan's proj_l. rCM weights as the finetune take an SLA model as turbo.",
            search_aliases=["TurboWan", "merge models", "SLA", "rCM", "finetune"],
            inputs=[
                _file_input("finetune", "The model to accelerate: a finetune of the base, or rCM weights."),
                _file_input("base", "The original that both others were trained from, unquantized (Wan 2.1 or 2.2)."),
                _file_input("turbo", "The accelerated model, unquantized: TurboWan, or SLA weights."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-MAX_STRENGTH,
                    max=MAX_STRENGTH,
                    step=0.05,
                    tooltip="How much of the acceleration is added; proj_l is taken whole at any strength.",
                ),
                io.Combo.Input("format", options=list(FORMATS), default="bf16", tooltip=_FORMAT_HELP),
                _filename_input(),
                _overwrite_input(),
            ],
            outputs=[io.String.Output("path", tooltip="Where the new file lies.")],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, finetune, base, turbo, strength, format, filename="", overwrite=False
    ) -> io.NodeOutput:  # fmt: skip
        check_number("strength", strength, -MAX_STRENGTH, MAX_STRENGTH)
        paths = _source(finetune), _source(base), [_source(turbo)]
        target = target_path((filename or "").strip() or f"{Path(finetune).stem}_turbo_{format}", overwrite)
        done = merge(*paths, target, format, strength, progress_bar())
        apart = [f"{Path(path).name}: {distance:.2%} from {base}" for path, distance in done.distances.items()]
        return _output(done, *apart, *done.warnings)


NODES = [TurboConvert, TurboMerge]
