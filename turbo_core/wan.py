"""A plain Wan 2.1 / 2.2 diffusion transformer with the official parameter names.

Dense or sparse-linear self-attention, float or int8 linears. Matrices compute in their own dtype; norms, RoPE,
modulation, the timestep path and the head in float32, as in the reference. Where kernels compute, a block whose ten
linears are int8 runs as turbo_core.fused.
"""

import contextlib
import functools
import math
import re

import torch
import torch.nn.functional as F
from torch import nn

from . import wan_fused
from .devices import widest_float
from .dispatch import FLOATS, explained, learning, use_triton
from .errors import TurboError
from .int8 import check_scale, int8_linear, is_row_scale, operations
from .sla import sla_from_qkv, sparse_linear_attention

PATCH = (1, 2, 2)
# the ten linears of a block that W8A8 replaces
QUANTIZED_LINEARS = tuple(f"{a}.{x}" for a in ("self_attn", "cross_attn") for x in "qkvo") + ("ffn.0", "ffn.2")


SLICE = 1 << 24  # elements computed in float32 at a time: one copy of the tokens is 1.5 GB at 14B and 720p
_NO_FIT = "state dict does not fit a Wan model"
_BLOCK_KEY = re.compile(r"blocks\.(\d+)\.")


def token_slices(x):
    """Slices of the tokens of x [B, L, ...], whole int8 blocks of 128 of them."""
    step = max(1, SLICE * x.shape[1] // x.numel() // 128) * 128
    return [slice(start, start + step) for start in range(0, x.shape[1], step)]


def _by_slices(function, x):
    """function(x [B, L, C]) -> [B, L, ...], computed slice by slice: tokens must not see each other in it."""
    out = None
    for part in token_slices(x):
        y = function(x[:, part])
        if y.shape[1] == x.shape[1]:
            return y
        out = y.new_empty(*x.shape[:2], *y.shape[2:]) if out is None else out
        out[:, part] = y
    return out


class Int8Linear(nn.Module):
    """A linear layer whose weight is int8 with block or row scales, see turbo_core.int8."""

    def __init__(self, weight, weight_scale, bias=None):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)

    def forward(self, x):
        return int8_linear(x, self.weight, self.weight_scale, self.bias)


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        if use_triton(x.device, "norm") and x.dtype in FLOATS and not learning(x, self.weight):
            with explained:
                rows = x.reshape(-1, x.shape[-1])
                return operations(x.device, ("norm",)).rms_norm(rows, self.weight, self.eps).view(x.shape)
        weight = self.weight.float()
        return _by_slices(lambda x: F.rms_norm(x.float(), weight.shape, weight, self.eps).to(x.dtype), x)


def _layer_norm(x, eps, weight=None, bias=None):
    """LayerNorm over the last axis, computed and returned in float32."""
    weight, bias = (None if p is None else p.float() for p in (weight, bias))
    return F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps)


