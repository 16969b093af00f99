"""Reading checkpoints: every spelling of a Wan file comes to the official names, and files larger than the memory."""

import json
import math
import os
import time

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers.states import official, plain, same, saved
from tests.helpers.tiny_dits import tiny_state_dict
from turbo_core import checkpoint
from turbo_core.checkpoint.formats import FLOATS
from turbo_core.checkpoint.names import PROJ_L
from turbo_core.checkpoint.shapes import Sizes, expected_shapes
from turbo_core.int8 import block_scale_shape, dequantize_block, quantize_rows
from turbo_core.wan import QUANTIZED_LINEARS

T2V_14B = Sizes(5120, 16, 16, 13824, 4096, 256, 128)
T2V_1_3B = Sizes(1536, 16, 16, 8960, 4096, 256, 128)
Q = "blocks.1.self_attn.q"


def hollow(path, sizes, blocks, has_sla=True):
    """A safetensors file of a full-size model without its data: only the header takes room on the disk."""
    header, end = {}, 0
    for name, shape in expected_shapes(blocks, has_sla, sizes).items():
        dtype, width = ("F32", 4) if PROJ_L in name else ("BF16", 2)
        start, end = end, end + width * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)
    return path


def test_published_file(tiny, state):
    loaded, found = checkpoint.load(tiny / "TinyWan2.1-T2V.pth")
    assert same(loaded, official(state))
    assert loaded["patch_embedding.weight"].shape == (256, 16, 1, 2, 2)
    assert loaded[f"blocks.0.{PROJ_L}.weight"].dtype == torch.float32
    assert (found.container, found.format, found.task, found.has_sla) == ("pth", "bf16", "t2v", True)
    assert (found.dim, found.ffn_dim, found.num_heads, found.head_dim, found.num_layers) == (256, 512, 2, 128, 2)
    assert (found.in_dim, found.out_dim, found.text_dim, found.tensors) == (16, 16, 64, 73)
    assert found.bytes == (tiny / "TinyWan2.1-T2V.pth").stat().st_size


def test_published_quantized_names_are_renamed(tiny, state):
    raw = torch.load(tiny / "TinyWan2.1-T2V-quant.pth", weights_only=True)
    loaded, found = checkpoint.load(tiny / "TinyWan2.1-T2V-quant.pth")
    assert found.format == "int8_block"
    assert torch.equal(loaded[f"{Q}.weight"], raw[f"{Q}.int8_weight"])
    assert torch.equal(loaded[f"{Q}.weight_scale"], raw[f"{Q}.scale"])
    assert not [k for k in loaded if "int8_weight" in k or k.endswith(".scale")]
    quantized = [k for k, v in loaded.items() if v.dtype == torch.int8]
    assert sorted(quantized) == sorted(f"blocks.{n}.{x}.weight" for n in (0, 1) for x in QUANTIZED_LINEARS)
    decoded = dequantize_block(loaded[f"{Q}.weight"], loaded[f"{Q}.weight_scale"])
    assert (decoded - state[f"{Q}.weight"].float()).norm() < 0.015 * decoded.norm()


def test_image_to_video_patch_columns_run_over_channels_first(tiny):
    raw = torch.load(tiny / "TinyWan2.2-I2V-high.pth", weights_only=True)["patch_embedding.weight"]
    loaded, found = checkpoint.load(tiny / "TinyWan2.2-I2V-high.pth")
    assert (found.task, found.in_dim) == ("i2v", 36)
    c, h, w = 20, 1, 0
    assert torch.equal(loaded["patch_embedding.weight"][:, c, 0, h, w], raw[:, c * 4 + h * 2 + w])


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "prefix", ["", "net.", "model.diffusion_model.", "diffusion_model.", "module.", "module.net.", "net_ema."]
)
def test_prefixes(tmp_path, state, prefix, suffix):
    path = saved({prefix + k: v for k, v in state.items()}, tmp_path / f"x{suffix}")
    loaded, found = checkpoint.load(path)
    assert same(loaded, official(state))
    assert any(prefix in note for note in found.notes) == bool(prefix)


