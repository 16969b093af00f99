"""TurboSave: any Wan MODEL as one file that TurboLoader reads back bit for bit."""

from comfy_api.latest import io

from .checks.red import output, red
from .host.files import new_output
from .host.inputs import wan_network
from .host.saving import save_model
from .reports.facts import summary
from .reports.made import asked, fingerprint, remember
from .reports.show import written


class TurboSave(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TurboSave",
            display_name="Turbo Save",
            category="model/merging",
            description="Saves a Wan MODEL as safetensors, int8 layers as they are and LoRAs baked in, so that "
            "quantizing is done once. Turbo Loader reads it back; files in the row format load in ComfyUI's own loader "
            "as well, which drops the trained part of TurboWan's attention.",
            search_aliases=["TurboWan", "save model", "ModelSave", "int8"],
            inputs=[
                io.Model.Input("model", tooltip="A Wan MODEL, with the LoRAs that are to be baked in."),
                io.String.Input(
                    "filename_prefix",
                    default="diffusion_models/TurboWan",
                    tooltip="Below ComfyUI's output folder. Loaders also list output/diffusion_models.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, filename_prefix=None):
        return red(output, filename_prefix)

    @classmethod
    def fingerprint_inputs(cls, filename_prefix=None, **inputs):
        return fingerprint(asked(cls, filename_prefix))

    @classmethod
    def execute(cls, model, filename_prefix) -> io.NodeOutput:
        wan_network(model, "TurboSave")
        path = new_output(filename_prefix)
        size = save_model(model, path)
        remember(asked(cls, filename_prefix), path)
        return io.NodeOutput(ui=written(path, size, summary(model)))


NODES = [TurboSave]
