"""Fixtures for tests in a real ComfyUI: the host in this process, the pack loaded as the host loads it, a small family.

Needs a ComfyUI (COMFYUI_DIR, the one this pack lies in, or ~/ComfyUI) and a Python with its requirements; without
them every test here is skipped with the reason.
"""

import asyncio
import importlib
import sys
import types
from pathlib import Path

import pytest
import torch

from tests.helpers import media_stub
from tests.helpers.comfyui import PACK, find_comfyui, lacks, load_pack
from tests.helpers.lab import Lab
from tests.helpers.tiny_family import make_tiny

HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items):
    reason = lacks()
    for item in items:
        if reason and HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder with the small family."""
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny(folder)
    return folder


@pytest.fixture(scope="session")
def comfy():
    """ComfyUI in this process, on the CPU."""
    media_stub.install()
    sys.path.insert(0, str(find_comfyui()))
    argv, sys.argv = sys.argv, sys.argv[:1]
    import comfy.cli_args

    sys.argv = argv
    comfy.cli_args.args.cpu = True
    import comfy.sd
    import comfy_extras.nodes_custom_sampler  # noqa: F401

    import nodes  # noqa: F401  (the host's own nodes; several extras need it)

    return comfy


@pytest.fixture(scope="session")
def pack(comfy):
    """The pack under a mangled name: pack.nodes[id], pack.part("host.loading"), pack.errors, pack.loading and so on."""
    module = load_pack(PACK, "custom_nodes_ComfyUI_TurboWan")
    extension = asyncio.run(module.comfy_entrypoint())
    listed = asyncio.run(extension.get_node_list())
    base = module.__name__
    host = "blocks", "inputs", "kernels", "loading", "ops", "override", "run", "saving", "settings"
    parts = {name: importlib.import_module(f"{base}.nodes.host.{name}") for name in host}
    parts["errors"] = importlib.import_module(f"{base}.turbo_core.errors")
    nodes = {node.GET_SCHEMA().node_id: node for node in listed}
    part = lambda name: importlib.import_module(f"{base}.{name}")  # noqa: E731
    return types.SimpleNamespace(name=base, root=PACK, nodes=nodes, part=part, **parts)


@pytest.fixture(scope="session")
def lab(comfy, pack, tiny):
    return Lab(comfy, pack, tiny)


@pytest.fixture(scope="session")
def network(lab):
    """Of the text-to-video model, to look at."""
    return lab.load().model.diffusion_model


@pytest.fixture
def sparse_calls(lab, monkeypatch):
    """How many tokens each sparse attention had, in order."""
    calls, real = [], lab.pack.settings.sparse_linear_attention
    counted = lambda q, *args, **kwargs: calls.append(q.shape[1]) or real(q, *args, **kwargs)  # noqa: E731
    monkeypatch.setattr(lab.pack.settings, "sparse_linear_attention", counted)
    return calls


@pytest.fixture(autouse=True)
def _as_the_server_runs(request):
    """inference_mode, and one thread: on tensors this small two threads mostly wait for each other."""
    if "comfy" not in request.fixturenames:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)
