"""What the registry is told and gets: metadata, requirements, the files that are shipped."""

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import turbo_core
from turbo_core.tinywan import FILES, PAIR

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it there

ROOT = Path(__file__).resolve().parents[2]


def git(*arguments):
    """Lines that git prints about this checkout; skips where the tests lie outside one."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("this is no git checkout")
    command = ["git", "-c", "core.quotepath=off", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=True)
    return done.stdout.splitlines()


def shipped():
    """Files of the registry's package: tracked ones without .comfyignore's, as comfy-cli picks them."""
    return set(git("ls-files")) - set(git("ls-files", "-ci", "--exclude-from=.comfyignore"))


def test_nothing_that_python_leaves_behind_is_shipped():
    """Builds by allowlists refuse a package that holds any."""
    assert [name for name in shipped() if "__pycache__" in name or name.endswith((".pyc", ".pyo"))] == []
    assert git("check-ignore", "nodes/__pycache__/loader.cpython-313.pyc"), "nor tracked by accident"


@pytest.fixture(scope="module")
def metadata():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_registry_metadata_is_complete_and_in_the_registry_s_formats(metadata):
    project, comfy = metadata["project"], metadata["tool"]["comfy"]
    assert re.fullmatch(r"[a-z](?:[a-z0-9]|[-_.](?![-_.])){1,98}", project["name"])
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert project["version"] == turbo_core.__version__
    assert 20 < len(project["description"]) < 200
    assert project["license"] == "Apache-2.0" and (ROOT / "LICENSE").is_file()
    assert comfy["PublisherId"] and comfy["DisplayName"] == "TurboWan"
    repository = project["urls"]["Repository"]
    assert all(url.startswith(repository) for url in project["urls"].values())
    # the registry's own rule; what does not match is dropped there with a warning
    assert re.fullmatch(r">=\d+\.\d+\.\d+", comfy["requires-comfyui"])
    kinds = [c.partition(" :: ")[0] for c in project["classifiers"]]
    assert "Operating System :: OS Independent" in project["classifiers"] and "License" not in kinds
    minors = [c.rpartition(".")[2] for c in project["classifiers"] if " :: Python :: 3." in c]
    assert minors == ["10", "11", "12", "13"] and project["requires-python"] == f">=3.{minors[0]}"


def test_one_minimum_of_comfyui_is_named_everywhere(metadata):
    tree = ast.parse((ROOT / "nodes" / "__init__.py").read_text(encoding="utf-8"))
    assigned = [n for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "MINIMUM_COMFYUI"]
    minimum = ".".join(map(str, ast.literal_eval(assigned[0].value)))
    assert metadata["tool"]["comfy"]["requires-comfyui"] == f">={minimum}.0"
    assert f"ComfyUI {minimum} or newer" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("key", "size"), [("Icon", (400, 400)), ("Banner", (1260, 540))])
def test_pictures_of_the_registry_page_are_in_the_repository(metadata, key, size):
    image_module = pytest.importorskip("PIL.Image")
    repository = metadata["project"]["urls"]["Repository"].removeprefix("https://github.com/")
    base = f"https://raw.githubusercontent.com/{repository}/main/"
    url = metadata["tool"]["comfy"][key]
    assert url.startswith(base)
    with image_module.open(ROOT / url.removeprefix(base)) as picture:
        assert picture.format == "PNG" and picture.size == size


def test_requirements_leave_torch_alone(metadata):
    """ComfyUI-Manager runs pip on requirements.txt: a torch there, however deep, may replace the user's build."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    assert sorted([*lines, "torch>=2.7"]) == sorted(metadata["project"]["dependencies"])
    waiting, seen = [Requirement(line).name for line in lines], set()
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name not in seen:
            seen.add(name)
            needs = map(Requirement, importlib.metadata.requires(name) or ())
            waiting += [r.name for r in needs if r.marker is None or r.marker.evaluate({"extra": ""})]
    assert not [name for name in seen if re.match(r"torch|triton|nvidia|cuda|pytorch", name)]


def test_nothing_runs_at_installation():
    assert not {"install.py", "setup.py", "prestartup_script.py"} & {path.name for path in ROOT.iterdir()}


def test_the_shipped_package_has_all_that_runs_and_what_its_pages_link_to():
    files = shipped()
    code = {f for f in git("ls-files") if re.match(r"(nodes|turbo_core|kernels|web|workflows|subgraphs|locales)/", f)}
    assert len(code) > 60 and any(f.startswith("web/docs/") for f in code)
    pages = {f for f in git("ls-files") if re.match(r"(docs|benchmarks/results)/", f)}
    roots = {"__init__.py", "LICENSE", "README.md", "SECURITY.md", "CONTRIBUTING.md"}
    roots |= {"pyproject.toml", "requirements.txt"}
    family = {
        f"models/tinywan/{name}" for name in ["README.md", "log.md", "curves.png", *FILES.values(), *PAIR.values()]
    }
    assert files == code | pages | roots | family
    assert sum((ROOT / f).stat().st_size for f in files if (ROOT / f).exists()) < 27e6


def test_names_suit_windows():
    files = git("ls-files")
    assert len({f.casefold() for f in files}) == len(files)
    reserved = r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?"
    for file in files:
        parts = file.split("/")
        assert not re.search(r'[<>:"|?*\\\x00-\x1f]|[^\x00-\x7f]', file), file
        assert not [p for p in parts if p.endswith((" ", ".")) or re.fullmatch(reserved, p)], file
        assert len(file) < 120, file  # below 260 with C:\Users\...\ComfyUI_windows_portable\ComfyUI\custom_nodes\...


def test_no_links_and_no_shell_scripts():
    modes = dict(reversed(line.split(maxsplit=3)[::3]) for line in git("ls-files", "-s"))
    assert {name for name, mode in modes.items() if mode != "100644"} <= {".ci/run"}
    assert not [name for name in modes if name.endswith((".sh", ".bash", ".bat", ".ps1"))]


def test_text_files_are_opened_with_their_encoding():
    """Else Windows takes the code page of its language."""
    for file in git("ls-files", "run.py", "__init__.py", "nodes", "turbo_core", "kernels", "benchmarks"):
        if not file.endswith(".py") or not (ROOT / file).exists():
            continue
        for call in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call):
                continue
            name = getattr(call.func, "attr", getattr(call.func, "id", None))
            words = {ast.unparse(a) for a in call.args} | {f"{k.arg}=" for k in call.keywords}
            binary = name == "open" and any(re.fullmatch(r"'[rwax+]*b[+]?'", word) for word in words)
            ours = name in ("read_text", "write_text") or (name == "open" and isinstance(call.func, ast.Name))
            assert not ours or binary or words & {"encoding=", "'utf-8'"}, f"{file}:{call.lineno}"
