"""What an import brings and costs, and that each copy of the pack finds its own kernels."""

import importlib
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import turbo_core.kernels

ROOT = Path(__file__).resolve().parents[2]
NUMERICS = ["errors", "schedule", "sampler", "int8", "sla", "wan", "kernels"]


def run(code, *args):
    """Run code in a fresh interpreter at the repository root; returns the JSON it prints."""
    done = subprocess.run([sys.executable, "-c", code, *args], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


IMPORTS = """
import json, sys, time, importlib

def clocked(names):
    start = time.process_time()
    for name in names:
        importlib.import_module(name)
    return time.process_time() - start

clocked(["torch"])
before = {name.partition(".")[0] for name in sys.modules}
seconds = clocked(["turbo_core"] + ["turbo_core." + name for name in sys.argv[1:]])
new = {name.partition(".")[0] for name in sys.modules} - before
print(json.dumps([seconds, sorted(new - set(sys.stdlib_module_names))]))
"""


def test_turbo_core_imports_torch_alone_and_adds_next_to_nothing_to_its_time():
    for _ in range(3):  # the best of three: a file may have to come from the disk
        seconds, new = run(IMPORTS, *NUMERICS)
        assert new == ["turbo_core"]
        if seconds < 0.2:
            return
    raise AssertionError(f"import turbo_core took {seconds:.2f} s on top of torch")


def test_nothing_is_printed_at_import():
    code = "import turbo_core; " + "; ".join(f"import turbo_core.{name}" for name in NUMERICS)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


PACK_ALONE = """
import importlib.util, inspect, json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "comfy", "comfy_api", "nodes", "numpy", "triton"):
            raise ImportError(f"{name} was wanted")

sys.meta_path.insert(0, Blocked())
name = "custom_nodes.turbo-wan.9"
spec = importlib.util.spec_from_file_location(name, "__init__.py", submodule_search_locations=["."])
pack = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)
entry = pack.comfy_entrypoint
try:
    entry().send(None)
    wanted = None
except ImportError as error:
    wanted = str(error)
print(json.dumps([inspect.iscoroutinefunction(entry), wanted]))
"""


def test_the_pack_imports_without_torch_and_comfy():
    is_coroutine, wanted = run(PACK_ALONE)
    assert is_coroutine
    assert wanted.startswith("comfy")  # its nodes, and with them the host, are imported on entry only


def test_the_bridge_leads_to_the_folder_beside_turbo_core():
    assert [Path(p) for p in turbo_core.kernels.__path__] == [ROOT / "kernels"]
    own = ROOT / "kernels"
    for path in sorted(own.glob("*.py")):
        if path.stem != "__init__":
            spec = importlib.util.find_spec(f"turbo_core.kernels.{path.stem}")
            assert spec is not None and Path(spec.origin) == path


@pytest.fixture
def copies(tmp_path):
    """Two copies of the pack under names as a host gives them, each with a kernel that knows whose it is."""
    names = []
    for i in "ab":
        folder = tmp_path / f"ComfyUI-TurboWan-{i}"
        ignore = shutil.ignore_patterns("__pycache__")
        for part in ("turbo_core", "kernels"):
            shutil.copytree(ROOT / part, folder / part, ignore=ignore)
        shutil.copy(ROOT / "__init__.py", folder)
        (folder / "kernels" / "whose.py").write_text(f"WHOSE = {i!r}\n")
        (folder / "turbo_core" / "user.py").write_text("from .kernels.whose import WHOSE\n")
        # ComfyUI's name is the path, with its dots replaced; a hyphen keeps it from being an identifier
        name = str(folder).replace(".", "_x_")
        spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
        names.append(name)
    yield names
    for module in [m for m in sys.modules if m.startswith(tuple(names))]:
        del sys.modules[module]


def test_two_copies_of_the_pack_each_find_their_own_kernels(copies):
    before = set(sys.modules)
    a, b = (importlib.import_module(".turbo_core.user", name) for name in copies)
    assert (a.WHOSE, b.WHOSE) == ("a", "b")
    int8_a, int8_b = (importlib.import_module(".turbo_core.int8", name) for name in copies)
    assert int8_a is not int8_b and Path(int8_a.__file__).parent.parent != Path(int8_b.__file__).parent.parent
    new = {name.partition(".")[0] for name in set(sys.modules) - before}
    assert not new & {"kernels", "nodes", "turbo_core"}  # nothing was found under an absolute name
    with pytest.raises(ImportError):
        importlib.import_module("turbo_core.kernels.whose")  # the repository's own copy is a third one
