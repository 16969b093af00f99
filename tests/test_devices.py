import contextlib

import pytest
import torch

from turbo_core import devices
from turbo_core.errors import TurboError


def test_a_device_that_is_not_there_is_told_in_one_line():
    """torch lists its backends on 1,200 characters; on meta there are no numbers."""
    for name in ("mps" if not torch.backends.mps.is_available() else "cuda:99", "meta"):
        with pytest.raises(TurboError, match="Leave --device out") as error:
            devices.pick_device(name)
        assert len(str(error.value)) < 250


def test_only_apple_gpus_lack_float64():
    assert [devices.widest_float(name) for name in ("cpu", "cuda:1", "mps")] == [torch.float64] * 2 + [torch.float32]


def test_locked_memory_is_taken_in_pieces_that_torch_does_not_round_up(monkeypatch):
    pieces, empty = [], torch.empty

    def locked(size, dtype, pin_memory):
        assert pin_memory
        pieces.append(size)
        return empty(size, dtype=dtype)

    monkeypatch.setattr(devices, "_LOCKED", 1 << 12)
    state = {str(n): torch.randn(n, 3) for n in (70, 1, 300, 0, 40)} | {
        "a": torch.ones(5, 7, dtype=torch.int8), "b": torch.tensor(2.5, dtype=torch.bfloat16),
    }  # fmt: skip
    monkeypatch.setattr(torch, "empty", locked)
    read = []
    found = devices.page_locked(state, lambda tensor: read.append(1) or tensor.clone())
    monkeypatch.setattr(torch, "empty", empty)
    assert list(found) == list(state) and len(read) == len(state)
    assert all(found[name].dtype == t.dtype and torch.equal(found[name], t) for name, t in state.items())
    assert pieces == [1 << 12, 1 << 12, 1024]  # powers of two, the last no larger than what is left
    if not torch.cuda.is_available():
        assert devices.page_locked(state) is None  # no card: the system gives none


def test_work_beside_other_work_has_one_stream_whose_memory_is_used_again(monkeypatch):
    made = []

    class Stream:
        def __init__(self, device):
            made.append(device)

        def synchronize(self):
            made.append("done")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    devices._stream_beside.cache_clear()
    card = torch.device("cuda", 7)
    for _ in range(2):
        with devices.own_stream(card):
            pass
    devices._stream_beside.cache_clear()
    assert made == [card, "done", "done"]


@pytest.mark.parametrize(
    ("hip", "capability", "expected"),
    [(None, (7, 0), False), (None, (7, 5), True), (None, (12, 0), True), ("6.4", (11, 0), False)],
)
def test_int8_products_only_where_the_card_has_them(hip, capability, expected, monkeypatch):
    devices.has_int_mm.cache_clear()
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert devices.has_int_mm(torch.device("cuda")) is expected
    assert devices.has_int_mm(torch.device("cpu")) and not devices.has_int_mm(torch.device("mps"))
    devices.has_int_mm.cache_clear()


@pytest.mark.parametrize(
    "known, expected",
    [
        ({"avx512_vnni": True}, True),
        ({"avx512_vnni": False, "avx_vnni": True}, True),
        ({"avx512_vnni": False, "avx_vnni": False, "amx_int8": False}, False),
        ({"neon": True}, True),  # another architecture
    ],
)
def test_int8_products_are_left_to_float32_where_a_cpu_has_none(known, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    assert devices.int_mm_pays.__wrapped__(torch.device("cpu")) is expected
    assert devices.int_mm_pays.__wrapped__(torch.device("cuda"))


@pytest.mark.parametrize(
    ("told", "files", "expected"),
    [
        # a container of today: its own group is the root
        (
            "0::/\n",
            {"memory.max": "1000", "memory.current": "700", "memory.stat": "anon 5\ninactive_file 50\n"},
            (350, 1000),
        ),
        # a cluster's job in a group of a group, of which the outer one is fuller
        (
            "0::/slurm/job_7\n",
            {
                "slurm/job_7/memory.max": "900", "slurm/job_7/memory.current": "100", "slurm/job_7/memory.stat": "",
                "slurm/memory.max": "1000", "slurm/memory.current": "990", "slurm/memory.stat": "inactive_file 0",
            },
            (10, 1000),
        ),
        # the first form, whose path is the machine's and not the container's
        (
            "11:memory:/docker/abc\n3:cpu:/\n0::/\n",
            {
                "memory/memory.limit_in_bytes": "800", "memory/memory.usage_in_bytes": "900",
                "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 50\n",
            },
            (0, 800),
        ),
        ("0::/\n", {"memory.max": "max", "memory.current": "7", "memory.stat": ""}, None),
        ("0::/../other\n", {}, None),
        (None, {}, None),
    ],
)  # fmt: skip
def test_the_memory_of_a_container_or_job_is_what_its_groups_leave(told, files, expected, tmp_path, monkeypatch):
    if told is not None:
        (tmp_path / "process").write_text(told)
    for name, text in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(text)
    found = devices._of_groups(tmp_path / "process", tmp_path / "groups")
    assert found == expected
    monkeypatch.setattr(devices, "_of_groups", lambda: found)
    machine = devices._of_machine()
    if machine is not None and expected is not None:
        assert devices.available_memory() == expected
