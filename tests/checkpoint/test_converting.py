"""Conversion: bit-exact where nothing changes, the formulas where something does, in little memory."""

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.opens import counted_opens
from tests.helpers.states import official, same
from tests.helpers.tiny_dits import RAGGED, tiny_state_dict
from turbo_core import checkpoint
from turbo_core.checkpoint import names, write
from turbo_core.checkpoint.formats import FORMATS
from turbo_core.checkpoint.names import PROJ_L
from turbo_core.checkpoint.shapes import Sizes, expected_shapes
from turbo_core.errors import TurboError
from turbo_core.int8 import dequantize_block, dequantize_rows, quantize_block, quantize_rows
from turbo_core.wan import QUANTIZED_LINEARS

ROOT = Path(__file__).resolve().parents[2]
LAYERS = [f"blocks.{n}.{x}" for n in (0, 1) for x in QUANTIZED_LINEARS]
NORM = "blocks.0.norm3.weight"


def said(tensor):
    return json.loads(bytes(tensor.tolist()))


def test_block_format_on_disk(ragged, tmp_path):
    source = checkpoint.load(ragged)[0]
    result = checkpoint.convert(ragged, tmp_path / "x.safetensors", "int8_block")
    raw = load_file(result.path)
    assert result.bytes == os.path.getsize(result.path)
    assert result.warnings == []
    for layer in LAYERS:  # 192 and 200 are no multiples of 128: both edges of the blocks are ragged
        q, scale = quantize_block(source.pop(f"{layer}.weight"))
        assert torch.equal(raw.pop(f"{layer}.weight"), q)
        assert torch.equal(raw.pop(f"{layer}.weight_scale"), scale)
        assert said(raw.pop(f"{layer}.comfy_quant")) == {"format": "int8_block128"}
    assert same(raw, source)  # everything else as it was
    assert checkpoint.inspect(result.path).format == "int8_block"


def test_row_format_is_comfyui_s_own(ragged, tmp_path):
    source = checkpoint.load(ragged)[0]
    result = checkpoint.convert(ragged, tmp_path / "x.safetensors", "int8_row")
    raw = load_file(result.path)
    for layer in LAYERS:
        q, scale = quantize_rows(source[f"{layer}.weight"])
        assert torch.equal(raw[f"{layer}.weight"], q)
        assert torch.equal(raw[f"{layer}.weight_scale"], scale)
        assert scale.shape == (q.shape[0], 1)
        assert said(raw[f"{layer}.comfy_quant"]) == {"format": "int8_tensorwise"}
    assert "proj_l" in " ".join(result.warnings)
    assert torch.equal(raw[f"blocks.1.{PROJ_L}.weight"], source[f"blocks.1.{PROJ_L}.weight"])  # ours reads it back


def test_published_quantized_file_keeps_its_bits(tiny, tmp_path):
    source = checkpoint.load(tiny / "TinyWan2.1-T2V-quant.pth")[0]
    result = checkpoint.convert(tiny / "TinyWan2.1-T2V-quant.pth", tmp_path / "x.safetensors", "int8_block")
    assert same(checkpoint.load(result.path)[0], source)
    assert source[NORM].dtype == source[f"blocks.0.{PROJ_L}.bias"].dtype == torch.float32
    again = checkpoint.convert(result.path, tmp_path / "y.safetensors", "int8_block")
    assert same(load_file(again.path), load_file(result.path))
    assert result.warnings == again.warnings == []


def test_float_formats_round_trip(ragged, tmp_path):
    source = checkpoint.load(ragged)[0]
    wide = checkpoint.convert(ragged, tmp_path / "fp32.safetensors", "fp32").path
    assert all(t.dtype == torch.float32 for t in load_file(wide).values())
    narrow = checkpoint.convert(wide, tmp_path / "bf16.safetensors", "bf16").path
    loaded = load_file(narrow)
    for name, tensor in loaded.items():
        delicate = "proj_l" in name or "norm" in name or "modulation" in name
        assert tensor.dtype == (torch.float32 if delicate else torch.bfloat16), name
        assert torch.equal(tensor.float(), source[name].float()), name
    kept = load_file(checkpoint.convert(ragged, tmp_path / "same.safetensors", "bf16").path)
    assert same(kept, source)  # norms and modulation were bf16, proj_l float32: both stay


