"""Sparse-linear attention (SLA) and its low-bit form (SageSLA).

q, k, v are [B, L, H, D] after q/k RMSNorm and RoPE. Three parts: a block map that keeps the best key blocks per query
block, softmax attention over the kept blocks, and a linear branch over all keys with the trained projection proj_l.
Source: SLA, arXiv 2509.24006; SageSLA, TurboDiffusion, arXiv 2512.16093. Blocks are 128 queries x 64 keys everywhere.
Triton kernels compute where they were proved (fast), plain torch everywhere else (reference).

Memory by the kernels beside q, k, v and the result, at (B, L, H, D) = (1, 75600, 40, 128) in bf16, top-k 0.1: 18 MB
for precision bf16 where norm and RoPE are done, else 0.8 GB: k after them, or k in int8 and v in fp8. Nothing grows
with L x L but the block map, 11 MB here; by cumulative score up to 0.11 GB, 0.2 GB while it is made.
"""

from ..dispatch import FLOATS, explained
from ..errors import TurboError, quoted
from .blocks import covering_map as _covering_map
from .blocks import kept_blocks, pool, top_map
from .paths import operations
from .reference import GATHERED, SLICE, linear_branch, sparse_attention

__all__ = [
    "GATHERED", "HEAD_DIMS", "PRECISIONS", "SLICE", "block_map", "covering_map", "kept_blocks", "linear_branch", "pool",
    "sla_from_qkv", "sparse_attention", "sparse_linear_attention",
]  # fmt: skip
HEAD_DIMS = (64, 128)
PRECISIONS = ("bf16", "int8")


