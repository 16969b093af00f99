"""One velocity of turbo_core.wan.WanModel and of the official network from the same file in the published layout."""

import tempfile
from pathlib import Path

import torch

from tests.parity import official
from turbo_core import checkpoint
from turbo_core.wan import WanModel

DIM, FFN, TEXT, LAYERS = 256, 512, 64, 2
GRID = (3, 14, 22)  # latent frames, height, width: 3 x 7 x 11 = 231 tokens, no multiple of 64 or 128
LONG = (5, 18, 22)  # 495 tokens, 8 key blocks of which the last is ragged

_F32, _BF16 = torch.float32, torch.bfloat16
_I2V = {"in_dim": 36}
CASES = {
    "dense t2v": {"topk": None},
    "dense i2v batch 2": {"topk": None, **_I2V, "batch": 2},
    # their SLA told to compute in float32, strong gates: what remains is a difference in method
    "float32 SLA t2v topk 0.3": {"topk": 0.3, "latent": LONG, "sla_dtype": _F32, "gates": 1.0},
    "float32 SLA i2v topk 1 batch 2": {"topk": 1.0, **_I2V, "batch": 2, "sla_dtype": _F32, "gates": 1.0},
    "SLA t2v topk 0.3": {"topk": 0.3},
    "SLA t2v topk 0.3 long": {"topk": 0.3, "latent": LONG},
    "SLA t2v topk 0.3 batch 2": {"topk": 0.3, "batch": 2},
    "SLA t2v topk 0.3 head_dim 64": {"topk": 0.3, "head_dim": 64},
    "SLA t2v topk 1": {"topk": 1.0},
    "SLA i2v topk 0.3": {"topk": 0.3, **_I2V},
    "SLA i2v topk 1 batch 2": {"topk": 1.0, **_I2V, "batch": 2},
    "quantized t2v topk 0.3": {"topk": 0.3, "quantized": True},
    "quantized t2v topk 1 batch 2": {"topk": 1.0, "batch": 2, "quantized": True},
    "quantized i2v topk 0.3": {"topk": 0.3, **_I2V, "quantized": True},
    # self-attention makes two thirds of the velocity, and its rounding counts accordingly
    "strong gates SLA t2v topk 0.3": {"topk": 0.3, "gates": 1.0},
    "strong gates SLA i2v topk 1": {"topk": 1.0, **_I2V, "gates": 1.0},
    "strong gates quantized t2v topk 0.3": {"topk": 0.3, "quantized": True, "gates": 1.0},
    "strong gates quantized i2v topk 0.3": {"topk": 0.3, **_I2V, "quantized": True, "gates": 1.0},
}
# as published: weights and activations in bf16, their Triton norms
PUBLISHED = {
    "SLA t2v topk 0.3": {"topk": 0.3, "latent": LONG, "dtype": _BF16, "fast_norms": True},
    "SLA i2v topk 1": {"topk": 1.0, **_I2V, "dtype": _BF16, "fast_norms": True},
    "quantized t2v topk 0.3": {"topk": 0.3, "dtype": _BF16, "quantized": True, "fast_norms": True},
}


