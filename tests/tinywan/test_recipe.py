"""The whole recipe at its smallest: every file is made, is what loaders take, and can be measured."""

import inspect
import json

import pytest

pytest.importorskip("sentencepiece")

from turbo_core import checkpoint
from turbo_core.errors import TurboError
from turbo_core.pipeline.text import encode_text, load_text_encoder
from turbo_core.tinywan import FILES, PAIR, evaluate, presets, recipe, rows, vae, world
from turbo_core.train import engine
from turbo_core.vae import load_vae

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def small_world():
    """Small crops of small clips: a VAE learns nothing in four steps of any size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "FRAMES", 9)
        patch.setattr(world, "SIDE", 64)
        patch.setattr(vae, "WINDOWS", ((9, 48), (5, 64)))
        yield


@pytest.fixture(scope="module")
def family(small_world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    recipe.train(folder, "try", log=lambda line: None)
    recipe.train(folder, "try", pair=True, log=lambda line: None)  # added to a family that is there
    return folder


def test_every_file_is_what_the_loaders_take(family):
    for name, has_sla in (("teacher", False), ("student", False), ("turbo", True)):
        described = checkpoint.inspect(family / FILES[name])
        assert (described.num_heads, described.text_dim, described.has_sla) == (2, 64, has_sla)
    load_vae(family / FILES["vae"])
    model, tokenize = load_text_encoder(family / FILES["text"])
    assert encode_text(model, tokenize, ["a red circle"]).shape == (1, 512, 64)


def test_the_pair_is_what_the_loaders_take(family):
    for name in PAIR.values():
        described = checkpoint.inspect(family / name)
        assert (described.task, described.in_dim, described.has_sla) == ("i2v", 36, True)


def test_a_second_call_trains_nothing(family, monkeypatch):
    for stage in (recipe.vae, recipe.text, recipe.teacher, recipe.distill, recipe.sparsify):
        monkeypatch.setattr(stage, "train", None)  # calling it would raise
    for left in (family / "work").glob("*.safetensors"):
        left.unlink()  # nobody needs to keep data and what came between
    before = {file: file.stat().st_mtime_ns for file in family.iterdir()}
    recipe.train(family, "try", pair=True, log=lambda line: None)
    assert before == {file: file.stat().st_mtime_ns for file in family.iterdir()}


def test_a_pair_of_other_settings_is_not_taken_for_this_one(family, monkeypatch):
    (family / PAIR["low"]).rename(family / "aside")
    monkeypatch.setitem(presets.PRESETS["try"]["pair"], "data", {"count": 8})
    with pytest.raises(TurboError, match="other settings"):
        recipe.train(family, "try", pair=True)
    (family / "aside").rename(family / PAIR["low"])


@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_stage_of_a_preset_takes_its_settings(name):
    takes = {"vae": vae.train, "decoder": vae.train, "text": recipe.text.train, "data": recipe.data.make_clips}
    takes |= {"teacher": recipe.teacher.train, "distill": recipe.distill.train, "sparsify": recipe.sparsify.train}
    preset = presets.PRESETS[name]
    for stages in (preset, preset["pair"]):
        for stage, options in stages.items():
            for each in options if isinstance(options, list) else [options]:
                if stage != "pair":
                    inspect.signature(recipe.data.make_clips).bind_partial(**each.get("more", {}))
                    inspect.signature(takes[stage]).bind_partial(**{k: v for k, v in each.items() if k != "more"})
                    assert len(each.get("kept", "all")) == 3


def test_settings_bind_once_their_stage_has_begun(family, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    def tried(name, stages):
        with monkeypatch.context() as patch:
            patch.setitem(plain, name, stages)
            recipe.train(family, "try", log=lambda line: None)

    def taken(stages):
        """They are kept, and the stages would begin."""
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(recipe.sparsify, "train", stopped)
            tried("sparsify", stages)
        kept = json.loads((family / "work" / "settings.json").read_text())
        assert [kept[f"sparsify{i}"] for i in range(len(stages))] == stages

    plain, changed = presets.PRESETS["try"], {"steps": 3, "batch": 2}
    first, second = plain["sparsify"]
    checkpoints = [family / "work" / f"sparsify{i}" / engine.CHECKPOINT for i in range(2)]
    for name, stages, told in (
        ("text", changed, "text"),
        ("sparsify", [changed, second], "sparsify0"),
        ("sparsify", [first, changed], "sparsify1"),
    ):
        with pytest.raises(TurboError, match=rf"other settings \({told}\)"):
            tried(name, stages)
    for path in checkpoints:
        path.rename(path.with_name("aside"))
    (family / "work" / "sparsify1-more.safetensors").unlink(missing_ok=True)  # with its clips encoded it has begun
    try:
        with pytest.raises(TurboError, match=r"other settings \(sparsify0\)"):
            tried("sparsify", [changed, second])  # its file is there
        (family / FILES["turbo"]).rename(family / "turbo")
        for stages in ([*plain["distill"], changed], [changed, *plain["distill"][1:]], plain["distill"][:1]):
            with pytest.raises(TurboError, match=r"other settings \(distill"):
                tried("distill", stages)  # its file is made of those that were
        taken([changed, second])  # to come: nothing is made of it yet
        taken([first, second])
        checkpoints[0].with_name("aside").rename(checkpoints[0])
        taken([first, changed])  # the second one is to come
        with pytest.raises(TurboError, match=r"other settings \(sparsify0\)"):
            tried("sparsify", [changed, changed])
        taken([first, second])
    finally:
        for path in checkpoints:
            if path.with_name("aside").exists():
                path.with_name("aside").rename(path)
        if (family / "turbo").exists():
            (family / "turbo").rename(family / FILES["turbo"])


def test_another_seed_or_size_wants_another_folder(family, tmp_path, monkeypatch):
    with pytest.raises(TurboError, match=r"other settings \(seed\)"):
        recipe.train(family, "try", seed=1)
    for name in ("SIDE", "FRAMES"):
        with monkeypatch.context() as patch, pytest.raises(TurboError, match=rf"other settings \({name.lower()}\)"):
            patch.setattr(world, name, 128)
            recipe.train(family, "try")
    with pytest.raises(TurboError, match="preset"):
        recipe.train(family, "none")

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe.vae, "train", stopped)
    for side in (64, 128):  # where nothing has begun it may change
        monkeypatch.setattr(world, "SIDE", side)
        with pytest.raises(KeyboardInterrupt):
            recipe.train(tmp_path, "try")
    assert json.loads((tmp_path / "work" / "settings.json").read_text())["side"] == 128


def test_the_family_can_be_measured(family, tmp_path):
    found = evaluate.evaluate(family, tmp_path, 1, rows=rows.ROWS[-2:], log=lambda line: None)  # of the pair
    assert [row["name"] for row in found] == ["VAE", rows.ROWS[-2].name, rows.ROWS[-1].name]
