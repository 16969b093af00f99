"""What torch.compile meets of the int8 operations and of attention: one node each, with the same result."""

import pytest
import torch

from tests.helpers.attention_inputs import projection, raw_form
from tests.helpers.int8_operands import FORMATS, quantized
from tests.helpers.tensors import gaussian
from turbo_core import dispatch, int8, sla
from turbo_core.int8 import reference

BF16 = torch.bfloat16
X, W, BIAS = quantized("block", 130, 200, 0), quantized("block", 64, 200, 1), gaussian(64, seed=2)
X_ROWS, W_ROWS = quantized("row", 130, 200, 0), quantized("row", 64, 200, 1)
RESIDUAL, GATE = gaussian(130, 64), gaussian(2, 64)
FLOATS, WEIGHT = gaussian(130, 200, dtype=BF16), gaussian(200, seed=3)
VECTORS = WEIGHT, gaussian(200, seed=4), gaussian(2, 200, seed=5), gaussian(2, 200, seed=6)  # weight to scale
QKV = gaussian(3, 1, 300, 2, 64)
RAW, PROJ = raw_form(*QKV[:2])[0], projection(64)
NONE = (None, None)

# operator: every form of its arguments
FORMS = {
    "quantize_block": [(RESIDUAL,)],
    "quantize_rows": [(RESIDUAL,)],
    "int8_linear": [(gaussian(70, 200), *W, None), (gaussian(70, 200), *W_ROWS, BIAS)],
    "rms_norm": [(FLOATS, WEIGHT, 1e-6)],
    "layer_norm_quantize": [
        (FLOATS, 1e-6, *VECTORS, None, False),
        (FLOATS, 1e-6, *NONE, *NONE, reference.row_stats(FLOATS), False),
        (FLOATS, 1e-6, *NONE, *NONE, None, True),
    ],
    "int8_mm": [(*X, *W, BIAS, BF16, True), (*X_ROWS, *W_ROWS, None, torch.float32, False)],
    "int8_mm_quantize": [(*X, *W, BIAS, True)],
    "int8_mm_residual": [(*X, *W, BIAS, RESIDUAL, GATE, True), (*X_ROWS, *W_ROWS, None, RESIDUAL, None, False)],
    "int8_mm_qkv": [
        (*X, [W[0]] * 3, [W[1]] * 3, [BIAS] * 3, BF16),
        (*X_ROWS, [W_ROWS[0]] * 3, [W_ROWS[1]] * 3, None, BF16),
    ],
    "sparse_linear_attention": [(*QKV, *proj, 0.3, None, 128, 64, "bf16") for proj in (PROJ, NONE)],
    "sla_from_qkv": [(QKV, *RAW, *PROJ, 0.5, None, "bf16")],
    "sla_from_qkv_quantized": [(gaussian(3, 1, 200, 1, 128), None, *NONE, 1e-6, *NONE, *NONE, 0.5, 0.6, "int8")],
}


def test_every_operator_is_here():
    names = torch._C._dispatch_get_all_op_names()
    assert {name.removeprefix("turbowan::") for name in names if name.startswith("turbowan::")} == set(FORMS)


@pytest.mark.parametrize("name", FORMS)
def test_operators_are_well_formed(name):
    for arguments in FORMS[name]:
        torch.library.opcheck(getattr(torch.ops.turbowan, name).default, arguments)


def compiled(function, *arguments, dynamic=False):
    """(result, what the one graph calls), through the ahead-of-time compiler."""
    graphs, finish = [], torch._dynamo.lookup_backend("aot_eager")

    def backend(module, inputs):
        graphs.append(module.graph)
        return finish(module, inputs)

    torch._dynamo.reset()
    result = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)(*arguments)
    (graph,) = graphs
    return result, [str(node.target) for node in graph.nodes if node.op.startswith("call")]


def ours(calls):
    return [call.removeprefix("turbowan.") for call in calls if call.startswith("turbowan.")]


def same(a, b):
    return all(map(torch.equal, a, b)) if isinstance(a, tuple) else torch.equal(a, b)


@pytest.mark.parametrize("weight", [W, W_ROWS], ids=FORMATS)
def test_a_compiled_linear_is_one_node(weight):
    def linear(x):
        return int8.int8_linear(x, *weight)

    x = gaussian(2, 70, 200)
    result, calls = compiled(linear, x)
    assert same(result, linear(x)) and ours(calls) == ["int8_linear"] and len(calls) < 10


@pytest.mark.parametrize("proj", [PROJ, NONE], ids=["sla", "sparse"])
def test_compiled_attention_is_one_node(proj):
    def attend(q, k, v):
        return sla.sparse_linear_attention(q, k, v, *proj, 0.3)

    result, calls = compiled(attend, *QKV)
    assert same(result, attend(*QKV)) and ours(calls) == ["sparse_linear_attention"] and len(calls) < 10


@pytest.mark.parametrize("quantize", [False, True])
def test_compiled_attention_from_its_projections_is_one_node(quantize):
    def attend(qkv):
        return sla.sla_from_qkv(qkv, *RAW, *PROJ, 0.5, "bf16", quantize)

    result, calls = compiled(attend, QKV)
    assert same(result, attend(QKV)) and len(calls) < 20
    assert ours(calls) == ["sla_from_qkv_quantized" if quantize else "sla_from_qkv"]


def test_compiled_products_and_norms_are_one_node_each_whatever_the_length():
    def chain(x, residual):
        run = int8.operations(x.device)
        normed = run.layer_norm_quantize(x, 1e-6, *VECTORS)
        blocks = run.quantize_block(run.rms_norm(x, WEIGHT, 1e-6))
        rows = run.quantize_rows(x)
        y, sums = run.int8_mm_qkv(*normed, [W[0]] * 3, [W[1]] * 3, [BIAS] * 3)
        hidden = run.int8_mm_quantize(*blocks, *W, BIAS)
        residual, stats = run.int8_mm_residual(*blocks, *W, BIAS, residual)
        return run.int8_mm(*rows, *W_ROWS, BIAS), *hidden, y, sums, residual, stats

    result, calls = compiled(chain, FLOATS, RESIDUAL, dynamic=True)
    assert same(result, chain(FLOATS, RESIDUAL))
    attention = ("int8_linear", "sparse_linear_attention", "sla_from_qkv", "sla_from_qkv_quantized")
    assert sorted(ours(calls)) == sorted(set(FORMS) - set(attention))


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="this torch has no such tag")
def test_what_waits_for_a_number_of_the_device_is_not_recorded_in_a_graph():
    """Selection by score asks how many blocks the largest choice has."""
    operators = getattr(torch.ops, dispatch.OPERATORS)
    assert torch.Tag.cudagraph_unsafe in operators.sparse_linear_attention.default.tags
    assert torch.Tag.cudagraph_unsafe not in operators.int8_linear.default.tags
