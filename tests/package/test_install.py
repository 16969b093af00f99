"""Installing: metadata, what gets shipped, the wheel, odd and read-only folders, libraries that are not there."""

import ast
import errno
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import turbo_core
from tests.helpers.folders import ODD_NAME, without_rights
from tests.helpers.tiny_family import make_tiny
from turbo_core import checkpoint
from turbo_core.checkpoint import write
from turbo_core.cli import main
from turbo_core.errors import TurboError
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


def run(*command, cwd, **environment):
    """Standard output of a command in a folder, in a process of its own."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- metadata


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


# ---- requirements


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


# ---- files


def test_the_shipped_package_has_all_that_runs_and_little_else():
    files = shipped()
    code = {f for f in git("ls-files") if re.match(r"(nodes|turbo_core|kernels|web|workflows|locales)/", f)}
    assert len(code) > 60 and any(f.startswith("web/docs/") for f in code)
    roots = {"__init__.py", "LICENSE", "README.md", "pyproject.toml", "requirements.txt"}
    family = {f"models/tinywan/{name}" for name in ["README.md", *FILES.values(), *PAIR.values()]}
    assert files == code | roots | family
    assert sum((ROOT / f).stat().st_size for f in files if (ROOT / f).exists()) < 24e6


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


# ---- wheel


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
        assert "turbo-core = turbo_core.cli:main" in wheel.read(entry).decode()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    said = run(sys.executable, "-c", INSTALLED, cwd=elsewhere, PYTHONPATH=str(tmp_path / ODD_NAME), PYTHONUTF8="1")
    first, _, report = said.partition("\n")
    package = tmp_path / ODD_NAME / "turbo_core"
    assert [Path(p) for p in json.loads(first)] == [package / "cli.py", package / "kernels" / "__init__.py"]
    assert "sparse attention" in report and turbo_core.__version__ in report


WITHOUT = """
import importlib, sys
from importlib.machinery import PathFinder
from pathlib import Path

usual = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name.partition(".")[0] in sys.argv[1:] else usual(name, *rest)
import torch
for path in sorted(Path("turbo_core").glob("*.py")):
    if path.stem not in ("__main__", "layout"):  # layout is what comfy_kitchen is for
        importlib.import_module(f"turbo_core.{path.stem}")
assert "triton" not in sys.modules
from turbo_core.cli import main
raise SystemExit(main(["doctor"]))
"""


def test_turbo_core_works_without_triton_and_optional_libraries():
    absent = "triton", "comfy_kitchen", "av", "diffusers", "transformers", "sentencepiece", "PIL", "rich", "einops"
    said = run(sys.executable, "-c", WITHOUT, *absent, cwd=ROOT, PYTHONUTF8="1")
    assert re.search(r"generate\W+no: .*av.* missing", said)
    assert re.search(r"inspect, convert, quantize\W+yes", said)


# ---- folders


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
