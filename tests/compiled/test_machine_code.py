"""The record of what the compiler makes of the kernels is of these kernels; the model that reads it can tell apart."""

import re

import pytest
import torch

from tests.helpers import machine_code, sass, shipped
from tests.helpers.sass_cost import Code, turn_cycles
from tests.tools import forecast_peers, forecast_steps, record_machine_code

CURE = "python -m tests.tools.record_machine_code"


def test_the_record_has_every_kernel_and_card():
    record = machine_code.recorded()
    wanted = {f"{name}, sm_{card}" for card in machine_code.CARDS for name in machine_code.launches(card)}
    assert set(record["now"]) == wanted, CURE
    assert all(values["spills"] == 0 for values in record["now"].values())


def test_the_record_is_of_the_triton_that_is_installed_here():
    """For any other one nothing is compared."""
    pinned = re.search(r"^triton==(.+)$", (forecast_steps.ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)[1]
    assert machine_code.recorded()["triton"] == pinned, CURE


def test_the_table_is_what_the_record_says():
    record = machine_code.recorded()
    text = machine_code.RECORD.with_suffix(".md").read_text("utf-8")
    assert record_machine_code.table(record["before"], record["now"]) in text, CURE


def test_the_page_of_steps_is_what_the_record_says():
    cure = "python -m tests.tools.forecast_steps"
    assert forecast_steps.PAGE.read_text("utf-8") == forecast_steps.page(), cure
    assert forecast_steps.STEPS.read_text("utf-8") == forecast_steps.steps_file(), cure


def test_a_step_takes_no_less_than_the_roofline_and_twice_the_tokens_take_twice_as_long_and_more():
    record = machine_code.recorded()["now"]
    for name, model in forecast_steps.MODELS.items():
        for title, card in forecast_steps.CARDS.items():
            seconds = forecast_steps.step(record, card, model)
            assert seconds > forecast_steps.ROOFLINE[name, title]
            assert forecast_steps.step(record, card, model._replace(tokens=2 * model.tokens)) > 2 * seconds


STREAMING = [(name, card) for card in machine_code.CARDS for name in shipped.streaming(card) if card != 86]


@pytest.mark.parametrize("name, capability", [*STREAMING, ("_prepare_kernel", 86)])
def test_the_passes_between_the_products(name, capability):
    compiled = sass.compile_launch(capability, *shipped.streaming(capability)[name])
    assert not machine_code.differences(name, capability, compiled), CURE


def test_a_loop_that_waits_for_its_own_keys_costs_more():
    kernel, arguments, options = shipped.attention("int8", True, 120, quantize=True)[-1]
    cycles = []
    for stages in (3, 5):
        compiled = sass.compile_launch(120, kernel, arguments, options | {"num_stages": stages})
        given = sass.registers(compiled), compiled.metadata.shared, compiled.metadata.num_warps
        cycles.append(turn_cycles(Code(compiled.asm["sass"], 120, *given)))
        assert (min(sass.waits(compiled)) == 0) == (stages == 3)
    assert cycles[1] < 0.95 * cycles[0]


PEER = """
import a_module_that_nobody_has

@triton.jit
def doubled(x):
    return 2 * x

@triton.autotune(configs=a_module_that_nobody_has.CONFIGS, key=["K"])
@triton.jit
def product(a_ptr, b_ptr, c_ptr, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    rows, columns, depth = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    total = tl.zeros((BM, BN), tl.int32)
    for k in range(0, K, BK):
        a = tl.load(a_ptr + rows[:, None] * K + k + depth[None, :])
        total = tl.dot(a, tl.load(b_ptr + columns[None, :] * K + k + depth[:, None]), total, out_dtype=tl.int32)
    tl.store(c_ptr + rows[:, None] * N + columns[None, :], doubled(total))
"""


def test_a_peer_s_kernel_is_taken_out_of_its_file_and_a_slower_one_is_told(tmp_path):
    """Without the file's imports and tuning; a launch that does not fit the card is none."""
    (tmp_path / "theirs.py").write_text(PEER, "utf-8")
    kernel = forecast_peers.kernel_of(tmp_path / "theirs.py", "product", tmp_path)
    launches = [(128, 128, 128, 3, 8), (64, 64, 128, 3, 4), (128, 256, 256, 4, 8)]
    sizes = [5120, 5120, 5120]
    arguments = lambda: [*forecast_peers._operands(torch.int8)[:2], torch.empty(16, dtype=torch.int32), *sizes]  # noqa: E731
    peer = forecast_peers.Peer(
        "theirs.py", "product", "row plain", arguments, launches, lambda *tile: dict(zip(("BM", "BN", "BK"), tile))
    )
    large, small, too_large = (forecast_peers.forecast(peer, kernel, 120, launch) for launch in launches)
    ideal = 128 * 128 * 5120 / (4 * 256)  # the card's rate
    assert ideal < large < 3 * ideal and small > 1.1 * large and too_large is None
