"""A small Wan model: random weights at which every part matters, inputs, and RoPE once more in complex numbers."""

import torch

from turbo_core.wan import QUANTIZED_LINEARS, WanModel

DIM, FFN, HEADS, TEXT = 256, 384, 2, 24
PROJ_L = "self_attn.attn_op.local_attn.proj_l"


def weights(sla=False, in_dim=16, layers=2, seed=0):
    """A state dict with every tensor random, scaled so that activations stay of order one and every part matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = WanModel(DIM, FFN, HEADS, layers, in_dim, text_dim=TEXT, sla=sla)
    sd = {}
    for name, p in model.state_dict().items():
        x = torch.randn(p.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            sd[name] = 1 + 0.2 * x
        elif name.endswith("bias") or "modulation" in name:
            sd[name] = 0.2 * x
        else:
            sd[name] = x / p[0].numel() ** 0.5
    return sd


def quantized(sd, quantize, dtype=torch.float32):
    out = {k: v.to(dtype) if v.ndim > 1 else v for k, v in sd.items()}
    for name in sd:
        if name.startswith("blocks.") and name.removesuffix(".weight").split(".", 2)[2] in QUANTIZED_LINEARS:
            out[name], out[name + "_scale"] = quantize(sd[name])
    return out


def inputs(batch=1, channels=16, grid=(3, 6, 10), seed=1):
    """Latent, timestep and context; 3 x 3 x 5 = 45 tokens, all axes different."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, *grid, generator=generator)
    context = torch.randn(batch, 7, TEXT, generator=generator)
    return x, torch.tensor([932.0, 608.0, 988.0][:batch]), context


def complex_rope(grid, d):
    """e^(i angle) [T, H, W, d / 2]: time's pairs first, then height's, then width's."""
    spatial = d // 6
    axes = []
    for axis, pairs in enumerate((d // 2 - 2 * spatial, spatial, spatial)):
        frequency = 10000.0 ** -(torch.arange(pairs, dtype=torch.float64) / pairs)
        position = torch.arange(grid[axis], dtype=torch.float64)
        turn = torch.polar(torch.ones(()).double(), position[:, None] * frequency)
        axes.append(turn.view([-1 if i == axis else 1 for i in range(3)] + [pairs]).expand(*grid, -1))
    return torch.cat(axes, -1)


def rotate(x, turn):
    """x [B, L, H, D] float64 by turn [T, H, W, D / 2]."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn.flatten(0, 2)[:, None]).flatten(-2)
