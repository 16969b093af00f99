"""WanModel learns: from captions without their padding, from some of the patches, in bfloat16, sparse."""

import math

import pytest
import torch
import torch.nn.functional as F

from turbo_core.sla import block_map, sparse_linear_attention
from turbo_core.train import models, precision
from turbo_core.train.data import Data, patches_at, text_rows
from turbo_core.wan import WanModel
from turbo_core.wan import block as wan_block
from turbo_core.wan.layers import layer_norm

SIZES = {"dim": 128, "ffn_dim": 192, "num_heads": 2, "num_layers": 2, "text_dim": 24}
LENGTHS = torch.tensor([11, 6, 14])  # of the longest caption, of a short one, and of one that is not asked for


def model(sla=True):
    torch.manual_seed(0)
    net = WanModel(**SIZES, sla=sla)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return net


def inputs(seed=0):
    """x, timestep, and embeddings of captions."""
    torch.manual_seed(seed)
    # 9 x 8 x 4 tokens: two whole query blocks and a ragged one
    return torch.randn(2, 16, 9, 16, 8), torch.tensor([300.0, 850.0]), torch.randn(3, 14, 24)


def told(text):
    return text_rows(Data(None, text, LENGTHS, None), torch.tensor([0, 1]))


@pytest.mark.parametrize("topk", [None, 0.3], ids=["dense", "sparse"])
def test_a_caption_without_its_padding_says_the_same(topk):
    net, (x, time, text) = model(), inputs()
    padded = [F.pad(row[:length], (0, 0, 0, 512 - length)) for row, length in zip(text, LENGTHS.tolist())]
    ours, theirs = net(x, time, **told(text), topk=topk), net(x, time, torch.stack(padded[:2]), topk=topk)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_what_follows_a_caption_does_not_matter():
    net, (x, time, text) = model(), inputs()
    other = text.clone()
    other[1, 6:] = 7.0
    assert torch.equal(net(x, time, **told(text)), net(x, time, **told(other)))


def test_some_patches_keep_their_places():
    net, (x, time, text) = model(), inputs()
    grid = x.shape[2], x.shape[3] // 2, x.shape[4] // 2
    places = [torch.arange(size) for size in grid]
    assert torch.equal(net(x, time, **told(text)), net(x, time, **told(text), places=places))
    for axis, size in enumerate(grid):
        part = [*places]
        part[axis] = torch.tensor([0, size - 1])
        some = patches_at(x, part)
        apart = net(some, time, **told(text), places=part) - net(some, time, **told(text))
        assert apart.abs().max() > 1e-3


@pytest.mark.parametrize("biased", [False, True])
def test_attention_that_keeps_its_scores_is_torchs(biased, monkeypatch):
    calls, products = [], wan_block._products
    monkeypatch.setattr(wan_block, "_products", lambda *given: (calls.append(1), products(*given))[1])
    torch.manual_seed(0)
    made = [torch.randn(2, length, 2, 64, dtype=torch.bfloat16) for length in (70, 33, 33)]
    bias = text_rows(Data(None, torch.zeros(3, 32, 4), torch.tensor([11, 6, 32]), None), torch.tensor([0, 1]))
    bias = bias["context_bias"] if biased else None  # with -inf where a caption has no tokens
    found = []
    for dtype, keeps in ((torch.float64, False), (torch.bfloat16, True), (torch.bfloat16, False)):
        q, k, v = (tensor.detach().to(dtype).requires_grad_(True) for tensor in made)
        out = wan_block._attend(q, k, v, bias, keeps)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        found.append([out, q.grad, k.grad, v.grad])
    elsewhere = (tensor.to("meta") for tensor in made)
    assert wan_block._attend(*elsewhere, None, True).shape == (2, 70, 128)
    assert len(calls) == 1  # on a CPU alone, and where asked
    for exact, ours, theirs in zip(*found):
        apart, torchs = ((some - exact).norm() / exact.norm() for some in (ours, theirs))
        assert apart < max(2 * torchs, 0.01), (apart, torchs)


def test_what_is_trained_keeps_scores():
    fast = precision.has_bfloat16("cpu")
    trained = models.trainable(model().state_dict(), 2)
    for net, keeps in ((model(), False), (trained, fast), (models.new_model(), fast)):
        assert {part.keeps_scores for block in net.blocks for part in (block.self_attn, block.cross_attn)} == {keeps}


@pytest.mark.slow
def test_compiled_blocks_learn_the_same():
    plain, compiled = model(False), model(False)
    if not models.compiles("cpu"):
        pytest.skip("torch.compile does not work here")
    models.compile_blocks(compiled)
    ours, theirs = gradients(compiled), gradients(plain)
    assert ours.keys() == theirs.keys()
    assert max((ours[name] - exact).norm() / exact.norm() for name, exact in theirs.items()) < 1e-4
    assert compiled.state_dict().keys() == plain.state_dict().keys()


