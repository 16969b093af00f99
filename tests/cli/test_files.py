"""turbo-core inspect, convert, quantize and merge."""

from safetensors.torch import save_file

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


def test_convert_and_quantize_write_what_they_say_and_pass_warnings_on(tiny, tmp_path, capsys):
    row, block = tmp_path / "row.safetensors", tmp_path / "block.safetensors"
    assert main(["convert", str(tiny / "TinyWan2.1-T2V-quant.pth"), str(row), "--format", "int8_row"]) == 0
    assert "warning:" in capsys.readouterr().err  # int8 to int8 rounds twice
    assert main(["quantize", str(tiny / "TinyWan2.1-T2V.pth"), str(block)]) == 0
    assert [checkpoint.inspect(path).format for path in (row, block)] == ["int8_row", "int8_block"]
    assert main(["convert", str(row), str(row), "--format", "bf16"]) == 2


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
    assert main([*map(str, command), str(tmp_path / "none.pth")]) == 2
    assert "none.pth" in capsys.readouterr().err
