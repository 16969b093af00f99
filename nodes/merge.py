"""TurboMerge: files in models/diffusion_models into a new one there, a finetune with TurboWan's acceleration."""

import itertools
from pathlib import Path

from comfy_api.latest import io

from ..turbo_core.checkpoint.formats import FORMATS
from ..turbo_core.checkpoint.merging import merge
from ..turbo_core.errors import TurboError
from .checks.red import merging, red
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
from .host.inputs import check_number
from .reports.made import asked, fingerprint, remember
from .reports.show import written

MAX_STRENGTH = 2.0


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
                file_input("finetune", "The model to accelerate: a finetune of the base, or rCM weights."),
                file_input("base", "The original that both others were trained from, unquantized (Wan 2.1 or 2.2)."),
                file_input("turbo", "The accelerated model, unquantized: TurboWan, or SLA weights."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-MAX_STRENGTH,
                    max=MAX_STRENGTH,
                    step=0.05,
                    tooltip="How much of the acceleration is added; proj_l is taken whole at any strength.",
                ),
                format_input("bf16"),
                filename_input(),
                overwrite_input(),
            ],
            outputs=[io.String.Output("path", tooltip="Where the new file lies.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, turbo=None):
        return red(merging, turbo, cls.hidden.unique_id, _check_different)

    @classmethod
    def fingerprint_inputs(
        cls, finetune=None, base=None, turbo=None, strength=None, format=None, filename=None, **inputs
    ):
        wanted = asked(cls, finetune, base, turbo, strength, format, filename)
        return fingerprint(wanted, listed_files(finetune, base, turbo))

    @classmethod
    def execute(
        cls, finetune, base, turbo, strength, format, filename="", overwrite=False
    ) -> io.NodeOutput:  # fmt: skip
        check_number("strength", strength, -MAX_STRENGTH, MAX_STRENGTH)
        paths = model_file(finetune), model_file(base), [model_file(turbo)]
        target = new_model((filename or "").strip() or f"{file_stem(finetune)}_turbo_{format}", overwrite)
        if format in FORMATS:  # else merge names those there are
            _check_different(finetune=finetune, base=base, turbo=turbo)
        done = merge(*paths, target, format, strength, progress_bar())
        remember(asked(cls, finetune, base, turbo, strength, format, filename), done.path)
        apart = [f"{Path(path).name}: {distance:.2%} from {base}" for path, distance in done.distances.items()]
        return io.NodeOutput(done.path, ui=written(done.path, done.bytes, *apart, *done.warnings))


def _check_different(**files):
    """Raise TurboError where two inputs are the same file: the sum would be one of the files again."""
    for first, second in itertools.combinations(files, 2):
        if files[first] == files[second]:
            raise TurboError(
                f"{first} and {second} are the same file, {files[first]}: choose the finetune, the original that it "
                "and the accelerated model come from, and the accelerated model."
            )


NODES = [TurboMerge]
