"""Every kind of file that people have: inspected, loaded, converted and reloaded, or refused with a cure."""

import re
from pathlib import Path

import pytest
import torch

from tests.helpers.file_kinds import HOST, KINDS
from tests.helpers.states import official, plain
from turbo_core import checkpoint
from turbo_core.checkpoint.formats import decode
from turbo_core.checkpoint.names import is_scale
from turbo_core.errors import TurboError

DOCS = Path(__file__).resolve().parents[2] / "docs" / "files.md"


def kinds(*formats):
    return pytest.mark.parametrize("kind", [k for k in KINDS if bool(k.cure) in formats], ids=lambda k: k.title)


def floats(state):
    """The state with everything decoded to float32."""
    return {n: decode(t, state.get(f"{n}_scale"), torch.float32) for n, t in state.items() if not is_scale(n, state)}


def error(ours, theirs):
    """The largest distance of a tensor, relative to it; both hold the same names."""
    assert ours.keys() == theirs.keys()
    return max((ours[n] - t).norm() / t.norm() for n, t in theirs.items()).item()


@kinds(False)
@pytest.mark.parametrize("trained", [True, False], ids=["TurboWan", "stock"])
def test_what_is_read_is_what_was_written(state, tmp_path, kind, trained):
    state = state if trained else plain(state)
    path = kind.make(state, tmp_path)
    loaded, found = checkpoint.load(path)
    assert (found.format, found.has_sla, checkpoint.inspect(path)) == (kind.format, trained, found)
    expected = floats(official(state))
    assert error(floats(loaded), expected) <= kind.error
    assert found.comfyui == (kind.loads == HOST)
    for format in ("bf16", "int8_block"):  # to the others: test_converting.py
        done = checkpoint.convert(path, tmp_path / f"{format}.safetensors", format)
        again, described = checkpoint.load(done.path)
        assert described.format == format and described.has_sla == trained
        assert error(floats(again), expected) <= kind.error + (0.02 if format == "int8_block" else 0.005)


@kinds(True)
@pytest.mark.parametrize("trained", [True, False], ids=["TurboWan", "stock"])
def test_what_is_not_read_is_told_with_a_cure(state, tmp_path, kind, trained):
    path = kind.make(state if trained else plain(state), tmp_path)
    if kind.format is None:
        with pytest.raises(TurboError, match=kind.cure):
            checkpoint.inspect(path)
    else:
        found = checkpoint.inspect(path)
        assert (found.format, found.has_sla, found.dim, found.ffn_dim) == (kind.format, trained, 256, 512)
        assert kind.format in found.notes[-1] and found.comfyui
    with pytest.raises(TurboError, match=kind.cure) as caught:
        checkpoint.load(path)
    assert kind.format is None or ("Turbo Loader hands it" in str(caught.value)) != trained
    before = sorted(tmp_path.iterdir())
    for format in ("bf16", "int8_block"):
        with pytest.raises(TurboError, match=kind.cure):
            checkpoint.convert(path, tmp_path / "y.safetensors", format)
    assert sorted(tmp_path.iterdir()) == before


def test_the_table_says_so():
    rows = re.findall(r"^\| (.+) \|$", DOCS.read_text(encoding="utf-8"), re.MULTILINE)[1:]
    assert rows == [row(kind) for kind in KINDS]


def row(kind):
    no = "refused, with the cure"
    trained = no if kind.cure else "Turbo Loader"
    works = no if kind.cure else "yes"
    return " | ".join([kind.title, kind.format or no, trained, kind.loads or no, works])
