"""Wan 2.1 / 2.2's diffusion transformer with the official parameter names."""

import math
import re

import torch
import torch.nn.functional as F
from torch import nn

from ..devices import widest_float
from ..errors import TurboError
from ..files import counted
from ..int8 import check_scale
from ..rope import rope_angles
from .block import Block
from .layers import Int8Linear, by_slices, float_linear, layer_norm, new_modulation
from .text import Text

PATCH = (1, 2, 2)
_NO_FIT = "state dict does not fit a Wan model"
_BLOCK_KEY = re.compile(r"blocks\.(\d+)\.")


def timestep_embedding(timestep, dim: int):
    """Sinusoidal embedding, cosines first. timestep [B] (0 to 1000) -> float32 [B, dim]."""
    exact = widest_float(timestep.device)
    frequency = torch.pow(10000, -torch.arange(dim // 2, dtype=exact, device=timestep.device) / (dim // 2))
    angle = timestep.to(exact)[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], 1).float()


class Head(nn.Module):
    def __init__(self, dim, out_dim, eps):
        super().__init__()
        self.eps = eps
        self.head = nn.Linear(dim, math.prod(PATCH) * out_dim)
        self.modulation = new_modulation(2, dim)

    def forward(self, x, time):
        """x [B, L, dim], time float32 [B, dim] -> float32 [B, L, patch * out_dim]."""
        shift, scale = (self.modulation.float() + time[:, None]).chunk(2, 1)
        return by_slices(lambda x: float_linear(self.head, torch.addcmul(shift, layer_norm(x, self.eps), 1 + scale)), x)


def _quantized_layers(model, sd):
    """Names of the linears that are int8 in a state dict; raises TurboError unless the two fit in every tensor."""
    shapes = {name: t.shape for name, t in model.state_dict().items()}
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    quantized = [name for name in linears if f"{name}.weight_scale" in sd]
    scales = {f"{name}.weight_scale" for name in quantized}
    missing = [name for name in shapes if name not in sd]
    unknown = [name for name in sd if name not in shapes and name not in scales]
    if missing or unknown:
        raise TurboError(f"{_NO_FIT}: {len(missing)} keys missing {missing[:3]}, {len(unknown)} unknown {unknown[:3]}")
    for name, shape in shapes.items():
        if sd[name].shape != shape:
            raise TurboError(f"{_NO_FIT}: {name} must be {list(shape)}, got {list(sd[name].shape)}")
        if (sd[name].dtype == torch.int8) != (f"{name}_scale" in scales):
            raise TurboError(f"{_NO_FIT}: an int8 weight and its scale come together, {name} has only one of them")
    for name in quantized:
        check_scale(sd[f"{name}.weight"], sd[f"{name}.weight_scale"], name)
    return quantized


class WanModel(nn.Module):
    """Wan diffusion transformer, text-to-video (in_dim 16) or image-to-video by channels (in_dim 36).

    dim 1536 / ffn 8960 / 12 heads / 30 layers is 1.3B; 5120 / 13824 / 40 / 40 is 14B and each A14B expert.
    sla: every self-attention has the trained projection proj_l.
    """

    def __init__(
        self,
        dim,
        ffn_dim,
        num_heads,
        num_layers,
        in_dim=16,
        out_dim=16,
        text_dim=4096,
        freq_dim=256,
        eps=1e-6,
        sla=False,
    ):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise TurboError(f"dim {dim} does not divide into {num_heads} heads")
        self.dim, self.num_heads, self.freq_dim = dim, num_heads, freq_dim
        self.in_dim, self.out_dim = in_dim, out_dim
        self.edition = 0  # counts how often other weights took the place of these
        self.sequence = None  # turbo_core.parallel.Sequence: several processes compute each forward together
        self.patch_embedding = nn.Conv3d(in_dim, dim, PATCH, PATCH)
        self.text_embedding = nn.Sequential(nn.Linear(text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, dim * 6))
        self.blocks = nn.ModuleList(Block(dim, ffn_dim, num_heads, eps, sla) for _ in range(num_layers))
        self.head = Head(dim, out_dim, eps)

    @property
    def has_sla(self) -> bool:
        return self.blocks[0].self_attn.proj_l is not None

    @classmethod
    def from_state_dict(cls, sd, dtype=None, device="cpu", num_heads=None, read=None, progress=None):
        """Build the model that a canonical state dict describes (turbo_core.checkpoint.load) and load it.

        dtype: of the float matrices, default as stored; int8 weights stay int8, norms, modulation and proj_l become
        float32. num_heads: default from proj_l, else heads of 128. read: brings a tensor of sd, one at a time, from its
        file into memory. progress: callable (bytes done, total). Raises TurboError when keys or shapes do not fit.
        """

        def size(name, axis):
            if name not in sd or sd[name].ndim <= axis:
                raise TurboError(f"{_NO_FIT}: {name} is missing or has too few axes")
            return sd[name].shape[axis]

        dim, in_dim = size("patch_embedding.weight", 0), size("patch_embedding.weight", 1)
        proj_l = sd.get("blocks.0.self_attn.attn_op.local_attn.proj_l.weight")
        num_heads = num_heads or dim // (128 if proj_l is None else proj_l.shape[0])
        with torch.device("meta"):
            model = cls(
                dim,
                size("blocks.0.ffn.0.weight", 0),
                num_heads,
                1 + max(int(m[1]) for m in map(_BLOCK_KEY.match, sd) if m),
                in_dim,
                size("head.head.weight", 0) // math.prod(PATCH),
                size("text_embedding.0.weight", 1),
                size("time_embedding.0.weight", 1),
                sla=proj_l is not None,
            )
        for layer in _quantized_layers(model, sd):
            weight = sd[f"{layer}.weight"]
            model.set_submodule(layer, Int8Linear(weight, sd[f"{layer}.weight_scale"], sd[f"{layer}.bias"]))

        def place(name, t):
            t = t if read is None else read(t)
            if t.is_floating_point():
                keep_float = name.endswith(("norm_q.weight", "norm_k.weight", "modulation", "weight_scale"))
                keep_float = keep_float or ".proj_l." in name or ".norm3." in name
                t = t.float() if keep_float else t.to(dtype or t.dtype)
            return t.to(device)

        placed = {name: place(name, tensor) for name, tensor in counted(sd.items(), progress)}
        model.load_state_dict(placed, assign=True)
        return model.eval().requires_grad_(False)

    def forward(self, x, timestep, context, y=None, topk=None, precision="bf16", places=None, context_bias=None):
        """Velocity of the rectified flow.

        x [B, 16, T, H, W] latent (H and W even); timestep [B], 0 to 1000; context [B, tokens, text_dim], or a Text of
        it for all steps of a run, without context_bias;
        y [B, in_dim - 16, T, H, W] for image-to-video: 4 mask channels, then the 16 of the encoded clip.
        topk None: dense attention; else sparse-linear attention, see turbo_core.sla.
        places: int64 ([T], [H / 2], [W / 2]), where x's frames, rows and columns of patches lie in a larger clip of
        which x is a part; default x is whole. context_bias [B, tokens]: what is added to the score of each token of the
        context, for one that stands for many or is to be ignored.
        Returns [B, 16, T, H, W] in x's dtype.
        """
        if y is not None:
            x = torch.cat([x, y.to(x)], 1)
        if x.shape[1] != self.in_dim:
            cure = "give it an image" if self.in_dim > x.shape[1] else "this is not an image-to-video model"
            raise TurboError(f"this model takes {self.in_dim} latent channels, got {x.shape[1]}: {cure}")
        if x.shape[3] % PATCH[1] or x.shape[4] % PATCH[2]:
            raise TurboError(f"latent height and width must be even, got {list(x.shape[3:])}: sizes divide by 16")
        dtype, out_dtype = self.patch_embedding.weight.dtype, x.dtype
        tokens = self.patch_embedding(x.to(dtype))
        grid = tokens.shape[2:]
        tokens, shards = tokens.flatten(2).transpose(1, 2), None
        if self.sequence is not None:
            shards = self.sequence.over(*tokens.shape[:2], self.num_heads)
            tokens = tokens[:, shards.own]
        tokens = tokens.contiguous()
        embed, silu, project = self.time_embedding
        time = float_linear(project, silu(float_linear(embed, timestep_embedding(timestep, self.freq_dim))))
        modulation = float_linear(self.time_projection[1], F.silu(time)).unflatten(1, (6, self.dim))
        if isinstance(context, Text):
            assert context_bias is None, "a Text has a bias of its own"
            context, context_bias, kept = context.of(self, dtype)
        else:
            context, kept = self.text_embedding(context.to(dtype)), [None] * len(self.blocks)
        angles = rope_angles(grid, self.dim // self.num_heads, tokens.device, places)
        for block, keys in zip(self.blocks, kept):
            tokens = block(tokens, modulation, context, angles, topk, precision, context_bias, keys, shards)
        out = self.head(tokens, time)
        out = out if shards is None else shards.whole(out)
        b, (t, h, w) = out.shape[0], grid
        out = out.view(b, t, h, w, *PATCH, self.out_dim).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return out.reshape(b, self.out_dim, t * PATCH[0], h * PATCH[1], w * PATCH[2]).to(out_dtype)
