"""Fixtures for tests in a real ComfyUI: the host in this process, the pack loaded as the host loads it, a small family.

Needs a ComfyUI (COMFYUI_DIR, the one this pack lies in, or ~/ComfyUI) and a Python with its requirements; without
them every test here is skipped with the reason.
"""

import asyncio
import importlib.util
import os
import sys
import types
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
PACK = HERE.parent.parent


def find_comfyui():
    """The folder of a ComfyUI, or None."""
    candidates = [os.environ.get("COMFYUI_DIR"), PACK.parent.parent, Path.home() / "ComfyUI"]
    return next((Path(c) for c in candidates if c and (Path(c) / "comfyui_version.py").is_file()), None)


def _missing():
    if find_comfyui() is None:
        return "no ComfyUI found: set COMFYUI_DIR"
    if importlib.util.find_spec("comfy_kitchen") is None or importlib.util.find_spec("aiohttp") is None:
        return "this Python lacks ComfyUI's requirements: run `python run.py host`"
    return None


def pytest_collection_modifyitems(items):
    reason = _missing()
    if reason:
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))


def load_pack(folder, name):
    """Import the pack from `folder` under a name of our choosing, as ComfyUI does; returns the package."""
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder with the small family."""
    sys.path.insert(0, str(PACK)) if "turbo_core" not in sys.modules and str(PACK) not in sys.path else None
    from turbo_core.tiny_family import make_tiny

    folder = tmp_path_factory.mktemp("tiny")
    make_tiny(folder)
    return folder


@pytest.fixture(scope="session")
def comfy():
    """ComfyUI in this process, on the CPU."""
    spec = importlib.util.spec_from_file_location("media_stub", HERE / "media_stub.py")
    stub = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stub)
    stub.install()
    sys.path.insert(0, str(find_comfyui()))
    argv, sys.argv = sys.argv, sys.argv[:1]
    import comfy.cli_args

    sys.argv = argv
    comfy.cli_args.args.cpu = True
    import comfy.sd
    import comfy_extras.nodes_custom_sampler
    import nodes  # noqa: F401  (the host's own nodes; several extras need it)

    return comfy


@pytest.fixture(scope="session")
def pack(comfy):
    """The pack's modules under a mangled name: pack.loader, pack.quantize, ..., pack.nodes[id], pack.core."""
    module = load_pack(PACK, "custom_nodes_ComfyUI_TurboWan")
    extension = asyncio.run(module.comfy_entrypoint())
    listed = asyncio.run(extension.get_node_list())
    base = module.__name__
    parts = {
        name: importlib.import_module(f"{base}.nodes.{name}")
        for name in ("attention", "blocks", "experts", "loader", "ops", "quantize", "sampling", "text_encoder")
    }
    nodes = {node.GET_SCHEMA().node_id: node for node in listed}
    return types.SimpleNamespace(name=base, nodes=nodes, **parts)


@pytest.fixture(autouse=True)
def _inference_mode(request):
    if "comfy" in request.fixturenames:
        with torch.inference_mode():
            yield
    else:
        yield
