"""A prompt as a model's blocks attend to it: its padding as one key, the keys and values of each block made once."""

import math
import weakref

import torch

from ..int8 import BLOCK, is_row_scale
from .layers import Int8Linear

# A bias keeps torch from its fastest attention on cards, so there the text must shrink to a quarter. Not measured.
CARD_SHARE = 4


class Text:
    """The context of one run, for WanModel.forward in the place of a tensor.

    Wan pads its text with zeros. These tokens are alike, and so are their keys and values, for cross-attention knows no
    places; and a key that is there n times is one key with log(n) added to its score. What is kept belongs to the
    weights of one model: for another one, or other weights in its place, it is made again.
    """

    def __init__(self, context):
        """context [B, tokens, text_dim]."""
        self.context = context
        self._whose = self._kept = None

    def of(self, model, dtype):
        """(embedded tokens [B, keys, dim], bias [B, keys] or None, a list for the (keys, values) of each block)."""
        whose = weakref.ref(model), model.edition, dtype
        if whose != self._whose:
            self._kept = None  # gone before the next ones are made
            tokens, bias = collapsed(self.context, dtype, _in_blocks(model))
            self._kept = model.text_embedding(tokens.to(dtype)), bias, [[] for _ in model.blocks]
            self._whose = whose
        return self._kept

    def let_go(self):
        """Forget what was made of the text; it is made again when it is asked for."""
        self._whose = self._kept = None


def _in_blocks(model) -> bool:
    """True where 128 rows of the text share an int8 scale."""
    layers = [layer for block in model.blocks for layer in (block.cross_attn.k, block.cross_attn.v)]
    return any(isinstance(layer, Int8Linear) and not is_row_scale(layer.weight, layer.weight_scale) for layer in layers)


def collapsed(context, dtype, blocks=False):
    """(context [B, keys, C], bias [B, keys] in this dtype): as few of the equal last tokens as can stand for all of
    them; (context, None) where that saves nothing. Waits for the device.

    blocks: 128 rows share a scale, so that padding beside the prompt is not the padding of the blocks behind it: the
    first block without a prompt stands for the others.
    """
    batch, total, _ = context.shape
    alike = (context == context[:, -1:]).all(-1).all(0).tolist()
    own = total - next((i for i, same in enumerate(reversed(alike)) if not same), total)
    standing = 1 if dtype.itemsize > 2 else 2
    whole = -(-own // BLOCK) * BLOCK if blocks else own
    step = BLOCK if blocks and batch > 1 else 8  # samples share no block; and rows are read at full speed
    kept = -(-(whole + standing) // step) * step
    if kept >= (total if context.device.type == "cpu" else total // CARD_SHARE):
        return context, None
    bias = torch.zeros(batch, kept, dtype=dtype)
    bias[:, -standing:] = torch.tensor(shares(total - kept + standing, dtype)[:standing], dtype=dtype)
    return context[:, :kept], bias.to(context.device)


def shares(count: int, dtype) -> list[float]:
    """Two biases in this dtype whose exponentials sum to count: the logarithm in bfloat16 may be off by 1.5 %, so the
    first is rounded down and the second brings what is missing."""
    first = torch.tensor(math.log(count)).to(dtype)
    if first.double().exp() > count:
        first = torch.nextafter(first, torch.zeros((), dtype=dtype))
    rest = count - first.double().exp().item()
    return [first.item(), math.log(rest) if rest > 0 else -math.inf]
