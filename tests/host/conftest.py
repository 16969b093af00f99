"""Fixtures for tests in a real ComfyUI: the host in this process, the pack loaded as the host loads it, a small family.

Needs a ComfyUI (COMFYUI_DIR, the one this pack lies in, or ~/ComfyUI) and a Python with its requirements; without
them every test here is skipped with the reason.
"""

import asyncio
import importlib
import os
import shutil
import socket
import sys
import types
from pathlib import Path

import pytest
import torch

from tests.helpers import media_stub
from tests.helpers.comfyui import PACK, find_comfyui, lacks, load_pack
from tests.helpers.good_inputs import good_inputs
from tests.helpers.lab import HIGH, STOCK, T2V, TINY_SHAPE, Lab, small_flux
from tests.helpers.tiny_family import make_tiny
from tests.host import newer
from tests.host.serving import object_info, server, small  # noqa: F401  (fixtures)

HERE = Path(__file__).resolve().parent


def pytest_addoption(parser):
    parser.addoption("--newer", action="store_true", help="the host with the calls of newer ones, see newer.py")


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
def comfy(request):
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

    if request.config.getoption("--newer", False) or os.environ.get("TURBOWAN_NEWER"):
        newer.install()
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


@pytest.fixture(scope="session")
def given(comfy, lab):
    """Models and inputs that are good, by name; they are shared, as in a graph."""
    with torch.inference_mode():
        models = {"t2v": lab.load(T2V), "i2v": lab.load(HIGH), "stock": lab.load(STOCK), "flux": small_flux(comfy)}
    return models | {"positive": lab.positive(), "latent": lab.latent(TINY_SHAPE)}


@pytest.fixture(scope="session")
def expected(lab, given):
    with torch.inference_mode():
        return lab.turbo(given["t2v"], given["latent"], steps=1)


@pytest.fixture
def healthy(lab, given, expected):
    """A check that a model loaded afresh still gives what it gave."""
    return lambda: torch.equal(lab.turbo(lab.load(), given["latent"], steps=1), expected)


@pytest.fixture
def place(lab, tmp_path, monkeypatch):
    """The host's folders, in a folder of the test's own, and no network: a connection fails the test."""
    import folder_paths

    for name in ("diffusion_models", "text_encoders", "loras", "output", "temp"):
        (tmp_path / name).mkdir()
    for name in (T2V, STOCK):
        shutil.copy(lab.path(name), tmp_path / "diffusion_models" / name)
    for kind in ("diffusion_models", "text_encoders", "loras"):
        paths = [str(tmp_path / kind)], {".pth", ".safetensors"}
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, paths)
    monkeypatch.setattr(socket.socket, "connect", _refuse_to_connect)
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    return tmp_path


def _refuse_to_connect(*args):
    raise AssertionError(f"connects to {args[1]}")


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def refused(lab, given, expected, place):
    """Run a node with good inputs, some replaced by bad ones: it raises, leaves nothing, and a good run follows."""

    def check(node, match, error=None, **changes):
        before = files(place)
        with pytest.raises(error or lab.pack.errors.TurboError, match=match) as caught:
            lab.pack.nodes[node].execute(**{**good_inputs(node, given), **changes})
        print(f"{node}: {caught.value}")
        assert files(place) == before
        assert torch.equal(lab.turbo(given["t2v"], given["latent"], steps=1), expected)

    return check


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
