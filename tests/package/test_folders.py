"""Folders as people have them: odd names, no right to write, a file that another program holds, any console."""

import errno
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from tests.helpers.folders import ODD_NAME, without_rights
from tests.helpers.tiny_family import make_tiny
from turbo_core import checkpoint
from turbo_core.checkpoint import write
from turbo_core.cli import main
from turbo_core.errors import TurboError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A folder with spaces, brackets and letters of three scripts in its name, with the small family."""
    folder = tmp_path_factory.mktemp("disk") / ODD_NAME
    make_tiny(folder)
    return folder


def test_commands_work_in_a_folder_with_spaces_and_other_scripts(odd, capsys):
    source, target = odd / "TinyWan2.1-T2V.pth", odd / "сжатая 模型.safetensors"
    assert main(["convert", str(source), str(target), "--format", "int8_block"]) == 0
    assert main(["inspect", str(source), str(target)]) == 0
    sd, _ = checkpoint.load(target)
    assert sd["blocks.0.ffn.0.weight"].dtype == torch.int8
    size = ["--size", "32x32", "--frames", "5", "--steps", "1", "--device", "cpu"]
    output, sheet = odd / "фильм.mp4", odd / "лист 1.png"
    files = ["--dit", target, "--vae", odd / "TinyWan2.1_VAE.pth", "--text-encoder", odd / "tiny_umt5_enc.pth"]
    files += ["--tokenizer", odd / "spiece.model"]
    pictures = ["-o", output, "--contact-sheet", sheet]
    assert main(["generate", "--prompt", "корабль", *map(str, [*files, *pictures]), *size]) == 0, capsys.readouterr()
    assert output.stat().st_size > 500 and sheet.stat().st_size > 100


@pytest.fixture
def read_only(odd):
    """A read-only folder with one read-only model, and a folder of everybody's, outside of pytest's closed ones."""
    base = Path(tempfile.mkdtemp(prefix="turbowan-"))
    base.chmod(0o755)
    folder, free = base / "models", base / "free"
    folder.mkdir()
    free.mkdir()
    free.chmod(0o777)
    shutil.copy(odd / "TinyWan2.1-T2V.pth", folder)
    shutil.copy(odd / "tiny_wan_stock_bf16.safetensors", folder)
    for path in folder.iterdir():
        path.chmod(0o444)
    folder.chmod(0o555)
    yield folder, free
    folder.chmod(0o755)
    shutil.rmtree(base)


@pytest.mark.parametrize("name", ["TinyWan2.1-T2V.pth", "tiny_wan_stock_bf16.safetensors"])
def test_models_in_a_read_only_folder_are_read_and_converted_elsewhere(read_only, name):
    folder, free = read_only
    with without_rights():
        with pytest.raises(PermissionError):
            (folder / "probe").touch()  # else this test proves nothing
        sd, _ = checkpoint.load(folder / name)
        sd["blocks.0.ffn.0.bias"].add_(1)  # the host writes to what it loaded
        checkpoint.convert(folder / name, free / "x.safetensors", "int8_block")
    assert checkpoint.inspect(free / "x.safetensors").format == "int8_block"


def test_converting_into_a_read_only_folder_says_so(read_only):
    folder = read_only[0]
    before = sorted(path.name for path in folder.iterdir())
    with without_rights(), pytest.raises(TurboError, match=r"x\.safetensors could not be written.*Check the rights"):
        checkpoint.convert(folder / before[0], folder / "x.safetensors", "bf16")
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize("moment", ["replace", "rename"])  # at the end, and before anything is written
@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "The process cannot access the file because it is being used"),  # WinError 32
        OSError(errno.EINVAL, "The requested operation cannot be performed"),  # 1224: a program has it mapped
    ],
)
def test_a_target_that_windows_does_not_let_go_stays_whole(odd, tmp_path, monkeypatch, error, moment):
    """Windows does not replace a file that a program, ComfyUI itself for one, has open or mapped."""
    target, calls = tmp_path / "x.safetensors", []
    checkpoint.convert(odd / "TinyWan2.1-T2V.pth", target, "int8_block")
    before = target.read_bytes()

    def refuse(source, destination):
        raise error

    monkeypatch.setattr(write.os, moment, refuse)
    with pytest.raises(TurboError, match=r"x\.safetensors could not be written .*ComfyUI has.*another name"):
        checkpoint.convert(odd / "TinyWan2.1-T2V.pth", target, "bf16", lambda *call: calls.append(call))
    assert bool(calls) == (moment == "replace")
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"] and target.read_bytes() == before


def test_output_fits_any_console(odd):
    """A path that the code page of a pipe has no letters for is no reason to fail."""
    command = [sys.executable, "-m", "turbo_core", "inspect", str(odd / "TinyWan2.1-T2V.pth")]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONIOENCODING": "cp1252"}, capture_output=True)
    assert done.returncode == 0 and rb"\u041c\u043e\u0438" in done.stdout, done.stderr.decode()
