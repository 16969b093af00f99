"""Tables of launches: what is read back, what is ignored, which row a card takes."""

import json
import logging

import pytest
import torch

triton = pytest.importorskip("triton", reason="launches need triton (pip install triton)")
int8_configs = pytest.importorskip("turbo_core.kernels.int8_configs")
tune = pytest.importorskip("turbo_core.bench.tune")

CARD = "NVIDIA Test 9000"
CPU = torch.device("cpu")
TABLE = {"block plain long": int8_configs.DEFAULT._replace(stages=4), "row qkv short": int8_configs.DEFAULT}


def test_a_table_is_read_back_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "table.json"
    for _ in range(2):
        tune.write_table(path, CARD, TABLE)
    assert int8_configs.read_table(path, CARD) == TABLE
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_sees_a_whole_table_when_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    tune.write_table(path, CARD, TABLE)
    monkeypatch.setattr(tune.json, "dumps", lambda *_, **__: pytest.fail("disk full"))
    with pytest.raises(pytest.fail.Exception):
        tune.write_table(path, CARD, {})
    assert int8_configs.read_table(path, CARD) == TABLE


def changed(**change):
    return json.dumps({"card": CARD, "triton": triton.__version__, "launches": TABLE} | change)


@pytest.mark.parametrize(
    "text",
    [
        changed()[:40],
        "",
        "[]",
        "{}",
        "\x00\xff",
        changed(card="NVIDIA Other"),
        changed(triton="3.0.0"),
        changed(launches=None),
        changed(launches={"block plain long": ["pointers", 128, 128, 128, 8, 8]}),
        changed(launches={"block plain long": ["pointers", 96, 128, 128, 8, 8, 3]}),
        changed(launches={"block plain long": ["pointers", 128, 128, 128, 0, 8, 3]}),
        changed(launches={"block plain long": ["magic", 128, 128, 128, 8, 8, 3]}),
        changed(launches={"block quantize long": ["pointers", 64, 128, 128, 8, 4, 3]}),
        changed(launches={"block plain huge": ["pointers", 128, 128, 128, 8, 8, 3]}),
        changed(launches={"block plain long": "pointers"}),
    ],
)
def test_a_damaged_or_foreign_table_is_ignored_with_one_line(text, tmp_path, caplog):
    path = tmp_path / "table.json"
    path.write_bytes(text.encode("latin-1"))
    with caplog.at_level(logging.WARNING):
        assert int8_configs.read_table(path, CARD) == {}
    assert len(caplog.records) == 1 and str(path) in caplog.text and "turbo-core tune" in caplog.text


def test_no_table_is_no_news(tmp_path, caplog):
    assert int8_configs.read_table(tmp_path / "none.json", CARD) == {} and not caplog.records


def test_where_a_table_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("TURBOWAN_CACHE", str(tmp_path))
    assert int8_configs.table_path(CARD) == tmp_path / "launch-nvidia-test-9000.json"
    monkeypatch.delenv("TURBOWAN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    assert int8_configs.table_path(CARD) == tmp_path / "turbowan" / "launch-nvidia-test-9000.json"


def test_without_a_home_there_is_no_table_and_no_error(monkeypatch):
    """The kernels would have counted as broken."""
    for name in ("TURBOWAN_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(int8_configs.os.path, "expanduser", lambda path: path)  # as it does for a user without one
    assert int8_configs.read_table(int8_configs.table_path(CARD), CARD) == {}


KINDS = {
    (7, 5): None,
    (8, 0): "sm_80",
    (8, 6): "sm_86",
    (8, 9): "sm_86",
    (9, 0): "sm_90",
    (10, 3): "sm_100",
    (12, 1): "sm_120",
}


@pytest.mark.parametrize("capability, kind", KINDS.items())
def test_a_card_takes_the_newest_row_that_is_not_newer(capability, kind, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert int8_configs.card_kind.__wrapped__(torch.device("cuda")) == kind
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert int8_configs.card_kind.__wrapped__(torch.device("cuda")) == "hip"


def test_a_tuned_launch_takes_the_place_of_the_shipped_one(monkeypatch):
    monkeypatch.setattr(int8_configs, "tuned_table", lambda device: TABLE)
    monkeypatch.setattr(int8_configs, "card_kind", lambda device: "sm_90")
    device = torch.device("cuda")
    assert int8_configs.config("block plain", 32760, device) == TABLE["block plain long"]
    assert int8_configs.config("block plain", 512, device) == int8_configs.shipped("block plain", 512, "sm_90")
    assert int8_configs.config("block plain", 32760, CPU, "sm_90") == int8_configs.shipped(
        "block plain", 32760, "sm_90"
    )


def test_several_gates_have_a_launch_of_their_own_and_fall_back_from_it(monkeypatch):
    """What was tuned was tuned with one gate; and the launch that failed is the one that is left."""
    tuned = int8_configs.DEFAULT._replace(stages=4)
    monkeypatch.setattr(int8_configs, "card_kind", lambda device: "sm_100")
    monkeypatch.setattr(int8_configs, "tuned_table", lambda device: {"block residual long": tuned})
    monkeypatch.setattr(int8_configs, "_FAILED", set())
    rows = 4 * int8_configs.SHORT
    one, several = (int8_configs.config("block residual", rows, CPU, gates=gates) for gates in (1, 2))
    assert one == tuned and several == int8_configs._GATES["sm_100"] != int8_configs.DEFAULT
    assert int8_configs.drop(CPU, "block residual", rows, "no such launch", gates=2)
    assert int8_configs.config("block residual", rows, CPU, gates=2) == int8_configs.DEFAULT
    assert int8_configs.config("block residual", rows, CPU) == tuned, "not the one that is to blame"
    assert not int8_configs.drop(CPU, "block residual", rows, "no such launch", gates=2)
