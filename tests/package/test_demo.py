"""`python run.py demo`: a second time it writes over what the first made."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_demo_runs_again(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("run", ROOT / "run.py")
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    monkeypatch.setattr(run, "environment", lambda *_: sys.executable)
    monkeypatch.setattr(run, "OUTPUT", tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("COMFYUI_DIR", raising=False)
    for prompt in ([], ["A green square moves to the left over a plain black background."]):
        assert run.demo(prompt) == 0
    assert (tmp_path / "demo.mp4").stat().st_size > 1000 and (tmp_path / "demo.png").is_file()