def random_checkpoint(in_dim=16, head_dim=128, dtype=_F32, gates=0.5, seed=0):
    """A checkpoint in the published layout with weights at which every part of the network matters.

    Matrices, biases and modulation in dtype, norms and proj_l in float32, patch_embedding as a matrix. gates scales
    the modulation: at 0.5 self-attention makes a fifth of the velocity, at 1.0 two thirds.
    """
    generator = torch.Generator().manual_seed(seed)
    sd = {}

    def normal(*shape, std):
        return torch.randn(shape, generator=generator) * std

    def linear(name, n, k, gain=1.0):
        sd[f"{name}.weight"], sd[f"{name}.bias"] = normal(n, k, std=gain * k**-0.5), normal(n, std=0.1 * gain)

    def norm(name, bias=False):
        sd[f"{name}.weight"] = 1 + normal(DIM, std=0.2)
        if bias:
            sd[f"{name}.bias"] = normal(DIM, std=0.1)

    linear("patch_embedding", DIM, in_dim * 4)
    linear("text_embedding.0", DIM, TEXT)
    linear("text_embedding.2", DIM, DIM)
    linear("time_embedding.0", DIM, 256)
    linear("time_embedding.2", DIM, DIM)
    linear("time_projection.1", 6 * DIM, DIM, gates)
    linear("head.head", 64, DIM)
    sd["head.modulation"] = normal(1, 2, DIM, std=0.5 * gates)
    for i in range(LAYERS):
        block = f"blocks.{i}"
        for attention in ("self_attn", "cross_attn"):
            for x in "qkvo":
                linear(f"{block}.{attention}.{x}", DIM, DIM)
            norm(f"{block}.{attention}.norm_q")
            norm(f"{block}.{attention}.norm_k")
        linear(f"{block}.self_attn.attn_op.local_attn.proj_l", head_dim, head_dim)
        norm(f"{block}.norm3", bias=True)
        linear(f"{block}.ffn.0", FFN, DIM)
        linear(f"{block}.ffn.2", DIM, FFN)
        sd[f"{block}.modulation"] = normal(1, 6, DIM, std=0.5 * gates)
    return {k: v if "norm" in k or "proj_l" in k else v.to(dtype) for k, v in sd.items()}


def _inputs(in_dim, latent, batch, dtype, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 16, *latent, generator=generator)
    y = torch.randn(batch, in_dim - 16, *latent, generator=generator)
    if in_dim == 36:
        y[:, :4], y[:, :4, :1] = 0.0, 1.0
    text = torch.randn(batch, 24, TEXT, generator=generator)
    timestep = torch.tensor([932.0, 608.0])[:batch]
    return x.to(dtype), y.to(dtype) if in_dim == 36 else None, text.to(dtype), timestep


def _ours(sd, topk, x, y, text, timestep):
    """Through a file, as a user's checkpoint comes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.pth"
        torch.save(sd, path)
        state, described = checkpoint.load(path)
        model = WanModel.from_state_dict(state, num_heads=described.num_heads)
        return model(x, timestep, text, y=y, topk=topk)


@torch.no_grad()
def velocities(
    theirs,
    topk,
    in_dim=16,
    head_dim=128,
    latent=GRID,
    batch=1,
    dtype=_F32,
    sla_dtype=_BF16,
    quantized=False,
    fast_norms=False,
    gates=0.5,
):
    """(ours, theirs, float): velocities of one checkpoint file for one input; float is ours in float32 throughout.

    sla_dtype: what their SLA casts to inside, bf16 as published.
    """
    float_sd = random_checkpoint(in_dim, head_dim, dtype, gates)
    sd = official.quantize(theirs, float_sd) if quantized else float_sd
    x, y, text, timestep = _inputs(in_dim, latent, batch, dtype)

    net = official.build(theirs, sd, DIM // head_dim, topk, quantized, fast_norms)
    for module in net.modules():
        if isinstance(module, theirs.sla.SparseLinearAttention):
            module.dtype = sla_dtype
    expected = net(x, timestep[:, None], text, y_B_C_T_H_W=y)

    ours = _ours(sd, topk, x, y, text, timestep)
    floats = {k: v.float() for k, v in float_sd.items()}
    exact = _ours(floats, topk, x.float(), None if y is None else y.float(), text.float(), timestep)
    return ours, expected, exact


def figures(theirs, error):
    """The cases, and as published also how far either side stands off the float32 network."""
    result = {}
    for name, case in CASES.items():
        ours, expected, _ = velocities(theirs, **case)
        result[name] = error(ours, expected)
    for name, case in PUBLISHED.items():
        ours, expected, exact = velocities(theirs, **case)
        result[f"published bf16 {name}: ours to theirs"] = error(ours, expected)
        result[f"published bf16 {name}: theirs to float32"] = error(expected, exact)
        result[f"published bf16 {name}: ours to float32"] = error(ours, exact)
    return result
