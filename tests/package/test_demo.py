"""run.py: the demo writes over what an earlier one made, and an environment is filled once for what it is to hold."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run():
    spec = importlib.util.spec_from_file_location("run", ROOT / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_demo_runs_again(run, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "environment", lambda *_: sys.executable)
    monkeypatch.setattr(run, "OUTPUT", tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("COMFYUI_DIR", raising=False)
    for prompt in ([], ["A green square moves to the left over a plain black background."]):
        assert run.demo(prompt) == 0
    assert (tmp_path / "demo.mp4").stat().st_size > 1000 and (tmp_path / "demo.png").is_file()


def test_the_demo_takes_no_options_for_a_prompt(run, monkeypatch):
    monkeypatch.setattr(run, "environment", lambda *_: pytest.fail("it sets itself up"))
    with pytest.raises(SystemExit, match="demo   render a prompt"):
        run.demo(["--help"])


def test_an_environment_is_filled_once_for_each_set(run, tmp_path, monkeypatch):
    """Sets of this project add to each other; one ComfyUI's requirements take the place of another's."""
    monkeypatch.setattr(run, "ROOT", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text("")
    filled = []

    def subprocess_run(command, **_):
        if "venv" in command:
            python = Path(command[-1]) / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
            python.parent.mkdir(parents=True, exist_ok=True)
            python.touch()
        else:
            filled.append(command[-1])

    monkeypatch.setattr(run.subprocess, "run", subprocess_run)
    for wanted in (".[pipeline]", ".[test]", ".[pipeline]", ".[test]"):
        run.environment(".venv", [wanted])
    assert filled == [".[pipeline]", ".[test]"]
    for wanted in ("av==15", "av==16", "av==15", "av==15"):
        run.environment(".venv-host", [wanted])
    assert filled[2:] == ["av==15", "av==16", "av==15"]
    (tmp_path / "pyproject.toml").write_text("changed")
    python = run.environment(".venv", [".[test]"])
    python.unlink()
    run.environment(".venv", [".[test]"])
    assert filled[5:] == [".[test]", ".[test]"]
