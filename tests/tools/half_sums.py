"""What it would cost to sum the attention's products of probabilities and values in fp16, emulated in exact numbers.

    python -m tests.tools.half_sums

GeForce cards multiply fp8, and those before 8.9 fp16, twice as fast where sums are fp16. Prints, for inputs that are
hard in different ways, the error of int8 attention against float64 with float32 sums, and how many times larger it is
with fp16 sums, rounded after each instruction and added in float32 after each block of 64 keys. Scales of probabilities
and values are such that no sum of a block overflows.
"""

import math

import torch

QUERIES, KEYS, CHANNELS, BLOCK = 64, 4096, 64, 64
FP8, FP16 = torch.float8_e4m3fn, torch.float16
DEPTH = {FP8: 32, FP16: 16}  # keys of one matrix instruction
# largest probability and value: 64 * p * v stays below 65504
SCALES = {FP8: ((448, 2.25), (224, 4.5), (112, 9)), FP16: ((2, 448),)}


def _hidden(q, k, v, size):
    """A value that no query attends to takes the range of its channels."""
    v[17] *= size
    q[:, 0], k[:, 0], k[17, 0] = 6, 0, -40


def _dominant(q, k, v):
    k[:, 0], k[5], q[:, 0] = 0, 0, 8
    k[5, 0] = 8.5 * math.sqrt(CHANNELS) / 8


def _opposite(q, k, v):
    """Neighbours that nearly cancel."""
    sign = (torch.arange(KEYS) % 2 * 2 - 1)[:, None]
    v.copy_(v.sign() * sign + 0.01 * v)


HARD = {
    "normal": lambda q, k, v: None,
    "values with a mean": lambda q, k, v: v.add_(3),
    "a value of 100 times": lambda q, k, v: v[17].mul_(100),
    "a hidden value of 100 times": lambda q, k, v: _hidden(q, k, v, 100),
    "a hidden value of 1,000 times": lambda q, k, v: _hidden(q, k, v, 1000),
    "one dominant key": _dominant,
    "key outliers": lambda q, k, v: k[::97].mul_(5),
    "equal scores": lambda q, k, v: q.mul_(0.01),
    "values that cancel": _opposite,
}


def _int8(x):
    scale = x.abs().max() / 127
    return (x / scale).round() * scale


def attention(q, k, v, dtype, largest_p, largest_v, half):
    """Attention with scores of int8 as the kernel computes it; half: with fp16 sums in a block."""
    keys = torch.cat([_int8(block) for block in (k - k.mean(0)).split(BLOCK)])
    scores = (_int8(q).double() @ keys.double().T / math.sqrt(CHANNELS)).float()
    scale = v.abs().amax(0) / largest_v
    values = (v / scale).to(dtype).double()
    top, total, out = torch.full((QUERIES,), -1e30), torch.zeros(QUERIES), torch.zeros(QUERIES, CHANNELS)
    for start in range(0, KEYS, BLOCK):
        score = scores[:, start : start + BLOCK]
        new = torch.maximum(top, score.amax(1))
        p = torch.exp(score - new[:, None]) * largest_p
        decay, top = torch.exp(top - new), new
        total = total * decay + p.sum(1)
        p = p.to(dtype).double()
        part = torch.zeros(QUERIES, CHANNELS, dtype=FP16 if half else torch.float64)
        for at in range(0, BLOCK, DEPTH[dtype]):
            here = slice(at, at + DEPTH[dtype])
            part = (part.double() + p[:, here] @ values[start : start + BLOCK][here]).to(part.dtype)
        out = out * decay[:, None] + part.float()
    return out / total[:, None] * scale


def ratios(name) -> dict:
    """{dtype: (error with float32 sums, [times that with fp16 sums, for each of SCALES])} of one kind of input."""
    generator, found = torch.Generator().manual_seed(0), {}
    q, k, v = (torch.randn(rows, CHANNELS, generator=generator) for rows in (QUERIES, KEYS, KEYS))
    HARD[name](q, k, v)
    exact = torch.softmax(q.double() @ k.double().T / math.sqrt(CHANNELS), -1) @ v.double()
    for dtype, scales in SCALES.items():
        usual = (attention(q, k, v, dtype, 448, 448, False) - exact).norm()
        others = [(attention(q, k, v, dtype, *scale, True) - exact).norm() / usual for scale in scales]
        found[dtype] = (usual / exact.norm()).item(), [other.item() for other in others]
    return found


def main():
    for name in HARD:
        for dtype, (error, times) in ratios(name).items():
            said = ", ".join(f"{scale}: {factor:.2f}" for scale, factor in zip(SCALES[dtype], times))
            print(f"{name:30s} {dtype!s:20s} error {error:.1e}, fp16 sums {said}")


if __name__ == "__main__":
    main()
