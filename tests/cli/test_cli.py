"""The turbo-core command: every verb on the tiny family, exit codes, one line for a person's mistake."""

import json
import subprocess
import sys
from pathlib import Path

import av
import pytest
from PIL import Image

from tests.helpers.tiny_family import make_tiny
from turbo_core import checkpoint, pipeline, sla
from turbo_core.checkpoint import formats
from turbo_core.cli import files, main
from turbo_core.cli.generate import PRECISIONS
from turbo_core.errors import TurboError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    make_tiny(folder)
    return folder


def generate(tiny, output, *more, dit="TinyWan2.1-T2V.pth", steps=1):
    command = f"generate --dit {tiny / dit} --vae {tiny / 'tiny_wan_vae.safetensors'} --size 32x32 --frames 5"
    command += f" --text-encoder {tiny / 'tiny_umt5_enc.pth'} --tokenizer {tiny} --steps {steps} --device cpu"
    return main([*command.split(), "--prompt", "two [bold]cats[/bold]", "-o", str(output), *map(str, more)])


def test_generate_writes_video_contact_sheet_and_report(tiny, tmp_path, capsys):
    output, sheet, report = tmp_path / "a.mp4", tmp_path / "a.png", tmp_path / "a.json"
    assert generate(tiny, output, "--contact-sheet", sheet, "--json", report, "--seed", 3, "--topk", 0.2) == 0
    with av.open(str(output)) as container:
        frames = [frame.to_ndarray(format="rgb24").shape for frame in container.decode(video=0)]
    assert frames == [(32, 32, 3)] * 5
    assert Image.open(sheet).size == (96, 64)
    told = json.loads(report.read_text())
    assert told["settings"]["seed"] == 3 and told["settings"]["topk"] == 0.2
    assert {"text encoder", "sampling", "decode", "write"} <= set(told["seconds"])
    out = capsys.readouterr().out
    assert "time: sampling" in out and "two [bold]cats[/bold]" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.mp4", "a.png"]


def test_image_to_video_with_two_experts(tiny, tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "image.png")
    low = tiny / "TinyWan2.2-I2V-low-quant.pth"
    more = "--image", tmp_path / "image.png", "--dit-low", low, "--precision", "int8", "--ode"
    assert generate(tiny, tmp_path / "a.mp4", *more, dit="TinyWan2.2-I2V-high-quant.pth", steps=3) == 0
    assert (tmp_path / "a.mp4").stat().st_size > 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--size", "33x32"], "nearest is 32x32"),
        (["--frames", "6"], "nearest is 5"),
        (["--steps", "9"], "1 to 4"),
        (["--image", "none.png"], "leave --image out"),
        (["--vae", "none.pth"], "none.pth does not exist"),
        (["--tokenizer", "nowhere"], "Pass --tokenizer"),
        (["-o", "video.gif"], "video.mp4"),
        (["--contact-sheet", "sheet.abc"], "sheet.png"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tiny, tmp_path, more, message, capsys):
    assert generate(tiny, tmp_path / "a.mp4", *more) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("turbo-core: ") and message in last
    assert not list(tmp_path.iterdir())


def test_debug_shows_where_an_error_comes_from(tiny, tmp_path):
    with pytest.raises(TurboError):
        generate(tiny, tmp_path / "a.mp4", "--steps", 9, "--debug")


def test_interrupting_gives_130_and_leaves_no_file(tiny, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "decode_video", interrupt)
    assert generate(tiny, tmp_path / "a.mp4") == 130
    assert "Traceback" not in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


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


def test_doctor_tells_the_path_of_every_part(capsys):
    assert main(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    paths = dict(findings["paths"])
    assert {"int8 linear", "sparse attention", "text encoder", "VAE", "generate"} <= set(paths)
    assert paths["generate"] == "yes"
    assert main(["doctor"]) == 0
    assert "torch" in capsys.readouterr().out


def test_doctor_says_what_is_missing_and_how_to_get_it(monkeypatch, capsys):
    from turbo_core.diagnostics import doctor

    find = doctor.importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name == "diffusers" else find(name))
    assert main(["doctor", "--json"]) == 0
    paths = dict(json.loads(capsys.readouterr().out)["paths"])
    assert "diffusers missing" in paths["generate"] and "[pipeline]" in paths["generate"]
    assert "not installed" in paths["VAE"]


@pytest.mark.parametrize("package", ["diffusers", "transformers", "sentencepiece", "av"])
def test_a_missing_library_names_the_extra_before_sampling(tiny, tmp_path, package, monkeypatch, capsys):
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # what Python does for a package that cannot be imported
    monkeypatch.setattr(pipeline, "sample", lambda *_, **__: pytest.fail("sampled first"))
    assert generate(tiny, tmp_path / "a.mp4") == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert package in last and 'pip install "comfyui-turbowan[pipeline]"' in last


def test_the_command_starts_without_heavy_imports():
    """--help and import turbo_core need torch alone; the pipeline's libraries come in when they are used."""
    code = (
        "import sys, turbo_core.cli, turbo_core.pipeline, turbo_core.diagnostics.doctor\n"
        "heavy = {'diffusers', 'transformers', 'av', 'PIL', 'sentencepiece', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([sys.executable, "-m", "turbo_core", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    for verb in ("generate", "inspect", "convert", "quantize", "doctor", "bench", "tune", "plan", "merge", "tinywan", "train", "evaluate"):
        assert verb in done.stdout


def test_choices_are_those_of_the_library():
    assert files.FORMATS == formats.FORMATS and files.FORMATS[:2] == tuple(formats.INTEGERS)
    assert tuple(sla.PRECISIONS) == PRECISIONS


def test_plain_output_without_rich(tiny, tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name == "rich" or name.startswith("rich.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert generate(tiny, tmp_path / "a.mp4") == 0
    captured = capsys.readouterr()
    assert "sampling 1/1" in captured.err and "time: total" in captured.out
