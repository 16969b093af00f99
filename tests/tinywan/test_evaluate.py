"""The quality report: each row is measured once, with the same prompts and noise, and of the files that are there."""

import json
import shutil

import pytest
import torch

pytest.importorskip("sentencepiece")

from turbo_core.errors import TurboError
from turbo_core.tinywan import FILES, PAIR, evaluate, report, rows, text, vae, world
from turbo_core.train import models

COUNT = 2
NAMED = {row.name: row for row in rows.ROWS}
NAMES = "rCM, 4 steps", "rCM 4 + SLA top-k 0.15", "rCM 4 + W8A8 block", "I2V, 4 steps, SLA top-k 0.15"
ROWS = tuple(NAMED[name] for name in NAMES)
TEACHER = NAMED["teacher, 4 steps, guidance 3"]


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Every file of the family with random weights."""
    folder = tmp_path_factory.mktemp("family")
    for file in FILES.values():
        (folder / file).parent.mkdir(exist_ok=True)
    plain = models.new_model()
    torch.nn.init.normal_(plain.head.head.weight, std=0.02)  # it starts as zero: all clips would be alike
    sparse = models.trainable(plain.state_dict(), 2, sla=True)
    for kind, model in (("teacher", plain), ("student", plain), ("turbo", sparse)):
        models.save_model(model, folder / FILES[kind], world.WORLD)
    for name in PAIR.values():
        models.save_model(models.with_image(sparse), folder / name, world.WORLD)
    torch.manual_seed(0)
    vae.save(vae.fresh(8), folder / FILES["vae"])
    text.save(text.tiny_text_encoder(text.tokenizer()), folder / FILES["text"])
    return folder


@pytest.fixture
def small_clips(monkeypatch):
    monkeypatch.setattr(world, "FRAMES", 9)
    monkeypatch.setattr(world, "SIDE", 64)
    monkeypatch.setattr(report, "BATCH", 2)  # clips that the picture samples of each row


def test_the_report(family, small_clips, tmp_path):
    found = evaluate.evaluate(family, tmp_path, COUNT, rows=ROWS[:1], log=lambda line: None)
    wanted = TEACHER, *ROWS
    found = evaluate.evaluate(family, tmp_path, COUNT, rows=wanted, log=lambda line: None)  # only what is missing
    for again in (False, True):  # which is for changed files only
        with pytest.raises(TurboError, match="other prompts"):
            evaluate.evaluate(family, tmp_path, COUNT + 1, rows=ROWS, again=again, log=lambda line: None)
    assert evaluate.evaluate(family, tmp_path, COUNT, rows=ROWS[:1]) == found  # what is not asked for stays
    assert [row["name"] for row in found] == ["VAE", TEACHER.name, *NAMES]
    assert all(0 <= row["low"] <= row["all"] <= row["high"] <= 1 for row in found)
    assert found == json.loads((tmp_path / "quality.json").read_text())
    assert found[-1]["first_frame"] > 0
    assert report.markdown(found).count("\n") == len(found) + 2
    assert all(len(row["true"]) == COUNT and row["true"].count("1") / COUNT == row["all"] for row in found[1:])
    report.picture(found, family, tmp_path / "quality.png", count=1)
    assert (tmp_path / "quality.png").stat().st_size > 2000


def test_only_rows_of_changed_files_are_measured_again(family, small_clips, tmp_path, monkeypatch):
    folder, out = tmp_path / "family", tmp_path / "out"
    for name in FILES.values():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(family / name, folder / name)
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


def test_a_row_is_held_to_its_base_prompt_by_prompt():
    base, row = ({"name": ROWS[i].name, "of": {}, "low": 0.1, "high": 0.9, "bytes": 1} for i in (0, 1))
    for line, marks in ((base, "1" * 170 + "0" * 150), (row, "1" * 152 + "0" * 168)):
        share = marks.count("1") / len(marks)
        line |= dict.fromkeys(("all", *world.ATTRIBUTES), share) | {"true": marks}
    heading, first, second = report.table([base, row])
    cells = dict(zip(heading, second))
    assert cells["points to base"] == "-5.6 (-8.2 to -3.0)" and cells["p"] == "8e-06"
    assert dict(zip(heading, first))["points to base"] == "-"
    del base["true"]  # a report of before
    assert report.table([base, row])[2][heading.index("p")] == "-"
    del row["true"]
    assert "p" not in report.table([base, row])[0]


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
    taken = {"cpu_seconds": 0, "processes": 0}
    assert [row | taken for row in shared] == [row | taken for row in alone]


def test_the_same_noise_for_every_row(family, small_clips):
    row = rows.ROWS[2]
    model_at, _ = rows.load_row(family, row)
    context = torch.randn(1, 512, 64)
    one, other = (rows.sample_row(model_at, row, context, None, seed=3) for _ in range(2))
    assert torch.equal(one, other)
    assert not torch.equal(one, rows.sample_row(model_at, row, context, None, seed=4))


def test_a_family_that_is_not_there(tmp_path):
    with pytest.raises(TurboError, match=r"lacks diffusion_models.TinyWan2"):
        evaluate.evaluate(tmp_path, tmp_path / "out")
