"""Prompt to file by us and by others: the same noise, weights and times, and what is told of them."""

import json

import pytest
import torch

from turbo_core import checkpoint
from turbo_core.bench import clip, harness, one_clip, rivals
from turbo_core.cli import main
from turbo_core.errors import TurboError
from turbo_core.sampler import sample_rcm
from turbo_core.schedule import rcm_sigmas
from turbo_core.tinywan import FILES, FOLDER
from turbo_core.train import teacher
from turbo_core.wan import WanModel

HOUSE = {name: FOLDER / file for name, file in FILES.items()}
JOB = {
    "prompt": "a red circle",
    "width": 32,
    "height": 32,
    "frames": 5,
    "seed": 3,
    "device": "cpu",
    "threads": 1,
    "clock": one_clip.WALL,
}


def stepped(schedule, x, velocity):
    """What WanPipeline does with a scheduler."""
    schedule.set_timesteps(len(schedule.sigmas) - 1, "cpu")
    schedule.set_begin_index(0)
    for t, sigma in zip(schedule.timesteps, schedule.sigmas):
        assert abs(t / 1000 - sigma) < (1e-6 if schedule.draw is None else 4e-3)  # bfloat16
        x = schedule.step(velocity(x, sigma), t, x, return_dict=False)[0]
    return x


def test_their_few_steps_are_ours():
    def velocity(x, sigma):
        return (x + sigma).sin()

    draw, sigmas = one_clip.noise(JOB), rcm_sigmas(4)
    theirs = stepped(rivals.Schedule(sigmas.tolist(), draw), draw() * sigmas[0].item(), velocity)
    again = one_clip.noise(JOB)
    ours = sample_rcm(
        lambda x, sigma: x - sigma.item() * velocity(x, sigma.item()),
        again().double() * sigmas[0].item(),
        sigmas,
        noise_sampler=lambda *_: again(),
    )
    torch.testing.assert_close(theirs, ours.float(), atol=1e-5, rtol=0)


def test_their_teacher_is_ours():
    class Network(torch.nn.Module):
        def forward(self, x, t, both):
            return (x + t.view(-1, 1, 1, 1, 1) / 1000).sin() * both.view(-1, 1, 1, 1, 1)

    x = one_clip.noise(JOB)()
    ours = teacher.sample(lambda _: Network(), x, torch.tensor([2.0, 1.0]), 6)
    at = teacher.shifted(torch.linspace(1, 0, 7), teacher.SHIFT).tolist()
    theirs = stepped(rivals.Schedule(at), x, lambda x, now: (1 + teacher.GUIDANCE) * (x + now).sin())
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)


def test_their_networks_have_our_weights():
    diffusers = pytest.importorskip("diffusers")
    model = rivals.transformer(diffusers, HOUSE["student"])
    state, described = checkpoint.load(HOUSE["student"])
    ours = WanModel.from_state_dict(state, torch.float32, num_heads=described.num_heads)
    x, context = one_clip.noise(JOB)(), torch.randn(1, 512, 64)
    theirs = model(x, torch.tensor([700.0]), context, return_dict=False)[0]
    assert harness.relative_error(ours(x, torch.tensor([700.0]), context), theirs) < 1e-5


def test_their_tokenizer_pads_and_cuts():
    given = rivals.Tokenizer(lambda text: [5] * len(text))(["abc", "x" * 600])
    assert given.input_ids.shape == (2, 512) and given.attention_mask.sum(1).tolist() == [3, 512]


def test_a_host_that_is_not_there_is_missing(tmp_path, monkeypatch):
    for folder in ("", str(tmp_path)):
        monkeypatch.setenv("COMFYUI_DIR", folder)
        with pytest.raises(harness.Missing, match="COMFYUI_DIR names its folder"):
            rivals.host_vae(HOUSE["vae"], torch.device("cpu"))


def fake(order, missing=()):
    """A child that notes its job and takes as many seconds as it has steps."""

    def child(job):
        order.append((job["maker"], job["steps"]))
        if job["maker"] in missing:
            return {"missing": "diffusers is not installed"}
        torch.save(torch.ones(2), job["kept"])
        seconds = dict.fromkeys(clip.STAGES, 0.5)
        told = {"seconds": seconds, "steps": [0.1], "peak": {"process": 1 << 20}, "digest": "d"}
        return told | {"total": float(job["steps"]), "wall": 9.0}

    return child