def timestep_embedding(timestep, dim: int):
    """Sinusoidal embedding, cosines first. timestep [B] (0 to 1000) -> float32 [B, dim]."""
    exact = widest_float(timestep.device)
    frequency = torch.pow(10000, -torch.arange(dim // 2, dtype=exact, device=timestep.device) / (dim // 2))
    angle = timestep.to(exact)[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], 1).float()


def rope_angles(grid, head_dim: int, device=None):
    """Angles of the three-axis rotary embedding for a grid of (frames, height, width) patches.

    Returns float32 [T * H * W, head_dim / 2]: channel pairs for time first, then height, then width, which get
    head_dim // 6 pairs each. Any grid size.
    """
    spatial = 2 * (head_dim // 6)
    axes = []
    for size, dim in zip(grid, (head_dim - 2 * spatial, spatial, spatial)):
        frequency = 1.0 / 10000.0 ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        axes.append(torch.outer(torch.arange(size, dtype=torch.float64), frequency).float().to(device))
    t, h, w = grid
    time, height, width = axes
    return torch.cat(
        [
            time[:, None, None].expand(t, h, w, -1),
            height[None, :, None].expand(t, h, w, -1),
            width[None, None].expand(t, h, w, -1),
        ],
        -1,
    ).reshape(t * h * w, -1)


def apply_rope(x, angles):
    """Rotate neighbouring channel pairs of x [B, L, H, D] by angles [L, D / 2], in float32."""
    out = torch.empty_like(x)
    for part in token_slices(x):
        cos, sin = angles[part].cos()[:, None], angles[part].sin()[:, None]
        even, odd = x[:, part].float().unflatten(-1, (-1, 2)).unbind(-1)
        out[:, part] = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
    return out


class Attention(nn.Module):
    """Multi-head attention with RMSNorm of q and k over the full width. sla adds proj_l under its published name."""

    def __init__(self, dim, num_heads, eps, sla=False):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps), RMSNorm(dim, eps)
        if sla:
            head_dim = dim // num_heads
            proj_l = nn.Linear(head_dim, head_dim)
            self.attn_op = nn.ModuleDict({"local_attn": nn.ModuleDict({"proj_l": proj_l})})

    @property
    def proj_l(self):
        return self.attn_op["local_attn"]["proj_l"] if hasattr(self, "attn_op") else None

    def forward(self, x, context=None, angles=None, topk=None, precision="bf16"):
        """x [B, L, dim]; context [B, keys, dim] makes it cross-attention; angles [L, head_dim / 2] are RoPE's."""
        source = x if context is None else context
        heads = (self.num_heads, -1)
        q = self.norm_q(self.q(x)).unflatten(-1, heads)
        k = self.norm_k(self.k(source)).unflatten(-1, heads)
        v = self.v(source).unflatten(-1, heads)
        if angles is not None:
            q = apply_rope(q, angles)
            k = apply_rope(k, angles)
        if topk is None:
            out = _attend(q, k, v)
        else:
            out = sparse_linear_attention(q, k, v, *self._projection(), topk, precision=precision).flatten(2)
        del q, k, v  # three times the size of what o is about to make
        return self.o(out)

    def _projection(self):
        return (None, None) if self.proj_l is None else (self.proj_l.weight, self.proj_l.bias)

    def attend_self(self, qkv, sums, quantized, angles, topk=None, precision="bf16"):
        """Self-attention between the products, see turbo_core.fused.block. Overwrites qkv."""
        qkv = qkv.unflatten(-1, (self.num_heads, -1))
        if topk is not None:
            weights = self.norm_q.weight, self.norm_k.weight, self.norm_q.eps
            turn = angles.cos(), angles.sin()
            out = sla_from_qkv(qkv, sums, *weights, *turn, *self._projection(), topk, precision, quantized)
            return out if isinstance(out, tuple) else out.flatten(2)
        q, k, v = qkv
        for x, norm in ((q, self.norm_q), (k, self.norm_k)):
            for part in token_slices(x):  # in place: no copies of q and k beside them
                x[:, part] = apply_rope(norm(x[:, part].flatten(2)).view_as(x[:, part]), angles[part])
        return _attend(q, k, v)

    def attend_text(self, q, k, v):
        """Cross-attention between the products, see turbo_core.fused.block."""
        heads = (self.num_heads, -1)
        return _attend(*(t.unflatten(-1, heads) for t in (self.norm_q(q), self.norm_k(k), v)))


def _attend(q, k, v):
    """Dense attention of [B, L, H, D] -> [B, L, H * D]."""
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self, dim, ffn_dim, num_heads, eps, sla):
        super().__init__()
        self.eps = eps
        self.self_attn = Attention(dim, num_heads, eps, sla)
        self.norm3 = nn.LayerNorm(dim, eps)
        self.cross_attn = Attention(dim, num_heads, eps)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(self, x, modulation, context, angles, topk=None, precision="bf16"):
        """x [B, L, dim]; modulation float32 [B, 6, dim]; context [B, keys, dim]."""
        modulation = (self.modulation.float() + modulation).chunk(6, 1)
        if wan_fused.pays(x.device) and self.is_int8() and not learning(x, context, *modulation, *self.parameters()):
            return self.fused(x, modulation, context, angles, topk, precision)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation

        def modulated(x, shift, scale):
            return _by_slices(lambda x: torch.addcmul(shift, _layer_norm(x, self.eps), 1 + scale).to(x.dtype), x)

        def normed(x):
            return _layer_norm(x, self.eps, self.norm3.weight, self.norm3.bias).to(x.dtype)

        attend = functools.partial(self.self_attn, angles=angles, topk=topk, precision=precision)
        x = torch.addcmul(x, attend(modulated(x, shift1, scale1)), gate1.to(x.dtype))
        x = x + self.cross_attn(_by_slices(normed, x), context)
        y = modulated(x, shift2, scale2)
        y = _by_slices(self.ffn, y.view(1, -1, y.shape[-1])).view_as(x)  # one batch: int8 blocks run through samples
        return torch.addcmul(x, y, gate2.to(x.dtype))

    def is_int8(self) -> bool:
        """True where the ten linears are int8 in one format."""
        layers = [self.get_submodule(name) for name in QUANTIZED_LINEARS]
        return all(isinstance(layer, Int8Linear) for layer in layers) and (
            len({is_row_scale(layer.weight, layer.weight_scale) for layer in layers}) == 1
        )

    def fused(self, x, modulation, context, angles, topk=None, precision="bf16"):
        """The same by turbo_core.fused; modulation: six float32 [B, 1, dim]."""

        def borrow(*names):
            layers = [self.get_submodule(name) for name in names]
            return contextlib.nullcontext([(layer.weight, layer.weight_scale, layer.bias) for layer in layers])

        attend = functools.partial(self.self_attn.attend_self, angles=angles, topk=topk, precision=precision)
        heads, norm3 = self.self_attn.num_heads, (self.norm3.weight, self.norm3.bias)
        modulation = [part.flatten(0, 1) for part in modulation]
        return wan_fused.block(
            x, context, modulation, borrow, attend, self.cross_attn.attend_text, norm3, heads, self.eps
        )


