"""Nodes that are red before anything runs: what the host's /prompt answers to files and graphs that cannot work."""

import os
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers import comfyui as host
from turbo_core.pipeline.umt5 import UMT5

pytestmark = pytest.mark.host
PAGE = Path(__file__).parents[2] / "docs" / "setups.md"
T2V, QUANT = "TurboWan2.1-T2V-1.3B-480P.pth", "TurboWan2.1-T2V-1.3B-480P-quant.pth"
HIGH, LOW = "TurboWan2.2-I2V-A14B-high-720P-quant.pth", "TurboWan2.2-I2V-A14B-low-720P-quant.pth"
STOCK, TINY = "wan2.1_t2v_14B_bf16.safetensors", "TinyWan2.1-T2V.safetensors"
LORA, UMT5_FILE = host.LORAS[0].removeprefix("loras/"), "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
VAE = "wan_2.1_vae.safetensors"


@pytest.fixture(scope="module")
def misplaced(server):
    """Sound files in the wrong folders, and a umT5 of another width."""
    models = server.base / "models"
    copies = {
        f"loras/{LORA}": "diffusion_models/a lora.safetensors",
        f"text_encoders/{UMT5_FILE}": "diffusion_models/umt5.safetensors",
        f"vae/{VAE}": "text_encoders/vae.safetensors",
        f"diffusion_models/{T2V}": "loras/model.pth",
    }
    for source, target in copies.items():
        shutil.copy(models / source, models / target)
    flux = {
        name: torch.zeros(9, 3) for name in ("double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight")
    }
    save_file(flux, models / "diffusion_models" / "flux.safetensors")
    small = load_file(models / "text_encoders" / UMT5_FILE)
    kept = {name: small[name] for name in small if "." not in name}
    sizes = {"vocabulary": len(small["shared.weight"]), "width": 32, "ffn": 64, "blocks": 2, "heads": 2, "head": 16}
    save_file(UMT5(**sizes).state_dict() | kept, models / "text_encoders" / "narrow.safetensors")
    wide = {"decoder.conv1.weight": torch.zeros(8, 48, 3, 3, 3)}  # as the VAE of the 5B model begins
    save_file(wide, models / "vae" / "wan2.2_vae.safetensors")
    yield
    made = "diffusion_models/flux.safetensors", "text_encoders/narrow.safetensors", "vae/wan2.2_vae.safetensors"
    for target in (*copies.values(), *made):
        (models / target).unlink()


def _one(kind, **inputs):
    return lambda small: {"1": {"class_type": kind, "inputs": inputs}}


def _set(name, kind, which=0, **inputs):
    """A shipped workflow with other inputs for one of the nodes of a class."""

    def make(small):
        prompt = small(name)
        numbers = [number for number in prompt if prompt[number]["class_type"] == kind]
        prompt[numbers[which]]["inputs"] |= inputs
        return prompt

    return make


def _loads(file):
    return _set("turbowan_t2v_turbo_sampler", "TurboLoader", model_name=file)


def _merges(finetune, base, turbo):
    more = {"strength": 1.0, "format": "bf16", "filename": "", "overwrite": False}
    return _one("TurboMerge", finetune=finetune, base=base, turbo=turbo, **more)


def _reports(small):
    lora = {"model": ["1", 0], "lora_name": "model.pth", "strength": 1.0}
    return {**_one("TurboLoader", model_name=T2V, dtype="default")(small),
            "2": {"class_type": "TurboLoraReport", "inputs": lora}}  # fmt: skip


def _saves(small):
    saved = {"model": ["1", 0], "filename_prefix": "../outside"}
    return {**_one("TurboLoader", model_name=T2V, dtype="default")(small),
            "2": {"class_type": "TurboSave", "inputs": saved}}  # fmt: skip


def _exchanged(small):
    prompt = small("turbowan_i2v_a14b")
    names = {HIGH: LOW, LOW: HIGH}
    for node in prompt.values():
        if node["class_type"] == "TurboLoader":
            node["inputs"]["model_name"] = names[node["inputs"]["model_name"]]
    return prompt


def _of_two_sizes(small):
    prompt = small("turbowan_compare")
    compare = next(node for node in prompt.values() if node["class_type"] == "TurboCompare")
    prompt["other"] = {"class_type": "TurboLoader", "inputs": {"model_name": TINY, "dtype": "default"}}
    compare["inputs"]["model_b"] = ["other", 0]
    return prompt


