"""What is refused: damaged, foreign and malicious files, with what was expected, what came, and the cure."""

import json
import math
import os
import pickle
import time

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers.states import official, saved
from tests.helpers.tiny_dits import tiny_state_dict
from turbo_core import checkpoint
from turbo_core.checkpoint.names import PROJ_L, looks_like
from turbo_core.checkpoint.shapes import Sizes
from turbo_core.errors import TurboError
from turbo_core.pipeline.inputs import check_model

Q = "blocks.1.self_attn.q"


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


@pytest.mark.parametrize("kind, size", [("U16", 2), ("U32", 4), ("U64", 8), ("F4", 1), ("C64", 8)])
def test_a_type_that_safetensors_has_and_we_have_not_is_no_damage(tmp_path, kind, size):
    header = json.dumps({"x": {"dtype": kind, "shape": [2], "data_offsets": [0, 2 * size]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(2 * size))
    for call in (checkpoint.inspect, checkpoint.load):
        with pytest.raises(TurboError, match=f"x is {kind}. Expected floats") as error:
            call(path)
        assert "damaged" not in str(error.value) and str(path) in str(error.value)


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


@pytest.mark.parametrize("name", ["SCB", "scales", "weight_scales", "weight.absmax", "qweight_scale"])
def test_a_scale_under_another_name_is_named(tiny, tmp_path, name):
    state = torch.load(tiny / "TinyWan2.1-T2V-quant.pth", weights_only=True)
    state[f"{Q}.{name}"] = state.pop(f"{Q}.scale")
    words = f"{Q}.weight is int8", f"looked for as {Q}.weight_scale", f"{Q}.{name} [2, 2] may be it", "bf16 version"
    refuse(saved(state, tmp_path / "x.pth"), *words)
    state[f"{Q}.weight_scale_inv"] = state.pop(f"{Q}.{name}")  # as the message says
    assert checkpoint.inspect(saved(state, tmp_path / "y.pth")).format == "int8_block"


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
    path = saved(state, tmp_path / "x.safetensors")
    with pytest.raises(TurboError, match=r"nvfp4.*bf16 version.*Turbo Loader hands it to"):
        checkpoint.load(path)
    found = checkpoint.inspect(path)
    assert found.foreign == {f"{Q}.weight": "nvfp4"} and "nvfp4" in found.notes[-1]
    state[f"{Q}.comfy_quant"] = torch.frombuffer(bytearray(b'{"format": "int8_tensorwise"}'), dtype=torch.uint8)
    refuse(saved(state, tmp_path / "y.safetensors"), "stated to be int8_row and stored as bf16")
    state[f"{Q}.comfy_quant"] = torch.frombuffer(bytearray(b"{nonsense"), dtype=torch.uint8)
    refuse(saved(state, tmp_path / "z.safetensors"), "not JSON")


def test_newer_version_of_our_own_files(tmp_path, state):
    save_file(state, tmp_path / "x.safetensors", metadata={"turbowan.version": "2"})
    refuse(tmp_path / "x.safetensors", "version '2'", "update")
    save_file(state, tmp_path / "y.safetensors", metadata={"turbowan.version": "9" * 5000})
    refuse(tmp_path / "y.safetensors", "999...'. Expected '1'")


@pytest.mark.parametrize("name", ["x" * 300 + ".pth", "x\0.pth", "\ud800.pth", "y" * 300 + "/x.pth"])
def test_a_name_that_no_disk_takes_is_no_file(tmp_path, name):
    with pytest.raises(TurboError, match="does not exist"):
        checkpoint.inspect(tmp_path / name)
    with pytest.raises(TurboError, match="does not exist"):
        checkpoint.convert(tmp_path / name, tmp_path / "y.safetensors", "bf16")


def test_a_dtype_that_is_not_read_is_named(tmp_path, state):
    state[f"{Q}.weight"] = torch.zeros(256, 256, dtype=torch.int32)
    refuse(saved(state, tmp_path / "x.pth"), "int32", f"{Q}.weight")


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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s | {"__metadata__": torch.ones(4)}, ["is called __metadata__"]),
        (lambda s: s | {"\ud800": torch.ones(4)}, ["is called \\ud800"]),
        (lambda s: s | {"x": torch.ones(3, dtype=torch.complex64)}, ["x is torch.complex64"]),
        (lambda s: s | {f"blocks.{'9' * 5000}.x": torch.ones(1)}, ["not part of any Wan model", "blocks.999"]),
        (lambda s: s | {"patch_embedding.weight": torch.ones(0, 64)}, ["patch_embedding.weight", "[0, 64]"]),
        (lambda s: s | {"blocks.x": torch.ones(1)}, ["not part of any Wan model", "blocks.x"]),
        (lambda s: s | {"head.head.weight": s["head.head.weight"].to(torch.int8)}, ["head.head.weight", "torch.int8"]),
        (lambda s: s | {"time_projection.1.weight": s["time_projection.1.weight"].bool()}, ["torch.bool"]),
        (lambda s: {name: t[:0] if name == "head.modulation" else t for name, t in s.items()}, ["is empty"]),
    ],
)
def test_names_and_types_that_no_model_has(tmp_path, state, change, words):
    """Some of these were converted to files that nothing could read."""
    refuse(saved(change(state), tmp_path / "x.pth"), *words)


