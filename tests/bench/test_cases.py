"""The benchmark's cases: each contender of ours is right, oracles see what is wrong, a missing library is named."""

import sys

import pytest
import torch

from turbo_core import int8
from turbo_core.bench import attention, block, check, harness, linear, report, streaming, vae
from turbo_core.bench.harness import Missing


def test_compiled_contenders_are_named_where_quick_leaves_them_out():
    with pytest.raises(Missing, match="--quick"):
        linear.compiled(lambda: 0, quick=True)


@pytest.mark.parametrize(
    ("make", "cases"),
    [
        (linear.cases, 4),  # the linear and its three fused forms
        (streaming.cases, 6),
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


def measured_block(dim=1536, **milliseconds):
    times = {"float32, eager, dense": 800.0}
    for form, (dense, sparse) in {"block": (400.0, 200.0), "row": (320.0, 160.0)}.items():
        times |= {f"int8 {form}, turbo-core, dense": dense, f"int8 {form}, turbo-core, SLA": sparse}
    rows = [
        {"name": name, "ms": ms, "p10": ms - 1, "p90": ms + 1, "error": 0.01, "status": "ok"}
        for name, ms in (times | milliseconds).items()
        if ms
    ]
    shape = {"l": 9360, "dim": dim, "ffn": 8960}
    return {"name": "Wan block", "shape": shape, "baseline": "float32, eager, dense", "rows": rows, "flop": 1.0,
            "bytes": 0.0, "streaming": False, "notes": ["of the block"], "clocks": {"W": [1, 2, 3]}}  # fmt: skip


def test_a_clip_is_its_blocks_times_its_evaluations():
    clip = block.derived(measured_block())
    assert [round(row["speedup"], 2) for row in clip["rows"]] == [1, 2, 4, 100, 2.5, 5, 125]
    first, last = clip["rows"][0], clip["rows"][3]
    assert (first["ms"], last["ms"]) == (800.0 * 30 * 100, 200.0 * 30 * 4) and last["p10"] == 199.0 * 30 * 4
    assert "computed from the times above, not run" in report.remarks(clip) and not clip["clocks"]
    assert all(len(report.cells(row)) == len(report.HEADER) for row in clip["rows"])


@pytest.mark.parametrize("without", [{"dim": 256}, {"int8 row, turbo-core, SLA": None}])
def test_no_clip_is_told_of_a_width_that_no_model_has_or_with_a_rung_missing(without):
    assert block.derived(measured_block(**without)) is None


def test_each_sparse_contender_has_the_blocks_that_its_name_says(monkeypatch):
    """Whatever is chosen later for other shares: flex_attention once computed three times the work it was named for."""
    given = []
    monkeypatch.setattr(attention, "_flex", lambda o, index, quick: given.append(index) or (lambda: o.q))
    case = attention.attention_case(torch.device("cpu"), 1, 2, 2560, 64, quick=True)
    next(one for one in case.contenders if "flex_attention" in one.name).build()
    kept = given[0].shape[-1]
    assert kept == round(attention.TOPK * 2560 / 64) and f"{kept} of 40 key blocks" in case.name
