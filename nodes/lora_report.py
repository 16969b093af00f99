"""TurboLoraReport: a LoRA in any tool's spelling on a MODEL, and what of it acts where, as text."""

import torch
from comfy_api.latest import io

from ..turbo_core.errors import TurboError
from .checks.red import lora, red
from .host.files import file_input, listed_files, model_file, read_tensors
from .host.inputs import check_number, network_of
from .reports.lora_facts import Examined
from .reports.made import states
from .reports.show import report

MAX_STRENGTH = 100.0


class TurboLoraReport(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TurboLoraReport",
            display_name="Turbo LoRA Report",
            category="model/loaders",
            description="Says what of a LoRA acts on a MODEL: which tensors match which layers, which do not and why, "
            "its rank, and what int8 weights do to it. Also applies it, in the spelling of any training tool "
            "(ComfyUI's own LoRA nodes do not read diffusers names for Wan).",
            search_aliases=["lora", "lora keys", "lora key not loaded", "diffusers lora", "load lora", "TurboWan"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL that the LoRA is for."),
                file_input("lora_name", "A file in models/loras.", "loras"),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-MAX_STRENGTH,
                    max=MAX_STRENGTH,
                    step=0.01,
                    tooltip="Of the LoRA in the model that comes out; the report is about strength 1.",
                ),
            ],
            outputs=[io.String.Output(display_name="report"), io.Model.Output(tooltip="The model with this LoRA.")],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, lora_name=None):
        return red(lora, lora_name)

    @classmethod
    def fingerprint_inputs(cls, lora_name=None, **inputs):
        return states(listed_files(lora_name, kind="loras"))  # it may have been trained further

    @classmethod
    def execute(cls, model, lora_name, strength=1.0) -> io.NodeOutput:
        network_of(model, "TurboLoraReport")
        check_number("strength", strength, -MAX_STRENGTH, MAX_STRENGTH)
        path = model_file(lora_name, "loras")
        tensors, metadata = read_tensors(path)
        if not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
            raise TurboError(f"{path} is not a LoRA: expected a flat file of tensors, got nested entries.")
        examined = Examined(model, tensors, metadata)
        text = examined.text(lora_name)
        patched = model.clone()
        if examined.patches and strength:
            patched.add_patches(examined.patches, strength)
        return io.NodeOutput(text, patched, ui=report(text))


NODES = [TurboLoraReport]
