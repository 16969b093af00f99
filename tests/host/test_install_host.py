"""The pack as a user gets it, in the real host: the registry's package, odd folders, too old a host or library."""

import asyncio
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import pytest

from tests.helpers import comfyui as host
from tests.helpers import workflow_api
from tests.helpers.comfyui import PACK, find_comfyui
from tests.helpers.folders import ODD_NAME, without_rights
from turbo_core import checkpoint

pytestmark = pytest.mark.host
FOLDER = "comfyui-turbowan"  # as ComfyUI-Manager names it, after the registry's id
NO_TRITON = """
from importlib.machinery import PathFinder
usual = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name.partition(".")[0] == "triton" else usual(name, *rest)
"""


@pytest.fixture(scope="session")
def packaged(tmp_path_factory):
    """The pack as the registry's package will hold it: what git tracks or would, without .comfyignore's."""
    if not (PACK / ".git").exists():
        pytest.skip("this is no git checkout")
    folder = tmp_path_factory.mktemp("package") / FOLDER

    def listed(*options):
        command = ["git", "ls-files", "-z", *options]
        return set(subprocess.run(command, cwd=PACK, capture_output=True, check=True).stdout.decode().split("\0"))

    files = listed() | listed("-o", "--exclude-standard")
    for name in files - listed("-ci", "--exclude-from=.comfyignore") - listed("-oi", "--exclude-from=.comfyignore"):
        if (PACK / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PACK / name, folder / name)
    return folder


# ---- a server


