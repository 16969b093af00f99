"""Fixtures: a real server with two copies of the pack, and prompts for it; conftest.py has them for all tests."""

import pickle

import pytest

from tests.helpers import comfyui as host
from tests.helpers import workflow_api
from tests.helpers.comfyui import find_comfyui

COPIES = ("ComfyUI-TurboWan", "TurboWan-second-copy")


@pytest.fixture(scope="session")
def server(tiny, tmp_path_factory):
    """One server for all tests, with two copies of the pack: whatever works here also works beside another copy."""
    base = host.make_base(tmp_path_factory.mktemp("base"), tiny, COPIES)
    _write_bad_files(base / "models" / "diffusion_models", base)
    _put_a_fault(base / "custom_nodes")
    running = host.start(find_comfyui(), base)
    yield running
    host.stop(running)


class _Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def _write_bad_files(folder, base):
    whole = next(folder.glob("*.pth")).read_bytes()
    (folder / "truncated.pth").write_bytes(whole[: len(whole) // 2])
    (folder / "malicious.pth").write_bytes(pickle.dumps({"blocks.0.ffn.0.weight": _Payload(base / "owned")}))


def _put_a_fault(packs):
    """Conversions to a file of this name fail as nobody foresaw, in both copies."""
    for name in COPIES:
        file = packs / name / "turbo_core" / "checkpoint" / "converting.py"
        text, place = file.read_text("utf-8"), "    check_name(target)\n"
        assert place in text
        fault = "    if target.stem == 'fault':\n        raise KeyError('a fault of ours')\n"
        file.write_text(text.replace(place, place + fault, 1), "utf-8")


@pytest.fixture(scope="session")
def object_info(server):
    return host.get_json(server, "/object_info")


@pytest.fixture
def small(object_info):
    """Makes the prompt of a shipped workflow, at a size that a CPU renders in a second."""

    def make(name, *size, **changes):
        prompt = workflow_api.to_api(workflow_api.load(name), object_info)
        return workflow_api.for_tiny_models(prompt, *size, **changes)

    return make
