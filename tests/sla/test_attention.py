import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from turbo_core import sla
from turbo_core.diagnostics.compare import key_block_mass
from turbo_core.errors import TurboError
from turbo_core.int8 import quantize_block
from turbo_core.sla import blocks, reference

BLOCKS = [(64, 64), (128, 64), (128, 128)]
# one token; around one block; whole blocks; ragged in both
LENGTHS = [1, 63, 64, 65, 128, 300, 720]


def qkv(length, keys=None, b=1, h=1, d=64, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    keys = keys or length
    return [torch.randn(b, n, h, d, generator=generator).to(dtype) for n in (length, keys, keys)]


def projection(d, seed=9):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(d, d, generator=generator) / d**0.5, torch.randn(d, generator=generator)


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def slow_block_map(q, k, topk, block_q, block_k):
    """The published block map, block by block in float64."""
    q, k = q.double(), k.double()
    k = k - k.mean(1, keepdim=True)
    b, _, h, _ = q.shape
    rows = []
    for i in range(b):
        for j in range(h):
            pooled_k = torch.stack([block.mean(0) for block in k[i, :, j].split(block_k)])
            kept = max(1, int(topk * len(pooled_k)))
            for block in q[i, :, j].split(block_q):
                scores = (pooled_k @ block.mean(0)).tolist()
                best = sorted(range(len(scores)), key=lambda n: (-scores[n], n))[:kept]
                rows.append(sorted(best))
    return torch.tensor(rows).view(b, h, -1, len(rows[0]))


def masked_attention(q, k, v, index, block_q, block_k):
    """Dense float64 attention under the [B, H, Lq, Lk] mask that the block map stands for."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    b, h, length, d = q.shape
    kept = torch.zeros(b, h, index.shape[2], -(-k.shape[2] // block_k), dtype=torch.bool)
    kept.scatter_(3, index.long(), True)
    mask = kept.repeat_interleave(block_q, 2)[:, :, :length].repeat_interleave(block_k, 3)[..., : k.shape[2]]
    score = (q @ k.transpose(-1, -2) * d**-0.5).masked_fill(~mask, -torch.inf)
    return (score.softmax(-1) @ v).transpose(1, 2)


def linear_attention(q, k, v, weight, bias):
    """The published linear branch in float64."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    cq, ck = q.softmax(-1), k.softmax(-1)
    out = cq @ (ck.transpose(-1, -2) @ v) / (1e-5 + (cq * ck.sum(2, keepdim=True)).sum(-1, keepdim=True))
    return (out @ weight.double().T + bias.double()).transpose(1, 2)


# ---- block map


@pytest.mark.parametrize("block_q, block_k", BLOCKS)
@pytest.mark.parametrize("length", LENGTHS)
def test_block_map_against_loops(length, block_q, block_k):
    for topk in (0.15, 0.5, 1.0):
        q, k, _ = qkv(length, b=2, h=3, seed=length)
        k += 5  # a common offset changes no choice
        index = sla.block_map(q, k, topk, block_q, block_k)
        assert index.dtype == torch.int32
        assert torch.equal(index.long(), slow_block_map(q, k, topk, block_q, block_k))


@pytest.mark.parametrize("length, keys", [(300, 77), (65, 512), (1, 200)])
def test_block_map_for_other_keys_than_queries(length, keys):
    q, k, _ = qkv(length, keys, b=2, h=2, d=128)
    assert torch.equal(sla.block_map(q, k, 0.4).long(), slow_block_map(q, k, 0.4, 128, 64))


@pytest.mark.parametrize("topk", [0.0, 0.05, 0.1, 0.15, 0.29, 0.3, 0.999, 1.0])
def test_block_map_keeps_the_floor_of_topk_but_never_nothing(topk):
    for count in (1, 2, 10, 20, 100):
        q, k, _ = qkv(1, 64 * count)
        index = sla.block_map(q, k, topk)
        assert index.shape == (1, 1, 1, max(1, int(topk * count)))
        assert (index.diff(dim=-1) > 0).all() and index.min() >= 0 and index.max() < count


def test_ties_go_to_the_lower_block():
    # whole numbers and 8 blocks, so that every score is exact in any order of summation
    q, k, _ = qkv(256, 512, h=2)
    q = q.sign()
    assert sla.block_map(q, torch.ones_like(k), 0.375).tolist() == [[[[0, 1, 2]] * 2] * 2]
    k = torch.ones_like(k)
    k[:, 64 * 6 : 64 * 7] += q[:, :128].mean(1, keepdim=True).sign()  # one winner, seven equals behind it
    assert sla.block_map(q[:, :128], k, 0.375).tolist() == [[[[0, 1, 6]]] * 2]


def test_a_large_common_key_offset_changes_no_choice():
    q, k, _ = qkv(300, b=2, h=2)
    offset = 1000 * torch.randn(1, 1, 2, 64, generator=torch.Generator().manual_seed(3))
    assert torch.equal(sla.block_map(q, k + offset, 0.5).long(), slow_block_map(q, k, 0.5, 128, 64))


# ---- block map by cumulative score


def slow_covering_map(q, k, coverage, block_q=128, block_k=64):
    """Rows of block numbers, block by block in float64; as many queries as keys are the same tokens."""
    q, k = q.double(), k.double()
    rows = []
    for i in range(q.shape[0]):
        for j in range(q.shape[2]):
            pooled_k = torch.stack([block.mean(0) for block in k[i, :, j].split(block_k)])
            for r, block in enumerate(q[i, :, j].split(block_q)):
                share = (pooled_k @ block.mean(0) * q.shape[-1] ** -0.5).softmax(0).tolist()
                chosen, total = set(), 0.0
                for n in sorted(range(len(share)), key=lambda n: (-share[n], n)):
                    if total >= coverage and chosen:
                        break
                    chosen.add(n)
                    total += share[n]
                if q.shape[1] == k.shape[1]:
                    first = r * block_q // block_k
                    chosen |= set(range(first, min(first + block_q // block_k, len(share))))
                rows.append(sorted(chosen))
    return rows


def rows_of(index, counts):
    return [row[:n].tolist() for row, n in zip(index.flatten(0, 2), counts.flatten())]


# ragged in both; one token; other keys than queries (no block is a row's own)
@pytest.mark.parametrize("length, keys", [(720, 720), (1, 1), (63, 63), (300, 500)])
@pytest.mark.parametrize("coverage", [0.0, 0.3, 0.7, 0.95])
def test_covering_map_against_loops(length, keys, coverage):
    q, k, _ = qkv(length, keys, b=2, h=3, seed=length)
    q *= torch.tensor([1.0, 20.0, 90.0])[:, None]  # pooled scores that are even, uneven, one block's alone
    index, counts = sla.covering_map(q, k + 5, coverage)
    assert index.dtype == counts.dtype == torch.int32
    assert rows_of(index, counts) == slow_covering_map(q, k, coverage)
    assert index.shape[-1] == counts.max()
    for row, n in zip(index.flatten(0, 2).tolist(), counts.flatten().tolist()):
        assert set(row[n:]) <= {row[n - 1]}


@pytest.mark.parametrize("blocks", BLOCKS)
def test_covering_map_keeps_the_blocks_of_the_rows_own_tokens(blocks):
    q, k, _ = qkv(300)
    q[:, 128:], k[:, 64:128] = -5, 5  # all but the first rows want block 1 least
    q[:, :128] = 5
    rows = rows_of(*sla.covering_map(q, k, 0.1, *blocks))
    assert rows == slow_covering_map(q, k, 0.1, *blocks)
    at = 64 // blocks[0]
    assert 64 // blocks[1] in rows[at]


def test_covering_map_in_pieces_and_in_any_order_of_heads(monkeypatch):
    q, k, _ = qkv(720, b=2, h=5)
    whole = sla.covering_map(q * 9, k, 0.6)
    monkeypatch.setattr(blocks, "SLICE", 1)
    assert all(map(torch.equal, sla.covering_map(q * 9, k, 0.6), whole))
    order = torch.tensor([3, 1, 4, 0, 2])
    index, counts = sla.covering_map(q[:, :, order] * 9, k[:, :, order], 0.6)
    assert torch.equal(index, whole[0][:, order]) and torch.equal(counts, whole[1][:, order])


def test_uneven_rows_get_what_they_need():
    """One head looks everywhere, one at few places: at equal cost the share of attention kept is more even."""
    q, k, _ = qkv(1280, h=2)
    direction = torch.randn(64, generator=torch.Generator().manual_seed(2)).sign()
    k[:, 192:256, 1] += 2 * direction
    q[:, :, 1] += 2 * direction
    index, counts = sla.covering_map(q, k, 0.5)
    spread, sharp = counts.float().mean(-1)[0].tolist()
    assert sharp < 5 < 8 < spread
    rows = torch.arange(0, 1280, 7)
    recalls = []
    for chosen in (index, sla.block_map(q, k, (spread + sharp) / 2 / 20)):
        mass = key_block_mass(q, k, rows)
        kept = torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, chosen[:, :, rows // 128].long(), True)
        recalls.append((mass * kept).sum(-1).mean(-1)[0])
    assert recalls[0].min() > recalls[1].min() + 0.1


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_attention_over_rows_of_different_lengths(precision):
    q, k, v = qkv(720, b=2, h=2)
    q[:, 128:256] *= 60
    index, counts = sla.covering_map(q, k, 0.6)
    assert counts.min() + 2 < counts.max()
    v[:, 64 * int(index[0, 0, 0, -1])] += 100  # a block that is read twice would show
    out = reference.sparse_attention(q, k, v, index, precision=precision, counts=counts)
    exact = masked_attention if precision == "bf16" else emulate_low_bit  # what is repeated is a block of the row
    assert relative(out, exact(q, k, v, index, 128, 64)) < (2e-5 if precision == "bf16" else 0.02)
    whole = sla.sparse_linear_attention(q, k, v, None, None, 0.1, precision=precision, coverage=0.6)
    torch.testing.assert_close(whole, out, rtol=1e-5, atol=1e-5)


def test_coverage_1_is_dense_attention():
    q, k, v = qkv(300, h=2)
    for precision in ("bf16", "int8"):
        a, b = (
            sla.sparse_linear_attention(q, k, v, *projection(64), topk, precision=precision, coverage=coverage)
            for topk, coverage in ((0.1, 1.0), (1.0, None))
        )
        assert torch.equal(a, b)


@pytest.mark.parametrize("which", ["q", "k"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_number_keeps_no_block_but_its_own(which, bad):
    q, k, _ = qkv(640, h=2)
    clean = rows_of(*sla.covering_map(q, k, 0.6))
    {"q": q, "k": k}[which][0, 200, 0, 5] = bad  # query block 1, key block 3, head 0
    rows = rows_of(*sla.covering_map(q, k, 0.6))
    assert rows[5:] == clean[5:]  # the other head
    if which == "q":
        assert rows[:1] + rows[2:] == clean[:1] + clean[2:]
        assert {2, 3} <= set(rows[1])
    else:
        assert [3 in row for row in rows[:5]] == [False, True, False, False, False]
        assert all(len(row) >= 4 for row in rows[:5])


@pytest.mark.parametrize("coverage", [-0.1, 1.1, torch.nan])
def test_bad_coverage(coverage):
    q, k, v = qkv(64)
    with pytest.raises(TurboError, match=f"coverage.*{coverage}"):
        sla.sparse_linear_attention(q, k, v, None, None, 0.1, coverage=coverage)
    with pytest.raises(TurboError, match=f"coverage.*{coverage}"):
        sla.covering_map(q, k, coverage)


# ---- sparse branch


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("length", LENGTHS)
def test_topk_1_without_projection_is_dense_attention(length, d):
    q, k, v = qkv(length, b=2, h=3, d=d)
    dense = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    torch.testing.assert_close(sla.sparse_linear_attention(q, k, v, None, None, 1.0), dense, rtol=1e-5, atol=1e-5)
    for sizes in BLOCKS:  # and so is the sparse path itself, which the line above may not have taken
        out = reference.sparse_attention(q, k, v, sla.block_map(q, k, 1.0, *sizes), *sizes)
        torch.testing.assert_close(out, dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block_q, block_k", BLOCKS)
@pytest.mark.parametrize("length, keys", [(1, 1), (65, 65), (300, 300), (720, 720), (300, 77), (65, 500)])
def test_sparse_attention_is_dense_attention_under_the_mask(length, keys, block_q, block_k):
    q, k, v = qkv(length, keys, b=2, h=2, d=64)
    index = sla.block_map(q, k, 0.35, block_q, block_k)
    expected = masked_attention(q, k, v, index, block_q, block_k)
    out = reference.sparse_attention(q, k, v, index, block_q, block_k)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=2e-6)
    whole = sla.sparse_linear_attention(q, k, v, None, None, 0.35, block_q, block_k)
    torch.testing.assert_close(whole.double(), expected, rtol=1e-5, atol=2e-6)


def test_sparse_attention_takes_any_map():
    q, k, v = qkv(200, 300, b=2, h=2, d=128)
    index = torch.randint(5, (2, 2, 2, 1), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    assert index.unique().numel() > 2
    torch.testing.assert_close(
        reference.sparse_attention(q, k, v, index).double(),
        masked_attention(q, k, v, index, 128, 64),
        rtol=1e-5,
        atol=2e-6,
    )


def test_a_large_common_key_offset_changes_little():
    # softmax does not see it; what remains is the rounding of k + 100 to float32
    q, k, v = qkv(300, h=2)
    for precision, tolerance in (("bf16", 2e-4), ("int8", 0.01)):
        plain, moved = (
            sla.sparse_linear_attention(q, x, v, None, None, 0.5, precision=precision) for x in (k, k + 100)
        )
        assert relative(moved, plain) < tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_half_precision_keeps_its_dtype_and_the_result(dtype, precision):
    q, k, v = qkv(300, b=2, h=2, d=128, dtype=dtype)
    weight, bias = projection(128)
    out = sla.sparse_linear_attention(q, k, v, weight, bias, 0.5, precision=precision)
    index = sla.block_map(q, k, 0.5)
    expected = masked_attention(q, k, v, index, 128, 64) + linear_attention(q, k, v, weight, bias)
    assert out.dtype == dtype and out.shape == q.shape
    assert relative(out, expected) < (0.006 if precision == "bf16" else 0.03)


def test_strided_inputs():
    qkv_packed = torch.randn(2, 200, 3, 2, 64, generator=torch.Generator().manual_seed(0))
    weight, bias = projection(64)
    views = qkv_packed.unbind(2)
    for precision in ("bf16", "int8"):
        out, same = (
            sla.sparse_linear_attention(*x, weight, bias, 0.5, precision=precision)
            for x in (views, [v.contiguous() for v in views])
        )
        torch.testing.assert_close(out, same, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_working_in_pieces_changes_nothing(precision, monkeypatch):
    q, k, v = qkv(720, b=2, h=2)
    index = sla.block_map(q, k, 0.4)
    whole = reference.sparse_attention(q, k, v, index, precision=precision)
    monkeypatch.setattr(reference, "GATHERED", 1)
    torch.testing.assert_close(
        reference.sparse_attention(q, k, v, index, precision=precision), whole, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("topk", [0.3, 1.0])
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_some_heads_at_a_time_change_nothing(precision, topk, monkeypatch):
    q, k, v = qkv(300, b=2, h=5, d=128)
    q[..., 1, :] *= 9  # heads of different sizes, which share no scale
    v[..., 3, :] *= 9
    args = q, k, v, *projection(128), topk
    whole, seen = sla.sparse_linear_attention(*args, precision=precision), []
    branch = reference.linear_branch
    monkeypatch.setattr(reference, "linear_branch", lambda q, *args: seen.append(q.shape[2]) or branch(q, *args))
    for limit, heads in ((1, [1] * 5), (2 * 300 * 128 * 2, [2, 2, 1])):
        seen.clear()
        monkeypatch.setattr(reference, "SLICE", limit)
        torch.testing.assert_close(sla.sparse_linear_attention(*args, precision=precision), whole, rtol=0, atol=1e-6)
        assert seen == heads


@pytest.mark.parametrize("proj", [projection(64), (None, None)], ids=["sla", "sparse"])
def test_compiled_it_is_one_node_with_the_same_result(proj):
    (q, k, v), graphs = qkv(300, h=2), []

    def attend(q, k, v):
        return sla.sparse_linear_attention(q, k, v, *proj, 0.3)

    compiled = torch.compile(attend, fullgraph=True, backend=lambda g, _: graphs.append(g.graph) or g)
    assert torch.equal(compiled(q, k, v), attend(q, k, v))
    assert len([node for node in graphs[0].nodes if node.op == "call_function"]) < 10
    torch.library.opcheck(
        torch.ops.turbowan.sparse_linear_attention.default, (q, k, v, *proj, 0.3, None, 128, 64, "bf16")
    )


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_number_reaches_only_the_query_blocks_that_chose_its_block(which, bad, precision):
    q, k, v = qkv(640, h=2)
    {"q": q, "k": k, "v": v}[which][0, 200, 0, 5] = bad  # query block 1, key block 3, head 0
    index = sla.block_map(q, k, 0.4)
    if which == "k":
        assert not (index[0, 0] == 3).any()  # a broken block is no one's best
        index[0, 0, 2] = torch.tensor([0, 1, 2, 3])  # unless forced on one
    finite = reference.sparse_attention(q, k, v, index, precision=precision).isfinite().all(-1)
    finite = F.pad(finite, (0, 0, 0, -640 % 128)).unflatten(1, (-1, 128)).all(2)  # [1, query blocks, heads]
    touched = torch.zeros_like(finite)
    if which == "q":
        touched[0, 1, 0] = True
    else:
        touched[0, :, 0] = (index[0, 0] == 3).any(-1)
    assert touched.any() and not touched.all()
    assert finite[~touched].all()
    if bad is torch.nan or which == "v":
        assert not finite[touched].any()


# ---- low bit


def emulate_low_bit(q, k, v, index, block_q, block_k):
    """SageSLA in float64: int8 q and mean-free k with a scale per block, v per channel and probabilities in e4m3."""

    def int8(x, block):
        out = []
        for part in x.split(block, 1):
            scale = part.abs().amax((1, 3), keepdim=True).clamp_min(1e-8) / 127
            out.append((part / scale).round() * scale)
        return torch.cat(out, 1)

    q, k, v = q.double(), k.double() - k.double().mean(1, keepdim=True), v.double()
    scale = v.abs().amax(1, keepdim=True) / 448
    v = (v / scale).float().to(torch.float8_e4m3fn).double() * scale
    return masked_attention(int8(q, block_q), int8(k, block_k), v, index, block_q, block_k)


@pytest.mark.parametrize("block_q, block_k", BLOCKS)
def test_low_bit_is_int8_scores_and_fp8_values(block_q, block_k):
    q, k, v = qkv(300, b=2, h=2, d=128)
    q[:, 128:] *= 4  # blocks and channels of different size: scales that were shared would show
    k[:, 64:128] *= 3
    v[..., ::2] *= 30
    index = sla.block_map(q, k, 0.7, block_q, block_k)
    out = reference.sparse_attention(q, k, v, index, block_q, block_k, "int8")
    exact = emulate_low_bit(q, k, v, index, block_q, block_k)
    # the probabilities' own rounding to e4m3, 2^-4 at worst, averages out over the keys
    assert 0.001 < relative(out, exact) < 0.02
    assert relative(out[..., 1::2], exact[..., 1::2]) < 0.02


@pytest.mark.parametrize("d", [64, 128])
def test_low_bit_error_on_gaussian_and_on_attention_as_models_have_it(d):
    q, k, v = qkv(720, b=2, h=2, d=d)

    def error(q, k, v):
        index = sla.block_map(q, k, 0.3)
        return relative(
            reference.sparse_attention(q, k, v, index, precision="int8"), reference.sparse_attention(q, k, v, index)
        )

    gaussian = error(q, k, v)
    assert 0.005 < gaussian < 0.06
    # neighbouring tokens alike, keys with a common offset, values with a mean: what RMSNorm and video give
    smooth = [x.cumsum(1) / x.cumsum(1).std() + 0.3 * x for x in (q, k, v)]
    assert error(smooth[0], smooth[1] + 4, smooth[2] + 1) < 0.01


# ---- linear branch


@pytest.mark.parametrize("length, keys, d", [(1, 1, 64), (65, 65, 128), (300, 300, 128), (40, 300, 64)])
def test_linear_branch_folded_and_not_against_float64(length, keys, d):
    q, k, v = qkv(length, keys, b=2, h=3, d=d)
    weight, bias = projection(d)
    expected = linear_attention(q, k, v, weight, bias)
    for fold in (True, False):
        out = reference.linear_branch(q, k, v, weight, bias, fold)
        assert out.shape == q.shape
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=3e-6)


def test_linear_branch_sees_all_keys_and_the_unshifted_ones():
    q, k, v = qkv(300, h=2)
    weight, bias = projection(64)
    k[:, :, :, 0] += 3  # channel softmax is not invariant to this offset; the sparse branch is
    whole = sla.sparse_linear_attention(q, k, v, weight, bias, 0.2)
    sparse = sla.sparse_linear_attention(q, k, v, None, None, 0.2)
    torch.testing.assert_close((whole - sparse).double(), linear_attention(q, k, v, weight, bias), rtol=1e-4, atol=1e-5)


def test_linear_branch_in_float16_does_not_overflow():
    q, k, v = qkv(8192, dtype=torch.float16)
    v += 1000  # 8192 / 64 * 1000 is above 65504
    out = reference.linear_branch(q, k, v, torch.eye(64), torch.zeros(64))
    torch.testing.assert_close(out, torch.full_like(out, 1000), rtol=0.01, atol=0)


def test_linear_branch_in_bf16_with_float32_projection():
    q, k, v = qkv(720, h=2, d=128, dtype=torch.bfloat16)
    v += 0.5
    weight, bias = projection(128)
    folded, unfolded = (reference.linear_branch(q, k, v, weight, bias, fold) for fold in (True, False))
    assert folded.dtype == torch.bfloat16
    exact = linear_attention(q, k, v, weight, bias)
    assert relative(folded, exact) < 0.005 and relative(unfolded, exact) < 0.005


# ---- q, k and v as their projections left them


def raw_qkv(b, length, h, d, partials, seed=0):
    """(qkv, sums, norm_q_weight, norm_k_weight, eps, cos, sin) with sums from float64 in that many parts."""
    generator = torch.Generator().manual_seed(seed)
    qkv = 3 * torch.randn(3, b, length, h, d, generator=generator) + 1
    parts = qkv[:2].double().square().flatten(3).flatten(1, 2).chunk(partials, -1)
    sums = torch.stack([part.sum(-1) for part in parts], 1).float()
    weights = [1 + 0.3 * torch.randn(h * d, generator=generator) for _ in range(2)]
    angles = 6 * torch.rand(length, d // 2, generator=generator)
    return qkv, sums, *weights, 1e-2, angles.cos(), angles.sin()


def normed_and_turned(x, weight, eps, cos, sin):
    """The published RMSNorm over all heads and rotary embedding of channel pairs as complex numbers, in float64."""
    b, length, h, d = x.shape
    x = x.double().flatten(2)
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    turn = torch.complex(cos.double(), sin.double())[:, None]
    return torch.view_as_real(torch.view_as_complex(x.view(b, length, h, d // 2, 2)) * turn).flatten(-2)


# ragged length, batch > 1, sums in parts; one token; head_dim 64
@pytest.mark.parametrize("b, length, h, d, partials", [(2, 200, 2, 128, 2), (1, 1, 1, 64, 1), (1, 300, 3, 64, 3)])
@pytest.mark.parametrize("with_sums", [True, False])
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_from_qkv_is_norm_rope_and_attention(b, length, h, d, partials, with_sums, precision):
    qkv, sums, norm_q, norm_k, eps, cos, sin = raw_qkv(b, length, h, d, partials)
    q, k = (normed_and_turned(x, w, eps, cos, sin).float() for x, w in ((qkv[0], norm_q), (qkv[1], norm_k)))
    expected = sla.sparse_linear_attention(q, k, qkv[2], *projection(d), 0.4, precision=precision)
    given = qkv, sums if with_sums else None, norm_q, norm_k, eps, cos, sin, *projection(d), 0.4, precision
    out = sla.sla_from_qkv(*given)
    assert out.shape == expected.shape
    assert relative(out, expected) < (1e-5 if precision == "bf16" else 2e-3)  # values beside a rounding edge
    q8, scale = sla.sla_from_qkv(*given, quantize=True)
    assert all(map(torch.equal, (q8, scale), quantize_block(out.view(b * length, h * d))))


def test_from_qkv_in_slices_rounds_once_and_leaves_its_input(monkeypatch):
    qkv, sums, norm_q, _, eps, cos, sin = raw_qkv(1, 300, 2, 64, 1)
    x = qkv[0].bfloat16()
    before = x.clone()
    whole = reference.normed(x, sums[0], norm_q, eps, cos, sin)
    exact = reference.normed(x.float(), sums[0], norm_q, eps, cos, sin)
    assert torch.equal(whole, exact.bfloat16()) and torch.equal(x, before)
    monkeypatch.setattr(reference, "SLICE", 2 * 64 * 77)
    assert torch.equal(reference.normed(x, sums[0], norm_q, eps, cos, sin), whole)
    for given in ((sums[0], norm_q, eps, None, None), (None, None, eps, cos, sin)):  # each step by itself
        assert not torch.equal(reference.normed(x, *given), whole)


@pytest.mark.parametrize("quantize", [False, True])
def test_from_qkv_compiled_is_one_node(quantize):
    (qkv, *raw), proj = raw_qkv(1, 200, 1, 128, 1), projection(128)

    def attend(qkv):
        return sla.sla_from_qkv(qkv, *raw, *proj, 0.5, "bf16", quantize)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    a, b = compiled(qkv), attend(qkv)
    assert all(map(torch.equal, a, b)) if quantize else torch.equal(a, b)
    name = "sla_from_qkv_quantized" if quantize else "sla_from_qkv"
    args = (qkv, *raw, *proj, 0.5, None, "bf16")
    torch.library.opcheck(getattr(torch.ops.turbowan, name).default, args)


@pytest.mark.parametrize(
    "at, shape, name",
    [
        (0, (2, 1, 64, 1, 64), "qkv"),
        (1, (2, 1, 63), "sums"),
        (2, (128,), "norm_q_weight"),
        (3, (63,), "norm_k_weight"),
        (5, (64, 64), "cos"),
        (6, (63, 32), "sin"),
    ],
)
def test_from_qkv_names_what_does_not_fit(at, shape, name):
    given = list(raw_qkv(1, 64, 1, 64, 1))
    given[at] = torch.zeros(shape)
    with pytest.raises(TurboError, match=rf"{name}.*{shape[-1]}\]"):
        sla.sla_from_qkv(*given, *projection(64), 0.5)


# ---- memory


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.numel())
        return out


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_nothing_of_size_l_by_l_is_ever_built(precision):
    q, k, v = qkv(4096)
    with Largest() as seen:
        sla.sparse_linear_attention(q, k, v, *projection(64), 0.1, precision=precision)
    assert 4096 * 64 <= seen.numel < 4096 * 4096


@pytest.mark.parametrize("topk", [0.1, 1.0])
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_memory_is_linear_in_the_length(precision, topk, monkeypatch):
    monkeypatch.setattr(reference, "GATHERED", 1 << 18)  # pieces in proportion to lengths that a test can wait for
    largest = {}
    for length in (1024, 4096):
        q, k, v = qkv(length)
        with Largest() as seen:
            reference.sparse_attention(q, k, v, sla.block_map(q, k, topk), precision=precision)
        largest[length] = seen.numel
    assert largest[4096] <= 4.01 * largest[1024]


# ---- bad input


@pytest.mark.parametrize("topk", [-0.1, 1.1, torch.nan, 10])
def test_bad_topk(topk):
    q, k, v = qkv(64)
    for call in (lambda: sla.block_map(q, k, topk), lambda: sla.sparse_linear_attention(q, k, v, None, None, topk)):
        with pytest.raises(TurboError, match=f"topk.*{topk}"):
            call()


@pytest.mark.parametrize(
    "shapes",
    [
        [(1, 64, 2, 64), (1, 64, 2, 64), (1, 63, 2, 64)],
        [(1, 64, 2, 64), (1, 64, 1, 64), (1, 64, 1, 64)],
        [(1, 64, 2, 64), (2, 64, 2, 64), (2, 64, 2, 64)],
        [(1, 64, 2, 64), (1, 64, 2, 128), (1, 64, 2, 128)],
        [(64, 2, 64)] * 3,
    ],
)
def test_shapes_that_do_not_fit_are_all_named(shapes):
    with pytest.raises(TurboError) as error:
        sla.sparse_linear_attention(*(torch.zeros(s) for s in shapes), None, None, 0.5)
    assert all(str(list(s)) in str(error.value) for s in shapes)


def test_other_head_dims_and_precisions_are_refused():
    with pytest.raises(TurboError, match="head_dim 64 and 128, got 96"):
        sla.sparse_linear_attention(*qkv(64, d=96), None, None, 0.5)
    with pytest.raises(TurboError, match="fp4"):
        sla.sparse_linear_attention(*qkv(64), None, None, 0.5, precision="fp4")


@pytest.mark.parametrize("dtypes", [["float64"] * 3, ["int64"] * 3, ["float32", "bfloat16", "float32"]])
def test_other_and_mixed_dtypes_are_refused(dtypes):
    given = [x.to(getattr(torch, dtype)) for x, dtype in zip(qkv(64), dtypes)]
    with pytest.raises(TurboError, match=f"got {', '.join(dtypes)}"):
        sla.sparse_linear_attention(*given, None, None, 0.5)


def test_no_tokens_are_refused():
    with pytest.raises(TurboError, match="at least one token"):
        sla.sparse_linear_attention(*(torch.zeros(1, 0, 2, 64) for _ in range(3)), None, None, 0.5)


def test_a_projection_of_another_size_is_refused():
    with pytest.raises(TurboError, match=r"\[128, 128\]"):
        sla.sparse_linear_attention(*qkv(64, d=64), *projection(128), 0.5)
    with pytest.raises(TurboError, match=r"bias \[64\], got None"):
        sla.sparse_linear_attention(*qkv(64, d=64), projection(64)[0], None, 0.5)
