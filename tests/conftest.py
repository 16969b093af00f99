"""What tests of any room may ask for."""

import pytest


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
