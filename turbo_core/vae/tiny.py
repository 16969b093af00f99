"""Tiny decoders in the place of the VAE's, for drafts: TAEHV's taew2_1, and LightTAE, which has the same network.

Every frame goes through convolutions of 3x3; time enters by blocks that also see the frame before. A latent frame
becomes four frames, of which the first three of a video are dropped, so that 4n + 1 are left as the VAE gives them.
Source: taehv.py of madebyollin/taehv, and lighttaew2_1 of lightx2v/Autoencoders.
"""

import logging
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ..checkpoint.read import open_tensors
from ..errors import TurboError
from .files import build_vae, check_shapes, is_wan_vae
from .layers import CausalConv, Conv2d, doubled
from .network import LATENT_CHANNELS
from .ops import conv
from .past import Past

_WIDTHS, _TIMES = (256, 128, 64, 64), (1, 2, 2)  # of the stages; frames that one becomes after each
_TOP = 3  # a latent is squeezed smoothly to this size
_CURE = (
    "Expected a tiny decoder of the Wan 2.1 VAE: taew2_1 (madebyollin/taehv), lighttaew2_1 or lightvaew2_1 "
    "(lightx2v/Autoencoders)."
)
_OTHERS = {24: "MiniMax H3", 32: "HunyuanVideo 1.5", 48: "Wan 2.2 5B", 128: "LTX-2"}  # by latent channels
_NAMED = {"taehv": "HunyuanVideo", "taecvx": "CogVideoX"}  # alike in every shape: only their names tell
_LOG = logging.getLogger(__name__)


class _Memory(nn.Module):
    """Three convolutions and the frame itself. The first one sees the frame before too, which is published as twice
    the channels and is a causal convolution over two frames."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Sequential(
            CausalConv(width, width, (2, 3, 3)), nn.ReLU(),
            Conv2d(width, width, 3), nn.ReLU(), Conv2d(width, width, 3),
        )  # fmt: skip

    def forward(self, x, past: Past):
        first, _, second, _, third = self.conv
        y = F.relu(first(x, past))
        y = F.relu(_framewise(y, second, past))
        return F.relu(_framewise(y, third, past).add_(x))


class _Grow(nn.Module):
    def __init__(self, width, times):
        super().__init__()
        self.conv = Conv2d(width, width * times, 1, bias=False)


class TinyDecoder(nn.Module):
    """Latent frames [B, 16, T, H, W] to video [B, 3, 4T - 3, 8H, 8W] in [-1, 1], piece by piece as WanVAE decodes.

    takes_raw: whether latents come as the VAE's encoder makes them (LightTAE) or normalized, as the DiT does (TAEHV).
    """

    dim = _WIDTHS[-1]

    def __init__(self, takes_raw: bool):
        super().__init__()
        self.takes_raw = takes_raw
        layers = [nn.Identity(), Conv2d(LATENT_CHANNELS, _WIDTHS[0], 3), nn.ReLU()]
        for width, wide, times in zip(_WIDTHS, _WIDTHS[1:], _TIMES):
            layers += [_Memory(width), _Memory(width), _Memory(width), nn.Identity(), _Grow(width, times)]
            layers.append(Conv2d(width, wide, 3, bias=False))
        self.decoder = nn.Sequential(*layers, nn.ReLU(), Conv2d(_WIDTHS[-1], 3, 3))

    @property
    def place(self) -> torch.device:
        return self.decoder[1].weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder[1].weight.dtype

    def told(self) -> str:
        """Its name for a person."""
        return "LightTAE" if self.takes_raw else "TAEHV"

    def counted(self, work: str) -> str:
        """What memory.py counts this work as."""
        return f"tiny {work}"

    def decode_piece(self, latent, past: Past):
        """The frames of the first latent frame, or of the next k ones; not clamped."""
        x = torch.tanh(latent / _TOP) * _TOP
        x = F.relu(_framewise(x, self.decoder[1], past))
        for stage, times in enumerate(_TIMES):
            *blocks, _, grow, out = self.decoder[3 + 6 * stage : 9 + 6 * stage]
            for block in blocks:
                x = block(x, past)
            # a product over channels is the same before pixels are doubled as after it
            x = doubled(_framewise(x, grow.conv, past), out, times, past)
        x = _framewise(F.relu(x), self.decoder[-1], past)
        if past.first:
            x = x[:, :, 3:]
        past.first = False
        return x * 2 - 1


def _framewise(x, layer, past: Past):
    """A convolution over space of [B, C, T, H, W]."""
    above, beside = (side // 2 for side in layer.kernel_size)
    if above and past.rows is not None:
        x, above = past.rows.edges(x), 0
    y = conv(x.transpose(1, 2).flatten(0, 1), layer.weight, layer.bias, padding=(above, beside))
    return y.unflatten(0, (x.shape[0], -1)).transpose(1, 2)


def load_fast(path, device="cpu", dtype=torch.float32):
    """A decoder for drafts of a file, for inference: TinyDecoder, or a Wan VAE of any width (LightVAE's is 24).

    TAEHV and LightTAE have the same names and shapes and take other latents; which one a file is its name tells, else
    its numbers: TAEHV's are float16. Raises TurboError for a decoder of another model, and for any other file.
    """
    file = open_tensors(path)
    state = file.tensors
    if is_wan_vae(state):
        return build_vae(state, path, device, dtype, read=file.disk.read)
    _check_kind(state, path)
    with torch.device("meta"):
        model = TinyDecoder(_takes_raw(path, state["decoder.1.weight"].dtype))
    own = {}
    for name, tensor in state.items():
        if name.startswith("decoder."):  # there is an encoder in the files too
            tensor, twice = file.disk.read(tensor), name.endswith(".conv.0.weight") and tensor.ndim == 4
            even = twice and tensor.shape[1] and tensor.shape[1] % 2 == 0
            own[name] = torch.stack(tensor.chunk(2, 1)[::-1], 2) if even else tensor
    check_shapes(model, own, path, _CURE)
    model.load_state_dict({name: tensor.to(device, dtype) for name, tensor in own.items()}, assign=True)
    return model.eval().requires_grad_(False)


def _check_kind(state: dict, path) -> None:
    first, last = state.get("decoder.1.weight"), state.get("decoder.22.weight")
    if first is None or first.ndim != 4 or last is None or last.ndim != 4 or "decoder.3.conv.0.weight" not in state:
        larger = state.get("decoder.1.conv.0.weight")
        kind = "the larger kind of another model's tiny decoder" if larger is not None else "not a tiny video decoder"
        raise TurboError(f"Tiny decoder: {path} is {kind}. {_CURE}")
    channels, name = first.shape[1], Path(path).name.lower()
    model = _OTHERS.get(channels) or next((model for mark, model in _NAMED.items() if mark in name), None)
    if channels != LATENT_CHANNELS or model is not None:
        model = f" of {model}" if model else ""
        raise TurboError(
            f"Tiny decoder: {path} is one{model} with {channels} latent channels, whose colours are other ones. {_CURE}"
        )
    if last.shape[0] != 3:
        raise TurboError(f"Tiny decoder: {path} makes {last.shape[0]} numbers a pixel, expected 3. {_CURE}")


def _takes_raw(path, dtype) -> bool:
    name = Path(path).name.lower()
    if "light" in name or "taew" in name:
        return "light" in name
    kind = "TAEHV" if dtype == torch.float16 else "LightTAE"
    said = "Tiny decoder: %s is taken for %s by the type of its numbers; a name like taew2_1 or lighttaew2_1 tells."
    _LOG.warning(said, path, kind)
    return kind == "LightTAE"
