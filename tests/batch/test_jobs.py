"""Lists of jobs as people write them: three forms, the line of every mistake, ids that follow from what they mean."""

import json

import pytest

from turbo_core.batch import jobs, read_jobs
from turbo_core.errors import TurboError
from turbo_core.pipeline import Clip

DEFAULTS = Clip("", seed=7, size=(32, 32), frames=5, steps=2)


def read(tmp_path, text, name="jobs.jsonl", **settings):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_jobs(path, DEFAULTS, **settings)


def test_lines_of_prompts(tmp_path):
    found, faults = read(tmp_path, '\ufeffa red cat\r\n\r\n# not this\n  a blue, "quoted" dog  ', "jobs.txt")
    assert not faults
    assert [(job.line, job.clip.prompt, job.clip.seed) for job in found] == [
        (1, "a red cat", 7),
        (4, 'a blue, "quoted" dog', 7),
    ]
    assert found[0].name.startswith("a-red-cat-seed7-") and found[0].name.endswith(".mp4")
    assert found[0].clip.size == (32, 32) and found[0].clip.frames == 5


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_spreadsheet(tmp_path, separator):
    rows = [
        ["Prompt", "seed", "size", "frames", "steps", "topk", "ode", "name"],
        ['"two\nlines, and ""quotes"""', "3", "64x32", "9", "1", "dense", "yes", "first"],
        ["plain", "", "", "", "", "0.2", "", ""],
        [""] * 8,
        ["고양이가 걷는다", "4", "480p", "", "", "auto", "no", "고양이.MKV"],
    ]
    found, faults = read(tmp_path, "\n".join(separator.join(row) for row in rows), "jobs.csv")
    assert not faults
    one, two, three = (job.clip for job in found)
    assert one == Clip('two\nlines, and "quotes"', 3, size=(64, 32), frames=9, steps=1, topk=None, ode=True)
    assert two == Clip("plain", 7, size=(32, 32), frames=5, steps=2, topk=0.2)
    assert three == Clip("고양이가 걷는다", 4, size=(832, 480), frames=5, steps=2)
    assert [job.name for job in found][::2] == ["first.mp4", "고양이.mkv"]


def test_lines_of_json_with_seeds_and_images(tmp_path):
    (tmp_path / "frame.png").write_bytes(b"x")
    rows = [
        {"prompt": "a", "seeds": "0-2, 9", "name": "set.mp4"},
        {"prompt": "b", "image": "frame.png", "sigma_max": 120.5, "adaptive": True},
    ]
    found, faults = read(tmp_path, "\n".join(map(json.dumps, rows)))
    assert not faults
    assert [(job.name, job.clip.seed) for job in found[:4]] == [
        ("set-0.mp4", 0), ("set-1.mp4", 1), ("set-2.mp4", 2), ("set-9.mp4", 9),
    ]  # fmt: skip
    assert found[4].clip.image == tmp_path / "frame.png" and found[4].clip.adaptive
    assert found[4].clip.sigma_max == 120.5


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "not an object"),
        ('{"prompt": NaN}', "no number"),
        ("[" * 100_000, "not JSON"),
        ({}, "no prompt"),
        ({"prompt": "  "}, "no prompt"),
        ({"prompt": 3}, "no prompt"),
        ({"prompt": "a", "sed": 1}, "unknown column sed"),
        ({"prompt": "a", "seed": -1}, "Expected a whole number"),
        ({"prompt": "a", "seed": True}, "Expected a whole number"),
        ({"prompt": "a", "seed": 1, "seeds": "0-9"}, "Expected one of them"),
        ({"prompt": "a", "seeds": "9-0"}, "a range that rises"),
        ({"prompt": "a", "seeds": "0-99999999999"}, "a range that rises"),
        ({"prompt": "a", "seeds": "many"}, "Expected a whole number"),
        ({"prompt": "a", "size": "33x32"}, "nearest is 32x32"),
        ({"prompt": "a", "size": [32, 32]}, "Expected a text"),
        ({"prompt": "a", "frames": "all"}, "Expected a whole number"),
        ({"prompt": "a", "topk": "some"}, "Expected a number"),
        ({"prompt": "a", "topk": "1.2.3"}, "Expected a number"),
        ({"prompt": "a", "ode": "maybe"}, "true or false"),
        ({"prompt": "a", "image": "none.png"}, "is not a file"),
        ({"prompt": "a", "name": "../../etc/passwd"}, "plain name"),
        ({"prompt": "a", "name": ".hidden"}, "plain name"),
        ({"prompt": "a", "name": "con.mp4"}, "plain name"),
        ({"prompt": "a", "name": "a\x1bb"}, "plain name"),
        ({"prompt": "a", "name": "x" * 230}, "too long a name"),
        ({"prompt": "a", "name": "ä" * 105, "seeds": "98765432109, 3"}, "too long a name"),
        ({"prompt": "x" * 100_000}, "100,000 letters"),
    ],
)
def test_a_bad_line_is_told_by_its_number_and_the_others_stay(tmp_path, row, message):
    row = row if isinstance(row, str) else json.dumps(row)
    found, faults = read(tmp_path, f'{{"prompt": "before"}}\n{row}\n{{"prompt": "after"}}')
    assert [job.clip.prompt for job in found] == ["before", "after"]
    [fault] = faults
    assert fault.line == 2 and message in fault.error and len(fault.error) < 400