@pytest.fixture(scope="module")
def server(tiny, packaged, tmp_path_factory):
    """A host without Triton, in a folder with spaces and other scripts, with the package and a switched-off copy."""
    base = tmp_path_factory.mktemp("disk") / ODD_NAME
    host.make_base(base, tiny, copies=())
    shutil.copytree(packaged, base / "custom_nodes" / FOLDER)
    shutil.copytree(packaged, base / "custom_nodes" / "ComfyUI-TurboWan.disabled")
    models = base / "models" / "diffusion_models"
    shutil.copy(tiny / "TinyWan2.1-T2V.pth", models / "моя 模型 (2).pth")
    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(NO_TRITON, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")])))
        running = host.start(find_comfyui(), base)
    yield running
    host.stop(running)


@pytest.fixture(scope="module")
def object_info(server):
    return host.get_json(server, "/object_info")


def _run(server, prompt):
    run = host.run(server, prompt)
    assert run.status == "execution_success", run.error
    return run


def test_the_package_is_whole(server, object_info, pack):
    ours = {name for name, node in object_info.items() if workflow_api.is_ours(node)}
    assert {object_info[name]["python_module"] for name in ours} == {f"custom_nodes.{FOLDER}"}
    assert ours == set(pack.nodes)
    # a folder named example or examples would hide that of the workflows from the host
    assert sorted(host.get_json(server, "/workflow_templates")[FOLDER]) == workflow_api.names()
    for name in workflow_api.names():
        assert host.get(server, f"/api/workflow_templates/{FOLDER}/{name}.jpg")[0] == 200, name
    for page in sorted((PACK / "web" / "docs").glob("*.md")):
        assert host.get(server, f"/extensions/{FOLDER}/docs/{page.name}")[0] == 200, page.name


def test_a_switched_off_copy_does_nothing(server):
    assert ".disabled" not in server.log.split("Starting server")[0].replace("\r", "")
    assert set(host.get_json(server, "/workflow_templates")) >= {FOLDER}


def test_nothing_of_ours_asks_for_triton(server):
    started = server.log.split("Starting server")[0]
    assert "No module named 'triton'" in started  # said by comfy_kitchen: it is hidden indeed
    # of this pack: a host may lack what some of its own extra nodes want
    failed = [line for line in started.splitlines() if re.search(r"IMPORT FAILED|Cannot import|Error while", line)]
    assert not [line for line in failed if FOLDER in line]


def test_a_folder_with_spaces_and_other_scripts_loads_converts_saves_and_generates(server, object_info):
    prompt = workflow_api.to_api(workflow_api.load("turbowan_t2v_turbo_sampler"), object_info)
    small = workflow_api.for_tiny_models(prompt, steps=1, filename_prefix="фильмы 片/первый")
    (loader,) = [number for number, node in small.items() if node["class_type"] == "TurboLoader"]
    small[loader]["inputs"]["model_name"] = "моя 模型 (2).pth"
    (video,) = _run(server, small).videos(server.base)
    assert video.stat().st_size > 500 and video.parent.name == "фильмы 片"
    given = {"source": "моя 模型 (2).pth", "format": "int8_block", "filename": "сжатая 片", "overwrite": False}
    prefix = "diffusion_models/сохранённая 存"
    _run(
        server,
        {
            "1": {"class_type": "TurboConvert", "inputs": given},
            "2": {"class_type": "TurboLoader", "inputs": {"model_name": "моя 模型 (2).pth", "dtype": "default"}},
            "3": {"class_type": "TurboSave", "inputs": {"model": ["2", 0], "filename_prefix": prefix}},
        },
    )
    converted = server.base / "models" / "diffusion_models" / "сжатая 片.safetensors"
    assert checkpoint.inspect(converted).format == "int8_block"
    (saved,) = (server.base / "output" / "diffusion_models").glob("сохранённая 存*.safetensors")
    assert checkpoint.inspect(saved).has_sla


# ---- rights


def test_a_read_only_model_folder_is_loaded_from_and_not_converted_into(tiny, pack, monkeypatch):
    import folder_paths

    base = Path(tempfile.mkdtemp(prefix="turbowan-"))  # pytest's own folders are closed to others
    folder, model = base / "diffusion_models", "TinyWan2.1-T2V-quant.pth"
    folder.mkdir()
    shutil.copy(tiny / model, folder)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([str(folder)], {".pth"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    load, convert = pack.nodes["TurboLoader"].execute, pack.nodes["TurboConvert"].execute
    load(model)  # what is imported late lies where only the owner may read
    (folder / model).chmod(0o444)
    folder.chmod(0o555)
    base.chmod(0o755)
    try:
        with without_rights():
            with pytest.raises(PermissionError):
                (folder / "probe").touch()  # else this test proves nothing
            assert load(model)[0].model.diffusion_model.blocks[0].ffn[0].weight.is_floating_point()
            with pytest.raises(ValueError, match=r"could not be written \(Permission denied\)\. Check the rights"):
                convert(model, "bf16", "x")
        assert [path.name for path in folder.iterdir()] == [model]
    finally:
        folder.chmod(0o755)
        shutil.rmtree(base)


# ---- what does not fit, in the host's own loader of packs


@pytest.fixture
def load(comfy, packaged, tmp_path, caplog):
    """Loads the pack as the host does at start, fresh, and returns what the host logged: [] when all went well."""
    import nodes

    def load(before=None):
        folder = tmp_path / FOLDER
        shutil.copytree(packaged, folder)
        if before is not None:
            before(folder)
        modules, mappings = set(sys.modules), dict(nodes.NODE_CLASS_MAPPINGS)
        try:
            with caplog.at_level(logging.INFO):
                done = asyncio.run(nodes.load_custom_node(str(folder)))
        finally:
            for name in set(sys.modules) - modules:
                if name.startswith(str(tmp_path).replace(".", "_x_")):
                    del sys.modules[name]
            nodes.NODE_CLASS_MAPPINGS.clear()
            nodes.NODE_CLASS_MAPPINGS.update(mappings)
        lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert done == (not lines), lines
        return lines

    return load


def _one_line(lines, *words):
    """The host's log has one line, of one line, with all that a user needs."""
    (line,) = lines
    assert "\n" not in line and all(word in line for word in words), line


def test_the_package_loads_without_a_warning(load):
    assert load() == []


@pytest.mark.parametrize("version", ["0.32.9", "0.3.76", "v0.9"])
def test_too_old_a_comfyui_is_told_which_one_is_needed(load, monkeypatch, version):
    monkeypatch.setitem(sys.modules, "comfyui_version", types.SimpleNamespace(__version__=version))
    _one_line(load(), f"TurboWan needs ComfyUI 0.33 or newer, this is {version}: update ComfyUI.")


def test_a_comfyui_from_before_comfy_api_is_told_too(load, monkeypatch):
    """It knows no comfy_entrypoint, looks for NODE_CLASS_MAPPINGS and would only say that there is none."""
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, usual=importlib.util.find_spec: None if name == "comfy_api" else usual(name),
    )
    _, line = load()  # a traceback comes before it, as from any pack that cannot be imported
    _one_line([line], "Cannot import", "TurboWan needs ComfyUI 0.33 or newer")


@pytest.mark.parametrize(
    ("version", "known"), [("0.33.0", True), ("0.34.0rc1", True), ("0.39.2", True), ("0.40.1", False), ("1.0.0", False)]
)
def test_newer_ones_are_taken_and_the_newest_told_of_once(load, monkeypatch, caplog, version, known):
    fake = types.SimpleNamespace(__version__=version, __file__=str(find_comfyui() / "comfyui_version.py"))
    monkeypatch.setitem(sys.modules, "comfyui_version", fake)
    caplog.set_level(logging.INFO)
    assert load() == []
    told = [r.getMessage() for r in caplog.records if "TurboWan knows ComfyUI 0.33 to 0.39" in r.getMessage()]
    assert told == [] if known else len(told) == 1 and f"this is {version}:" in told[0]


def _without(module, name):
    """A stand-in for an imported module of another version, which lacks one name."""
    stand_in = types.ModuleType(module)
    stand_in.__dict__.update({k: v for k, v in vars(sys.modules[module]).items() if k != name})
    return stand_in


@pytest.mark.parametrize("name", ["register_layout_op", "QuantizedLayout"])
def test_an_old_comfy_kitchen_is_told_with_the_command_that_mends_it(load, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "comfy_kitchen.tensor", _without("comfy_kitchen.tensor", name))
    requirements = f'"{sys.executable}" -m pip install -r "{find_comfyui().resolve() / "requirements.txt"}"'
    _one_line(load(), "does not fit this ComfyUI", name, "comfy_kitchen", requirements, "restart")


def test_a_host_without_comfy_kitchen_is_told_so(load, monkeypatch):
    for module in [m for m in sys.modules if m.partition(".")[0] == "comfy_kitchen"]:
        monkeypatch.setitem(sys.modules, module, None)
    _one_line(load(), "does not fit this ComfyUI", "comfy_kitchen", "pip install -r")


def test_a_missing_library_of_the_pack_is_told_with_the_pack_s_own_file(load, tmp_path):
    def want_einops(folder):
        with open(folder / "nodes" / "size.py", "a", encoding="utf-8") as file:
            file.write("import einops.absent\n")

    own = tmp_path / FOLDER / "requirements.txt"
    _one_line(load(want_einops), "TurboWan lacks a library", "einops", f'-m pip install -r "{own.resolve()}"')


def test_half_an_installation_is_told(load):
    _one_line(load(lambda folder: (folder / "nodes" / "size.py").unlink()), "TurboWan is not whole", "install it again")


def test_pyproject_says_to_the_host_what_it_says_to_the_registry(comfy, packaged):
    if importlib.util.find_spec("pydantic_settings") is None:
        pytest.skip("this host has no pydantic-settings")
    from comfy_config import config_parser

    found = config_parser.extract_node_configuration(str(packaged))
    assert found.project.supported_os == ["OS Independent"] and found.project.supported_comfyui_version == ">=0.33.0"
    assert found.project.license.text == "Apache-2.0" and found.project.urls.repository
    assert found.tool_comfy.publisher_id and found.tool_comfy.icon.endswith("/assets/icon.png")