# {set-up of the table: (class that is red, function of `small` that makes the prompt)}
SETUPS = {
    "a file that is not there": ("TurboLoader", _loads("nowhere.pth")),
    "a LoRA in the place of a model": ("TurboLoader", _loads("a lora.safetensors")),
    "a text encoder in the place of a model": ("TurboLoader", _loads("umt5.safetensors")),
    "a file cut short": ("TurboLoader", _loads("truncated.pth")),
    "a file that would run code": ("TurboLoader", _loads("malicious.pth")),
    "a model of another family": ("TurboLoader", _loads("flux.safetensors")),
    "a VAE in the place of a text encoder": (
        "TurboTextEncoderLoader",
        _set("turbowan_t2v_turbo_sampler", "TurboTextEncoderLoader", text_encoder="vae.safetensors"),
    ),
    "a model in the place of a LoRA": ("TurboLoraReport", _reports),
    "an image-to-video model whose prompt has no picture": ("TurboSampler", _loads(HIGH)),
    "a text-to-video model as the low-noise expert": (
        "TurboSampler",
        _set("turbowan_i2v_a14b", "TurboLoader", 1, model_name=STOCK),
    ),
    "the two experts exchanged": ("TurboSampler", _exchanged),
    "a text encoder for another model": (
        "TurboSampler",
        _set("turbowan_t2v_turbo_sampler", "TurboTextEncoderLoader", text_encoder="narrow.safetensors"),
    ),
    "the VAE of another model behind the sampler": (
        "TurboSampler",
        _set("turbowan_t2v_turbo_sampler", "VAELoader", vae_name="wan2.2_vae.safetensors"),
    ),
    "models of two sizes": ("TurboCompare", _of_two_sizes),
    "one file given to two inputs": ("TurboMerge", _merges(STOCK, STOCK, T2V)),
    "files of two sizes": ("TurboMerge", _merges(TINY, STOCK, T2V)),
    "a quantized base or turbo": ("TurboMerge", _merges(T2V, STOCK, QUANT)),
    "a name that Windows does not allow": (
        "TurboConvert",
        _one("TurboConvert", source=T2V, format="bf16", filename="a:b", overwrite=False),
    ),
    "a place outside the output folder": ("TurboSave", _saves),
}


def _table():
    second = PAGE.read_text("utf-8").split("\n# ")[1]
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \|$", second, re.MULTILINE)[1:]
    return {setup: (node, said) for setup, node, said in rows}


def test_the_table_holds_what_is_tested():
    assert list(_table()) == list(SETUPS)


@pytest.mark.parametrize("setup", SETUPS)
def test_a_node_is_red_before_anything_runs(server, small, object_info, misplaced, setup):
    node, said = _table()[setup]
    kind, make = SETUPS[setup]
    run = host.run(server, make(small))
    assert run.status == "refused", run.messages
    (refused,) = run.refusal["node_errors"].values()
    assert (refused["class_type"], object_info[kind]["display_name"]) == (kind, node)
    (error,) = refused["errors"]
    assert said in error["details"], error["details"]
    assert kind == "TurboSave" or str(server.base) not in error["details"]  # which names the output folder
    assert not (server.base / "owned").exists(), "the pickle ran its code"


def test_a_file_that_is_mended_is_red_no_more(server, small):
    """What was read of a header holds as long as the file is the same."""
    models = server.base / "models" / "diffusion_models"
    file = models / "mended.pth"
    file.write_bytes((models / QUANT).read_bytes()[:5000])
    prompt = _loads(file.name)(small)
    try:
        assert host.run(server, prompt).status == "refused"
        time.sleep(0.01)  # a file system's clock
        shutil.copy(models / QUANT, file)
        os.utime(file)
        run = host.run(server, prompt)
        assert run.status == "execution_success", run.error
    finally:
        file.unlink()


def test_what_comes_through_a_link_is_left_to_the_run(server):
    """A name from another node: nothing is known of it before, and the run tells."""
    prompt = {
        "1": {"class_type": "PrimitiveString", "inputs": {"value": "nowhere.pth"}},
        "2": {"class_type": "TurboConvert",
              "inputs": {"source": ["1", 0], "format": "bf16", "filename": "", "overwrite": False}},
    }  # fmt: skip
    run = host.run(server, prompt)
    assert run.status in ("execution_error", "refused")  # some hosts do not link a text to a choice
    assert "custom_validation_failed" not in run.error


def test_graphs_that_lead_nowhere_are_no_fault(lab):
    """Circles, links to nothing and shapes that no page sends: the check passes, and the host says what it says."""
    graph = lab.pack.part("nodes.checks.graph")
    red = lab.pack.part("nodes.checks.red")
    link = ["1", 0]
    graphs = (
        {"1": {"class_type": "LoraLoaderModelOnly", "inputs": {"model": link}}},
        {"1": {"class_type": "TurboLoader", "inputs": {"model_name": 5}}},
        {"1": {"class_type": "TurboLoader", "inputs": {"model_name": "nowhere.pth"}}},
        {"1": {"class_type": "TurboLoader"}}, {"1": 5}, {"1": {"inputs": []}}, {}, [], None,
    )  # fmt: skip
    for prompt in graphs:
        if isinstance(prompt, dict):
            prompt |= {
                "9": {"class_type": "TurboSampler", "inputs": {"model": link, "positive": link, "model_low": [1]}}
            }
        graph._remember({"prompt": prompt})
        assert red.red(red.sampling, "9") is True
        assert graph.file_behind(link, "model") is None
    graph._remember({})
    assert red.red(red.sampling, "9") is True and graph.inputs_of("9") == {}
