"""The record of what the compiler makes of the kernels is of these kernels; the model that reads it can tell apart."""

import pytest

from tests.helpers import machine_code, sass, shipped
from tests.helpers.sass_cost import Code, turn_cycles
from tests.tools import forecast_steps, record_machine_code

CURE = "python -m tests.tools.record_machine_code"


def test_the_record_has_every_kernel_and_card():
    record = machine_code.recorded()
    wanted = {f"{name}, sm_{card}" for card in machine_code.CARDS for name in machine_code.launches(card)}
    assert set(record["now"]) == wanted, CURE
    assert all(values["spills"] == 0 for values in record["now"].values())


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
