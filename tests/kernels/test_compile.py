"""What torch.compile makes of turbo_core where the kernels compute: whole graphs of operators, with the same bits."""

import functools
import re

import pytest
import torch

from tests.helpers.attention_inputs import draw, projection, raw_form
from tests.helpers.wan import DIM, HEADS, quantized, weights
from turbo_core import sla
from turbo_core.int8 import reference
from turbo_core.rope import rope_angles
from turbo_core.wan import WanModel

GRID = (2, 5, 9)  # 90 tokens


@pytest.fixture(autouse=True)
def poison():
    """Memory is as torch allocates it: torch.compile cannot trace the functions that poison puts in their place."""
    torch._dynamo.trace_rules.clear_lru_cache()  # it may have met those in a test before


def wan_block(quantize, whole=True):
    """A block in bfloat16 and its operands. whole False: one linear is left in floats, so that layers compute."""
    sd = quantized(weights(sla=True, layers=1), quantize, torch.bfloat16)
    block = WanModel.from_state_dict(sd, torch.bfloat16).blocks[0].requires_grad_(False)
    if not whole:
        block.self_attn.v = torch.nn.Linear(DIM, DIM, dtype=torch.bfloat16).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    x, context = (torch.randn(1, n, DIM, generator=generator).to(torch.bfloat16) for n in (90, 7))
    modulation = 0.3 * torch.randn(1, 6, DIM, generator=generator)
    return block, (x, modulation, context, rope_angles(GRID, DIM // HEADS))


def compiled(function):
    """(the function as one graph, the names of our operators that are in it once it has run)."""
    found = set()

    def backend(module, _):
        targets = (str(node.target) for node in module.graph.nodes if node.op == "call_function")
        found.update(name[1] for target in targets if (name := re.match(r"turbowan\.(\w+)", target)))
        return module

    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend), found


# (format, a whole int8 block, top-k, precision) -> operators in its graph
COMMON = {"layer_norm_quantize", "int8_mm", "int8_mm_residual", "int8_mm_qkv", "rms_norm"}
BLOCK, ROW = reference.quantize_block, reference.quantize_rows
BLOCKS = {
    "block": ((BLOCK, True, None, "bf16"), COMMON | {"quantize_block", "int8_mm_quantize"}),
    "row": ((ROW, True, None, "bf16"), COMMON | {"quantize_rows"}),
    "block SageSLA": (
        (BLOCK, True, 0.5, "int8"),
        COMMON | {"quantize_block", "int8_mm_quantize", "sla_from_qkv_quantized"},
    ),
    "row SageSLA": ((ROW, True, 0.5, "int8"), COMMON | {"quantize_rows", "sla_from_qkv"}),
    "block by layers": ((BLOCK, False, None, "bf16"), {"int8_linear", "rms_norm"}),
    "row by layers SageSLA": ((ROW, False, 0.5, "int8"), {"int8_linear", "rms_norm", "sparse_linear_attention"}),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_wan_block_is_one_graph_of_operators(name):
    (quantize, whole, topk, precision), operators = BLOCKS[name]
    block, args = wan_block(quantize, whole)
    run = functools.partial(block, topk=topk, precision=precision)
    graph, found = compiled(run)
    with torch.no_grad():
        assert torch.equal(graph(*args), run(*args))
    assert found == operators


def test_every_operator_is_met_by_a_compiled_block():
    names = torch._C._dispatch_get_all_op_names()
    registered = {name.removeprefix("turbowan::") for name in names if name.startswith("turbowan::")}
    assert registered == set().union(*(operators for _, operators in BLOCKS.values()))


def test_operators_say_what_shapes_the_kernels_return():
    (q, k, v), proj = draw(65, h=1, d=128), projection(128)
    ops, checks = torch.ops.turbowan, ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.sparse_linear_attention.default, (q, k, v, *proj, 0.5, None, 128, 64, "int8"))
    given = torch.stack([q, k, v]), *raw_form(q, k)[0], *proj, 0.5, None, "int8"
    torch.library.opcheck(ops.sla_from_qkv.default, given, test_utils=checks)
    torch.library.opcheck(ops.sla_from_qkv_quantized.default, given, test_utils=checks)


def test_gradients_are_those_of_the_reference():
    weight, bias = projection(64)
    plain = draw(65, h=1)
    raw, _ = raw_form(*plain[:2])
    learners = [bias, *raw[1:3]]
    for x in learners:
        x.requires_grad_()

    def attend():
        one = sla.sparse_linear_attention(*plain, weight, bias, 0.5)
        return one + sla.sla_from_qkv(torch.stack(plain), *raw, weight, bias, 0.5)

    eager, graph = (
        torch.autograd.grad((function() * plain[0]).sum(), learners)
        for function in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager"))
    )
    for one, other in zip(eager, graph):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
