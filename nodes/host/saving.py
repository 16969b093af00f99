"""A MODEL written to a file."""

import json

import comfy.model_management
import comfy.utils
from comfy.quant_ops import QuantizedTensor

from ...turbo_core.checkpoint.others.comfyui import attention_tensors
from ...turbo_core.checkpoint.write import stream_safetensors
from ...turbo_core.errors import TurboError
from .loading import SOURCE
from .weights import PREFIX, original_weight, stored_weight


def save_model(patcher, path):
    """Write the network of a MODEL, its LoRAs baked in, one tensor at a time.

    The host's ModelSave does the same for a MODEL that lies on its device as a whole; of an int8 one that does not,
    ComfyUI 0.33 makes parameters that ask for gradients, which torch refuses. Returns the size of the file in bytes.
    Raises TurboError like the writer.
    """
    if patcher.injections:
        names = ", ".join(patcher.injections)
        raise TurboError(f"TurboSave cannot bake in the injection {names} (a bypass LoRA is one): use a LoRA loader.")
    network = patcher.model.diffusion_model
    sd = network.state_dict() | _attention_of_the_file(patcher, network)
    if any(tensor.is_meta for tensor in sd.values()):
        raise TurboError(
            "TurboSave does not read the weights of this MODEL, which the node that loaded it keeps in a format of its "
            "own (GGUF and the like): load the bf16, fp16 or fp8 version of this model."
        )
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in sd.items()}
    quantized = {}  # name of a weight: the names of all its tensors
    for name in [n for n in sd if n.endswith(".weight")]:
        weight = original_weight(patcher, PREFIX + name)
        if isinstance(weight, QuantizedTensor):
            quantized[name] = set(weight.state_dict(name))
    for name in [n for n in sd if PREFIX + n in patcher.backup and n not in quantized]:
        layout[name] = (original_weight(patcher, PREFIX + name).dtype, layout[name][1])
    parts = set().union(*quantized.values()) - set(quantized)
    held = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    held |= {name for name, _ in network.named_buffers(remove_duplicate=False)}
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
            elif name not in held:  # what a module writes of itself, as .comfy_quant and .comfy_attention.config
                yield name, tensor.cpu()
            else:
                yield name, stored_weight(patcher, PREFIX + name).detach().cpu()

    config = patcher.model.model_config
    # what the host tells the family by: not all of it can be read off the weights (Animate-2, causal AR)
    kind = {key: value for key, value in type(config).unet_config.items() if key != "image_model"}
    sizes = {"num_heads": config.unet_config["num_heads"], "text_dim": config.unet_config.get("text_dim", 4096)}
    metadata = {"format": "pt", "config": json.dumps({"transformer": {**kind, **sizes}})}
    return stream_safetensors(path, layout, tensors(), metadata)


def _attention_of_the_file(patcher, network):
    """{name: tensor} of the attention that the MODEL's file names for modules in which this host keeps no such wish."""
    source = patcher.get_attachment(SOURCE)
    modules = dict(network.named_modules())
    wishes = {} if source is None else source.attention
    return attention_tensors({m: text for m, text in wishes.items() if not hasattr(modules.get(m), "comfy_attention")})
