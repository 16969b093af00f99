"""Files in every spelling and number format, as TurboLoader and TurboSave take them."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.helpers.lab import QUANT, STOCK, T2V
from tests.helpers.states import saved
from tests.helpers.tiny_dits import tiny_state_dict, unquantized

pytestmark = pytest.mark.host


@pytest.fixture
def state():
    return tiny_state_dict(0)


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_dtypes_of_the_published_file_change_nothing(lab, state, tmp_path, dtype):
    """proj_l, modulation and embeddings in bf16, and the same values in float32."""
    paths = [saved(unquantized(state, rest), tmp_path / f"{rest}.pth") for rest in (torch.bfloat16, torch.float32)]
    ours, theirs = (lab.denoise(lab.load(path, dtype)) for path in paths)
    assert torch.equal(ours, theirs)


WISH = torch.tensor(list(b'[{"attention": "comfy_kitchen_sol", "tau": 1.0}]'), dtype=torch.uint8)
KEY = "blocks.1.self_attn.comfy_attention.config"


class Preference(torch.nn.Module):
    """As newer hosts keep what a file wants of a module's attention: a dict, written to the state dict as bytes."""

    config = None

    def _load_from_state_dict(self, state, prefix, *args):
        entry = state.pop(f"{prefix}config", None)
        self.config = None if entry is None else json.loads(bytes(entry.tolist()))

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if self.config is not None:
            text = json.dumps(self.config).encode()
            destination[f"{prefix}config"] = torch.tensor(list(text), dtype=torch.uint8)


def with_wish(lab, source, folder):
    """A file of the family that names an attention."""
    path = folder / f"wish{source[-4:]}"
    if source.endswith(".pth"):
        torch.save(torch.load(lab.path(source), weights_only=True) | {KEY: WISH}, path)
    else:
        with safe_open(lab.path(source), "pt") as file:
            save_file(load_file(lab.path(source)) | {KEY: WISH}, path := folder / "wish.safetensors", file.metadata())
    return path


@pytest.mark.parametrize("source", [T2V, QUANT, STOCK])
def test_attention_that_a_file_names_is_kept_by_a_host_that_knows_none(lab, tmp_path, source):
    model = lab.load(with_wish(lab, source, tmp_path))
    assert torch.equal(lab.denoise(model), lab.denoise(lab.load(source)))
    model = lab.merged(lab.quantize(model), lab.lora(model))
    lab.pack.saving.save_model(model, str(tmp_path / "saved.safetensors"))
    assert torch.equal(load_file(tmp_path / "saved.safetensors")[KEY], WISH)
    assert lab.load(tmp_path / "saved.safetensors").get_attachment(lab.pack.loading.SOURCE).attention


@pytest.mark.parametrize("source", [T2V, QUANT])
def test_attention_that_a_file_names_reaches_a_host_that_knows_it(comfy, lab, tmp_path, monkeypatch, source):
    from comfy.ldm.wan.model import WanSelfAttention

    init = WanSelfAttention.__init__

    def newer(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.comfy_attention = Preference()

    monkeypatch.setattr(WanSelfAttention, "__init__", newer)
    model = lab.load(with_wish(lab, source, tmp_path))
    blocks = model.model.diffusion_model.blocks
    assert blocks[1].self_attn.comfy_attention.config == json.loads(bytes(WISH.tolist()))
    assert blocks[0].self_attn.comfy_attention.config is None
    lab.pack.saving.save_model(model, str(tmp_path / "saved.safetensors"))
    assert torch.equal(load_file(tmp_path / "saved.safetensors")[KEY], WISH)
    blocks[1].self_attn.comfy_attention.config = None  # as a node may
    lab.pack.saving.save_model(model, str(tmp_path / "without.safetensors"))
    assert KEY not in load_file(tmp_path / "without.safetensors")
