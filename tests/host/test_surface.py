"""The names of the host that the nodes use: recorded, so that a change shows in a diff, and all there in this host."""

import importlib

from tests.tools.record_surface import RECORDING, surface


def test_the_recording_is_up_to_date():
    assert surface() == RECORDING.read_text("utf-8"), "run python -m tests.tools.record_surface and look at the diff"


def test_this_host_has_them_all(comfy, pack):
    missing = [name for name in RECORDING.read_text("utf-8").split() if not _there(name)]
    assert missing == []


def _there(name):
    """True where a dotted name leads through modules and attributes to something."""
    parts, found = name.split("."), None
    for i, part in enumerate(parts):
        if hasattr(found, part):
            found = getattr(found, part)
            continue
        try:
            found = importlib.import_module(".".join(parts[: i + 1]))
        except ImportError:
            return False
    return True
