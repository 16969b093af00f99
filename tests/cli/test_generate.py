"""turbo-core generate: what it writes, one line for a person's mistake, nothing left over."""

import errno
import json
import sys

import av
import pytest
from PIL import Image

from tests.helpers.opens import counted_opens
from turbo_core import files
from turbo_core.cli import main
from turbo_core.errors import TurboError
from turbo_core.pipeline import Trajectory, resident


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


def test_two_experts_and_an_image_each_file_opened_and_described_once(tiny, tmp_path, monkeypatch):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "image.png")
    opened, described = counted_opens(monkeypatch)
    high, low = (f"TinyWan2.2-I2V-{name}-quant.pth" for name in ("high", "low"))
    more = "--image", tmp_path / "image.png", "--dit-low", tiny / low, "--precision", "int8", "--ode"
    assert generate(tiny, tmp_path / "a.mp4", *more, dit=high, steps=3) == 0
    assert (tmp_path / "a.mp4").stat().st_size > 0
    assert opened == dict.fromkeys([high, low, "tiny_wan_vae.safetensors", "tiny_umt5_enc.pth"], 1)
    assert described == dict.fromkeys([high, low], 1)


def test_a_report_that_cannot_be_written_is_named_and_keeps_the_old_one(tiny, tmp_path, monkeypatch, capsys):
    report = tmp_path / "a.json"
    report.write_text("old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", lambda _: None if not report.with_suffix(".mp4").exists() else full())
    assert generate(tiny, tmp_path / "a.mp4", "--json", report) == 2
    assert "a.json (" in capsys.readouterr().err
    assert report.read_text() == "old" and {path.name for path in tmp_path.iterdir()} == {"a.json", "a.mp4"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seed", str(1 << 64)], "2^64 - 1"),
        (["--seed", "-1"], "2^64 - 1"),
        (["--prompt", "a \udcff circle"], "not valid text"),
        (["--prompt", " "], "--prompt is empty"),
        (["--size", "33x32"], "nearest is 32x32"),
        (["--frames", "6"], "nearest is 5"),
        (["--steps", "101"], "1 to 4"),
        (["--image", "none.png"], "leave --image out"),
        (["--vae", "none.pth"], "none.pth does not exist"),
        (["--vae-fast", "none.pth"], "none.pth does not exist"),
        (["--tokenizer", "nowhere"], "Pass --tokenizer"),
        (["-o", "video.gif"], "video.mp4"),
        (["--contact-sheet", "sheet.abc"], "sheet.png"),
        (["--json", "."], "name a file in it"),
        (["-o", "x" * 300 + ".mp4"], "too long a name"),
        (["--size", "9" * 5000 + "x16"], "is not understood"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tiny, tmp_path, more, message, capsys):
    assert generate(tiny, tmp_path / "a.mp4", *more) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("turbo-core: ") and message in last
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, message", [("out.mp4", "does not end in .json. Name it out.json"), ("tokenizer.json", "and it is read")]
)
def test_a_report_does_not_take_the_place_of_the_video_or_of_what_is_read(tiny, tmp_path, name, message, capsys):
    (tmp_path / "tokenizer.json").write_text("of a person")
    more = "--tokenizer", tmp_path / "tokenizer.json", "--json", tmp_path / name
    assert generate(tiny, tmp_path / "out.mp4", *more) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    assert (tmp_path / "tokenizer.json").read_text() == "of a person"


def test_more_than_four_steps_are_made_with_one_warning(tiny, tmp_path, capsys):
    assert generate(tiny, tmp_path / "a.mp4", "--steps", "5") == 0
    assert capsys.readouterr().err.count("4 are enough") == 1


def test_a_fault_of_ours_is_one_line_too_and_asks_for_a_report(tiny, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise KeyError("a name\nof two lines")

    monkeypatch.setattr(resident, "open_models", fail)
    assert generate(tiny, tmp_path / "out.mp4") == 70
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "KeyError" in said[0] and "--debug and report" in said[0]
    with pytest.raises(KeyError):
        generate(tiny, tmp_path / "out.mp4", "--debug")


def test_memory_that_is_not_there_is_told_with_the_ways_out(tiny, tmp_path, capsys, monkeypatch):
    assert generate(tiny, tmp_path / "out.mp4", "--frames", "100000001") == 2
    assert "fewer --frames" in capsys.readouterr().err
    monkeypatch.setattr(resident, "check_room", lambda *_: None)  # what is left of it may be less than the machine has
    assert generate(tiny, tmp_path / "out.mp4", "--frames", "100000001") == 2
    assert "Out of memory" in capsys.readouterr().err


def test_debug_shows_where_an_error_comes_from(tiny, tmp_path):
    with pytest.raises(TurboError):
        generate(tiny, tmp_path / "a.mp4", "--steps", 101, "--debug")


def test_interrupting_gives_130_and_leaves_no_file(tiny, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(resident, "decode_frames", interrupt)
    assert generate(tiny, tmp_path / "a.mp4") == 130
    assert "Traceback" not in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["sentencepiece", "av"])
def test_a_missing_library_names_the_extra_before_sampling(tiny, tmp_path, package, monkeypatch, capsys):
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # what Python does for a package that cannot be imported
    monkeypatch.setattr(Trajectory, "advance", lambda *_, **__: pytest.fail("sampled first"))
    assert generate(tiny, tmp_path / "a.mp4") == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert package in last and 'pip install "comfyui-turbowan[pipeline]"' in last


def test_plain_output_without_rich(tiny, tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name == "rich" or name.startswith("rich.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert generate(tiny, tmp_path / "a.mp4") == 0
    captured = capsys.readouterr()
    assert "sampling 1/1" in captured.err and "time: total" in captured.out
