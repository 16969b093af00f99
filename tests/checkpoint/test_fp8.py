"""fp8 as a target of convert: ComfyUI's float8_e4m3fn with one scale a layer."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.states import official, plain
from tests.helpers.tiny_dits import tiny_state_dict
from turbo_core import checkpoint
from turbo_core.checkpoint.formats import decode, encode_fp8
from turbo_core.checkpoint.names import PROJ_L, is_quantizable
from turbo_core.errors import TurboError

Q = "blocks.0.self_attn.q.weight"


@pytest.fixture
def source(tmp_path):
    torch.save(tiny_state_dict(3), tmp_path / "source.pth")
    return tmp_path / "source.pth"


# the largest magnitude just below, at and above a power of two times 448, a tiny one, and zeros
@pytest.mark.parametrize("largest", [447.9, 448.0, 449.0, 7.0, 0.03, 1e-6, 0.0])
def test_scale_is_the_smallest_power_of_two_that_saturates_nothing(largest):
    weight = torch.randn(600, 40)  # more rows than are encoded at once
    weight *= largest / weight.abs().max()
    q, scale = encode_fp8(weight)
    assert q.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32 and scale.shape == ()
    assert math.frexp(scale.item())[0] == 0.5
    assert largest == 0 or 224 < weight.abs().max() / scale <= 448
    decoded = q.float() * scale
    assert torch.equal(decoded.bfloat16().float(), decoded)  # exact where the reader computes in bf16
    assert (decoded - weight).norm() <= 0.03 * weight.norm()


def test_file_is_comfyui_s_own_convention(source, tmp_path):
    state = checkpoint.load(source)[0]
    done = checkpoint.convert(source, tmp_path / "x.safetensors", "fp8")
    raw = load_file(done.path)
    for name, tensor in state.items():
        if is_quantizable(name):
            q, scale = encode_fp8(tensor)
            assert torch.equal(raw[name].view(torch.uint8), q.view(torch.uint8))
            assert torch.equal(raw[f"{name}_scale"], scale)
            entry = raw[name.removesuffix("weight") + "comfy_quant"]
            assert json.loads(bytes(entry.tolist())) == {"format": "float8_e4m3fn"}
        else:
            assert raw[name].dtype == tensor.dtype and torch.equal(raw[name], tensor)
    assert raw[f"blocks.0.{PROJ_L}.weight"].dtype == torch.float32
    assert checkpoint.inspect(done.path).format == "fp8"
    loaded = checkpoint.load(done.path)[0]
    assert torch.equal(loaded[Q].float(), raw[Q].float() * raw[f"{Q}_scale"])
    assert any("decodes fp8" in warning for warning in done.warnings)


def test_fp8_layers_keep_their_bits(source, tmp_path):
    one = checkpoint.convert(source, tmp_path / "one.safetensors", "fp8")
    two = checkpoint.convert(one.path, tmp_path / "two.safetensors", "fp8")
    a, b = load_file(one.path), load_file(two.path)
    assert all(torch.equal(a[name].float(), b[name].float()) for name in a) and a.keys() == b.keys()
    assert not any("rounded a second time" in warning for warning in two.warnings)


def test_a_plain_cast_and_scales_per_row_are_brought_to_one_scale(tmp_path):
    state = official(plain(tiny_state_dict(3)))
    rows = torch.rand(256, 1) + 0.5
    state[Q] = (state[Q].float() / rows).to(torch.float8_e4m3fn)
    bare = "blocks.1.ffn.0.weight"
    state[bare] = state[bare].to(torch.float8_e4m3fn)  # no scale at all
    save_file(state | {f"{Q}_scale": rows}, tmp_path / "source.safetensors")
    raw = load_file(checkpoint.convert(tmp_path / "source.safetensors", tmp_path / "x.safetensors", "fp8").path)
    assert raw[f"{bare}_scale"] == 1 and torch.equal(raw[bare].float(), state[bare].float())
    expected = encode_fp8(state[Q].float() * rows)
    assert torch.equal(raw[Q].float(), expected[0].float()) and torch.equal(raw[f"{Q}_scale"], expected[1])


@pytest.mark.parametrize("first", ["int8_block", "int8_row"])
def test_from_int8_rounds_twice_and_says_so(source, tmp_path, first):
    quantized = checkpoint.quantize(source, tmp_path / "q.safetensors", first)
    done = checkpoint.convert(quantized.path, tmp_path / "x.safetensors", "fp8")
    assert f"20 layers were quantized already ({first}): their weights are rounded a second time" in done.warnings[0]
    back = checkpoint.convert(done.path, tmp_path / "y.safetensors", first)
    assert checkpoint.inspect(back.path).format == first


def test_not_finite_fp8_weight_is_named(source, tmp_path):
    path = checkpoint.convert(source, tmp_path / "x.safetensors", "fp8").path
    state = load_file(path)
    state[Q].view(torch.uint8)[3, 5] = 0x7F  # NaN
    save_file(state, tmp_path / "bad.safetensors")
    with pytest.raises(TurboError, match=f"{Q} holds NaN"):
        checkpoint.convert(tmp_path / "bad.safetensors", tmp_path / "y.safetensors", "fp8")


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_a_scale_that_is_none_is_named_when_the_file_is_loaded(source, tmp_path, value):
    path = tmp_path / "x.safetensors"
    checkpoint.convert(source, path, "fp8")
    raw = load_file(path)
    name = "blocks.0.ffn.0.weight_scale"
    raw[name] = torch.full_like(raw[name], value)
    save_file(raw, path)
    with pytest.raises(TurboError, match=r"ffn.0.weight_scale"):
        checkpoint.load(path)


@pytest.mark.parametrize("kind", ["e5m2", "a scale a row"])
def test_fp8_that_is_rounded_again_is_told(source, tmp_path, kind):
    state = checkpoint.load(source)[0]
    name = "blocks.0.ffn.0.weight"
    if kind == "e5m2":
        state[name] = state[name].to(torch.float8_e5m2)
    else:
        scale = state[name].float().abs().amax(1, keepdim=True) / 448
        state |= {name: (state[name].float() / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale}
    save_file(state, tmp_path / "x.safetensors")
    done = checkpoint.convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors", "fp8")
    assert "1 layers were quantized already (fp8): their weights are rounded a second time" in done.warnings[0]
    again = checkpoint.convert(done.path, tmp_path / "z.safetensors", "fp8")
    assert not any("quantized already" in warning for warning in again.warnings), "the same bits"


def test_the_smallest_numbers_do_not_become_nan():
    q, scale = encode_fp8(torch.full((2, 3), 1e-44))
    assert scale > 0 and decode(q, scale, torch.float32).isfinite().all()
