"""Settings in a video and content credentials on it, held to c2pa's own reader and to OpenSSL's certificates."""

import json
import sys

import pytest
import torch

from tests.helpers.certificates import make_keys
from turbo_core.cli import main
from turbo_core.errors import TurboError
from turbo_core.pipeline.provenance import Signer, credentials
from turbo_core.pipeline.video import read_made, write_video

c2pa = pytest.importorskip("c2pa")
FRAMES = torch.arange(5 * 32 * 32 * 3).view(5, 32, 32, 3).to(torch.uint8)


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Folder with chain.pem and leaf.key, as a certificate authority would give them out, and stranger.key."""
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def signer(keys):
    return Signer(keys / "chain.pem", keys / "leaf.key")


@pytest.mark.parametrize("suffix", ["mp4", "mov"])
def test_a_signed_video_says_that_a_model_made_it_and_keeps_its_settings(tmp_path, signer, suffix):
    path = tmp_path / f"a clip.{suffix}"
    write_video(path, FRAMES, made={"prompt": "ein Kreis, 원", "seed": 1 << 63}, finish=signer.sign)
    found = credentials(path)
    assert found["signed by"] == "A studio" and found["state"] == "Valid"
    assert found["source type"].endswith("/trainedAlgorithmicMedia") and found["made by"] == "ComfyUI-TurboWan"
    assert read_made(path)["prompt"] == "ein Kreis, 원" and read_made(path)["seed"] == 1 << 63
    kind = {"mp4": "video/mp4", "mov": "video/quicktime"}[suffix]
    with open(path, "rb") as file, c2pa.Reader(kind, file) as reader:
        manifest = json.loads(reader.json())
    assert manifest["manifests"][manifest["active_manifest"]]["title"] == path.name
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_change_after_signing_is_seen(tmp_path, signer):
    path = tmp_path / "a.mp4"
    write_video(path, FRAMES, finish=signer.sign)
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"mdat") + 40] ^= 1
    path.write_bytes(raw)
    assert credentials(path)["state"] == "Invalid"


def test_an_unsigned_video_has_none_and_no_metadata_means_none(tmp_path):
    write_video(tmp_path / "a.mp4", FRAMES)
    assert credentials(tmp_path / "a.mp4") is None and read_made(tmp_path / "a.mp4") is None


def test_a_signature_that_fails_leaves_the_finished_video(tmp_path, signer, monkeypatch, caplog):
    def fail(*_):
        raise c2pa.C2paError("no")

    monkeypatch.setattr(c2pa.Builder, "sign", fail)
    write_video(tmp_path / "a.mp4", FRAMES, made={"seed": 3}, finish=signer.sign)
    assert read_made(tmp_path / "a.mp4")["seed"] == 3 and "stays unsigned" in caplog.text
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize(
    ("certificate", "key", "message"),
    [
        ("leaf.key", "chain.pem", "Give it first"),
        ("chain.pem", "chain.pem", "no private key"),
        ("chain.pem", "stranger.key", "not the key of"),
        ("chain.pem", "none.key", "cannot be read"),
        ("none.pem", "leaf.key", "cannot be read"),
    ],
)
def test_wrong_keys_are_told_before_any_work(keys, certificate, key, message):
    with pytest.raises(TurboError, match=message):
        Signer(keys / certificate, keys / key)


def test_a_format_without_credentials_is_told(signer):
    with pytest.raises(TurboError, match=r"Name it clip\.mp4"):
        signer.check("clip.mkv")


def test_without_c2pa_the_cure_is_named_and_inspect_goes_on(tmp_path, keys, monkeypatch, capsys):
    write_video(tmp_path / "a.mp4", FRAMES, made={"prompt": "two cats"})
    monkeypatch.setitem(sys.modules, "c2pa", None)
    with pytest.raises(TurboError, match=r"comfyui-turbowan\[sign\]"):
        Signer(keys / "chain.pem", keys / "leaf.key")
    assert main(["inspect", str(tmp_path / "a.mp4")]) == 0
    assert "two cats" in capsys.readouterr().out


def test_inspect_shows_settings_and_credentials(tmp_path, signer, capsys):
    write_video(tmp_path / "a.mp4", FRAMES, made={"prompt": "two cats", "seed": 3}, finish=signer.sign)
    write_video(tmp_path / "b.mp4", FRAMES)
    assert main(["inspect", str(tmp_path / "a.mp4"), str(tmp_path / "b.mp4")]) == 0
    told = capsys.readouterr().out
    assert "two cats" in told and "A studio" in told and "trainedAlgorithmicMedia" in told and "not known" in told
    (tmp_path / "c.mp4").write_bytes(b"nothing")
    assert main(["inspect", str(tmp_path / "c.mp4")]) == 2
