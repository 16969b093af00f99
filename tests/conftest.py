"""What tests of any room may ask for."""

import os

import pytest

# Before torch is imported. The tensors are small: more threads only wait for each other, and add in another order than
# the processes of one thread that tests/parallel holds byte for byte.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder with the small random family and an image twice as wide as it is high; tests write elsewhere."""
    from PIL import Image

    from tests.helpers.heap import quick_collections
    from tests.helpers.tiny_family import make_tiny

    folder = tmp_path_factory.mktemp("tiny")
    make_tiny(folder)
    Image.new("RGB", (48, 24), (200, 40, 90)).save(folder / "image.png")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    with quick_collections():
        yield folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before, "a test wrote into it"


@pytest.fixture
def card(monkeypatch):
    """A device that could run kernels and that nobody has proved them for; a name alone, nothing computes there."""
    import torch  # here, for tests that do without

    from turbo_core import dispatch, selfcheck

    dispatch._tell_unproved.cache_clear()
    monkeypatch.setattr(dispatch, "cannot_run", lambda device: None)
    monkeypatch.setattr(dispatch, "_verdicts", {})
    monkeypatch.setattr(selfcheck, "_told", set())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some Card 24")
    monkeypatch.delenv(dispatch.SWITCH, raising=False)
    yield torch.device("cuda:0")
    dispatch._tell_unproved.cache_clear()
