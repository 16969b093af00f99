"""Embeddings of prompts on disk: the same bits, bounded, and a damaged or foreign entry is made again."""

import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from turbo_core.errors import TurboError
from turbo_core.pipeline import embeddings
from turbo_core.pipeline.embeddings import Embeddings, Store, cache_folder, padded
from turbo_core.pipeline.text import encode_text, load_text_encoder

PROMPTS = ["a red circle", "a blue square that moves", "a  red   circle"]


def no_stage(name):
    return torch.no_grad()


def made(tiny, folder, path=None, **settings):
    path = path or tiny / "tiny_umt5.safetensors"
    return Embeddings(path, None, torch.device("cpu"), settings.pop("dtype", torch.float32), folder, **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_is_what_the_encoder_gives_alone(tiny, tmp_path, dtype, monkeypatch):
    expected = encode_text(*load_text_encoder(tiny / "tiny_umt5.safetensors", dtype=dtype), PROMPTS[:1])
    first = made(tiny, tmp_path, dtype=dtype).of(PROMPTS, no_stage)
    assert torch.equal(padded(first[PROMPTS[0]]), expected)
    assert torch.equal(first[PROMPTS[2]], first[PROMPTS[0]])  # alike once it is clean
    monkeypatch.setattr(embeddings, "load_text_encoder", lambda *_: pytest.fail("read the encoder again"))
    again = made(tiny, tmp_path, dtype=dtype).of(PROMPTS, no_stage)
    assert all(torch.equal(again[prompt], first[prompt]) for prompt in PROMPTS)


def test_another_encoder_type_or_content_has_entries_of_its_own(tiny, tmp_path):
    copy = tmp_path / "copy.safetensors"
    shutil.copy(tiny / "tiny_umt5.safetensors", copy)
    folder = tmp_path / "cache"

    def entries():
        return len(list(folder.glob("*.embedding")))

    made(tiny, folder).of(PROMPTS[:1], no_stage)
    made(tiny, folder, copy).of(PROMPTS[:1], no_stage)
    assert entries() == 1  # the same content under another name
    made(tiny, folder, dtype=torch.bfloat16).of(PROMPTS[:1], no_stage)
    assert entries() == 2
    raw = bytearray(copy.read_bytes())
    raw[-5] ^= 1
    copy.write_bytes(raw)
    made(tiny, folder, copy).of(PROMPTS[:1], no_stage)
    assert entries() == 3


def test_an_encoder_replaced_in_a_run_leaves_nothing_under_the_old_ones_name(tiny, tmp_path):
    copy, folder = tmp_path / "copy.safetensors", tmp_path / "cache"
    shutil.copy(tiny / "tiny_umt5.safetensors", copy)
    running = made(tiny, folder, copy)
    running.of(PROMPTS[:1], no_stage)
    running.free()
    raw = bytearray(copy.read_bytes())
    raw[-5] ^= 1
    copy.write_bytes(raw)
    with pytest.raises(TurboError, match=r"copy.safetensors.*has changed since this run began"):
        running.of(PROMPTS[1:2], no_stage)
    assert running.encoder is None and len(list(folder.glob("*.embedding"))) == 1


def test_another_tokenizer_beside_the_encoder_has_entries_of_its_own(tiny, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    encoder, place = tmp_path / "encoder.safetensors", tmp_path / "google" / "umt5-xxl" / "tokenizer.json"
    tensors = load_file(tiny / "tiny_umt5.safetensors")
    del tensors["spiece_model"]
    save_file(tensors, encoder)
    place.parent.mkdir(parents=True)
    found = []
    for number in (3, 4):
        words = Tokenizer(models.WordLevel({"<unk>": 2, "red": number}, unk_token="<unk>"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        words.save(str(place))
        found.append(made(tiny, tmp_path / "cache", encoder).of(["red"], no_stage)["red"])
    assert not torch.equal(*found)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign"])
def test_a_damaged_entry_is_made_again(tiny, tmp_path, damage):
    first = made(tiny, tmp_path).of(PROMPTS[:1], no_stage)
    [place] = tmp_path.glob("*.embedding")
    raw = bytearray(place.read_bytes())
    raw[len(raw) // 2] ^= 4
    place.write_bytes({"cut": raw[:-7], "flipped": raw, "empty": b"", "foreign": b"x" * 100}[damage])
    again = made(tiny, tmp_path).of(PROMPTS[:1], no_stage)
    assert torch.equal(again[PROMPTS[0]], first[PROMPTS[0]])
    assert len(place.read_bytes()) == len(raw)


def test_nan_is_the_encoders_fault_and_is_not_kept(tiny, tmp_path):
    broken, state = tmp_path / "broken.safetensors", load_file(tiny / "tiny_umt5.safetensors")
    state["encoder.final_layer_norm.weight"][0] = float("nan")
    save_file(state, broken)
    with pytest.raises(TurboError, match=r'for "a red circle".*broken.safetensors'):
        made(tiny, tmp_path / "cache", broken).of(PROMPTS[:1], no_stage)
    assert not list((tmp_path / "cache").glob("*.embedding"))


def test_nan_that_was_kept_is_made_again(tiny, tmp_path):
    ours = made(tiny, tmp_path)
    first = ours.of(PROMPTS[:1], no_stage)[PROMPTS[0]]
    ours.store.write(ours._key(), PROMPTS[0], torch.full_like(first, float("nan")))
    assert torch.equal(made(tiny, tmp_path).of(PROMPTS[:1], no_stage)[PROMPTS[0]], first)


def test_the_folder_is_bounded_and_what_was_used_last_stays(tmp_path):
    store, entry = Store(tmp_path, most=3 * 1300), torch.zeros(4, 64)
    for name in "abc":
        store.write("whose", name, entry)
        os.utime(store._place("whose", name), (1, ord(name)))
    assert store.read("whose", "a") is not None  # now it is the youngest
    store.write("whose", "d", entry)
    assert [name for name in "abcd" if store.read("whose", name) is not None] == ["a", "c", "d"]


def test_a_disk_that_takes_nothing_costs_the_entry_and_not_the_video(tiny, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embeddings.Path, "write_bytes", full)
    assert made(tiny, tmp_path).of(PROMPTS, no_stage).keys() == set(PROMPTS)
    assert not list(tmp_path.glob("*.embedding"))


def test_a_folder_that_may_only_be_read_serves_all_the_same(tmp_path, monkeypatch):
    def denied(*_):
        raise PermissionError(1, "Operation not permitted")

    store = Store(tmp_path)
    store.write("whose", "a", torch.ones(4, 64))
    monkeypatch.setattr(embeddings.os, "utime", denied)
    assert torch.equal(store.read("whose", "a"), torch.ones(4, 64))


def test_a_folder_that_cannot_be_made_is_named(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TurboError, match="Choose another folder"):
        made(tiny, tmp_path / "file" / "cache")


def test_the_default_folder_is_where_caches_are(monkeypatch, tmp_path):
    monkeypatch.setattr(embeddings.os, "name", "posix")
    monkeypatch.setattr(embeddings.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "turbowan" / "embeddings"


@pytest.mark.parametrize("home", ["read-only", "none"])
def test_without_a_place_for_caches_nothing_is_kept_and_the_log_says_so(home, monkeypatch, tmp_path, caplog):
    """A container's user may have no home: batch keeps embeddings there unless it is told otherwise."""
    monkeypatch.setattr(embeddings.os, "name", "posix")
    monkeypatch.setattr(embeddings.sys, "platform", "linux")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    (tmp_path / "file").touch()

    def of_nobody():
        if home == "none":
            raise RuntimeError("Could not determine home directory.")
        return tmp_path / "file"

    monkeypatch.setattr(embeddings.Path, "home", of_nobody)
    assert cache_folder() is None
    assert "--cache names a folder" in caplog.text