def test_the_same_name_and_the_same_video_twice_name_the_first_line(tmp_path):
    # the third would have its settings in the x.json of the first
    rows = [{"prompt": "a", "name": "x"}, {"prompt": "b", "name": "X.mp4"}, {"prompt": "b", "name": "x.mov"}]
    rows += [{"prompt": "c"}, {"prompt": "c"}]
    found, faults = read(tmp_path, "\n".join(map(json.dumps, rows)))
    assert len(found) == 2
    assert [(fault.line, "as line 1" in fault.error, "as line 4" in fault.error) for fault in faults] == [
        (2, True, False),
        (3, True, False),
        (5, False, True),
    ]


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("", "jobs.txt", "holds no jobs"),
        ("# nothing\n\n", "jobs.txt", "holds no jobs"),
        ("", "jobs.csv", "holds no jobs"),
        (b"\xff\xfe\x00", "jobs.txt", "UTF-8"),
        ("seed,size\n1,2", "jobs.csv", "prompt among them"),
        ("prompt,prompt\na,b", "jobs.csv", "each once"),
    ],
)
def test_a_file_that_is_no_list_is_named(tmp_path, text, name, message):
    with pytest.raises(TurboError, match=message):
        read(tmp_path, text, name)


def test_csv_cells_without_a_column_and_open_quotes(tmp_path):
    found, faults = read(tmp_path, 'prompt,seed\na,1,2\nb,2\n"open', "jobs.csv")
    assert [job.clip.prompt for job in found] == ["b"]
    assert [fault.line for fault in faults] == [2, 4]
    # the second half of a cell is no prompt, and that later rows are left out is said
    found, faults = read(tmp_path, 'prompt,seed\na,1\n"he says "no"\nand leaves",2\nb,3', "jobs.csv")
    assert [job.clip.prompt for job in found] == ["a"]
    assert [fault.line for fault in faults] == [3] and "from here on are not read" in faults[0].error


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(TurboError, match="cannot be read"):
        read_jobs(tmp_path / "none.csv", DEFAULTS)


def test_an_id_follows_from_all_that_the_video_depends_on(tmp_path):
    (tmp_path / "frame.png").write_bytes(b"x")
    lines = ['{"prompt": "a", "image": "frame.png"}', '{"prompt": "a", "image": "frame.png", "steps": 3}']
    first = [job.id for job in read(tmp_path, "\n".join(lines), models="m")[0]]
    assert first == [job.id for job in read(tmp_path, "\n".join(lines), models="m")[0]]
    assert first[0] != first[1]
    assert first != [job.id for job in read(tmp_path, "\n".join(lines), models="n")[0]]
    (tmp_path / "frame.png").write_bytes(b"y")
    assert first != [job.id for job in read(tmp_path, "\n".join(lines), models="m")[0]]


def test_thousands_of_prompts_that_begin_alike_have_names_of_their_own(tmp_path):
    """Six letters of the id, as once, made two of so many the same."""
    start = "a cinematic shot of a wide green field in the morning light, "
    found, faults = read(tmp_path, "\n".join(f"{start}{number}" for number in range(20_000)), "jobs.txt")
    assert len(found) == 20_000 and not faults


def test_a_picture_without_the_right_to_read_it_is_its_own_lines_fault(tmp_path, monkeypatch):
    def denied(_):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "frame.png").write_bytes(b"x")
    monkeypatch.setattr(jobs, "digest", denied)
    found, faults = read(tmp_path, '{"prompt": "a", "image": "frame.png"}\n{"prompt": "b"}')
    assert [job.line for job in found] == [2] and "Permission denied" in faults[0].error


def test_a_picture_that_changed_anywhere_is_another(tmp_path):
    raw = bytearray(8 << 20)
    ids = []
    for value in (0, 1):
        raw[3 << 20] = value
        (tmp_path / "frame.bmp").write_bytes(raw)
        ids.append(read(tmp_path, '{"prompt": "a", "image": "frame.bmp"}')[0][0].id)
    assert ids[0] != ids[1]


def test_models_are_told_apart_by_their_bytes_not_their_names(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for path in (one, two):
        path.write_bytes(bytes(40 << 20))
    assert jobs.digest_of_models([one]) == jobs.digest_of_models([two])
    # near an end, or all of a layer somewhere between
    for start, part in (((40 << 20) - 9, b"x"), (9 << 20, b"x" * (5 << 20))):
        with open(two, "r+b") as file:
            file.seek(start)
            file.write(part)
        assert jobs.digest_of_models([one]) != jobs.digest_of_models([two])
        two.write_bytes(bytes(40 << 20))


def test_a_table_with_tabs_and_a_json_that_is_no_list_of_lines(tmp_path):
    (found, other), faults = read(tmp_path, "prompt\tseed\na fox\t3\na dog\t4\n", "list.tsv")
    assert [(job.clip.prompt, job.clip.seed) for job in (found, other)] == [("a fox", 3), ("a dog", 4)] and not faults
    with pytest.raises(TurboError, match=r"list.json is JSON.*save it as .jsonl"):
        read(tmp_path, '[\n{"prompt": "a fox"}\n]', "list.json")


def test_names_that_a_disk_takes_for_one_are_told(tmp_path):
    composed, apart = '{"prompt": "a", "name": "caf\u00e9"}', '{"prompt": "b", "name": "cafe\u0301"}'
    found, [fault] = read(tmp_path, f"{composed}\n{apart}")
    assert len(found) == 1 and "the same name" in fault.error


def test_a_picture_is_read_once_for_all_its_lines(tmp_path, monkeypatch):
    (tmp_path / "frame.png").write_bytes(b"x")
    seen, digest = [], jobs.digest
    monkeypatch.setattr(jobs, "digest", lambda files: seen.append(files) or digest(files))
    found, _ = read(
        tmp_path, '{"prompt": "a", "image": "frame.png", "seeds": "0-1"}\n{"prompt": "b", "image": "frame.png"}'
    )
    assert len(found) == 3 and len(seen) == 1 and {job.picture for job in found} == {digest([tmp_path / "frame.png"])}
