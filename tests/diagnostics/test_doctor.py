"""The doctor says which path is taken, and why a faster one is not."""

import torch

from turbo_core import dispatch, selfcheck
from turbo_core.diagnostics import cards, doctor


def test_the_doctor_says_which_path_and_why(monkeypatch):
    monkeypatch.setattr(doctor, "pick_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(doctor, "int_mm_pays", lambda device: False)
    assert dict(doctor.examine()["paths"])["int8 linear"].startswith("float32 products")
    monkeypatch.setattr(doctor, "int_mm_pays", lambda device: True)
    found = dict(doctor.examine()["paths"])
    assert found["norms"] == "PyTorch, in float32; no Triton kernels on cpu"
    assert found["sparse attention"].endswith("; no Triton kernels on cpu")
    assert found["int8 Wan block"] == "layer by layer" and found["int8 linear"].startswith("torch._int_mm")


def test_the_doctor_tries_the_kernels_of_a_card(card, monkeypatch):
    monkeypatch.setattr(doctor, "pick_device", lambda: card)
    for family in dispatch.FAMILIES:
        monkeypatch.setitem(selfcheck.CHECKS, family, lambda device: None)
    monkeypatch.setattr(doctor, "here", lambda device: cards.on_card("NVIDIA GeForce RTX 4090", 23.6))
    sections = doctor.examine()
    assert list(sections)[-1] == "on this card" and sections["on this card"][-1][0] == "attention"
    found = dict(sections["paths"])
    assert {found[name] for name in ("int8 linear", "norms", "sparse attention")} == {"Triton kernels"}
    assert found["int8 Wan block"].startswith("fused")


def test_the_path_of_a_linear_is_told_in_words(monkeypatch):
    for pays, words in ((True, "_int_mm"), (False, "float32 products")):
        monkeypatch.setattr(doctor, "int_mm_pays", lambda device, pays=pays: pays)
        assert words in doctor.int8_path("cpu", "block")
    monkeypatch.setattr(doctor, "why_not", lambda device, family: "Triton is not installed")
    for fmt in ("block", "row"):
        assert "Triton is not installed" in doctor.int8_path("meta", fmt)
    monkeypatch.setattr(doctor, "why_not", lambda device, family: None)
    assert "Triton" in doctor.int8_path("meta", "row")