def _check(q, k, v, topk, precision="bf16", coverage=None):
    if q.ndim != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise TurboError(
            "q, k, v must be [B, L, H, D] with the same B, H, D, and k and v the same L; got "
            f"{list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if q.numel() == 0 or k.numel() == 0:
        raise TurboError(f"sparse attention needs at least one token, got {list(q.shape)} and {list(k.shape)}")
    if q.shape[-1] not in HEAD_DIMS:
        raise TurboError(f"sparse attention supports head_dim 64 and 128, got {q.shape[-1]}: use dense attention")
    if q.dtype not in FLOATS or k.dtype != q.dtype or v.dtype != q.dtype:
        raise TurboError(
            "q, k, v must all be float32, float16 or bfloat16, got "
            f"{', '.join(str(x.dtype).removeprefix('torch.') for x in (q, k, v))}: convert them"
        )
    if not 0.0 <= topk <= 1.0:
        raise TurboError(f"topk is the fraction of key blocks to keep, 0 to 1, got {topk}: use 0.1 to 0.15")
    if coverage is not None and not 0.0 <= coverage <= 1.0:
        raise TurboError(f"coverage is the share of the pooled score to keep, 0 to 1, got {coverage}: use 0.5 or more")
    if precision not in PRECISIONS:
        raise TurboError(f"precision must be one of {PRECISIONS}, got {quoted(precision)}: use bf16")
    if precision == "int8" and q.device.type == "mps":
        raise TurboError("precision int8 needs float8, which Apple GPUs have not: use bf16")


def _check_projection(weight, bias, d):
    if weight is not None and weight.shape != (d, d):
        raise TurboError(f"proj_l of heads of {d} must be [{d}, {d}], got {list(weight.shape)}")
    if weight is not None and (bias is None or bias.shape != (d,)):
        raise TurboError(f"proj_l of heads of {d} has a bias [{d}], got {None if bias is None else list(bias.shape)}")


def block_map(q, k, topk: float, block_q: int = 128, block_k: int = 64):
    """Key blocks that each query block attends to: those with the highest score of pooled q and pooled k.

    q, k: [B, L, H, D]; topk: fraction of key blocks, floor, at least one block.
    Returns int32 [B, H, ceil(Lq / block_q), kept], ascending; ties go to the lower index.
    """
    _check(q, k, k, topk)
    return top_map(q, k, topk, block_q, block_k)


def covering_map(q, k, coverage: float, block_q: int = 128, block_k: int = 64):
    """Key blocks that each query block attends to: the best, until their share of the pooled score is `coverage`.

    q, k: [B, L, H, D]; coverage 0 to 1. With as many queries as keys a row keeps its own tokens' blocks in any case.
    Returns int32 (index [B, H, ceil(Lq / block_q), most], counts [B, H, ceil(Lq / block_q)]): the first counts entries
    of a row are its blocks, ascending; the last of them is repeated behind.
    """
    _check(q, k, k, 1.0, coverage=coverage)
    return _covering_map(q, k, coverage, block_q, block_k)


def sparse_linear_attention(
    q,
    k,
    v,
    proj_weight,
    proj_bias,
    topk: float,
    block_q: int = 128,
    block_k: int = 64,
    precision: str = "bf16",
    coverage: float | None = None,
):
    """SLA: sparse softmax attention over chosen key blocks plus the projected linear branch over all keys.

    q, k, v: [B, L, H, D], any L, D 64 or 128. proj_weight [D, D] and proj_bias [D] are proj_l; None means no linear
    branch (training-free sparsity). topk: fraction of key blocks kept, 0.1 to 0.15 for the published models.
    coverage: in place of topk, the share of the pooled score that the kept blocks of each row add up to.
    precision: "bf16" (SLA, the input's dtype) or "int8" (SageSLA). Returns [B, L, H, D]. Raises TurboError.
    """
    _check(q, k, v, topk, precision, coverage)
    _check_projection(proj_weight, proj_bias, q.shape[-1])
    if coverage == 1.0:
        topk, coverage = 1.0, None
    operands = q, k, v, proj_weight, proj_bias
    with explained():
        run = operations(q, *operands[1:])
        return run.sparse_linear_attention(*operands, topk, coverage, block_q, block_k, precision)


def sla_from_qkv(
    qkv,
    sums,
    norm_q_weight,
    norm_k_weight,
    eps: float,
    cos,
    sin,
    proj_weight,
    proj_bias,
    topk: float,
    precision: str = "bf16",
    quantize: bool = False,
    coverage: float | None = None,
):
    """sparse_linear_attention of q, k, v as their projections left them: RMSNorm and RoPE are done on the way in.

    qkv: [3, B, L, H, D]. sums: float32 [2, P, B * L], P partial sums of squares per token of q and k, or None.
    norm_q_weight, norm_k_weight: [H * D], over all heads; eps: RMSNorm's. cos, sin: float32 [L, D / 2], by which
    neighbouring channel pairs turn. The rest as of sparse_linear_attention. Returns [B, L, H, D], or with quantize
    what the projection o takes: (int8 [B * L, H * D], float32 scale [ceil(B * L / 128), ceil(H * D / 128)]).
    Raises TurboError.
    """
    if qkv.ndim != 5 or qkv.shape[0] != 3:
        raise TurboError(f"qkv must be [3, B, L, H, D], got {list(qkv.shape)}")
    _check(*qkv, topk, precision, coverage)
    _, b, length, h, d = qkv.shape
    _check_projection(proj_weight, proj_bias, d)
    for name, t, shape in (
        ("norm_q_weight", norm_q_weight, (h * d,)),
        ("norm_k_weight", norm_k_weight, (h * d,)),
        ("cos", cos, (length, d // 2)),
        ("sin", sin, (length, d // 2)),
        ("sums", None if sums is None else sums[:, 0], (2, b * length)),
    ):
        if t is not None and t.shape != shape:
            raise TurboError(f"{name} of qkv {list(qkv.shape)} must be {list(shape)}, got {list(t.shape)}")
    if (norm_q_weight is None) != (norm_k_weight is None) or (cos is None) != (sin is None):
        raise TurboError("norm_q_weight and norm_k_weight, cos and sin are given both or neither")
    if norm_q_weight is not None and not eps > 0:
        raise TurboError(f"eps of RMSNorm must be above 0, got {eps}: use 1e-6")
    if coverage == 1.0:
        topk, coverage = 1.0, None
    operands = qkv, sums, norm_q_weight, norm_k_weight, eps, cos, sin, proj_weight, proj_bias
    with explained():
        run = operations(*operands[:4], *operands[5:])
        attend = run.sla_from_qkv_quantized if quantize else run.sla_from_qkv
        return attend(*operands, topk, coverage, precision)
