"""TurboSave: any Wan MODEL as one file that TurboLoader reads back bit for bit."""

import json
import os

import comfy.model_management
import comfy.utils
import folder_paths
from comfy.quant_ops import QuantizedTensor
from comfy_api.latest import io

from ..turbo_core.errors import TurboError
from ..turbo_core.stream_safetensors import stream_safetensors
from .blocks import wan_network
from .file_names import check_name
from .weights import PREFIX, original_weight, stored_weight


def save_model(patcher, path):
    """Write the network of a MODEL, its LoRAs baked in, one tensor at a time.

    The host's ModelSave does the same for a MODEL that lies on its device as a whole; of an int8 one that does not,
    ComfyUI 0.33 makes parameters that ask for gradients, which torch refuses. Raises TurboError like the writer.
    """
    if patcher.injections:
        names = ", ".join(patcher.injections)
        raise TurboError(f"TurboSave cannot bake in the injection {names} (a bypass LoRA is one): use a LoRA loader.")
    sd = patcher.model.diffusion_model.state_dict()
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in sd.items()}
    quantized = {}  # name of a weight: the names of all its tensors
    for name in [n for n in sd if n.endswith(".weight")]:
        weight = original_weight(patcher, PREFIX + name)
        if isinstance(weight, QuantizedTensor):
            quantized[name] = set(weight.state_dict(name))
    for name in [n for n in sd if PREFIX + n in patcher.backup and n not in quantized]:
        layout[name] = (original_weight(patcher, PREFIX + name).dtype, layout[name][1])
    parts = set().union(*quantized.values()) - set(quantized)
    progress = comfy.utils.ProgressBar(len(sd))

    def tensors():
        for name, tensor in sd.items():
            comfy.model_management.throw_exception_if_processing_interrupted()
            progress.update(1)
            if name in parts:
                continue
            if name in quantized:
                pieces = stored_weight(patcher, PREFIX + name).state_dict(name)
                yield from ((n, t.cpu()) for n, t in pieces.items())
            elif name.endswith(".comfy_quant"):
                yield name, tensor
            else:
                yield name, stored_weight(patcher, PREFIX + name).detach().cpu()

    config = patcher.model.model_config
    # what the host tells the family by: not all of it can be read off the weights (Animate-2, causal AR)
    kind = {key: value for key, value in type(config).unet_config.items() if key != "image_model"}
    sizes = {"num_heads": config.unet_config["num_heads"], "text_dim": config.unet_config.get("text_dim", 4096)}
    metadata = {"format": "pt", "config": json.dumps({"transformer": {**kind, **sizes}})}
    return stream_safetensors(path, layout, tensors(), metadata)


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
