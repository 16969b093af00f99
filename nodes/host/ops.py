"""ComfyUI linear layers that hold block-int8 weights, beside every format the host knows itself."""

import json

import comfy.ops
import torch
from comfy.quant_ops import QUANT_ALGOS

from ...turbo_core.errors import TurboError
from ...turbo_core.int8 import block_scale_shape, int8_linear, is_row_scale, layout

ROW = "TensorWiseINT8Layout"  # the host's own layout, whose scales are one a row here

QUANT_ALGOS[layout.FORMAT] = {
    "storage_t": torch.int8,
    "parameters": {"weight_scale"},
    "comfy_tensor_layout": layout.NAME,
    "quantize_input": False,
}


def quant_entry(weight_q, scale):
    """The comfy_quant entry (JSON as uint8) that names the format of an int8 weight."""
    name = "int8_tensorwise" if is_row_scale(weight_q, scale) else layout.FORMAT
    return torch.tensor(list(json.dumps({"format": name}).encode()), dtype=torch.uint8)


def quantized_ops(compute_dtype):
    """The host's mixed-precision operations, whose Linear also loads, runs and saves the block format.

    The host's own loader raises on formats it does not list, hence the branch in _load_from_state_dict; F.linear on
    a quantized weight reaches the layout only under inference_mode, hence the direct call in _forward.
    """
    base = comfy.ops.mixed_precision_ops({}, compute_dtype)

    class Linear(base.Linear):
        def _load_from_state_dict(self, state_dict, prefix, *args):
            entry = state_dict.get(f"{prefix}comfy_quant")
            if entry is None or json.loads(entry.numpy().tobytes()).get("format") != layout.FORMAT:
                return super()._load_from_state_dict(state_dict, prefix, *args)
            state_dict.pop(f"{prefix}comfy_quant")
            weight, scale = state_dict.pop(f"{prefix}weight"), state_dict.pop(f"{prefix}weight_scale")
            expected = block_scale_shape(*self._orig_shape)
            if weight.shape != self._orig_shape or scale.shape != expected:
                raise TurboError(
                    f"{prefix[:-1]}: expected int8 {list(self._orig_shape)} with scales {list(expected)}, got "
                    f"{list(weight.shape)} with {list(scale.shape)}: the file is damaged, download or convert it again."
                )
            self.quant_format, self.layout_type = layout.FORMAT, layout.NAME
            device = self.factory_kwargs["device"]
            quantized = layout.wrap(weight.to(device), scale.to(device, torch.float32), self.factory_kwargs["dtype"])
            self.weight = torch.nn.Parameter(quantized, requires_grad=False)
            missing = args[2]
            torch.nn.Module._load_from_state_dict(self, state_dict, prefix, *args)
            if f"{prefix}weight" in missing:
                missing.remove(f"{prefix}weight")

        def _forward(self, input, weight, bias):
            if layout.is_block(weight):
                return int8_linear(input, *weight.layout_cls.get_plain_tensors(weight), bias)
            return super()._forward(input, weight, bias)

    class TurboOps(base):
        pass

    TurboOps.Linear = Linear
    return TurboOps