def test_they_take_turns_and_are_told(tmp_path, monkeypatch):
    order, said = [], []
    monkeypatch.setattr(clip, "_child", fake(order))
    report = clip.run(HOUSE, "cpu", tmp_path, tell=said.append)
    first, order = order[:-12], order[-12:]
    assert sorted(first) == [("guided", 1), ("hosted", 1), ("ours", 1), ("theirs", 1)], (
        "one short run each, not counted"
    )
    assert order[:6] == order[6:][::-1] and len(set(order)) == 5  # the two students of ours differ in their file
    rows = {row["name"]: row for row in report["rows"]}
    assert rows[clip.FAST]["speedup"] == 12.5 and rows["diffusers, 4 steps"]["error"] == 0.0
    folder = tmp_path / "cpu"
    assert json.loads((folder / "clip.json").read_text(encoding="utf-8"))["rows"] == json.loads(
        json.dumps(report["rows"])
    )
    page = (folder / "clip.md").read_text(encoding="utf-8")
    assert all(row["name"] in page for row in report["rows"]) and said[0] == page
    assert (folder / "clip.png").read_bytes()[:4] == b"\x89PNG"


def test_who_is_missing_is_named_and_the_others_are_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(clip, "_child", fake([], missing=("theirs", "guided", "hosted")))
    assert main(["bench", "clip", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "cpu" / "clip.md").read_text(encoding="utf-8")
    assert page.count("missing: diffusers is not installed") == 4 and "teachers take 4 steps" in page
    rows = json.loads((tmp_path / "cpu" / "clip.json").read_text(encoding="utf-8"))["rows"]
    assert [row.get("speedup") for row in rows] == [None, None, None, None, 1.0, 1.0]


def test_a_family_that_is_not_whole(tmp_path):
    with pytest.raises(TurboError, match=r"there is no .*gone"):
        clip.run(HOUSE | {"teacher": tmp_path / "gone"}, "cpu", tmp_path)


def test_reading_the_dit_within_sampling_is_no_sampling(monkeypatch):
    clock, now = one_clip.Clock(JOB | {"clock": one_clip.CPU_TIME}), [0.0]
    monkeypatch.setattr(clock, "read", lambda: now[0])
    told = clock.follow({"load DiT": "load"})
    for second, event in (
        (1, ("sampling", 0, 2)), (1, ("load DiT", 0, 1)), (4, ("load DiT", 1, 1)), (6, ("sampling", 1, 2)),
        (9, ("sampling", 2, 2)), (9, ("sampling", 2, 2)),
    ):  # fmt: skip
        now[0] = float(second)
        told(*event)
    assert clock.steps == [2.0, 3.0] and clock.seconds["sampling"] == 5.0 and clock.seconds["load"] == 3.0


@pytest.mark.parametrize("clock", [one_clip.WALL, one_clip.CPU_TIME])
def test_a_clip_in_a_process_of_its_own(tmp_path, clock):
    files = {"dit": HOUSE["student"], "vae": HOUSE["vae"], "text": HOUSE["text"]}
    places = {"output": tmp_path / "clip.mp4", "kept": tmp_path / "kept.pt"}
    wish = {"maker": "ours", "steps": 1, "guidance": None, "topk": None, "clock": clock}
    made = clip._child(JOB | wish | {name: str(path) for name, path in (files | places).items()})
    assert set(made["seconds"]) == set(clip.STAGES) and min(made["seconds"].values()) >= 0, made
    assert sum(made["seconds"].values()) == pytest.approx(made["total"]) and len(made["steps"]) == 1
    assert 0 < made["total"] < 1.2 * made["wall"]
    assert torch.load(tmp_path / "kept.pt").shape == (1, 16, 2, 4, 4) and (tmp_path / "clip.mp4").stat().st_size > 500
    failed = clip._child(JOB | wish | {"dit": "gone", "vae": "", "text": "", "output": "", "kept": ""})
    assert "gone does not exist" in failed["failed"]


def test_the_figures_in_the_docs_are_those_of_the_committed_run():
    root = FOLDER.parents[1]
    folder = root / "benchmarks" / "results" / "cpu"
    report = json.loads((folder / "clip.json").read_text(encoding="utf-8"))
    assert (folder / "clip.md").read_text(encoding="utf-8") == clip.markdown(report)
    told = (root / "docs" / "testing.md").read_text(encoding="utf-8")
    for row in [row for row in report["rows"] if row["status"] == "ok"]:
        before = sum(row["seconds"][stage] for stage in ("start", "load", "text"))
        spent = f"{before:.2f} s | {row['seconds']['sampling']:.2f} s | {row['seconds']['decode']:.2f} s"
        memory = f"{row['peak']['process'] / 1e6:.0f} MB"
        assert f"| {row['name']} | {spent} | {row['total']:.2f} s | {memory} |" in told, row["name"]
