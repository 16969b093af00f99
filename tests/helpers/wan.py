"""A small Wan model: random weights at which every part matters, inputs, and the network once more in float64."""

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


def _normal(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()


def _gelu(x):
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def _silu(x):
    return x / (1 + torch.exp(-x))


def _linear(p, name, x):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def _attention(p, name, x, source, turn=None):
    def rms(which, x):
        x = _linear(p, f"{name}.{which}", x)
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * p[f"{name}.norm_{which}.weight"]

    q, k, v = rms("q", x), rms("k", source), _linear(p, f"{name}.v", source)
    q, k, v = (t.unflatten(-1, (HEADS, -1)) for t in (q, k, v))
    if turn is not None:
        q, k = rotate(q, turn), rotate(k, turn)
    share = (torch.einsum("blhd,bkhd->bhlk", q, k) / (DIM // HEADS) ** 0.5).softmax(-1)
    return _linear(p, f"{name}.o", torch.einsum("bhlk,bkhd->blhd", share, v).flatten(2))


def exact_block(p, x, context, modulation, grid):
    """One block from its parameters p by their official names; modulation: shift, scale, gate twice. All float64."""
    m, turn = modulation, complex_rope(grid, DIM // HEADS)
    y = _normal(x) * (1 + m[1]) + m[0]
    x = x + m[2] * _attention(p, "self_attn", y, y, turn)
    x = x + _attention(p, "cross_attn", _normal(x) * p["norm3.weight"] + p["norm3.bias"], context)
    y = _normal(x) * (1 + m[4]) + m[3]
    return x + m[5] * _linear(p, "ffn.2", _gelu(_linear(p, "ffn.0", y)))


def exact_wan(sd, x, timestep, context):
    """The network from the state dict and the equations alone, in float64."""
    p = {k: v.double() for k, v in sd.items()}
    x, timestep, context = x.double(), timestep.double(), context.double()
    b, _, t, h, w = x.shape
    grid = (t, h // 2, w // 2)
    patches = x.reshape(b, -1, t, h // 2, 2, w // 2, 2).permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)
    tokens = patches @ p["patch_embedding.weight"].flatten(1).T + p["patch_embedding.bias"]
    angle = timestep[:, None] * 10000.0 ** -(torch.arange(128).double() / 128)
    angle = torch.cat([angle.cos(), angle.sin()], 1)
    time = _linear(p, "time_embedding.2", _silu(_linear(p, "time_embedding.0", angle)))
    e = _linear(p, "time_projection.1", _silu(time)).unflatten(1, (6, DIM))
    context = _linear(p, "text_embedding.2", _gelu(_linear(p, "text_embedding.0", context)))
    for n in range(1 + max(int(k.split(".")[1]) for k in p if k.startswith("blocks."))):
        block = {k.removeprefix(f"blocks.{n}."): v for k, v in p.items()}
        tokens = exact_block(block, tokens, context, (block["modulation"] + e).unsqueeze(2).unbind(1), grid)
    shift, scale = (p["head.modulation"] + time[:, None]).unsqueeze(2).unbind(1)
    out = _linear(p, "head.head", _normal(tokens) * (1 + scale) + shift)
    out = out.view(b, *grid, 2, 2, 16)  # a patch's rows, its columns, then channels
    return torch.einsum("bthwrsc->bcthrws", out).reshape(b, 16, t, h, w)