def test_wrapped_module_inside_names(tmp_path, state):
    wrapped = {k.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."): v for k, v in state.items()}
    wrapped = {f"net._orig_mod.{k}": v for k, v in wrapped.items()}
    assert same(checkpoint.load(saved(wrapped, tmp_path / "x.pth"))[0], official(state))


@pytest.mark.parametrize("key", ["state_dict", "model", "net", "ema", "anything"])
def test_training_dump(tmp_path, state, key):
    dump = {key: state, "step": torch.tensor(7), "config": {"lr": 1e-4}, "optimizer": {"state": {0: {"step": 1}}}}
    loaded, found = checkpoint.load(saved(dump, tmp_path / "x.pth"))
    assert same(loaded, official(state))
    assert key in found.notes[0]


def test_dump_with_averaged_weights_takes_those_and_says_so(tmp_path, state):
    other = {k: torch.zeros_like(v) for k, v in state.items()}
    path = saved({"model": other, "ema": state, "net_ema": {"decay": torch.tensor(0.9)}}, tmp_path / "x.pth")
    loaded, found = checkpoint.load(path)
    assert same(loaded, official(state))
    assert "'ema'" in found.notes[0]


def test_whole_checkpoint_leaves_the_other_models_out(tmp_path, state):
    content = {f"model.diffusion_model.{k}": v for k, v in state.items()}
    content["first_stage_model.conv1.weight"] = torch.zeros(3)
    loaded, found = checkpoint.load(saved(content, tmp_path / "x.safetensors"))
    assert same(loaded, official(state))
    assert "1 tensors outside" in found.notes[1]


def test_dictionary_that_contains_itself_ends(tmp_path, state):
    dump = {"state_dict": state}
    dump["self"] = dump
    assert same(checkpoint.load(saved(dump, tmp_path / "x.pth"))[0], official(state))


def test_old_non_zip_file(tmp_path, state):
    torch.save(state, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    assert same(checkpoint.load(tmp_path / "x.pth")[0], official(state))


def test_stock_file_without_proj_l(tiny):
    loaded, found = checkpoint.load(tiny / "tiny_wan_stock_bf16.safetensors")
    assert (found.container, found.has_sla, found.num_heads) == ("safetensors", False, 2)
    assert not any("proj_l" in k for k in loaded)
    assert json.loads(found.metadata["config"])["transformer"]["text_dim"] == 64


def test_row_scales_flat_or_single_become_columns(tmp_path, state):
    for layer in (f"blocks.{n}.{x}" for n in (0, 1) for x in QUANTIZED_LINEARS):
        state[f"{layer}.weight"], scale = quantize_rows(state[f"{layer}.weight"])
        state[f"{layer}.weight_scale"] = scale[0, 0] if layer.endswith(".o") else scale.flatten()
    loaded, found = checkpoint.load(saved(state, tmp_path / "x.pth"))
    assert found.format == "int8_row"
    assert all(v.shape[1] == 1 and v.shape[0] > 1 for k, v in loaded.items() if k.endswith("weight_scale"))
    assert torch.equal(
        loaded["blocks.0.self_attn.o.weight_scale"].unique(), state["blocks.0.self_attn.o.weight_scale"][None]
    )


def test_fp8_with_scale_weight_is_decoded(tmp_path, state):
    expected = {}
    for layer in (f"blocks.{n}.{x}" for n in (0, 1) for x in QUANTIZED_LINEARS):
        weight = (state[f"{layer}.weight"].float() * 8).to(torch.float8_e4m3fn)
        state[f"{layer}.weight"], state[f"{layer}.scale_weight"] = weight, torch.tensor(0.125)
        expected[layer] = (weight.float() * 0.125).bfloat16()
    state["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    loaded, found = checkpoint.load(saved(state, tmp_path / "x.safetensors"))
    assert found.format == "fp8"
    assert all(torch.equal(loaded[f"{layer}.weight"], w) for layer, w in expected.items())
    assert not [k for k in loaded if "scale" in k]


def test_image_branch_and_vace_pass_through(tmp_path, state):
    state["img_emb.proj.0.weight"] = torch.ones(1280)
    for n in (0, 1):
        state[f"blocks.{n}.cross_attn.k_img.weight"] = torch.ones(256, 256)
    loaded, found = checkpoint.load(saved(state, tmp_path / "clip.pth"))
    assert found.task == "i2v"
    assert torch.equal(loaded["blocks.1.cross_attn.k_img.weight"], torch.ones(256, 256))
    state["vace_patch_embedding.weight"] = torch.ones(256, 96, 1, 2, 2)
    state["blocks.0.something_of_vace.weight"] = torch.ones(2)
    loaded, found = checkpoint.load(saved(state, tmp_path / "vace.pth"))
    assert "VACE" in found.family
    assert "blocks.0.something_of_vace.weight" in loaded


@pytest.mark.parametrize(
    ("sizes", "blocks", "has_sla", "family"),
    [
        (T2V_1_3B, 30, True, "TurboWan2.1-T2V-1.3B"),
        (T2V_14B, 40, True, "TurboWan2.1-T2V-14B"),
        (T2V_14B, 40, False, "Wan2.1-T2V-14B"),
        (T2V_14B._replace(in_dim=36), 40, True, "TurboWan2.2-I2V-A14B"),
        (Sizes(3072, 48, 48, 14336, 4096, 256, 128), 30, False, "Wan2.2-TI2V-5B"),
    ],
)
def test_published_sizes_are_recognized_without_reading_28_gigabytes(tmp_path, sizes, blocks, has_sla, family):
    path = hollow(tmp_path / "x.safetensors", sizes, blocks, has_sla)
    checkpoint.inspect(path)
    start = time.perf_counter()
    found = checkpoint.inspect(path)
    assert time.perf_counter() - start < 2  # 0.05 s alone; reading the 14B would take far longer
    assert found.family == family
    assert found.num_heads == sizes.dim // 128
    loaded, _ = checkpoint.load(path, mapped=True)  # more than the memory of many machines
    assert loaded["blocks.0.ffn.0.weight"][0, 0] == 0


@pytest.mark.parametrize("name", ["TinyWan2.1-T2V.pth", "tiny_wan_stock_bf16.safetensors"])
def test_loaded_tensors_may_be_written_to_and_the_file_stays(tiny, name):
    before = (tiny / name).read_bytes()
    loaded, _ = checkpoint.load(tiny / name)
    loaded["blocks.0.ffn.0.weight"].zero_()
    assert not loaded["blocks.0.ffn.0.weight"].any()
    assert (tiny / name).read_bytes() == before


def test_views_and_shared_storage_in_a_pth(tmp_path, state):
    both = torch.randn(2, 300, 256).bfloat16()
    state["blocks.0.self_attn.q.weight"] = both[0, 7:263].t()
    state["blocks.0.self_attn.k.weight"] = both[1, :256]
    loaded, _ = checkpoint.load(saved(state, tmp_path / "x.pth"))
    assert same(loaded, official(state))


def test_heads_of_64_by_proj_l_and_by_metadata(tmp_path):
    sizes = Sizes(256, 16, 16, 384, 64, 256, 64)
    state = tiny_state_dict(0, sizes)
    assert checkpoint.inspect(saved(state, tmp_path / "x.pth")).num_heads == 4
    config = {"config": json.dumps({"transformer": {"num_heads": 4}})}
    save_file(plain(state), tmp_path / "x.safetensors", metadata=config)
    assert checkpoint.inspect(tmp_path / "x.safetensors").head_dim == 64
    save_file(plain(state), tmp_path / "y.safetensors")
    assert checkpoint.inspect(tmp_path / "y.safetensors").head_dim == 128


def test_mixed_layers_are_called_mixed(tmp_path, state):
    state[f"{Q}.weight"] = state[f"{Q}.weight"].float()
    assert checkpoint.inspect(saved(state, tmp_path / "x.pth")).format == "mixed"


def test_formats_cover_what_torch_can_hold(tmp_path, state):
    for name, dtype in FLOATS.items():
        cast = {k: v.to(dtype) for k, v in state.items()}
        assert checkpoint.inspect(saved(cast, tmp_path / f"{name}.pth")).format == name


def test_ragged_block_scale_shape():
    assert block_scale_shape(200, 130) == (2, 2)  # both edges ragged
