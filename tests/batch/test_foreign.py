"""turbo-core batch in a folder where files of a person lie: they are left alone, and their jobs are told."""

import json
import shutil

import torch

from tests.helpers.batches import command, made, records
from turbo_core.batch import Manifest
from turbo_core.cli import main
from turbo_core.pipeline.video import read_made, write_video


def test_a_file_that_no_batch_made_is_left_alone(tiny, tmp_path, capsys):
    out, prompts = tmp_path / "out", tmp_path / "prompts.csv"
    out.mkdir()
    prompts.write_text("prompt,name\na red circle,holiday\na blue square,mine\n")
    (out / "holiday.mp4").write_bytes(b"the only copy")
    for _ in range(2):
        assert main(command(tiny, prompts, out)) == 1
        assert (
            "prompts.csv:2: holiday.mp4 is in" in (said := capsys.readouterr().err)
            and "it is no clip of a batch" in said
        )
        assert (out / "holiday.mp4").read_bytes() == b"the only copy"
    assert list(made(out)) == ["mine.mp4"]
    (out / "batch.jsonl").unlink()
    (out / "mine.mp4").write_bytes((out / "mine.mp4").read_bytes()[:-9])  # ours, by what lies beside
    (out / "holiday.mp4").unlink()
    assert main(command(tiny, prompts, out)) == 0


def test_a_clip_of_generate_and_settings_without_a_video_are_left_alone(tiny, tmp_path, prompts):
    out, others = tmp_path / "out", tmp_path / "others"
    assert main(command(tiny, prompts, others)) == 0
    first, second, third, fourth = (record["name"] for record in records(others) if record["state"] == "done")
    out.mkdir()
    beside = (others / first).with_suffix(".json")
    made_by_hand = read_made(others / first)
    del made_by_hand["id"]
    write_video(
        out / first, torch.zeros(5, 32, 32, 3, dtype=torch.uint8), made=made_by_hand
    )  # as turbo-core generate does
    (out / second).with_suffix(".json").write_text('{"notes": "of a person"}')
    shutil.copy(others / third, out)  # of another batch, its settings somebody's
    (out / third).with_suffix(".json").write_text('{"notes": "of a person"}')
    shutil.copy(beside, (out / fourth).with_suffix(".json"))  # of a batch that was killed before its video was there
    manifest = Manifest(out)
    assert [manifest.folder.is_foreign(name) for name in (first, second, third, fourth)] == [
        True,
        True,
        True,
        False,
    ]
    mine = {path: path.read_bytes() for path in out.iterdir() if fourth.split(".")[0] not in path.name}
    assert main(command(tiny, prompts, out)) == 1
    assert all(path.read_bytes() == content for path, content in mine.items())
    assert (out / fourth).is_file() and (out / fourth).with_suffix(".json").is_file()


def test_a_file_that_took_the_place_of_a_clip_is_left_alone_whatever_the_journal_says(tiny, tmp_path, capsys):
    out, listed = tmp_path / "out", tmp_path / "jobs.jsonl"
    rows = [{"prompt": f"a red circle {i}", "name": name} for i, name in enumerate(("fox", "cat", "cut", "bad"))]
    listed.write_text("\n".join(map(json.dumps, [*rows[:3], rows[3] | {"topk": 3}])))
    assert main(command(tiny, listed, out)) == 1
    by_hand = read_made(out / "fox.mp4")
    del by_hand["id"]
    write_video(out / "fox.mp4", torch.zeros(5, 32, 32, 3, dtype=torch.uint8), made=by_hand)  # by turbo-core generate
    (out / "cat.mp4").write_text("of a person")
    (out / "cut.mp4").write_bytes((out / "cut.mp4").read_bytes()[:300])  # by a full disk
    (out / "bad.mp4").write_text("of a person")
    (out / "bad.json").write_text('{"notes": "of a person"}')
    listed.write_text("\n".join(map(json.dumps, rows)))
    mine = {
        path: path.read_bytes() for path in out.iterdir() if path.name in ("fox.mp4", "cat.mp4", "bad.mp4", "bad.json")
    }
    for more in ([], ["--check"]):
        capsys.readouterr()
        assert main(command(tiny, listed, out, *more)) == 1
        said = capsys.readouterr().err
        assert [name for name in ("fox", "cat", "cut", "bad") if f"{name}.mp4 is in" in said] == ["fox", "cat", "bad"]
        assert all(path.read_bytes() == content for path, content in mine.items())
    assert read_made(out / "cut.mp4")["prompt"] == "a red circle 2"
