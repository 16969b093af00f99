"""A memory planner: what a video of a given size needs on a card, stage by stage, and whether it fits.

Computed, not measured: weights from the shapes of the model, activations from the shapes of the tensors that are alive
together at the worst moment of turbo_core.wan in a 2-byte type, written out below under their names. The tests count
what torch allocates on a CPU, and by shape alone up to the published sizes, and hold the formulas to 10 %; the VAE's
bytes a pixel are such a count. ComfyUI's block runs the same attention and int8 functions: an evaluation there takes
at most that much, plus 1 kB a token for its RoPE, which a host test counts; what it keeps on the card it decides by
an estimate of its own. Where kernels compute, the fused block needs less: the plan holds for both, which a test counts
at 14B and 720p. Nothing here has been measured on a card: what a driver, the gaps of an allocator and the
workspaces of libraries take on top is the allowance RESERVED.
"""

import math
from typing import NamedTuple

import torch

from ..checkpoint.describe import Description
from ..checkpoint.formats import FLOATS, FORMATS, INTEGERS
from ..checkpoint.names import is_delicate, is_quantizable
from ..checkpoint.shapes import Sizes, expected_shapes
from ..errors import TurboError, quoted
from ..int8 import block_scale_shape
from ..int8.products import SLICE as INT8_SLICE
from ..sla import PRECISIONS
from ..sla.blocks import kept_blocks
from ..sla.reference import GATHERED, SLICE
from ..vae.memory import piece_bytes
from ..vae.tiles import SIDE
from ..wan.layers import SLICE as WAN_SLICE
from .sizes import latent_shape

GIB = 2**30
RESERVED = GIB  # driver, desktop, workspaces: an allowance, not a measurement
TEXT_TOKENS = 512
CARDS = (8, 12, 16, 24, 32)  # GiB
_VAE_WIDTH = 96  # of the published one
_TILE = 8 * SIDE  # pixels


class Model(NamedTuple):
    """What the planner needs to know of a diffusion model. experts: files that take turns, as in A14B."""

    sizes: Sizes
    blocks: int
    has_sla: bool
    experts: int = 1


class Stage(NamedTuple):
    """weights, activations and kept, what of the weights stays on the card, in bytes; fits: "resident", "offload",
    "tiled" or "no"; verdict: a plain sentence."""

    name: str
    weights: int
    activations: int
    fits: str
    verdict: str
    kept: int


_14B = Sizes(5120, 16, 16, 13824, 4096, 256, 128)
PUBLISHED = {
    "t2v-1.3b": Model(Sizes(1536, 16, 16, 8960, 4096, 256, 128), 30, True),
    "t2v-14b": Model(_14B, 40, True),
    "i2v-a14b": Model(_14B._replace(in_dim=36), 40, True, 2),
}


def model_of(description: Description) -> Model:
    """The planner's view of a checkpoint; A14B image-to-video files count as one of two experts."""
    d = description
    sizes = Sizes(d.dim, d.in_dim, d.out_dim, d.ffn_dim, d.text_dim, 256, d.head_dim)
    return Model(sizes, d.num_layers, d.has_sla, 2 if "A14B" in d.family else 1)


def weight_bytes(model: Model, format: str) -> tuple[int, int]:
    """(bytes of one expert, bytes of one of its blocks) in a format of turbo_core.checkpoint.convert."""
    if format not in FORMATS:
        raise TurboError(f"Unknown format {quoted(format)}. Expected one of {', '.join(FORMATS)}.")
    total = block = 0
    for name, shape in expected_shapes(model.blocks, model.has_sla, model.sizes).items():
        count = math.prod(shape)
        if is_quantizable(name) and format not in FLOATS:
            scales = {"int8_block": math.prod(block_scale_shape(*shape)), "int8_row": shape[0], "fp8": 1}[format]
            size = count + 4 * scales
        else:
            wide = format == "fp32" or ".proj_l." in name or (is_delicate(name) and "modulation" not in name)
            size = count * (4 if wide else 2)
        total += size
        block += size if name.startswith("blocks.0.") else 0
    return total, block


