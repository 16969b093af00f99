"""TurboConvert: a file in models/diffusion_models into a new one there, in another number format."""

from comfy_api.latest import io

from ..turbo_core import checkpoint
from .checks.red import conversion, red
from .host.files import (
    file_input,
    file_stem,
    filename_input,
    format_input,
    listed_files,
    model_file,
    new_model,
    overwrite_input,
    progress_bar,
)
from .reports.made import asked, fingerprint, remember
from .reports.show import written


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
                file_input("source", "A file in models/diffusion_models. The unquantized one is the better source."),
                format_input(),
                filename_input(),
                overwrite_input(),
            ],
            outputs=[io.String.Output("path", tooltip="Where the new file lies.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, source=None):
        return red(conversion, source, cls.hidden.unique_id)

    @classmethod
    def fingerprint_inputs(cls, source=None, format=None, filename=None, **inputs):
        return fingerprint(asked(cls, source, format, filename), listed_files(source))

    @classmethod
    def execute(cls, source, format, filename="", overwrite=False) -> io.NodeOutput:
        path = model_file(source)
        target = new_model((filename or "").strip() or f"{file_stem(source)}_{format}", overwrite)
        done = checkpoint.convert(path, target, format, progress_bar())
        remember(asked(cls, source, format, filename), done.path)
        return io.NodeOutput(done.path, ui=written(done.path, done.bytes, *done.warnings))


NODES = [TurboConvert]
