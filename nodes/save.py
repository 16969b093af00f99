"""TurboSave: any Wan MODEL as one file that TurboLoader reads back bit for bit."""

import os

import folder_paths
from comfy_api.latest import io

from ..turbo_core.errors import TurboError
from .host.blocks import wan_network
from .host.inputs import check_name
from .host.saving import save_model


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
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, filename_prefix) -> io.NodeOutput:
        wan_network(model, "TurboSave")
        output, prefix = folder_paths.get_output_directory(), (filename_prefix or "").strip()
        check_name(prefix)
        if not folder_paths.is_within_directory(output, os.path.join(output, os.path.normpath(prefix))):
            raise TurboError(
                f"{prefix!r} lies outside {output}. Expected a file name, or a folder below it and a name."
            )
        folder, name, counter, _, _ = folder_paths.get_save_image_path(prefix, output)
        save_model(model, os.path.join(folder, f"{name}_{counter:05}_.safetensors"))
        return io.NodeOutput()


NODES = [TurboSave]
