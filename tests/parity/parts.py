"""The parts one by one: int8 arithmetic, RoPE, norms, block map, attention."""

import torch
import torch.nn.functional as F

from tests.parity import cuda_ops
from turbo_core import sla, wan
from turbo_core.int8 import int8_linear, quantize_block
from turbo_core.rope import rope_angles


def attention_figures(theirs, error):
    figures = {}
    generator = torch.Generator().manual_seed(2)
    for head_dim in (64, 128):
        q, k, v = torch.randn(3, 2, 450, 2, head_dim, generator=generator)  # 8 key blocks, the last ragged
        k = k + 2  # a common offset, as keys have
        for topk in (0.3, 1.0) if head_dim == 128 else (0.3,):
            for dtype in (torch.float32, torch.bfloat16):
                layer = theirs.sla.SparseLinearAttention(head_dim, topk, BLKQ=128, BLKK=64)
                layer.dtype = dtype
                layer.proj_l.weight.data.normal_(std=head_dim**-0.5, generator=generator)
                layer.proj_l.bias.data.normal_(std=0.1, generator=generator)
                x = [t.to(dtype) for t in (q, k, v)]
                with torch.no_grad():
                    expected = layer(*x)
                    ours = sla.sparse_linear_attention(*x, layer.proj_l.weight, layer.proj_l.bias, topk)
                figures[f"attention {str(dtype)[6:]} D {head_dim} topk {topk:g}"] = error(ours, expected)
        for dtype in (torch.float32, torch.bfloat16):
            a, b = (t.to(dtype).transpose(1, 2).contiguous() for t in (q, k))
            _, lut, kept = theirs.sla_utils.get_block_map(a, b, 0.3, BLKQ=128, BLKK=64)
            ours = sla.block_map(a.transpose(1, 2), b.transpose(1, 2), 0.3)
            assert ours.shape[-1] == kept
            shared = (lut[..., :, None] == ours[..., None, :]).any(-1).float().mean().item()
            figures[f"block map {str(dtype)[6:]} D {head_dim}: share of blocks not in common"] = 1 - shared
    return figures


def rope_figures(theirs, error):
    figures = {}
    for head_dim in (64, 128):
        grid = (21, 45, 80)  # 1280x720, 81 frames
        table = theirs.wan2pt1.VideoRopePosition3DEmb(head_dim, len_h=128, len_w=128, len_t=32)
        expected = table.generate_embeddings(torch.Size([1, *grid, head_dim]))
        ours = rope_angles(grid, head_dim)
        figures[f"rope angles D {head_dim}: largest difference"] = (ours - expected).abs().max().item()
        x = torch.randn(1, 500, 2, head_dim, generator=torch.Generator().manual_seed(3))
        figures[f"rope D {head_dim}"] = error(
            wan.apply_rope(x, ours[-500:]), theirs.wan2pt1.rope_apply(x, expected[-500:])
        )
    return figures


def norm_figures(theirs, error):
    """Their fused norms in bf16, as published, against ours: 1024 channels and 5 rows."""
    generator = torch.Generator().manual_seed(4)
    x = (torch.randn(1, 5, 1024, generator=generator) * 3 + 1).to(torch.bfloat16)
    weight, bias = torch.randn(2, 1024, generator=generator)
    rms, layer = theirs.ops.FastRMSNorm(1024, 1e-6), theirs.ops.FastLayerNorm(1024, 1e-6, elementwise_affine=True)
    rms.weight, layer.weight, layer.bias = weight, weight, bias
    ours = wan.RMSNorm(1024, 1e-6)
    ours.weight.data = weight
    with torch.no_grad():
        return {
            "RMSNorm bf16": error(ours(x), rms(x)),
            "LayerNorm bf16": error(F.layer_norm(x.float(), (1024,), weight, bias, 1e-6).to(x.dtype), layer(x)),
        }


def int8_figures(theirs, error):
    figures = {}
    generator = torch.Generator().manual_seed(5)
    for dtype in (torch.float32, torch.bfloat16):
        x = (torch.randn(300, 640, generator=generator) * 2).to(dtype)  # ragged rows
        q, scale = quantize_block(x)
        their_q, their_scale = cuda_ops.quant_cuda(x)
        name = str(dtype)[6:]
        assert torch.equal(scale, their_scale)
        assert (q.int() - their_q.int()).abs().max() <= 1
        figures[f"quantize {name}: share of values off by one"] = (q != their_q).float().mean().item()
        w_q, w_scale = cuda_ops.quant_cuda(torch.randn(384, 640, generator=generator).to(dtype))
        with torch.no_grad():
            expected = theirs.ops.int8_linear(x, w_q, w_scale)
        figures[f"int8 linear {name}"] = error(int8_linear(x, w_q, w_scale), expected)
    return figures


def figures(theirs, error):
    """All of them by name."""
    return {
        name: value
        for part in (int8_figures, rope_figures, norm_figures, attention_figures)
        for name, value in part(theirs, error).items()
    }
