"""turbo-core inspect, convert, quantize and merge."""

import io
import sys

import torch
from safetensors.torch import save_file

from tests.helpers.tiny_decoders import tiny_decoder
from tests.helpers.tiny_dits import STOCK
from turbo_core import checkpoint
from turbo_core.cli import main


def test_inspect_describes_every_file(tiny, capsys):
    assert main(["inspect", str(tiny / "TinyWan2.1-T2V-quant.pth"), str(tiny / "TinyWan2.2-I2V-low.pth")]) == 0
    out = capsys.readouterr().out
    for text in ("t2v", "i2v", "int8_block", "bf16", "2 x 128", "36 in, 16 out, text 64"):
        assert text in out
    assert main(["inspect", str(tiny / "spiece.model")]) == 2
    assert "spiece.model" in capsys.readouterr().err


def test_inspect_says_what_other_files_are_and_goes_on_after_a_bad_one(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    names = ("self_attn.q", "ffn.0")
    layers = {f"diffusion_model.blocks.{i}.{name}": i for i in range(2) for name in names}
    lora = {f"{layer}.lora_down.weight": torch.zeros(4 + i, 1536) for layer, i in layers.items()}
    lora |= {f"{layer}.lora_up.weight": torch.zeros(1536, 4 + i) for layer, i in layers.items()}
    lora["blocks.0.unknown.lora_up.weight"] = torch.zeros(2, 2)
    save_file(lora, tmp_path / "style.safetensors")
    save_file({"lora_unet_input_blocks_1.lora_down.weight": torch.zeros(2, 2)}, tmp_path / "sd.safetensors")
    files = ["nowhere.pth", tiny / "tiny_umt5.safetensors", tiny / "tiny_wan_vae.safetensors"]
    files += [tmp_path / "style.safetensors", tmp_path / "sd.safetensors", tmp_path / "lighttaew2_1.pth"]
    torch.save(tiny_decoder(), files[-1])
    assert main(["inspect", *map(str, files)]) == 2
    out, err = capsys.readouterr()
    assert "nowhere.pth does not exist" in err and "Traceback" not in err
    tables = out.split("umt5.safetensors")[1]
    for text in ("umT5 text encoder", "inside", "VAE of Wan 2.1", "base width", "LoRA for Wan (dim 1536, 1.3B)"):
        assert text in tables
        tables = tables.split(text, 1)[1]
    for text in ("4 in 2 blocks", "4 in 2, 5 in 2", "left out", "another model than Wan", "LightTAE, a tiny decoder"):
        assert text in tables


def test_a_file_is_written_over_only_when_asked(tiny, tmp_path, capsys, monkeypatch):
    target = tmp_path / "there.safetensors"
    target.write_bytes(b"mine")
    command = ["quantize", str(tiny / "TinyWan2.1-T2V.pth"), str(target)]
    assert main(command) == 2 and "--force" in capsys.readouterr().err
    for answer, code in (("", 2), ("n\n", 2), ("y\n", 0)):
        assert target.read_bytes() == b"mine"
        terminal = io.StringIO(answer)
        terminal.isatty = lambda: True
        monkeypatch.setattr(sys, "stdin", terminal)
        assert main(command) == code, answer
        assert "Write over it?" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main([*command, "--force"]) == 0 and checkpoint.inspect(target).format == "int8_block"


def test_convert_and_quantize_write_what_they_say_and_pass_warnings_on(tiny, tmp_path, capsys):
    row, block = tmp_path / "row.safetensors", tmp_path / "block.safetensors"
    assert main(["convert", str(tiny / "TinyWan2.1-T2V-quant.pth"), str(row), "--format", "int8_row"]) == 0
    assert "warning:" in capsys.readouterr().err  # int8 to int8 rounds twice
    assert main(["quantize", str(tiny / "TinyWan2.1-T2V.pth"), str(block)]) == 0
    assert [checkpoint.inspect(path).format for path in (row, block)] == ["int8_row", "int8_block"]
    assert main(["convert", str(row), str(row), "--format", "bf16", "--force"]) == 2


def test_merge_tells_distances_and_names_a_missing_file(tiny, tmp_path, capsys):
    base, turbo, target = tiny / STOCK, tiny / "TinyWan2.1-T2V.pth", tmp_path / "out.safetensors"
    finetune = {name: tensor * 2 for name, tensor in checkpoint.load(base)[0].items()}
    save_file(finetune, tmp_path / "finetune.safetensors")
    command = ["merge", tmp_path / "finetune.safetensors", "--base", base, "-o", target]
    command += ["--strength", "0.5", "--format", "int8_block", "--turbo"]
    assert main([*map(str, command), str(turbo)]) == 0
    assert checkpoint.inspect(target).format == "int8_block"
    out, err = capsys.readouterr()
    assert "warning: finetune.safetensors is so far from" in err
    assert "finetune.safetensors: 100.00% from the original" in out and "pth: 0.00% from the original" in out
    assert f"{target}: " in out and "int8_block" in out
    assert main([*map(str, command), str(tmp_path / "none.pth"), "--force"]) == 2
    assert "none.pth" in capsys.readouterr().err


def test_a_name_that_no_disk_takes_is_an_error_in_one_line(capsys):
    """Path.is_file raises for it."""
    for command in ("inspect", "tinywan"):
        assert main([command, "x" * 300]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and err.startswith("turbo-core: ") and "x" * 300 in err
