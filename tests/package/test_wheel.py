"""turbo_core by itself: the wheel, where it runs, and without the libraries that only some of it needs."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import turbo_core
from tests.helpers.folders import ODD_NAME

ROOT = Path(__file__).resolve().parents[2]


def run(*command, cwd, **environment):
    """Standard output of a command in a folder, in a process of its own."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder with a wheel made from an sdist made from a copy of the sources, without the network."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    ignore = shutil.ignore_patterns("__pycache__")
    for part in ("turbo_core", "kernels", "tests", "nodes"):
        shutil.copytree(ROOT / part, source / part, ignore=ignore)
    for part in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "__init__.py"):
        shutil.copy(ROOT / part, source)
    build = "import sys, setuptools.build_meta as b; getattr(b, 'build_' + sys.argv[1])(sys.argv[2])"
    run(sys.executable, "-c", build, "sdist", str(folder), cwd=source)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        names = archive.getnames()
        archive.extractall(folder, filter="data")
    assert not [name for name in names if "/tests" in name or "/nodes" in name]
    run(sys.executable, "-c", build, "wheel", str(folder), cwd=next(folder.glob("comfyui_turbowan-*/")))
    return folder


def test_wheel_holds_turbo_core_with_its_kernels_and_nothing_else(built):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = {n for n in wheel.namelist() if ".dist-info/" not in n}
    ours = {path.relative_to(ROOT).as_posix() for path in (ROOT / "turbo_core").rglob("*.py")}
    kernels = {f"turbo_core/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "kernels").rglob("*.py")}
    assert names == ours | kernels


INSTALLED = """
import json, turbo_core.kernels, turbo_core.cli
print(json.dumps([turbo_core.cli.__file__, turbo_core.kernels.__file__]))
raise SystemExit(turbo_core.cli.main(["doctor"]))
"""


def test_wheel_runs_from_another_directory(built, tmp_path):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / ODD_NAME)  # what pip does with it
        (entry,) = [n for n in wheel.namelist() if n.endswith("entry_points.txt")]
        assert "turbo-core = turbo_core.cli:run" in wheel.read(entry).decode()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    said = run(sys.executable, "-c", INSTALLED, cwd=elsewhere, PYTHONPATH=str(tmp_path / ODD_NAME), PYTHONUTF8="1")
    first, _, report = said.partition("\n")
    package = tmp_path / ODD_NAME / "turbo_core"
    assert [Path(p) for p in json.loads(first)] == [
        package / "cli" / "__init__.py",
        package / "kernels" / "__init__.py",
    ]
    assert "sparse attention" in report and turbo_core.__version__ in report


WITHOUT = """
import importlib, sys
from importlib.machinery import PathFinder
from pathlib import Path

usual = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name.partition(".")[0] in sys.argv[1:] else usual(name, *rest)
import torch
for path in sorted(Path("turbo_core").rglob("*.py")):
    if path.stem not in ("__main__", "fast", "layout", "compiling"):  # those are what Triton and comfy_kitchen are for
        importlib.import_module(".".join(path.with_suffix("").parts).removesuffix(".__init__"))
assert "triton" not in sys.modules
from turbo_core.cli import main
raise SystemExit(main(["doctor"]))
"""


def test_turbo_core_works_without_triton_and_optional_libraries():
    absent = "triton", "comfy_kitchen", "av", "diffusers", "sentencepiece", "tokenizers", "PIL", "rich", "einops"
    said = run(sys.executable, "-c", WITHOUT, *absent, cwd=ROOT, PYTHONUTF8="1")
    assert re.search(r"generate\W+no: .*av.* missing", said)
    assert re.search(r"inspect, convert, quantize\W+yes", said)
