"""Where kernels compute, they take part in the benchmark alone and as a whole, and every row is right."""

import pytest
import torch

from turbo_core.bench import attention, harness, linear, streaming


@pytest.fixture
def admitted(monkeypatch):
    """admitted(case, *endings): {name: row} of the contenders whose names end so; none of them may be wrong."""
    monkeypatch.setattr(harness, "WARM_UP", 0)

    def admit(case, *endings):
        some = [contender for contender in case.contenders if contender.name.endswith(endings)]
        with torch.no_grad():
            rows = {contender.name: harness.admit(contender, harness.clock_of("cpu"))[0] for contender in some}
        assert rows and not [row for row in rows.values() if row["status"] in ("wrong", "failed")]
        return rows

    return admit


def test_products_take_part_alone(admitted):
    for case in (
        linear.linear_case("cpu", 130, 128, 128, True),
        linear.fused_case("cpu", "residual", 130, 128, 128, True),
    ):
        rows = admitted(case, "product alone", "torch path")
        assert rows["row, turbo-core, product alone"]["status"] == "ok"


def test_norms_take_given_statistics(admitted):
    rows = admitted(streaming.modulate_case("cpu", 130, 256, False, True), "statistics given")
    assert rows["turbo-core, statistics given"]["status"] == "ok"


def test_attention_takes_part_stage_by_stage_and_as_a_whole(admitted):
    case = attention.attention_case("cpu", 1, 1, 330, 64, True)
    rows = admitted(case, " alone, int8", "torch path", "dense int8, turbo-core")
    right = {name for name, row in rows.items() if row["status"] == "ok"}
    assert {*(f"{stage} alone, int8" for stage in attention.STAGES), "SLA 10%, turbo-core's torch path"} <= right
    assert rows["attention alone, int8"]["error"] < attention.FEW_KEYS
    assert rows["dense int8, turbo-core"]["note"] == ""  # a kernel, not an emulation
    assert case.notes[0].startswith("block map: kernel and torch reference agree on 100")
