"""Videos with LoRAs: alone, in sets that change them, with two experts; settings and jobs that know them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers.batches import command, made, records
from tests.helpers.lora_files import spelled
from tests.lora.test_put_on import LAB, QUANT, Loaded, saved
from turbo_core import checkpoint, pipeline
from turbo_core.batch import read_jobs
from turbo_core.batch.jobs import by_lora
from turbo_core.cli import main
from turbo_core.errors import TurboError
from turbo_core.pipeline import Clip, Pipeline, experts, resident
from turbo_core.pipeline.residence import Stay
from turbo_core.pipeline.video import read_made

SMALL = {"size": (32, 32), "frames": 5}
PAIR = "TinyWan2.2-I2V-high", "TinyWan2.2-I2V-low"


@pytest.fixture(scope="module")
def files(tiny, tmp_path_factory):
    """Two LoRAs."""
    network, folder = Loaded(tiny / QUANT).model, tmp_path_factory.mktemp("lora")
    one = saved(folder, spelled(LAB, network, "kohya"), "one.safetensors")
    two = saved(folder, {n: t for n, t in spelled(LAB, network, "PEFT").items() if "blocks.1" in n}, "two.safetensors")
    return str(one), str(two)


def pipe(tiny, dit, low=None, **settings):
    rest = tiny / "TinyWan2.1_VAE.pth", tiny / "tiny_umt5.safetensors"
    return Pipeline(tiny / dit, *rest, dit_low=low and tiny / low, device="cpu", **settings)


def alone(tiny, dit, clip, low=None):
    settings = {name: value for name, value in vars(clip).items() if name != "prompt"}
    rest = tiny / "TinyWan2.1_VAE.pth", tiny / "tiny_umt5.safetensors"
    return pipeline.generate(clip.prompt, tiny / dit, *rest, dit_low=low and tiny / low, device="cpu", **settings)


def whole_reads(monkeypatch):
    """Models read: parts of them, of which a LoRA is taken off, do not count."""
    reads, weights = [], experts.weights

    def counted(file, *device, **how):
        reads.extend([file.description.path] * ("head.head.weight" in file.tensors))
        return weights(file, *device, **how)

    monkeypatch.setattr(experts, "weights", counted)
    return reads


@pytest.mark.parametrize("dit", ["TinyWan2.1-T2V.pth", QUANT])
def test_a_set_that_changes_loras_is_the_single_videos_and_reads_the_model_once(tiny, files, dit, monkeypatch):
    one, two = files
    sets = [(), (f"{one}:0.8",), (one, f"{two}:-2"), (f"{one}:0",), (two,), ()]
    clips = [Clip("a red circle", steps=2, lora=loras, **SMALL) for loras in sets]
    expected = [alone(tiny, dit, clip) for clip in clips]
    reads = whole_reads(monkeypatch)
    with pipe(tiny, dit, memory=1 << 40) as several:
        found = list(several.map(clips))
    assert len(reads) == 1
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.latents, theirs.latents) and torch.equal(ours.frames, theirs.frames)
    assert torch.equal(found[0].latents, found[3].latents) and torch.equal(found[0].latents, found[5].latents)
    distinct = {tuple(result.latents.flatten().tolist()[:8]) for result in found}
    assert len(distinct) == 4
    assert found[0].settings["lora"] is None
    told = found[2].settings["lora"]
    assert [(lora["file"], lora["strength"]) for lora in told] == [("one.safetensors", 1.0), ("two.safetensors", -2.0)]


def test_a_file_wider_than_the_model_gives_the_same_sum_whatever_was_on_it_before(tiny, files, tmp_path):
    """What a LoRA had changed is read again from the file, what it had not is in the model, rounded."""
    state = {name: t.float() * 1.001 for name, t in checkpoint.load(tiny / "TinyWan2.1-T2V.pth")[0].items()}
    save_file(state, tmp_path / "wide.safetensors")
    first, second = (Clip("a", steps=1, lora=(file,), **SMALL) for file in files)
    found = []
    for clips in ([first, second], [second]):
        with pipe(tiny, tmp_path / "wide.safetensors", dtype=torch.bfloat16, memory=1 << 40) as several:
            found.append(list(several.map(clips))[-1].latents)
    assert torch.equal(*found)


@pytest.mark.parametrize("suffix", [".pth", "-quant.pth"])
@pytest.mark.parametrize("in_place", [False, True])
def test_each_expert_has_its_own_in_any_room(tiny, files, suffix, in_place, monkeypatch):
    """In place: the low-noise expert comes behind the last step of the other, whose LoRAs must not act in it."""
    one, two = files
    high, low = (f"{name}{suffix}" for name in PAIR)
    sets = [((one,), (two,)), ((one,), (one,)), ((), (two,)), ((two,), ())]
    clips = [
        Clip("a", seed, tiny / "image.png", steps=3, lora=lora, lora_low=lora_low, **SMALL)
        for seed, (lora, lora_low) in enumerate(sets)
    ]
    expected = [alone(tiny, high, clip, low) for clip in clips]
    without = alone(tiny, high, Clip("a", 0, tiny / "image.png", steps=3, **SMALL), low)
    assert not torch.equal(expected[0].latents, without.latents)
    monkeypatch.setattr(resident, "what_stays", lambda *_: Stay(dit=True))
    opened = experts.opened
    with pipe(tiny, high, low) as several:
        if in_place:  # on a CPU a model lies in its mapped file, which must then be a private copy
            monkeypatch.setattr(experts, "opened", lambda path: opened(path, writable=True))
            several.experts.files, several.experts.in_place = {}, True
        found = list(several.map(clips)) + list(several.map(clips[:1]))
    for ours, theirs in zip(found, [*expected, expected[0]], strict=True):
        assert torch.equal(ours.latents, theirs.latents)


def test_bytes_beside_int8_count_and_a_file_is_checked_before_anything_is_read(tiny, files, tmp_path, monkeypatch):
    with pipe(tiny, QUANT) as one:
        clip = Clip("a", lora=files, **SMALL)
        assert one._expert_bytes(clip)[0] > one._expert_bytes(Clip("a", **SMALL))[0] == one.experts.bytes[0]
        monkeypatch.setattr(experts, "weights", lambda *_: pytest.fail("read the DiT"))
        with pytest.raises(TurboError, match=r"none\.safetensors does not exist"):
            one("a", lora=[tmp_path / "none.safetensors"], **SMALL)
        with pytest.raises(TurboError, match="use --lora"):
            one("a", lora_low=files, **SMALL)


def test_a_fault_of_a_lora_is_its_own_videos(tiny, files, tmp_path):
    tensors = checkpoint.read.open_tensors(files[0]).tensors
    bad = saved(tmp_path, {n: t.clone().fill_(float("nan")) if "down" in n else t for n, t in tensors.items()})
    clips = [Clip("a", lora=loras, steps=1, **SMALL) for loras in ([files[0]], [bad], [files[0]])]
    failures = []
    with pipe(tiny, QUANT, memory=1 << 40) as several:
        found = list(several.map(clips, failed=lambda clip, error: failures.append((clip, str(error)))))
    assert [clip for clip, _ in failures] == [clips[1]] and "NaN" in failures[0][1]
    assert len(found) == 2 and torch.equal(found[0].latents, found[1].latents)


def test_a_list_of_jobs_with_loras(tiny, files, tmp_path, capsys):
    """The column, the option, settings inside, one video again where the file has other contents."""
    for file in files:
        shutil.copy(file, tmp_path)
    jobs, out = tmp_path / "jobs.jsonl", tmp_path / "out"
    rows = [
        {"prompt": "a", "lora": "one.safetensors:0.5"},
        {"prompt": "a", "lora": []},
        {"prompt": "a", "lora": ["one.safetensors:0.5", "two.safetensors"]},
        {"prompt": "a"},
        {"prompt": "b", "lora": "one.safetensors:0.5"},
        {"prompt": "c", "lora": "three.safetensors"},
        {"prompt": "c", "lora": "one.safetensors:much"},
        {"prompt": "c", "lora": "one.safetensors", "lora_low": "one.safetensors"},
    ]
    jobs.write_text("\n".join(map(json.dumps, rows)))
    given = command(tiny, jobs, out, "--lora", f"{files[1]}:0.25", "--dit", tiny / QUANT)
    for _ in range(2):
        assert main([*given, "--check"]) == 1
        told = capsys.readouterr().err
        assert "jobs.jsonl:6: LoRA " in told and "three.safetensors is not a file" in told
        assert "jobs.jsonl:7: LoRA " in told and "the strength is much" in told
        assert "jobs.jsonl:8: --lora-low is for" in told
    assert main(given) == 1
    loras = {record["line"]: read_made(out / record["name"])["lora"] for record in records(out) if "bytes" in record}
    assert [[(lora["file"], lora["strength"]) for lora in loras[line] or []] for line in range(1, 6)] == [
        [("one.safetensors", 0.5)],
        [],
        [("one.safetensors", 0.5), ("two.safetensors", 1.0)],
        [("two.safetensors", 0.25)],
        [("one.safetensors", 0.5)],
    ]
    order = [record["line"] for record in records(out) if record["state"] == "begun"]
    assert order == [1, 5, 2, 3, 4, *order[5:]], "those of one LoRA come one after the other"
    saved(tmp_path, {n: t * 2 for n, t in checkpoint.read.open_tensors(files[0]).tensors.items()}, "one.safetensors")
    assert main(given) == 1
    assert sorted(made(out).values()) == [1] * 8, "three of five are other videos now"


def test_a_table_has_several_in_a_cell_and_jobs_without_keep_their_names(tiny, files, tmp_path):
    jobs = tmp_path / "jobs.csv"
    jobs.write_text(f"prompt,lora\na,{files[0]}:0.5 | {files[1]}\na,\n")
    (one, two), faults = read_jobs(jobs, Clip("", **SMALL))
    assert not faults and [(lora.file.name, lora.strength) for lora in one.clip.lora] == [
        ("one.safetensors", 0.5), ("two.safetensors", 1.0),
    ]  # fmt: skip
    assert two.name == "a-seed0-d7385715d449.mp4"
    assert by_lora([two, one, two]) == [two, two, one]
    assert Clip.of_plain(json.loads(json.dumps(one.clip.plain()))) == one.clip