def text_encoder_bytes() -> int:
    """umT5-xxl's encoder in bf16, from its published sizes: 24 layers of 4096 channels, 10240 inside, 256384 words."""
    dim, inner, words, layers, buckets, heads = 4096, 10240, 256384, 24, 32, 64
    layer = 4 * dim * dim + 3 * dim * inner + 2 * dim + buckets * heads
    return 2 * (words * dim + layers * layer + dim)


def living_tensors(model: Model, tokens: int, linears: str, topk=None, precision="bf16", text=TEXT_TOKENS):
    """{moment: {tensor: bytes}} of the moments of a block that can be the worst, in turbo_core.wan, batch 1.

    linears: "float" (fp8 too, which is decoded), "int8_block" or "int8_row". topk None: dense attention.
    """
    size = model.sizes
    e = tokens * size.dim
    part = min(tokens, max(1, WAN_SLICE // size.dim // 128) * 128)  # tokens of a slice
    s = part * size.dim
    everywhere = {
        "latents and their conditioning, float32": 16 * tokens * (size.in_dim + size.out_dim),
        "embedded text": 2 * text * size.dim,
        "angles of RoPE": 2 * tokens * size.head_dim,
        "hidden state as the block got it": 2 * e,
    }
    attention = everywhere | {"normed input": 2 * e, "q, k, v": 6 * e}
    moments = {
        "RoPE of k": attention
        | {
            "rotated k": 2 * e,
            "a slice of k in float32, and its products, differences and sums": 12 * s,
            "sines and cosines": 4 * part * size.head_dim,
        }
    }
    if topk is not None:
        moments |= _sparse_moments(attention, model, tokens, topk, precision)
    rest = everywhere | {"hidden state": 2 * e, "normed input": 2 * e}
    if part < tokens:
        rest |= {"output of the feed-forward part": 2 * e}
    f = part * size.ffn_dim
    if linears == "float":
        moments["GELU"] = rest | {"feed-forward before and after GELU": 4 * f}
        return moments
    rows = min(part, max(1, INT8_SLICE // max(size.dim, size.ffn_dim) // 128) * 128)  # of a slice inside that slice
    matrix = size.dim * size.ffn_dim
    rounding = {"feed-forward after GELU": 2 * f, "output of the second matrix": 2 * s}
    if linears == "int8_block":
        rows = -(-rows // 128) * 128
        rounding["the matrix as floats"] = 2 * matrix
        moments["the first feed-forward matrix as floats"] = rest | {
            "feed-forward before GELU": 2 * f,
            "the matrix in float32, and times its scales": 8 * matrix,
        }
    rounding["the same in float32, as quotients and as int8"] = 9 * rows * size.ffn_dim
    moments["rounding for the second feed-forward matrix"] = rest | rounding
    return moments


def _sparse_moments(attention, model, tokens, topk, precision):
    e, head_dim = tokens * model.sizes.dim, model.sizes.head_dim
    heads = min(model.sizes.dim // head_dim, max(1, SLICE // (tokens * head_dim)))  # worked on together
    g = tokens * heads * head_dim
    of_one_row = heads * kept_blocks(topk, -(-tokens // 64)) * 64 * head_dim
    room = GATHERED // (4 if precision == "int8" else 2)
    gathered = of_one_row * min(-(-tokens // 128), max(1, room // of_one_row))  # elements of k, and as many of v
    scores = gathered * 128 // head_dim
    attention = attention | {"output": 2 * e}
    if precision == "int8":
        wide = attention | {"q, k, v of some heads in float32": 12 * g, "their blocks": 12 * g}
        moments = {
            "rounding k": wide | {"rounded q": 4 * g, "quotients of k": 4 * g},
            "sparse attention": wide
            | {"their output": 4 * g, "gathered keys and values": 8 * gathered, "scores, probabilities": 16 * scores},
        }
    else:
        blocks = {"blocks of q, k, v of some heads": 6 * g, "their output": 2 * g}
        moments = {"sparse attention": attention | blocks | {"gathered keys and values": 4 * gathered}}
    if model.has_sla:
        moments["linear branch"] = attention | {
            "sparse attention of some heads": 2 * g,
            "softmax of their q and k over channels": 8 * g,
            "product and quotient": 8 * g,
        }
    return moments


def step_peak(model: Model, tokens: int, linears: str, topk=None, precision="bf16", text=TEXT_TOKENS):
    """(bytes, moment, {tensor: bytes}) at the worst moment of one evaluation, without the weights."""
    moments = living_tensors(model, tokens, linears, topk, precision, text)
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    return sum(moments[moment].values()), moment, moments[moment]


def kept_text_bytes(model: Model, text=TEXT_TOKENS) -> int:
    """Bytes of the text's keys and values in all blocks, which stay from step to step, see wan.Text; at most: padding
    is left out of them where it pays."""
    return 2 * 2 * text * model.sizes.dim * model.blocks


def vae_peak(width: int, height: int, work: str = "decode", tiled: bool = False) -> int:
    """Bytes that decoding or encoding takes at least in bf16, without the 0.25 GB of weights: of one latent frame at a
    time. The video itself is in main memory."""
    pixels = min(width, _TILE) * min(height, _TILE) if tiled else width * height
    return piece_bytes(work, pixels, 1, _VAE_WIDTH, torch.bfloat16)


def stages(
    model: Model,
    width: int,
    height: int,
    frames: int,
    memory: float,
    format: str = "int8_block",
    topk: float | None = 0.1,
    precision: str = "bf16",
) -> list[Stage]:
    """The stages of making a video on a card of `memory` GiB. Raises TurboError for impossible sizes."""
    if not memory * GIB > RESERVED:
        raise TurboError(f"{memory} GiB is less than what is set aside for a card's driver. Expected 2 or more.")
    if topk is not None and not 0 <= topk <= 1:
        raise TurboError(f"topk is the fraction of key blocks to keep, 0 to 1, got {topk}: use 0.1 to 0.15.")
    if precision not in PRECISIONS:
        raise TurboError(f"precision must be one of {PRECISIONS}, got {quoted(precision)}.")
    t, h, w = latent_shape(width, height, frames)
    tokens = t * (h // 2) * (w // 2)
    room = int(memory * GIB) - RESERVED
    found = [_weights_stage("text encoder", room, text_encoder_bytes(), 0, 400_000_000, 1)]
    if model.sizes.in_dim > model.sizes.out_dim:
        found.append(_vae_stage("VAE encode", room, width, height, "encode"))
    # fp8 beside proj_l is decoded when it is loaded
    weights, block = weight_bytes(model, "bf16" if format == "fp8" and model.has_sla else format)
    activations, _, _ = step_peak(model, tokens, format if format in INTEGERS else "float", topk, precision)
    activations += kept_text_bytes(model)
    found.append(_weights_stage("sampling", room, weights, activations, block, model.experts))
    found.append(_vae_stage("VAE decode", room, width, height, "decode"))
    return found


def _weights_stage(name, room, weights, activations, block, experts):
    everything = weights * experts + activations
    kept = room - activations - 2 * block  # the block at work and the one that is fetched meanwhile
    if everything <= room:
        fits, stays = "resident", weights * experts
        verdict = "fits" if experts == 1 else "fits with both experts on the card"
    elif weights + activations <= room:
        fits, stays = "resident", weights
        verdict = "fits with one expert on the card; the other waits in main memory"
    elif kept >= 0:
        share = f"{kept / GIB:.1f} of {weights / GIB:.1f} GiB of weights"
        fits, stays = "offload", kept
        verdict = f"fits with offload: {share} stay on the card, the rest is fetched in turn"
    else:
        fits, stays = "no", 0
        verdict = f"does not fit, {-kept / GIB:.1f} GiB too much: choose a smaller size or fewer frames"
    return Stage(name, weights * experts, activations, fits, verdict, stays)


def _vae_stage(name, room, width, height, work):
    weights = 254_000_000  # 127 million, bf16
    whole = vae_peak(width, height, work)
    if weights + whole <= room:
        return Stage(name, weights, whole, "resident", "fits in one piece", weights)
    tiled = vae_peak(width, height, work, tiled=True)
    if weights + tiled <= room:
        verdict = f"tiled VAE needed: in one piece it is {whole / GIB:.1f} GiB"
        return Stage(name, weights, tiled, "tiled", verdict, weights)
    return Stage(name, weights, tiled, "no", "does not fit even in tiles: a larger card is needed", 0)
