"""Reading checkpoints: every spelling of a Wan file comes to the official names, everything else is refused clearly."""

import json
import math
import os
import pickle
import time
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers.states import official, plain, same, saved
from tests.helpers.tiny_dits import tiny_state_dict
from turbo_core import checkpoint
from turbo_core.checkpoint.formats import FLOATS
from turbo_core.checkpoint.names import PROJ_L, looks_like
from turbo_core.checkpoint.shapes import Sizes, expected_shapes
from turbo_core.errors import TurboError
from turbo_core.int8 import block_scale_shape, dequantize_block, quantize_rows
from turbo_core.wan import QUANTIZED_LINEARS

T2V_14B = Sizes(5120, 16, 16, 13824, 4096, 256, 128)
T2V_1_3B = Sizes(1536, 16, 16, 8960, 4096, 256, 128)
Q = "blocks.1.self_attn.q"


@pytest.fixture(scope="module")
def published():
    return tiny_state_dict(0)


@pytest.fixture
def state(published):
    return dict(published)  # tests replace tensors, they do not write into them


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


# what is read


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
    loaded, _ = checkpoint.load(path)  # more than the memory of many machines: mapped, not read
    assert loaded["blocks.0.ffn.0.weight"][0, 0] == 0


@pytest.mark.parametrize("name", ["TinyWan2.1-T2V.pth", "tiny_wan_stock_bf16.safetensors"])
def test_loaded_tensors_may_be_written_to_and_the_file_stays(tiny, name):
    before = (tiny / name).read_bytes()
    loaded, _ = checkpoint.load(tiny / name)
    loaded["blocks.0.ffn.0.weight"].zero_()
    assert not loaded["blocks.0.ffn.0.weight"].any()
    assert (tiny / name).read_bytes() == before


def test_pth_packed_again_with_compression_is_refused(tmp_path, state):
    old = zipfile.ZipFile(saved(state, tmp_path / "x.pth"))
    with old, zipfile.ZipFile(tmp_path / "y.pth", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    refuse(tmp_path / "y.pth", "with compression")


def test_views_and_shared_storage_in_a_pth(tmp_path, state):
    both = torch.randn(2, 300, 256).bfloat16()
    state["blocks.0.self_attn.q.weight"] = both[0, 7:263].t()
    state["blocks.0.self_attn.k.weight"] = both[1, :256]
    loaded, _ = checkpoint.load(saved(state, tmp_path / "x.pth"))
    assert same(loaded, official(state))


def test_places_found_as_with_an_older_torch(tmp_path, state, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.10.0")
    assert same(checkpoint.load(saved(state, tmp_path / "x.pth"))[0], official(state))


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


# what is refused


def refuse(path, *words):
    for call in (checkpoint.inspect, checkpoint.load):
        with pytest.raises(TurboError) as error:
            call(path)
        assert str(path) in str(error.value)
        for word in words:
            assert word in str(error.value), str(error.value)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_malicious_pickle_does_not_run(tmp_path, state, zipped):
    state["extra"] = Payload(str(tmp_path / "owned"))
    path = tmp_path / "evil.pth"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    refuse(path, "refused", "tried to load something other than tensors", "open")
    path.write_bytes(pickle.dumps(Payload(str(tmp_path / "owned")), 2))  # a bare pickle, not from torch
    refuse(path, "refused")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", "old.pth"])
@pytest.mark.parametrize("kept", [0, 5, 300, 0.5, 0.999])
def test_truncated_file(tmp_path, state, suffix, kept):
    path = tmp_path / f"x{suffix}"
    if suffix == "old.pth":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    else:
        saved(state, path)
    os.truncate(path, kept if kept > 1 else int(path.stat().st_size * kept))
    refuse(path, "cut short", "download it again")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_flipped_bytes_never_raise_anything_else(tmp_path, suffix):
    content = {"head.modulation": torch.zeros(1, 2, 4), "blocks.0.x": torch.zeros(2)}
    data = saved(content, tmp_path / f"x{suffix}").read_bytes()
    path = tmp_path / f"y{suffix}"
    for position in range(0, len(data), 19):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :])
        with pytest.raises(TurboError):
            checkpoint.inspect(path)


@pytest.mark.parametrize(
    ("start", "word"),
    [(b"GGUF", "GGUF"), (b"version https://git-lfs.github.com", "LFS"), (b"<!DOCTYPE html>", "web page")],
)
def test_what_is_downloaded_by_mistake_is_named(tmp_path, start, word):
    for name in ("x.pth", "x.safetensors"):
        (tmp_path / name).write_bytes(start + b"\n" * 200)
        refuse(tmp_path / name, word)


def test_not_a_dictionary(tmp_path):
    torch.save([torch.zeros(2)], tmp_path / "x.pth")
    refuse(tmp_path / "x.pth", "list", "Expected a model")


def test_missing_file_suggests_its_neighbours(tiny, tmp_path):
    refuse(tiny / "TinyWan2.1-T2V.safetensor", "does not exist", "TinyWan2.1-T2V.pth")
    refuse(tmp_path / "no" / "x.pth", "no folder")
    refuse(tmp_path, "is a folder")


def test_missing_keys_are_counted_and_named(tmp_path, state):
    for x in ("q", "k"):
        del state[f"blocks.1.self_attn.{x}.weight"]
    refuse(saved(state, tmp_path / "x.pth"), "2 are missing", "block 1", "blocks.1.self_attn.q.weight")


