"""A training that was killed goes on to the weights of one that was not, and bad folders are told before anything."""

import pytest
import torch

from tests.helpers.training import clips, model, pair
from turbo_core.errors import TurboError
from turbo_core.train import distill, engine, optim, sparsify, teacher

STEPS = 6


def stages(folder, steps=STEPS):
    quiet = {"batch": 2, "log": lambda line: None}
    return {
        "teacher": lambda: teacher.train(model(), clips(), folder, steps, kept=(2, 1, 1), **quiet),
        "distill": lambda: distill.train(model(), model(), model(), clips(), folder, steps, **quiet),
        "sparsify": lambda: sparsify.train(model(), model(), clips(), folder, steps, topk=0.5, **quiet),
        "two experts": lambda: distill.train(pair(), pair(), pair(), clips(images=True), folder, steps, **quiet),
    }


class Killed(Exception):
    pass


@pytest.mark.parametrize("stage", ["teacher", "distill", "sparsify", "two experts"])
def test_killed_and_resumed_is_the_same_bit_for_bit(stage, tmp_path, monkeypatch):
    whole, history = stages(tmp_path / "whole")[stage]()
    real, calls = engine.generator, []

    def until_killed(seed, step, *stream):
        calls.append(step)
        if step == 4 and len(calls) < 20:
            raise Killed
        return real(seed, step, *stream)

    monkeypatch.setattr(engine, "generator", until_killed)
    saved = engine.save
    # after every second step a checkpoint: step 3 was made and is lost
    monkeypatch.setattr(engine, "save", lambda parts, done, path: len(done) % 2 == 0 and saved(parts, done, path))
    monkeypatch.setattr(engine.run, "__defaults__", (None, 0.0, print))
    with pytest.raises(Killed):
        stages(tmp_path / "killed")[stage]()
    calls.extend([0] * 20)
    resumed, again = stages(tmp_path / "killed")[stage]()
    assert again == history
    for (name, one), other in zip(whole.state_dict().items(), resumed.state_dict().values()):
        assert torch.equal(one, other), name
    before = pair() if stage == "two experts" else model()
    moved = [not torch.equal(a, b) for a, b in zip(whole.parameters(), before.parameters())]
    assert sum(moved) > len(moved) / 2


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_ends_it_before_anything_is_updated(tmp_path, bad):
    """Clipped by an infinite norm all gradients are NaN, and so would be the weights in the next checkpoint."""
    net = model()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    both = optim.Both(net, 0.01, 0.01, optim.in_blocks)

    def step_of(step):
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        if step == 1:
            next(net.parameters()).grad.view(-1)[0] = bad
        norm = both.step(1.0)
        before.update({name: tensor.clone() for name, tensor in net.state_dict().items()})
        return {"gradient": norm}

    with pytest.raises(TurboError, match=f"the gradient is {bad}. Lower the learning rate"):
        engine.run(step_of, {"model": net}, tmp_path, 3, save_every=0.0, log=lambda line: None)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    kept = model()
    assert len(engine.load({"model": kept}, tmp_path / engine.CHECKPOINT)) == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in kept.state_dict().items())


def test_an_infinite_loss_ends_it_too(tmp_path):
    with pytest.raises(TurboError, match="step 1: loss is inf"):
        engine.run(lambda step: {"loss": float("inf")}, {}, tmp_path, 3, log=lambda line: None)


def test_a_finished_training_is_not_repeated(tmp_path):
    first, _ = stages(tmp_path)["teacher"]()
    written = (tmp_path / engine.CHECKPOINT).stat().st_mtime_ns
    second, history = stages(tmp_path)["teacher"]()
    assert len(history) == STEPS and (tmp_path / engine.CHECKPOINT).stat().st_mtime_ns == written
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))


def test_a_training_of_half_a_million_steps_resumes(tmp_path):
    history = [{"loss": 0.5, "gradient": step / 3} for step in range(500_000)]
    parts, path = {"model": torch.nn.Linear(2, 2)}, tmp_path / engine.CHECKPOINT
    engine.save(parts, history, path)
    assert engine.load(parts, path) == history


@pytest.mark.parametrize("history", ['[{"loss": "x"}]', "{}", '""', "[1]", "[" * 9999, "?"])
def test_a_history_that_is_none_is_refused(history, tmp_path):
    parts, path = {"model": torch.nn.Linear(2, 2)}, tmp_path / engine.CHECKPOINT
    states = {"model": parts["model"].state_dict()}
    torch.save({"parts": states, "history": torch.frombuffer(bytearray(history.encode()), dtype=torch.uint8)}, path)
    with pytest.raises(TurboError, match="does not fit this training"):
        engine.load(parts, path)


def test_a_checkpoint_of_another_model_is_refused_and_kept(tmp_path):
    stages(tmp_path)["teacher"]()
    before = (tmp_path / engine.CHECKPOINT).read_bytes()
    with pytest.raises(TurboError, match="does not fit this training"):
        stages(tmp_path)["distill"]()
    assert (tmp_path / engine.CHECKPOINT).read_bytes() == before


def test_a_damaged_checkpoint_is_refused(tmp_path):
    (tmp_path / engine.CHECKPOINT).write_bytes(b"not a checkpoint")
    with pytest.raises(TurboError, match="Remove it"):
        stages(tmp_path)["teacher"]()


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    stages(tmp_path, 2)["teacher"]()
    before = (tmp_path / engine.CHECKPOINT).read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(TurboError, match="Free space"):
        stages(tmp_path, 3)["teacher"]()
    assert (tmp_path / engine.CHECKPOINT).read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [engine.CHECKPOINT]


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TurboError, match="cannot be a folder"):
        stages(tmp_path / "file")["teacher"]()


def test_the_fake_score_learns_before_it_is_asked(tmp_path):
    fake = model()
    _, history = distill.train(model(), model(), fake, clips(), tmp_path, 2, alone=1.0, batch=2, log=lambda line: None)
    assert not any("apart" in values for values in history)
    assert not torch.equal(fake.blocks[0].self_attn.q.weight, model().blocks[0].self_attn.q.weight)
