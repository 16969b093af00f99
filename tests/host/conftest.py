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
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder with the small family."""
    sys.path.insert(0, str(PACK)) if "turbo_core" not in sys.modules and str(PACK) not in sys.path else None
    from tests.helpers.tiny_family import make_tiny

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
    import comfy_extras.nodes_custom_sampler  # noqa: F401

    import nodes  # noqa: F401  (the host's own nodes; several extras need it)

    return comfy


@pytest.fixture(scope="session")
def pack(comfy):
    """The pack's modules under a mangled name: pack.loading, pack.quantizing, ..., pack.nodes[id], pack.root."""
    module = load_pack(PACK, "custom_nodes_ComfyUI_TurboWan")
    extension = asyncio.run(module.comfy_entrypoint())
    listed = asyncio.run(extension.get_node_list())
    base = module.__name__
    parts = {
        name: importlib.import_module(f"{base}.nodes.host.{name}")
        for name in ("blocks", "experts", "inputs", "loading", "ops", "override", "quantizing", "run", "saving")
    }
    parts["text_encoder"] = importlib.import_module(f"{base}.nodes.text_encoder")
    parts["errors"] = importlib.import_module(f"{base}.turbo_core.errors")
    nodes = {node.GET_SCHEMA().node_id: node for node in listed}
    return types.SimpleNamespace(name=base, root=PACK, load_pack=load_pack, nodes=nodes, **parts)


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


TEXT_DIM, TEXT_TOKENS = 64, 24
SMALL = (1, 16, 5, 16, 18)  # 5 * 8 * 9 = 360 tokens: three query blocks, six key blocks, both ragged


def _draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Lab:
    """The few things that every test here does with a MODEL."""

    shape = SMALL
    draw = staticmethod(_draw)

    def __init__(self, comfy, pack, tiny):
        self.comfy, self.pack, self.tiny = comfy, pack, tiny

    def path(self, name):
        return str(self.tiny / name)

    def load(self, name="TinyWan2.1-T2V.pth", dtype=None):
        """A fresh MODEL with its own weights, through TurboLoader's function."""
        return self.pack.loading.load_turbo_model(self.path(name), dtype)

    def attention(self, model, topk=0.3, precision="bf16", **settings):
        return self.pack.nodes["SparseLowBitAttention"].execute(model, topk, precision, **settings)[0]

    def dense(self, model):
        return self.attention(model, 1.0, mode="dense")

    def quantize(self, model, kind="block", **settings):
        name = {"block": "block (TurboWan)", "row": "row (ComfyUI native)"}[kind]
        return self.pack.nodes["QuantizeW8A8"].execute(model, name, **settings)[0]

    def context(self, batch=1, seed=7):
        return _draw(batch, TEXT_TOKENS, TEXT_DIM, seed=seed)

    def positive(self, seed=7, **extra):
        return [[self.context(seed=seed), extra]]

    def latent(self, shape=SMALL, seed=None):
        """A LATENT: zeros, or noise-like where a seed is given."""
        return {"samples": torch.zeros(shape) if seed is None else _draw(*shape, seed=seed)}

    def inputs(self, shape=SMALL, sigma=0.9, seed=0, concat=0):
        """Arguments of apply_model; concat: how many channels an image-to-video model takes on top."""
        batch = shape[0]
        given = {"x": _draw(*shape, seed=seed), "t": torch.full((batch,), sigma), "c_crossattn": self.context(batch)}
        if concat:
            given["c_concat"] = _draw(batch, concat, *shape[2:], seed=seed + 1)
        return given

    def loaded(self, model, **load):
        """Put the MODEL on its device as the host does; returns the network's wrapper."""
        self.comfy.model_management.load_models_gpu([model], **load)
        return model.model

    def denoise(self, model, **given):
        """x0 of one evaluation of a MODEL, weights patched and loaded by the host."""
        given = self.inputs(**given)
        options = {**model.model_options["transformer_options"], "sigmas": given["t"]}
        return self.loaded(model).apply_model(**given, transformer_options=options)

    def sigmas(self, steps=4, sigma_max=0.0, model=None):
        return self.pack.nodes["TurboScheduler"].execute(steps, sigma_max, model)[0]

    def turbo(self, model, latent=None, seed=3, steps=4, mode="SDE", **settings):
        """Samples of TurboSampler."""
        latent = latent or self.latent()
        node = self.pack.nodes["TurboSampler"]
        settings = {"positive": self.positive(), "sigma_max": 0.0, **settings}
        return node.execute(model, latent_image=latent, seed=seed, steps=steps, mode=mode, **settings)[0]["samples"]

    def custom(self, model, sampler, sigmas, latent=None, seed=3, noise=True):
        """Samples of the host's SamplerCustom with one of its samplers, cfg 1."""
        from comfy_extras.nodes_custom_sampler import SamplerCustom

        sampler = self.comfy.samplers.sampler_object(sampler)
        positive, latent = self.positive(), latent or self.latent()
        return SamplerCustom.execute(model, noise, seed, 1.0, positive, positive, sampler, sigmas, latent)[0]["samples"]

    def weights(self, model):
        """Every stored tensor of the network, copied, with the weights as they are now."""
        return {name: tensor.clone() for name, tensor in model.model.diffusion_model.state_dict().items()}

    def difference(self, ours, theirs):
        """Largest absolute difference, relative to the largest value."""
        return ((ours - theirs).abs().max() / theirs.abs().max()).item()

    def distance(self, ours, theirs):
        """Norm of the difference, relative to the norm: for rounding noise."""
        return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.fixture(scope="session")
def lab(comfy, pack, tiny):
    return Lab(comfy, pack, tiny)