def test_without_a_compiler_training_goes_on(monkeypatch, caplog):
    def broken(*given, **options):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", broken)
    models.compiles.cache_clear()
    try:
        net = model()
        models.compile_blocks(net)
        assert all(block._compiled_call_impl is None for block in net.blocks) and "no compiler" in caplog.text
    finally:
        models.compiles.cache_clear()


def gradients(net, amp=False, topk=None):
    x, time, text = inputs(seed=1)
    net.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp, cache_enabled=False):
        velocity = net(x, time, **told(text), topk=topk)
    velocity.float().square().mean().backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def test_recomputing_blocks_changes_no_gradient():
    calls, found = [], []
    for recompute in (False, True):
        net = model()
        if recompute:
            models.recompute_blocks(net)
        net.blocks[0].cross_attn.register_forward_hook(lambda *_: calls.append(0))
        found.append(gradients(net, topk=0.3))
        with torch.no_grad():
            net(*inputs()[:2], **told(inputs()[2]), topk=0.3)
    assert len(calls) == 2 + 3  # the second one in the backward pass too
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert all(gradient.isfinite().all() for gradient in found[0].values())


def test_gradients_in_bfloat16_are_those_in_float32():
    net = model()
    exact, ours = (torch.cat([g.flatten() for g in gradients(net, amp).values()]) for amp in (False, True))
    assert (ours - exact).norm() < 0.02 * exact.norm()  # 0.004 were


def test_a_norm_learns_from_many_tokens_in_float32():
    """torch sums the gradients of its bfloat16 layer_norm's weight and bias in bfloat16 on a CPU: these 16 % off."""
    torch.manual_seed(0)
    x, push = torch.randn(2304, 128).bfloat16(), (torch.randn(2304, 128) + 0.3).bfloat16()
    weight, bias = torch.ones(128, requires_grad=True), torch.zeros(128, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        layer_norm(x, 1e-6, weight, bias).bfloat16().backward(push)
    expected = push.double().sum(0)
    assert (bias.grad - expected).norm() < 1e-5 * expected.norm()


def attend_in_float64(q, k, v, weight, bias, topk):
    """SLA as one masked softmax over all keys and one linear attention: nothing shared with what it checks."""
    index = block_map(q, k, topk)
    q, k, v = (x.transpose(1, 2).double() for x in (q, k, v))
    score = q @ k.mT / math.sqrt(q.shape[-1])
    kept = torch.zeros_like(score, dtype=torch.bool)
    for b, h, row in torch.cartesian_prod(*map(torch.arange, index.shape[:3])).tolist():
        for block in index[b, h, row].tolist():
            kept[b, h, 128 * row : 128 * (row + 1), 64 * block : 64 * (block + 1)] = True
    sparse = score.masked_fill(~kept, -math.inf).softmax(-1) @ v
    feature_q, feature_k = q.softmax(-1), k.softmax(-1)
    linear = feature_q @ (feature_k.mT @ v) / (1e-5 + feature_q @ feature_k.sum(2)[..., None])
    return (sparse + F.linear(linear, weight.double(), bias.double())).transpose(1, 2)


@pytest.mark.parametrize("tokens", [128, 200, 70])  # whole blocks; both kinds ragged; fewer than one query block
def test_sparse_attention_has_the_gradient_of_its_formula(tokens):
    torch.manual_seed(0)
    given = [torch.randn(2, tokens, 3, 64) for _ in range(3)] + [torch.randn(64, 64) / 8, torch.randn(64)]
    given, push = [x.requires_grad_(True) for x in given], torch.randn(2, tokens, 3, 64)
    ours, theirs = sparse_linear_attention(*given, 0.5), attend_in_float64(*given, 0.5)
    torch.testing.assert_close(ours.double(), theirs, atol=1e-4, rtol=1e-4)
    ours = torch.autograd.grad((ours * push).sum(), given)
    for one, other in zip(ours, torch.autograd.grad((theirs * push).sum(), given)):
        assert (one - other).norm() < 1e-5 * other.norm()


def test_proj_l_that_is_added_starts_as_nothing():
    net, (x, time, text) = model(sla=False), inputs()
    grown = models.trainable(net.state_dict(), num_heads=2, sla=True)
    assert grown.has_sla and all(p.requires_grad for p in grown.parameters())
    torch.testing.assert_close(grown(x, time, **told(text), topk=1.0), net(x, time, **told(text)), atol=1e-5, rtol=1e-4)


def test_an_image_to_video_model_begins_blind_to_the_image():
    plain = models.new_model()
    torch.nn.init.normal_(plain.head.head.weight)  # it starts as zero
    seeing = models.with_image(plain)
    x, context = torch.randn(1, 16, 3, 8, 8), torch.randn(1, 4, 64)
    time = torch.tensor([700.0])
    assert torch.equal(seeing(x, time, context, torch.randn(1, 20, 3, 8, 8)), plain(x, time, context))
    assert seeing.patch_embedding.weight.requires_grad