def test_part_of_a_sharded_model_is_called_so(tmp_path, state):
    for name in [k for k in state if k.startswith("blocks.0")]:
        del state[name]
    refuse(
        saved(state, tmp_path / "diffusion_pytorch_model-00002-of-00006.safetensors"), "part 00002 of 00006", "merge"
    )


def test_extra_keys_in_a_block_are_counted_and_named(tmp_path, state):
    state["blocks.0.self_attn.q.strange"] = torch.zeros(1)
    refuse(saved(state, tmp_path / "x.pth"), "1 is not part of any Wan model", "blocks.0.self_attn.q.strange")


def test_proj_l_in_some_blocks_only(tmp_path, state):
    del state[f"blocks.1.{PROJ_L}.weight"]
    refuse(saved(state, tmp_path / "x.pth"), "1 is missing", f"blocks.1.{PROJ_L}.weight")


def test_wrong_scale_shape_says_expected_and_got(tiny, tmp_path):
    state = torch.load(tiny / "TinyWan2.1-T2V-quant.pth", weights_only=True)
    state[f"{Q}.scale"] = torch.ones(3, 2)
    refuse(saved(state, tmp_path / "x.pth"), f"{Q}.weight_scale", "[3, 2]", "[2, 2]", "[256, 1]")
    del state[f"{Q}.scale"]
    refuse(saved(state, tmp_path / "y.pth"), f"{Q}.weight_scale is missing")


def test_scale_that_is_not_finite(tiny, tmp_path):
    state = torch.load(tiny / "TinyWan2.1-T2V-quant.pth", weights_only=True)
    state[f"{Q}.scale"][0, 0] = math.nan
    with pytest.raises(TurboError, match=f"{Q}.weight_scale holds NaN"):
        checkpoint.load(saved(state, tmp_path / "x.pth"))


def test_wrong_tensor_shape_says_expected_and_got(tmp_path, state):
    state["blocks.0.ffn.2.weight"] = torch.zeros(256, 500)
    refuse(saved(state, tmp_path / "x.pth"), "blocks.0.ffn.2.weight", "[256, 500]", "[256, 512]")


@pytest.mark.parametrize("size", [96, 32])
def test_head_dim_other_than_64_and_128(tmp_path, size):
    state = tiny_state_dict(0, Sizes(384, 16, 16, 64, 64, 64, size))
    refuse(saved(state, tmp_path / "x.pth"), "64 or 128", f"[{size}, {size}]")


def test_unreadable_quantization_is_named(tiny, tmp_path):
    quant = torch.frombuffer(bytearray(b'{"format": "nvfp4"}'), dtype=torch.uint8)
    state = dict(checkpoint.load(tiny / "tiny_wan_stock_bf16.safetensors")[0])
    state[f"{Q}.comfy_quant"] = quant
    refuse(saved(state, tmp_path / "x.safetensors"), "nvfp4", "bf16 version")
    state[f"{Q}.comfy_quant"] = torch.frombuffer(bytearray(b'{"format": "int8_tensorwise"}'), dtype=torch.uint8)
    refuse(saved(state, tmp_path / "y.safetensors"), "stated to be int8_row and stored as bf16")
    state[f"{Q}.comfy_quant"] = torch.frombuffer(bytearray(b"{nonsense"), dtype=torch.uint8)
    refuse(saved(state, tmp_path / "z.safetensors"), "not JSON")


def test_newer_version_of_our_own_files(tmp_path, state):
    save_file(state, tmp_path / "x.safetensors", metadata={"turbowan.version": "2"})
    refuse(tmp_path / "x.safetensors", "version '2'", "update")


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        (["double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"], "Flux"),
        (
            ["model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "model.diffusion_model.single_blocks.0.x"],
            "Flux",
        ),
        (["patchify_proj.weight", "adaln_single.linear.weight", "transformer_blocks.0.attn1.to_q.weight"], "LTX-Video"),
        (["model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.label_emb.0.0.weight"], "SDXL"),
        (["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"], "a language model"),
        (["token_embedding.weight", "blocks.0.attn.q.weight", "blocks.0.ffn.gate.0.weight"], "umT5"),
        (["shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"], "umT5"),
        (["encoder.conv1.weight", "decoder.middle.0.residual.0.gamma"], "the Wan VAE"),
        (["blocks.0.attn1.to_q.weight", "condition_embedder.time_embedder.linear_1.weight"], "diffusers"),
        (["diffusion_model.blocks.0.self_attn.q.lora_down.weight"], "LoRA"),
    ],
)
def test_other_families_are_named(tmp_path, keys, kind):
    assert kind in looks_like(keys)
    refuse(saved({k: torch.zeros(2) for k in keys}, tmp_path / "x.safetensors"), "not a Wan", kind, "head.modulation")


def test_formats_cover_what_torch_can_hold(tmp_path, state):
    for name, dtype in FLOATS.items():
        cast = {k: v.to(dtype) for k, v in state.items()}
        assert checkpoint.inspect(saved(cast, tmp_path / f"{name}.pth")).format == name
    state[f"{Q}.weight"] = torch.zeros(256, 256, dtype=torch.int32)
    refuse(saved(state, tmp_path / "x.pth"), "int32", f"{Q}.weight")


def test_ragged_block_scale_shape():
    assert block_scale_shape(200, 130) == (2, 2)  # both edges ragged
