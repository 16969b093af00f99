"""TurboDoctor: what it says is what is there, of the host and of a MODEL."""

import pytest
import torch

from tests.helpers.lab import QUANT, STOCK


@pytest.fixture
def doctor(pack):
    node = pack.nodes["TurboDoctor"]
    return lambda model=None: node.execute(model)[0]


def lines(text):
    """{item: finding} of a report."""
    rows = (line.strip().split("  ", 1) for line in text.splitlines() if line.startswith("  "))
    return {row[0]: row[1].strip() for row in rows if len(row) == 2}


def test_report_of_the_host(comfy, doctor):
    from comfy.ldm.modules.attention import optimized_attention
    from comfyui_version import __version__

    text = doctor()
    found = lines(text)
    assert found["ComfyUI"] == __version__ and found["device"] == "cpu"
    assert optimized_attention.__name__ == f"attention_{found['dense attention'].split(',')[0]}"
    assert found["VRAM state"] == "DISABLED" and found["dynamic VRAM"].startswith("off")
    assert found["comfy_kitchen eager"].startswith("on, ") and found["comfy_kitchen cuda"].startswith("off: ")
    assert torch.__version__ in found["torch"] and {"int8 linear", "sparse attention", "triton"} <= set(found)
    titles = [line for line in text.splitlines() if line and not line.startswith(" ")]
    assert titles[-1] == "on this card", "what a person with a new card looks for is not to be scrolled for"
    assert "generate" not in found and "this model" not in text, "what ComfyUI does itself, and no MODEL was given"


def test_text_is_also_shown_on_the_node(comfy, pack):
    output = pack.nodes["TurboDoctor"].execute()
    assert output.ui == {"text": (output[0],)}


def test_looks_again_at_every_run(comfy, pack):
    mark = pack.nodes["TurboDoctor"].fingerprint_inputs(model=None)
    assert mark != mark, "nan: never equal to the run before"


def test_published_model(lab, doctor):
    found = lines(doctor(lab.load(QUANT)))
    assert found["family"] == f"TurboWan (dim 256, 2 blocks) ({QUANT})"
    assert found["linear layers"] == "int8_block in 20" and found["proj_l"].startswith("in every block")
    assert found["attention"].startswith("sparse-linear (SLA), top-k 0.1, bf16") and "default" in found["attention"]
    assert found["rCM sigma_max"] == "80" and found["patched weights"] == "none"


def test_settings_of_the_other_nodes_are_told(lab, doctor):
    model = lab.quantize(lab.load(), "row", skip_blocks="1")
    model = lab.attention(model, 0.25, "int8", mode="sparse only", dense_blocks="1", min_tokens=99, end_percent=0.5)
    found = lines(doctor(model))
    assert found["linear layers"] == "int8_row in 10, float32 in 10"
    assert found["attention"] == (
        "sparse, without a linear branch, top-k 0.25, int8, blocks 1 dense, dense below 99 tokens, "
        "part of the sigmas only"
    )


def test_stock_model_is_dense_until_told_otherwise(comfy, lab, doctor):
    model = comfy.sd.load_diffusion_model(lab.path(STOCK))
    found = lines(doctor(model))
    assert found["proj_l"].startswith("none") and found["attention"].startswith("dense, by ")
    assert found["rCM sigma_max"].startswith("unknown") and found["family"].startswith("WAN21")
    assert lines(doctor(lab.attention(model, 0.5)))["attention"] == "sparse, without a linear branch, top-k 0.5, bf16"
    model.model_options["transformer_options"]["optimized_attention_override"] = lambda func, *a, **kw: func(*a, **kw)
    assert lines(doctor(model))["attention"] == "dense, by another node's override"


def test_looking_does_not_load(comfy, lab, doctor):
    model = lab.load()
    before = list(comfy.model_management.current_loaded_models)
    assert " 0 B of it on cpu" in doctor(model) and before == comfy.model_management.current_loaded_models


def test_model_of_another_kind_is_named_not_refused(comfy, lab, doctor):
    model = lab.load()
    kept = model.model.diffusion_model
    try:
        model.model.diffusion_model = torch.nn.Linear(2, 2)
        model.model.diffusion_model.dtype = torch.float32
        assert lines(doctor(model))["family"].startswith("Linear: not a Wan model")
    finally:
        model.model.diffusion_model = kept
