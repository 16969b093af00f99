"""What the benchmark says about the machine."""

import torch

from turbo_core.bench import machine


def test_the_machine_s_rates_come_from_its_case():
    rows = [{"name": "copy", "ms": 2.0}, {"name": "bf16 matrix product", "ms": 1.0}, {"name": "int8 matrix product"}]
    told = {"shape": {"bytes": 4_000_000, "n": 100}, "rows": rows}
    assert machine.limits(told) == {"gb_s": 2.0, "tflops": 0.002}


def test_clocks_are_read_from_what_nvidia_smi_says():
    lines = ["1980, 2619, 512.5, 61\n", "1755, 2619, [N/A], 64\n", "cut off, 26"]
    assert machine.read_clocks(lines) == {
        "SM MHz": [1755.0, 1867.5, 1980.0],
        "memory MHz": [2619.0, 2619.0, 2619.0],
        "W": [512.5, 512.5, 512.5],
        "C": [61.0, 62.5, 64.0],
    }
    assert "said nothing" in machine.read_clocks([])["not logged"]


def test_a_busy_machine_is_called_one():
    assert "3.0 processes" in machine.busy({"load": 3, "cores": 2})
    assert machine.busy({"load": 0.2, "cores": 2}) is None
    assert machine.busy({"load": None, "cores": 2}) is None


def test_folders_are_named_after_the_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 4090")
    assert machine.slug("cuda") == "geforce-rtx-4090" and machine.slug("cpu") == "cpu"