def test_float16_holds_norms_without_loss(ragged, tmp_path):
    raw = load_file(checkpoint.convert(ragged, tmp_path / "x.safetensors", "fp16").path)
    assert raw["blocks.0.ffn.0.weight"].dtype == torch.float16
    assert raw[NORM].dtype == torch.float32  # from bf16, whose range float16 does not have


@pytest.mark.parametrize("first", ["int8_block", "int8_row"])
def test_decoding_is_the_formula(ragged, tmp_path, first):
    quantized = checkpoint.quantize(ragged, tmp_path / "q.safetensors", first)
    result = checkpoint.convert(quantized.path, tmp_path / "f.safetensors", "fp32")
    q, f = load_file(quantized.path), load_file(result.path)
    decode = dequantize_block if first == "int8_block" else dequantize_rows
    for layer in LAYERS:
        assert torch.equal(f[f"{layer}.weight"], decode(q[f"{layer}.weight"], q[f"{layer}.weight_scale"]))
    assert f"20 layers were quantized already ({first})" in result.warnings[0]


def test_quantizing_twice_warns_and_quantize_refuses(ragged, tmp_path):
    block = checkpoint.quantize(ragged, tmp_path / "block.safetensors")
    result = checkpoint.convert(block.path, tmp_path / "row.safetensors", "int8_row")
    assert "rounded a second time" in result.warnings[0]
    with pytest.raises(TurboError, match=r"quantized already \(int8_block\)"):
        checkpoint.quantize(block.path, tmp_path / "z.safetensors")
    with pytest.raises(TurboError, match="int8_block or int8_row"):
        checkpoint.quantize(ragged, tmp_path / "z.safetensors", "bf16")


def test_fp8_is_decoded_on_the_way(ragged, tmp_path):
    state = dict(checkpoint.load(ragged)[0])
    for layer in LAYERS:
        state[f"{layer}.weight"] = (state[f"{layer}.weight"].float() * 4).to(torch.float8_e4m3fn)
        state[f"{layer}.weight_scale"] = torch.tensor(0.25)
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "fp8.safetensors")
    raw = load_file(checkpoint.convert(tmp_path / "fp8.safetensors", tmp_path / "x.safetensors", "bf16").path)
    for layer in LAYERS:
        assert torch.equal(raw[f"{layer}.weight"], (state[f"{layer}.weight"].float() * 0.25).bfloat16())
    raw = load_file(checkpoint.convert(tmp_path / "fp8.safetensors", tmp_path / "y.safetensors", "int8_row").path)
    q, scale = quantize_rows(state[f"{LAYERS[0]}.weight"].float() * 0.25)
    assert torch.equal(raw[f"{LAYERS[0]}.weight"], q)
    assert torch.equal(raw[f"{LAYERS[0]}.weight_scale"], scale)


def test_image_branch_is_not_quantized(ragged, tmp_path):
    state = tiny_state_dict(3, RAGGED)
    for n in (0, 1):
        state[f"blocks.{n}.cross_attn.k_img.weight"] = torch.randn(192, 192).bfloat16()
    torch.save(state, ragged)
    raw = load_file(checkpoint.quantize(ragged, tmp_path / "x.safetensors").path)
    assert torch.equal(raw["blocks.1.cross_attn.k_img.weight"], state["blocks.1.cross_attn.k_img.weight"])


def test_metadata(tiny, ragged, tmp_path):
    done = checkpoint.convert(ragged, tmp_path / "x.safetensors", "int8_row")
    metadata = checkpoint.inspect(done.path).metadata
    assert metadata["format"] == "pt"
    assert metadata["turbowan.format"] == "int8_row"
    assert metadata["turbowan.family"] == checkpoint.inspect(ragged).family
    assert metadata["turbowan.source_sha256"] == hashlib.sha256(ragged.read_bytes()).hexdigest()
    assert metadata["turbowan.version"] == "1"
    # 3 heads of 64, where ComfyUI would count 192 // 128 = 1
    assert json.loads(metadata["config"]) == {"transformer": {"num_heads": 3, "text_dim": 24}}


