"""The whole recipe at its smallest: every file is made, is what loaders take, and is measured."""

import json
import shutil

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from turbo_core import checkpoint
from turbo_core.errors import TurboError
from turbo_core.pipeline import encode_image
from turbo_core.pipeline.text import encode_text, load_text_encoder
from turbo_core.pipeline.vae import load_vae
from turbo_core.tinywan import FILES, PAIR, evaluate, presets, recipe, report, rows, vae, world
from turbo_core.tinywan import rows as rows_module
from turbo_core.tinywan.data import images_of, joined
from turbo_core.train import data, models

COUNT = 2
ROWS = tuple(rows_module.ROWS[i] for i in (2, 8, 10, 13))  # student, sparse, int8, image-to-video


@pytest.fixture(scope="module")
def family(tmp_path_factory):
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


def test_an_image_to_video_model_begins_blind_to_the_image(family):
    plain = models.load_model(family / FILES["teacher"])
    seeing = models.with_image(plain)
    x, context = torch.randn(1, 16, 3, 8, 8), torch.randn(1, 4, 64)
    time = torch.tensor([700.0])
    assert torch.equal(seeing(x, time, context, torch.randn(1, 20, 3, 8, 8)), plain(x, time, context))
    assert seeing.patch_embedding.weight.requires_grad


def test_what_an_image_to_video_model_is_given_is_the_pipelines(family):
    video = world.render(world.random_scenes(2, torch.Generator().manual_seed(0)), 9, 64, 64, torch.Generator())
    ours = images_of(vae.load(family / FILES["vae"]), video)
    codec = load_vae(family / FILES["vae"])
    for row, clip in zip(ours, video):
        theirs = encode_image(codec, clip[:, 0], 9)[0]
        assert torch.equal(row[:4], theirs[:4])
        assert (row[4:] - theirs[4:]).norm() < 0.02 * theirs[4:].norm()  # ours may be in bfloat16


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


def test_another_seed_wants_another_folder(family):
    with pytest.raises(TurboError, match="other settings"):
        recipe.train(family, "try", seed=1)
    with pytest.raises(TurboError, match="preset"):
        recipe.train(family, "none")


@pytest.fixture
def small_clips(monkeypatch):
    for module in (evaluate, rows_module):
        monkeypatch.setattr(module, "FRAMES", 9)
        monkeypatch.setattr(module, "SIDE", 64)


def test_the_report(family, small_clips, tmp_path):
    found = evaluate.evaluate(family, tmp_path, COUNT, rows=ROWS[:1], log=lambda line: None)
    found = evaluate.evaluate(family, tmp_path, COUNT, rows=ROWS, log=lambda line: None)  # only what is missing
    for again in (False, True):  # which is for changed files only
        with pytest.raises(TurboError, match="other prompts"):
            evaluate.evaluate(family, tmp_path, COUNT + 1, rows=ROWS, again=again, log=lambda line: None)
    assert evaluate.evaluate(family, tmp_path, COUNT, rows=ROWS[:1]) == found  # what is not asked for stays
    assert [row["name"] for row in found] == ["VAE", *(row.name for row in ROWS)]
    assert all(0 <= row["low"] <= row["all"] <= row["high"] <= 1 for row in found)
    assert found == json.loads((tmp_path / "quality.json").read_text())
    assert found[-1]["first_frame"] > 0
    assert report.markdown(found).count("\n") == len(found) + 2
    report.picture(found, family, tmp_path / "quality.png", count=1)
    assert (tmp_path / "quality.png").stat().st_size > 2000


def test_only_rows_of_changed_files_are_measured_again(family, small_clips, tmp_path, monkeypatch):
    folder, out = tmp_path / "family", tmp_path / "out"
    folder.mkdir()
    for name in FILES.values():
        shutil.copy(family / name, folder)
    options = {"count": COUNT, "rows": ROWS[:3], "log": lambda line: None}
    before = evaluate.evaluate(folder, out, **options)
    models.save_model(models.new_model(5), folder / FILES["turbo"], world.WORLD)  # without proj_l: another one
    with pytest.raises(TurboError, match="--again"):
        evaluate.evaluate(folder, out, **options)
    measured, real = [], rows.load_row

    def killed(at, row):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "load_row", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(folder, out, again=True, **options)
    assert evaluate.read(out / "quality.json") == before  # an old row stays until the new one is there
    monkeypatch.setattr(evaluate, "load_row", lambda at, row: (measured.append(row.name), real(at, row))[1])
    after = evaluate.evaluate(folder, out, again=True, **options)
    assert measured == [row.name for row in ROWS[:3] if row.file == "turbo"]
    assert [row["name"] for row in after] == [row["name"] for row in before]  # in the order of the report
    assert [row == old for row, old in zip(after, before)] == [row["name"] not in measured for row in after]


def test_rows_of_files_that_are_gone_do_not_stay(family, small_clips, tmp_path):
    folder, out, options = tmp_path / "family", tmp_path / "out", {"count": COUNT, "rows": ROWS[:1]}
    shutil.copytree(family, folder, ignore=shutil.ignore_patterns("work"))
    (whole, student) = evaluate.evaluate(folder, out, **options, log=lambda line: None)
    pair = student | {"name": ROWS[3].name, "of": student["of"] | {"files": "of the pair"}}
    for gone in (pair, student | {"name": "a row of an earlier version"}):
        (out / "quality.json").write_text(json.dumps([whole, student, gone]))
        with pytest.raises(TurboError, match=gone["name"]):
            evaluate.evaluate(folder, out, **options)
    for name in PAIR.values():
        (folder / name).unlink()
    (out / "quality.json").write_text(json.dumps([whole, student, pair]))
    with pytest.raises(TurboError, match=pair["name"]):
        evaluate.evaluate(folder, out, **options)
    assert evaluate.evaluate(folder, out, again=True, **options) == [whole, student]
    assert evaluate.evaluate(folder, out, **options) == [whole, student]  # and it stays gone


