"""Plain random q, k, v, and the sizes that sparse attention is tested at."""

import torch

BLOCKS = [(64, 64), (128, 64), (128, 128)]
# one token; around one block; whole blocks; ragged in both
LENGTHS = [1, 63, 64, 65, 128, 300, 720]


def qkv(length, keys=None, b=1, h=1, d=64, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    keys = keys or length
    return [torch.randn(b, n, h, d, generator=generator).to(dtype) for n in (length, keys, keys)]