def test_progress_counts_up_to_the_total(ragged, tmp_path):
    calls = []
    checkpoint.convert(ragged, tmp_path / "x.safetensors", "int8_block", lambda *call: calls.append(call))
    done, total = zip(*calls)
    assert list(done) == sorted(done)
    assert set(total) == {done[-1]}
    assert len(calls) > len(LAYERS)


@pytest.mark.parametrize("write", [checkpoint.convert, checkpoint.quantize])
def test_the_source_is_opened_and_described_once(ragged, tmp_path, monkeypatch, write):
    opened, described = counted_opens(monkeypatch)
    write(ragged, tmp_path / "x.safetensors", "int8_block")
    assert opened == described == {"ragged.pth": 1}


MEASURE = """
import re, sys, threading
import torch
from turbo_core import checkpoint

def memory(kind):
    with open("/proc/self/smaps_rollup") as file:
        return int(re.search(kind + r": +([0-9]+)", file.read())[1]) * 1024

def watch():
    while not done.wait(0.01):
        for kind in peak:
            peak[kind] = max(peak[kind], memory(kind))

source, small, target = sys.argv[1:]
checkpoint.convert(small, target, "int8_block")  # what is allocated once: threads, pools, modules
peak = {"Anonymous": 0, "Rss": 0}
start = {kind: memory(kind) for kind in peak}
done = threading.Event()
thread = threading.Thread(target=watch)
thread.start()
checkpoint.convert(source, target, "int8_block")
done.set()
thread.join()
print(*(peak[kind] - start[kind] for kind in peak))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="memory is read from Linux's /proc")
def test_memory_stays_at_a_few_times_the_largest_tensor(ragged, tmp_path):
    # 4 blocks in float32: 340 MB, the largest tensor 25 MB; zeros that take no room on the disk
    shapes = expected_shapes(4, True, Sizes(1024, 16, 16, 6144, 64, 256, 128))
    layout = {name: (torch.float32, shape) for name, shape in shapes.items()}
    header, _, size = write.file_header(layout, {})
    source = tmp_path / "big.safetensors"
    source.write_bytes(header)
    os.truncate(source, size)
    largest = 4 * max(math.prod(shape) for shape in shapes.values())
    command = [sys.executable, "-c", MEASURE, source, ragged, tmp_path / "x.safetensors"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    anonymous, resident = map(int, run.stdout.split())
    assert 300e6 < size < 600e6
    assert anonymous < 4 * largest  # a whole copy would be 13 times
    assert resident < 5 * largest  # no page of the mapped source is touched


def test_source_is_never_the_target(ragged, tmp_path):
    path = checkpoint.convert(ragged, tmp_path / "x.safetensors", "bf16").path
    before = Path(path).read_bytes()
    (tmp_path / "link.safetensors").symlink_to(path)
    for target in (path, tmp_path / "link.safetensors", tmp_path / "." / "x.safetensors"):
        with pytest.raises(TurboError, match="the source itself"):
            checkpoint.convert(path, target, "int8_row")
    assert Path(path).read_bytes() == before


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["blocks.1.ffn.2.weight", "time_embedding.0.bias", f"blocks.0.{PROJ_L}.weight"])
def test_not_finite_weight_is_named(ragged, tmp_path, bad, name):
    state = tiny_state_dict(3, RAGGED)
    state[name].view(-1)[-1] = bad
    torch.save(state, ragged)
    for format in ("int8_block", "fp16"):
        with pytest.raises(TurboError, match=f"{name} holds NaN or infinity"):
            checkpoint.convert(ragged, tmp_path / "x.safetensors", format)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ragged.pth"]


def test_value_too_large_for_float16(ragged, tmp_path):
    state = tiny_state_dict(3, RAGGED)
    state["head.head.weight"][0, 0] = 70000.0
    torch.save(state, ragged)
    with pytest.raises(TurboError, match=r"head\.head\.weight exceeds 65504"):
        checkpoint.convert(ragged, tmp_path / "x.safetensors", "fp16")
    checkpoint.convert(ragged, tmp_path / "x.safetensors", "bf16")


def test_every_format_reads_back(ragged, tmp_path):
    for format in FORMATS:
        path = checkpoint.convert(ragged, tmp_path / f"{format}.safetensors", format).path
        found = checkpoint.inspect(path)
        assert (found.format, found.has_sla, found.num_heads) == (format, True, 3)


def test_the_blocks_of_vace_are_quantized_as_quantizew8a8_does():
    assert names.is_quantizable("vace_blocks.0.ffn.0.weight")
    assert not names.is_quantizable("vace_blocks.0.after_proj.weight")


def test_a_source_that_changes_while_it_is_read_is_told(tiny, tmp_path):
    """Half of the old weights and half of the new ones were written, with the hash of the old."""
    source = tmp_path / "x.pth"
    shutil.copy(tiny / "TinyWan2.1-T2V.pth", source)

    def touch(done, total):
        os.utime(source, (1, 1))

    with pytest.raises(TurboError, match=r"x\.pth changed while it was read"):
        checkpoint.convert(source, tmp_path / "y.safetensors", "int8_block", touch)
    assert os.listdir(tmp_path) == ["x.pth"]


def test_a_name_that_no_disk_takes_is_told_before_the_work(tiny, tmp_path):
    with pytest.raises(TurboError, match="too long a name"):
        checkpoint.convert(tiny / "TinyWan2.1-T2V.pth", tmp_path / f"{'x' * 290}.safetensors", "bf16")


def test_a_flipped_bit_among_the_weights_is_found_by_a_conversion(tiny, tmp_path):
    """It reads every byte, and a .pth has a checksum for each tensor."""
    data = bytearray((tiny / "TinyWan2.1-T2V.pth").read_bytes())
    weights = torch.load(tiny / "TinyWan2.1-T2V.pth", weights_only=True)["blocks.0.ffn.0.weight"]
    data[data.index(weights.view(torch.uint8).numpy().tobytes()[:200]) + 100] ^= 4
    (tmp_path / "x.pth").write_bytes(data)
    with pytest.raises(TurboError, match=r"is damaged: .*data/\d+ is not what its checksum says"):
        checkpoint.convert(tmp_path / "x.pth", tmp_path / "y.safetensors", "bf16")
    assert os.listdir(tmp_path) == ["x.pth"]


@pytest.mark.parametrize("format", ["int8_row", "bf16"])
def test_what_only_the_metadata_tell_stays(tmp_path, format):
    """ComfyUI knows Animate-2 and causal models by it alone; without it they load as plain ones."""
    config = {"num_heads": 3, "text_dim": 24, "model_type": "animate2", "causal_ar": True}
    path = tmp_path / "x.safetensors"
    save_file(official(tiny_state_dict(3, RAGGED)), path, {"config": json.dumps({"transformer": config})})
    done = checkpoint.convert(path, tmp_path / "y.safetensors", format)
    found = checkpoint.inspect(done.path)
    assert json.loads(found.metadata["config"])["transformer"] == config and found.variant == "causal"


def test_a_quantized_image_branch_is_read(tmp_path):
    """Quantize W8A8 makes one where a pattern names it, and Turbo Save writes it."""
    state = official(tiny_state_dict(3, RAGGED))
    dim = state["head.modulation"].shape[-1]
    for part in ("k_img", "v_img"):
        weight = torch.randn(dim, dim)
        for n in (0, 1):
            q, scale = quantize_rows(weight)
            name = f"blocks.{n}.cross_attn.{part}"
            state |= {f"{name}.weight": q, f"{name}.weight_scale": scale, f"{name}.bias": torch.zeros(dim)}
    save_file(state, tmp_path / "x.safetensors")
    loaded = checkpoint.load(tmp_path / "x.safetensors")[0]
    assert torch.equal(loaded["blocks.1.cross_attn.v_img.weight"], q)
    done = checkpoint.convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors", "bf16")
    near = checkpoint.load(done.path)[0]["blocks.1.cross_attn.v_img.weight"].float()
    assert (near - weight).norm() / weight.norm() < 0.02
