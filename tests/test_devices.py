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
