"""LoRA files that cannot be added: one line that names the file and the cure, and nothing has changed."""

import json
import math

import pytest
import safetensors.torch
import torch

from tests.helpers.lora_files import MAKERS, spelled
from tests.lora.test_put_on import FLOAT, LAB, Loaded, saved
from turbo_core.errors import TurboError
from turbo_core.lora import Lora, as_loras


@pytest.fixture(scope="module")
def plain(tiny):
    return Loaded(tiny / FLOAT)


def changed(tensors, change):
    name = next(name for name in tensors if "lora_A" in name)
    return tensors | {name: change(tensors[name])}


def without(tensors, part):
    name = next(name for name in tensors if part in name)
    return {key: tensor for key, tensor in tensors.items() if key != name}


FLUX = {
    "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(4, 256),
    "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.ones(256, 4),
}
BAD = {
    "Flux": (lambda good: FLUX, "changes nothing of .*most of them for Flux.*Use a LoRA for Wan"),
    "a deeper Wan": (
        lambda good: {n.replace("blocks.0", "blocks.30").replace("blocks.1", "blocks.31"): t for n, t in good.items()},
        "for a Wan with more blocks; this one has 2",
    ),
    "a wider Wan": (lambda good: changed(good, lambda t: torch.ones(4, 5120)), r"Expected \[256, 256\].*size of Wan"),
    "another rank": (lambda good: changed(good, lambda t: t[:2]), "size of Wan"),
    "half a pair": (lambda good: without(good, "lora_B"), "one half of a pair without the other"),
    "integers": (lambda good: changed(good, lambda t: t.to(torch.int8)), "is torch.int8. Expected floats"),
    "no shape": (lambda good: changed(good, lambda t: torch.ones(())), "size of Wan"),
    "alpha": (lambda good: good | {"diffusion_model.blocks.0.self_attn.q.alpha": torch.tensor(math.nan)}, "no finite"),
    "DoRA": (lambda good: MAKERS["DoRA"](LAB, MODEL[0]), "dora_scale is of a kind that is not added here.*Turbo Save"),
    "OFT": (lambda good: good | {"diffusion_model.blocks.0.ffn.0.oft_blocks": torch.ones(4, 8, 8)}, "not added here"),
    "half a LoHa": (lambda good: without(MAKERS["LoHa"](LAB, MODEL[0]), "hada_w2_b"), "one half of a pair"),
    "half a LoKr": (lambda good: without(MAKERS["LoKr"](LAB, MODEL[0]), "lokr_w2_b"), "one half of a pair"),
    "a LoKr of no matrix": (lambda good: without(MAKERS["LoKr"](LAB, MODEL[0]), "lokr_w1"), "one half of a pair"),
    "another LoKr": (
        lambda good: {n: t.repeat(3, 1) if n.endswith("w1") else t for n, t in MAKERS["LoKr"](LAB, MODEL[0]).items()},
        "size of Wan",
    ),
    "a bias of a norm without": (
        lambda good: good | {"diffusion_model.blocks.0.self_attn.norm_q.diff_b": torch.ones(256)},
        "norm_q.bias, which .* does not have",
    ),
    "two experts in one": (
        lambda good: {
            n.replace("diffusion_model.", f"{half}."): t.clone() for n, t in good.items() for half in EXPERTS
        },
        "two LoRAs in one file.*a file of its own",
    ),
    "two adapters in one": (
        lambda good: {
            n.replace(".weight", f".{half}.weight"): t.clone() for n, t in good.items() for half in ("a", "b")
        },
        "two LoRAs in one file",
    ),
    "a model": (lambda good: MODEL[0].state_dict(), "holds whole weights: a model, no LoRA"),
}
MODEL, EXPERTS = [], ("transformer", "transformer_2")  # as Diffusers calls them


@pytest.mark.parametrize("what", BAD)
def test_bad_files_are_found_by_their_header(plain, tmp_path, what, monkeypatch):
    MODEL[:] = [plain.model]
    make, says = BAD[what]
    path = saved(tmp_path, make(spelled(LAB, plain.model, "diffusion-pipe")))
    with pytest.raises(TurboError, match=says) as told:
        plain.library.bytes([Lora(path, 0.0)], 0, 4)
    assert str(path) in str(told.value) and "\n" not in str(told.value)


def test_missing_cut_short_and_no_checkpoint(plain, tmp_path):
    good = saved(tmp_path, spelled(LAB, plain.model, "kohya"))
    raw = good.read_bytes()
    (tmp_path / "short.safetensors").write_bytes(raw[:-9])
    (tmp_path / "text.safetensors").write_text("a LoRA, honestly")
    for name, says in (("lorra.safetensors", "Did you mean lora.safetensors"), ("short.safetensors", "short.saf")):
        with pytest.raises(TurboError, match=says):
            plain.library.bytes([Lora(tmp_path / name)], 0, 4)
    with pytest.raises(TurboError, match=r"text\.safetensors"):
        plain.library.bytes([Lora(tmp_path / "text.safetensors")], 0, 4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_none_change_nothing(plain, tmp_path, value):
    path = saved(tmp_path, changed(spelled(LAB, plain.model, "PEFT"), lambda t: t.clone().fill_(value)))
    before = plain.state()
    with pytest.raises(TurboError, match="holds NaN or infinity"):
        plain.put_on(Lora(path))
    assert all(torch.equal(t, before[name]) for name, t in plain.model.state_dict().items())


def test_a_file_replaced_after_it_was_checked_is_named(plain, tmp_path):
    path = saved(tmp_path, spelled(LAB, plain.model, "PEFT"))
    plain.library.bytes([Lora(path)], 0, 4)
    path.unlink()
    saved(tmp_path, spelled(LAB, plain.model, "kohya"))
    with pytest.raises(TurboError, match="has changed since"):
        plain.put_on(Lora(path))


def test_what_is_for_other_layers_is_told_and_the_rest_acts(plain, tmp_path, caplog):
    tensors = spelled(LAB, plain.model, "PEFT") | {"lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": torch.ones(())}
    assert len(plain.library.file(Lora(saved(tmp_path, tensors)), 0).changes) == 4
    assert "1 tensors are left out, for a text encoder" in caplog.text
    stated = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 8, "transformer.r": 4})}
    path = tmp_path / "stated.safetensors"
    safetensors.torch.save_file({n: t.contiguous() for n, t in tensors.items()}, path, stated)
    plain.library.file(Lora(path), 0)
    assert "alpha 8 at rank 4" in caplog.text and "strength 2 is its full strength" in caplog.text


def test_strengths_as_people_write_them(tmp_path):
    colon = tmp_path / "a:0.5"
    safetensors.torch.save_file({"x": torch.ones(1)}, colon)
    texts = ["a.safetensors", "a.safetensors:0.8", "C:/x.safetensors", "a:-1e-1", str(colon), f"{colon}:2"]
    found = [(str(file), strength) for file, strength in as_loras([*texts, ("b", 2)])]
    assert found == [
        ("a.safetensors", 1.0), ("a.safetensors", 0.8), ("C:/x.safetensors", 1.0), ("a", -0.1), (str(colon), 1.0),
        (str(colon), 2.0), ("b", 2.0),
    ]  # fmt: skip
    for bad in ("a:strong", "a:nan", "a:inf", "a:101", "a:", ":1", ""):
        with pytest.raises(TurboError, match="Expected"):
            as_loras([bad])
