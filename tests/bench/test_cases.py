"""The benchmark's cases: each contender of ours is right, oracles see what is wrong, a missing library is named."""

import sys

import pytest
import torch

from turbo_core import int8
from turbo_core.bench import attention, block, check, harness, linear, streaming, vae
from turbo_core.bench.harness import Missing


def test_compiled_contenders_are_named_where_quick_leaves_them_out():
    with pytest.raises(Missing, match="--quick"):
        linear.compiled(lambda: 0, quick=True)


@pytest.mark.parametrize(
    ("make", "cases"),
    [
        (linear.cases, 4),  # the linear and its three fused forms
        (streaming.cases, 5),
        (attention.cases, 2),
        (block.cases, 1),
        (vae.cases, 2),  # decode, encode
    ],
)
def test_every_contender_of_ours_is_right_at_the_quick_shapes(make, cases):
    with torch.no_grad():
        made = [case() for case in make("cpu", quick=True)]
        assert len(made) == cases
        for case in made:
            rows = [harness.admit(c, harness.clock_of("cpu"))[0] for c in case.contenders]
            assert any(row["status"] == "ok" and "turbo-core" in row["name"] for row in rows), case.name
            for row in rows:
                assert row["status"] in ("ok", "missing") or "turbo-core" not in row["name"], row
                assert row["status"] != "wrong", row


@pytest.mark.parametrize("name", ["comfy_kitchen", "torchao.quantization", "sageattention"])
def test_a_library_that_is_not_installed_is_named(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    names = {"comfy_kitchen": "comfy_kitchen.int8_linear", "torchao.quantization": "torchao"}
    if name == "sageattention":
        case = attention.attention_case("cpu", 1, 1, 130, 64, quick=True)
    else:
        case = linear.linear_case("cpu", 5, 128, 128, quick=True)
    (one,) = [c for c in case.contenders if names.get(name, name) in c.name]
    row, function = harness.admit(one, harness.clock_of("cpu"))
    assert function is None and row["status"] == "missing"
    assert row["reason"] == f"{name.partition('.')[0]} is not installed"


def test_the_oracle_of_attention_sees_a_wrong_block_and_a_lost_linear_branch():
    case = attention.attention_case("cpu", 1, 2, 700, 64, quick=True)
    named = {c.name: c for c in case.contenders}
    sparse, whole = named["sparse 10%, turbo-core float32"], named["SLA 10%, turbo-core float32"]
    assert whole.error(whole.build()()) < 1e-3 < 0.1 < whole.error(sparse.build()())
    dense = named["dense, SDPA"]
    assert dense.error(dense.build()()) < 1e-3 < 0.02 < dense.error(sparse.build()())
    y = dense.build()()
    y[0, 690, 1] = torch.nan  # outside every sample
    assert dense.error(y.roll(-130, 1)) == float("inf")


def test_the_oracle_of_linears_sees_a_missing_bias_and_a_bad_row():
    case = linear.linear_case("cpu", 400, 128, 128, quick=True)
    one = next(c for c in case.contenders if c.name == "row, turbo-core")
    y = one.build()()
    assert one.error(y) < one.bound < one.error(y + 1)
    y[200] = torch.inf  # between the sampled ends
    assert one.error(y) == float("inf")


def test_check_names_what_is_wrong_and_goes_on(monkeypatch):
    few = {"LINEAR": ((5, 200, 320),), "STREAMING": ((5, 200),), "ATTENTION": ((1, 1, 130, 64),)}
    for name, shapes in few.items():
        monkeypatch.setattr(check, name, shapes)
    with torch.no_grad():
        right = check.check("cpu", tell=pytest.fail)
    assert all(one["ok"] for one in right) and len(right) > 15
    assert {"sla kernels", "quantize_block 5 x 200"} <= {one["what"] for one in right}

    honest = linear.CHAINS[int8.quantize_rows]
    monkeypatch.setitem(linear.CHAINS, int8.quantize_rows, lambda x: (honest(x)[0] + 1, honest(x)[1]))
    told = []
    with torch.no_grad():
        found = check.check("cpu", tell=told.append)
    assert [one["what"] for one in found if not one["ok"]] == ["quantize_rows 5 x 200"]
    assert len(told) == 1 and told[0].startswith("WRONG: quantize_rows") and len(found) == len(right)
