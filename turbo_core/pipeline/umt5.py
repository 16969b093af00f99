"""The encoder of umT5 (Chung et al. 2023; T5 1.1 with relative positions in every block), as Wan's prompts pass it.

Scores are not scaled, norms have neither mean nor bias, and attention sees distances alone, through one learned number
for each head and bucket of them. The modules carry Hugging Face's names.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

BUCKETS = 32  # of distances
FARTHEST = 128  # tokens: all that lie farther apart share a bucket
EPS = 1e-6


class UMT5(nn.Module):
    """The encoder for its sizes, see text.py; its weights are to be loaded.

    The table of tokens may be of another dtype than the rest, and a RowsOfFile in its place.
    """

    def __init__(self, vocabulary: int, width: int, ffn: int, blocks: int, heads: int, head: int):
        super().__init__()
        self.shared = _Table(vocabulary, width)
        self.encoder = nn.Module()
        self.encoder.block = nn.ModuleList(_Block(width, ffn, heads, head) for _ in range(blocks))
        self.encoder.final_layer_norm = _Norm(width)

    @property
    def device(self) -> torch.device:
        return self.encoder.final_layer_norm.weight.device

    def forward(self, ids, mask):
        """ids int64 [B, L], mask bool [B, L], False for padding -> [B, L, width] in the dtype of the weights."""
        like = self.encoder.final_layer_norm.weight
        x = self.shared(ids).to(like)
        buckets = distance_buckets(ids.shape[1]).to(like.device)
        hidden = ~mask[:, None, None].to(like.device)
        for block in self.encoder.block:
            for part in block.layer:
                x = finite(x + part(part.layer_norm(x), buckets, hidden))
        return self.encoder.final_layer_norm(x)


def distance_buckets(length: int) -> torch.Tensor:
    """int64 [L, L]: the bucket of the distance from each token (row) to each other (column).

    Half of the buckets are for tokens that come later. Of each half, half are one token wide, and the others grow
    evenly in the logarithm up to FARTHEST.
    """
    half, exact = BUCKETS // 2, BUCKETS // 4
    place = torch.arange(length)
    step = place[None] - place[:, None]
    distance = step.abs()
    wide = (distance.clamp_min(1) / exact).log() / math.log(FARTHEST / exact) * (half - exact)
    wide = (exact + wide.long()).clamp_max(half - 1)
    return (step > 0) * half + torch.where(distance < exact, distance, wide)


def finite(x):
    """x, brought back to what float16 can hold where a sum has left it, as the reference does after each sum."""
    if x.dtype != torch.float16:
        return x
    most = torch.finfo(x.dtype).max
    bound = torch.where(x.isinf().any(), most - 1000, most)
    return x.clamp(-bound, bound)


class _Block(nn.Module):
    def __init__(self, width, ffn, heads, head):
        super().__init__()
        self.layer = nn.ModuleList([_Attention(width, heads, head), _FeedForward(width, ffn)])


class _Table(nn.Module):
    """nn.Embedding without its first values: drawing them for no device takes torch's compiler in, which is seconds."""

    def __init__(self, rows, width):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))

    def forward(self, ids):
        return F.embedding(ids.to(self.weight.device), self.weight)


class RowsOfFile(nn.Module):
    """The same of a table in a file, of which the rows of the tokens that are there are read: a prompt needs few.

    weight: the table where it is mapped; read(row) reads one.
    """

    def __init__(self, weight, read):
        super().__init__()
        self.weight, self._read = weight, read

    def forward(self, ids):
        tokens, places = ids.cpu().unique(return_inverse=True)
        return torch.stack([self._read(self.weight[token]) for token in tokens])[places]


class _Norm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + EPS)).to(x.dtype) * self.weight


class _Attention(nn.Module):
    def __init__(self, width, heads, head):
        super().__init__()
        self.heads = heads
        self.layer_norm = _Norm(width)
        self.SelfAttention = nn.ModuleDict({name: nn.Linear(width, heads * head, bias=False) for name in "qkv"})
        self.SelfAttention["o"] = nn.Linear(heads * head, width, bias=False)
        self.SelfAttention["relative_attention_bias"] = _Table(BUCKETS, heads)

    def forward(self, x, buckets, hidden):
        part = self.SelfAttention
        q, k, v = (part[name](x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for name in "qkv")
        bias = part["relative_attention_bias"](buckets).permute(2, 0, 1).masked_fill(hidden, -torch.inf)
        y = F.scaled_dot_product_attention(q, k, v, bias, scale=1.0)
        return part["o"](y.transpose(1, 2).flatten(2))


class _FeedForward(nn.Module):
    def __init__(self, width, ffn):
        super().__init__()
        self.layer_norm = _Norm(width)
        self.DenseReluDense = nn.ModuleDict({name: nn.Linear(width, ffn, bias=False) for name in ("wi_0", "wi_1")})
        self.DenseReluDense["wo"] = nn.Linear(ffn, width, bias=False)

    def forward(self, x, *_):
        part = self.DenseReluDense
        return part["wo"](F.gelu(part["wi_0"](x), approximate="tanh") * part["wi_1"](x))