@pytest.mark.parametrize(
    ("share", "whole", "tenth"),
    [(0.575, "58%", "57.5%"), (0.525, "53%", "52.5%"), (0.5625, "56%", "56.3%"), (1, "100%", "100.0%")],
)
def test_halves_are_rounded_up(share, whole, tenth):
    assert (report._percent(share), report._percent(share, 1)) == (whole, tenth)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not a report"), ("[1]", "is not a report"), ('[{"name": "VAE", "of": "x"}]', "by an earlier version")],
)
def test_what_is_no_report_is_not_written_over(family, tmp_path, text, message):
    (tmp_path / "quality.json").write_text(text)
    with pytest.raises(TurboError, match=message):
        evaluate.evaluate(family, tmp_path, COUNT, again=True)
    assert (tmp_path / "quality.json").read_text() == text


def test_processes_share_the_prompts(family, small_clips, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "BATCH", 2)
    options = {"count": 5, "rows": ROWS[:1], "log": lambda line: None}
    alone = evaluate.evaluate(family, tmp_path / "alone", **options)
    clips_of = {}

    def gathered(items):
        if not items or isinstance(items[0], dict):  # the report so far
            return items
        clips_of[evaluate.engine.rank()] = items
        return [clip for found in clips_of.values() for clip in found]

    monkeypatch.setattr(evaluate.engine, "processes", lambda: 2)
    monkeypatch.setattr(evaluate.engine, "gathered", gathered)
    for rank in (1, 0):
        monkeypatch.setattr(evaluate.engine, "rank", lambda rank=rank: rank)
        shared = evaluate.evaluate(family, tmp_path / "shared", **options)
        assert (tmp_path / "shared" / "quality.json").exists() == (rank == 0)  # the first one writes
    assert [len(clips_of[rank]) for rank in (0, 1)] == [3, 2]
    taken = {"seconds": 0, "processes": 0}
    assert [row | taken for row in shared] == [row | taken for row in alone]


def test_the_same_noise_for_every_row(family, small_clips):
    row = rows_module.ROWS[2]
    model_at, _ = rows_module.load_row(family, row)
    context = torch.randn(1, 512, 64)
    one, other = (rows_module.sample_row(model_at, row, context, None, seed=3) for _ in range(2))
    assert torch.equal(one, other)
    assert not torch.equal(one, rows_module.sample_row(model_at, row, context, None, seed=4))


def test_joined_data_keep_every_clips_captions():
    def part(count, tokens, first):
        text = torch.full((1 + 2 * count, tokens, 3), float(first))
        latents = torch.full((count, 16, 2, 4, 4), float(first))
        captions = 1 + torch.arange(2 * count).view(count, 2)
        return data.Data(latents, text, torch.full((1 + 2 * count,), tokens), captions)

    whole = joined([part(2, 5, 1), part(3, 7, 2)])
    assert whole.latents.shape[0] == 5 and whole.text.shape == (5 + 7, 7, 3)
    for latent, captions in zip(whole.latents, whole.captions_of):
        for row in captions:
            assert (whole.text[row][: whole.lengths[row]] == latent.flatten()[0]).all()


def test_processes_share_the_encoding_and_a_kill_costs_one_part(tmp_path, monkeypatch):
    made = []

    def make(codec, encoder, tokenize, count, seed):
        made.append(seed)
        latents = torch.full((count, 16, 2, 4, 4), float(seed))
        text = torch.full((1 + count, 5, 3), float(seed))
        return data.Data(latents, text, torch.full((1 + count,), 5), 1 + torch.arange(count)[:, None])

    monkeypatch.setattr(recipe.data, "make_clips", make)
    monkeypatch.setattr(recipe.vae, "load", lambda path: None)
    monkeypatch.setattr(recipe, "load_text_encoder", lambda path, dtype: (None, None))
    monkeypatch.setattr(recipe.engine, "processes", lambda: 2)
    sizes, target = {"count": 250}, tmp_path / "data.safetensors"

    def encode(rank):
        monkeypatch.setattr(recipe.engine, "rank", lambda: rank)
        recipe._encode({"vae": "", "text": ""}, target, sizes, 0, lambda line: None)

    encode(1)
    assert made == [1] and not target.exists()
    monkeypatch.setattr(recipe.engine, "processes", lambda: 1)  # killed, and started again with one
    encode(0)
    assert sorted(made) == [0, 1, 2] and list(tmp_path.iterdir()) == [target]
    whole = data.load(target)
    assert whole.latents[:, 0, 0, 0, 0].tolist() == [0.0] * 100 + [1.0] * 100 + [2.0] * 50
    assert (whole.text[whole.captions_of[:, 0], 0, 0] == whole.latents[:, 0, 0, 0, 0]).all()


def test_a_few_frames_of_a_clip_begin_with_its_first():
    random = torch.Generator().manual_seed(0)
    picks = [data.frames_of(9, 4, random) for _ in range(50)]
    assert all(len(p) == 4 and p[0] == 0 and (p.diff() > 0).all() and p[-1] < 9 for p in picks)
    assert {int(i) for p in picks for i in p} == set(range(9))
    assert data.frames_of(9, 9, random).tolist() == list(range(9))


def test_a_family_that_is_not_there(tmp_path):
    with pytest.raises(TurboError, match="lacks TinyWan2"):
        evaluate.evaluate(tmp_path, tmp_path / "out")