class Head(nn.Module):
    def __init__(self, dim, out_dim, eps):
        super().__init__()
        self.eps = eps
        self.head = nn.Linear(dim, math.prod(PATCH) * out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def forward(self, x, time):
        """x [B, L, dim], time float32 [B, dim] -> float32 [B, L, patch * out_dim]."""
        shift, scale = (self.modulation.float() + time[:, None]).chunk(2, 1)
        return _by_slices(
            lambda x: _float_linear(self.head, torch.addcmul(shift, _layer_norm(x, self.eps), 1 + scale)), x
        )


def _float_linear(layer, x):
    return F.linear(x.float(), layer.weight.float(), layer.bias.float())


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
    def from_state_dict(cls, sd, dtype=None, device="cpu", num_heads=None):
        """Build the model that a canonical state dict describes (turbo_core.checkpoint.load) and load it.

        dtype: of the float matrices, default as stored; int8 weights stay int8, norms, modulation and proj_l become
        float32. num_heads: default from proj_l, else heads of 128. Raises TurboError when keys or shapes do not fit.
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
            if t.is_floating_point():
                keep_float = name.endswith(("norm_q.weight", "norm_k.weight", "modulation", "weight_scale"))
                keep_float = keep_float or ".proj_l." in name or ".norm3." in name
                t = t.float() if keep_float else t.to(dtype or t.dtype)
            return t.to(device)

        model.load_state_dict({k: place(k, v) for k, v in sd.items()}, assign=True)
        return model.eval().requires_grad_(False)

    def forward(self, x, timestep, context, y=None, topk=None, precision="bf16"):
        """Velocity of the rectified flow.

        x [B, 16, T, H, W] latent (H and W even); timestep [B], 0 to 1000; context [B, tokens, text_dim];
        y [B, in_dim - 16, T, H, W] for image-to-video: 4 mask channels, then the 16 of the encoded clip.
        topk None: dense attention; else sparse-linear attention, see turbo_core.sla.
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
        tokens = tokens.flatten(2).transpose(1, 2).contiguous()
        embed, silu, project = self.time_embedding
        time = _float_linear(project, silu(_float_linear(embed, timestep_embedding(timestep, self.freq_dim))))
        modulation = _float_linear(self.time_projection[1], F.silu(time)).unflatten(1, (6, self.dim))
        context = self.text_embedding(context.to(dtype))
        angles = rope_angles(grid, self.dim // self.num_heads, tokens.device)
        for block in self.blocks:
            tokens = block(tokens, modulation, context, angles, topk, precision)
        out = self.head(tokens, time)
        b, (t, h, w) = out.shape[0], grid
        out = out.view(b, t, h, w, *PATCH, self.out_dim).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return out.reshape(b, self.out_dim, t * PATCH[0], h * PATCH[1], w * PATCH[2]).to(out_dtype)