@pytest.mark.parametrize("scale", [-1.0, float("nan"), 1e300])
def test_scales_are_finite_and_not_negative_in_float32(tiny, tmp_path, scale):
    state = torch.load(tiny / "TinyWan2.1-T2V-quant.pth", weights_only=True)
    name = "blocks.0.ffn.0.scale"
    state[name] = state[name].double() * 0 + scale
    path = saved(state, tmp_path / "x.pth")
    for call in (checkpoint.load, lambda p: checkpoint.convert(p, tmp_path / "y.safetensors", "bf16")):
        with pytest.raises(TurboError, match=r"blocks\.0\.ffn\.0\.weight_scale"):
            call(path)
    assert not (tmp_path / "y.safetensors").exists()


@pytest.mark.parametrize(
    ("metadata", "quant", "words"),
    [
        ({"config": "[" * 100000}, None, ["config", "is not JSON"]),
        ({"_quantization_metadata": '{"layers": {"a": {"format": []}}}'}, None, ["a.weight is quantized as '[]'"]),
        ({}, b'{"format": {}}', ["is quantized as '{}'"]),
        ({}, b"[" * 4097, ["4,097 bytes", "few words"]),
    ],
)
def test_what_a_file_says_of_itself_may_be_anything(tmp_path, state, metadata, quant, words):
    state = official(state)
    if quant:
        state["blocks.0.ffn.0.comfy_quant"] = torch.frombuffer(bytearray(quant), dtype=torch.uint8)
    save_file(state, tmp_path / "x.safetensors", metadata)
    refuse(tmp_path / "x.safetensors", *words)


@pytest.mark.parametrize(
    "change",
    [
        {"y": torch.ones(2, 2), "y_scale": torch.ones(3)},  # of the wrong shape
        {"y": torch.ones(2, 2, dtype=torch.int8), "y_scale": torch.ones(2, 1, dtype=torch.int8)},
        {"y": torch.ones(2, 2, dtype=torch.int32), "y_scale": torch.ones(2, 1)},
        {"y": torch.full((2, 2), math.nan)},
        {"_orig_mod.y": torch.ones(1), "y": torch.ones(1)},
    ],
)
def test_an_error_shows_the_beginning_of_a_long_name(tmp_path, state, change):
    long = {name.replace("y", "y" * 3000): tensor for name, tensor in change.items()}
    path = saved(official(state) | long, tmp_path / "x.pth")
    with pytest.raises(TurboError, match=r"yyy\.\.\.") as error:
        checkpoint.convert(path, tmp_path / "y.safetensors", "bf16")
    assert len(str(error.value)) - len(str(path)) < 400


def test_what_a_terminal_obeys_is_escaped(tmp_path):
    path = saved({"\r\x1b[2K\x1b[32mall is well\x1b[0m\x1b]0;owned\x07": torch.ones(1)}, tmp_path / "x.pth")
    with pytest.raises(TurboError) as error:
        checkpoint.inspect(path)
    assert str(error.value).isprintable() and "x1b" in str(error.value)


@pytest.mark.parametrize(
    "header",
    [
        b"[]", b"[" * 5000, b"{}x", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": [1]}}', b"\xff\xff",
        b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}', b'{"a": {}, "a": {}}',
        b'{"a": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}}', b'{"__metadata__": [1]}',
        b'{"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": 4.0}}',
        b'{"a": {"dtype": "F32", "shape": [], "data_offsets": 1}}',
    ],
)  # fmt: skip
def test_a_header_may_be_any_json(tmp_path, header):
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    refuse(path, "damaged, cut short or not a checkpoint")


def test_a_header_of_a_hundred_thousand_int8_names_is_refused_in_a_moment(tmp_path, state):
    """Without data: what is looked for beside each of them must not be looked for among all."""
    many = {f"a{n}.weight": torch.empty(0, dtype=torch.int8) for n in range(100_000)}
    save_file(state | many, tmp_path / "x.safetensors")
    start = time.process_time()
    checkpoint.inspect(tmp_path / "x.safetensors")
    assert time.process_time() - start < 20


def test_a_layer_with_ten_thousand_parts_in_its_name_costs_no_more(tmp_path, state):
    told = json.dumps({"layers": {".".join("a" * 200_000): {"format": "float8_e4m3fn"}}})
    save_file(state, tmp_path / "x.safetensors", {"_quantization_metadata": told})
    start = time.process_time()
    checkpoint.inspect(tmp_path / "x.safetensors")
    assert time.process_time() - start < 5


def test_a_scaled_tensor_that_is_no_matrix_is_named(tmp_path, state):
    state |= {"patch_embedding.weight": torch.ones(state["patch_embedding.weight"].shape, dtype=torch.int8)}
    state |= {"patch_embedding.weight_scale": torch.ones(len(state["patch_embedding.weight"]), 1)}
    refuse(saved(state, tmp_path / "x.safetensors"), "patch_embedding.weight is torch.int8", "Expected a matrix")


def test_sides_that_no_tensor_has_are_damage(tmp_path):
    entry = {"a": {"dtype": "F32", "shape": [0, 1 << 64], "data_offsets": [0, 0]}}
    header = json.dumps(entry).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    refuse(tmp_path / "x.safetensors", "has no shape or place")


@pytest.mark.parametrize(
    "change, word",
    [
        (lambda state: state | {"img_emb.proj.0.weight": torch.ones(4)}, "an image branch"),
        (lambda state: state | {"vace_patch_embedding.weight": torch.ones(4)}, "VACE"),
    ],
)
def test_a_model_with_more_than_the_plain_network_is_refused_before_anything_is_read(tmp_path, state, change, word):
    found = checkpoint.inspect(saved(change(state), tmp_path / "x.safetensors"))
    with pytest.raises(TurboError, match=f"{word}.*load others in ComfyUI"):
        check_model(found)
