"""turbo-core train on a model and data of one's own: videos in, a checkpoint out; bad input is told before any work."""

import pytest
import torch

pytest.importorskip("sentencepiece")

from tests.helpers.tiny_family import make_tiny
from turbo_core import checkpoint
from turbo_core.checkpoint.write import write_safetensors
from turbo_core.cli import main
from turbo_core.pipeline.video import write_video
from turbo_core.tinywan import FOLDER, evaluate, report
from turbo_core.train import data, distill, models, sparsify, videos

CONFIG = '{"transformer": {"num_heads": 2, "text_dim": 64}}'


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The random family, and two short videos of noise with captions, encoded by it."""
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny(folder)
    videos = folder / "videos"
    videos.mkdir()
    for seed in range(2):
        frames = torch.randint(0, 255, (6, 40, 48, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        write_video(videos / f"{seed}.mp4", frames)
        (videos / f"{seed}.txt").write_text(f"a red circle number {seed}\n")
    write_video(videos / "no caption.mp4", frames)
    models.save_model(models.new_model(dim=256, ffn_dim=256), folder / "wide.safetensors")
    assert encode(folder) == 0
    assert encode(folder, "--image", out="images.safetensors") == 0
    return folder


def encode(folder, *more, out="data.safetensors"):
    arguments = ["--vae", folder / "tiny_wan_vae.safetensors", "--text-encoder", folder / "tiny_umt5.safetensors"]
    arguments += ["--size", "64x48", "--frames", "5", "--device", "cpu", "-o", folder / out, *more]
    return main(["train", "data", str(folder / "videos"), *map(str, arguments)])


def train(stage, folder, out, *more):
    arguments = ["--model", folder / "TinyWan2.1-T2V.pth", "--data", folder / "data.safetensors", "--steps", 2]
    arguments += ["--batch", 2, "--work", out / "work", "-o", out / "new.safetensors"]
    return main(["train", stage, *map(str, [*arguments, *more])])


def test_the_kernel_of_the_vae_is_proved_before_videos_are_encoded(tiny, monkeypatch):
    asked, done = [], videos.load_vae
    monkeypatch.setattr(videos, "prove", lambda device, families: asked.append((str(device), families)))
    monkeypatch.setattr(videos, "load_vae", lambda *given: asked.append("read") or done(*given))
    assert encode(tiny, out="again.safetensors") == 0 and asked == [("cpu", ("vae",)), "read"]


def test_a_video_without_a_caption_is_named(tiny, capsys):
    assert encode(tiny, out="again.safetensors") == 0
    assert "left out, without a caption of the same name (.txt): no caption.mp4" in capsys.readouterr().out


def test_videos_become_data(tiny):
    made = data.load(tiny / "data.safetensors")
    assert made.latents.shape == (2, 16, 2, 6, 8) and made.captions_of.tolist() == [[1], [2]]
    assert made.lengths[0] == 1  # the empty caption: its end token


@pytest.mark.parametrize("stage", ["teacher", "distill", "sparsify"])
def test_a_stage_makes_a_checkpoint_of_the_same_family(stage, tiny, tmp_path, capsys):
    assert train(stage, tiny, tmp_path) == 0
    new, old = (checkpoint.inspect(path) for path in (tmp_path / "new.safetensors", tiny / "TinyWan2.1-T2V.pth"))
    assert (new.family, new.num_heads, new.has_sla) == (old.family, old.num_heads, old.has_sla)
    assert (tmp_path / "work" / "curves.png").stat().st_size > 1000
    assert "new.safetensors" in capsys.readouterr().out


def test_the_first_frame_is_what_an_image_to_video_model_is_given(tiny):
    plain, made = (data.load(tiny / name) for name in ("data.safetensors", "images.safetensors"))
    assert plain.images is None and torch.equal(made.latents, plain.latents)
    assert made.images.shape == (2, 20, 2, 6, 8)
    mask, image = made.images.split((4, 16), 1)
    assert (mask[:, :, 0] == 1).all() and (mask[:, :, 1:] == 0).all()
    assert torch.equal(image[:, :, 0], made.latents[:, :, 0])  # the VAE is causal: the first frame is alone
    assert not torch.equal(image[:, :, 1], made.latents[:, :, 1])


@pytest.mark.parametrize("stage", ["teacher", "distill", "sparsify"])
def test_two_experts_become_two_files(stage, tiny, tmp_path, capsys):
    names = [tiny / f"TinyWan2.2-I2V-{noise}.pth" for noise in ("high", "low")]
    more = ["--model", names[0], "--model-low", names[1], "--data", tiny / "images.safetensors"]
    assert train(stage, tiny, tmp_path, *more, "--output-low", tmp_path / "low.safetensors") == 0
    paths = [tmp_path / "new.safetensors", tmp_path / "low.safetensors"]
    assert capsys.readouterr().out.split()[-2:] == [str(path) for path in paths]
    for path, old in zip(paths, names):
        new, old = checkpoint.inspect(path), checkpoint.inspect(old)
        assert (new.family, new.task, new.in_dim, new.has_sla) == (old.family, "i2v", 36, old.has_sla)


@pytest.mark.parametrize("stage", ["distill", "sparsify"])
def test_going_on_from_an_earlier_student(stage, tiny, tmp_path, monkeypatch):
    earlier, began = tmp_path / "earlier.safetensors", []
    state, _ = checkpoint.load(tiny / "TinyWan2.1-T2V.pth")
    state = {name: tensor.float() * (1.5 if "head.head" in name else 1.0) for name, tensor in state.items()}
    write_safetensors(earlier, state, {"format": "pt", "config": CONFIG, checkpoint.WORLD: "tinywan"})
    module = {"distill": distill, "sparsify": sparsify}[stage]

    def watched(*given, **options):
        assert options.get("start", 0.5) == (0.15 if stage == "sparsify" else 0.5)  # top-k needs no ramp
        began.extend(m.head.head.weight.detach().clone() for m in given if hasattr(m, "head"))
        return given[0], []

    monkeypatch.setattr(module, "train", watched)
    model = ["--model", earlier, "--start"]
    assert train(stage, tiny, tmp_path, *model, tiny / "TinyWan2.1-T2V.pth") == 0
    first, *others = began
    assert others and all(torch.equal(other, 1.5 * first) for other in others)
    # what is made of a model with a small world has the same one
    assert checkpoint.inspect(tmp_path / "new.safetensors").metadata[checkpoint.WORLD] == "tinywan"


@pytest.mark.parametrize("stage", ["distill", "sparsify"])
def test_two_experts_go_on_from_their_own(stage, tiny, tmp_path, monkeypatch):
    names = [tiny / f"TinyWan2.2-I2V-{noise}.pth" for noise in ("high", "low")]
    earlier = [tmp_path / f"earlier-{i}.safetensors" for i in range(2)]
    for i, (path, source) in enumerate(zip(earlier, names)):
        state, _ = checkpoint.load(source)
        state["head.head.weight"] = torch.full_like(state["head.head.weight"], i + 1.0)
        write_safetensors(path, state, {"format": "pt", "config": CONFIG})
    module, began = {"distill": distill, "sparsify": sparsify}[stage], []

    def watched(student, *others, **options):
        began.extend(part.head.head.weight.mean().item() for part in student.parts)
        return student, []

    monkeypatch.setattr(module, "train", watched)
    more = ["--model", names[0], "--model-low", names[1], "--data", tiny / "images.safetensors"]
    more += ["--start", earlier[0], "--start-low", earlier[1], "--output-low", tmp_path / "low.safetensors"]
    assert train(stage, tiny, tmp_path, *more) == 0
    assert began == [1.0, 2.0]


def test_a_work_folder_of_other_weights_is_not_gone_on_from(tiny, tmp_path, capsys):
    state, _ = checkpoint.load(tiny / "TinyWan2.1-T2V.pth")
    state["head.head.bias"] = state["head.head.bias"] + 1
    write_safetensors(tmp_path / "other.safetensors", state, {"format": "pt", "config": CONFIG})
    assert train("sparsify", tiny, tmp_path) == 0
    made = (tmp_path / "new.safetensors").read_bytes()
    other = ["--model", tmp_path / "other.safetensors"]
    for stage, more, what in (
        ("sparsify", other, "model"),
        ("sparsify", ["--start", tmp_path / "other.safetensors"], "start"),
        ("sparsify", ["--seed", "1"], "seed"),
        ("sparsify", ["--topk", "0.5"], "topk"),
    ):
        assert train(stage, tiny, tmp_path, *more) == 2
        assert f"other settings ({what})" in capsys.readouterr().err
    assert (tmp_path / "new.safetensors").read_bytes() == made
    assert train("sparsify", tiny, tmp_path, "--lr", "0.01") == 0  # the same ones: it is finished
    assert (tmp_path / "new.safetensors").read_bytes() == made
    (tmp_path / "work" / "made_from.json").unlink()
    assert train("sparsify", tiny, tmp_path) == 2
    assert "does not say of what" in capsys.readouterr().err


def test_a_training_that_took_no_step_binds_nobody(tiny, tmp_path, monkeypatch):
    def killed(*given, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sparsify, "train", killed)
        assert train("sparsify", tiny, tmp_path, "--seed", "1") != 0
    assert train("sparsify", tiny, tmp_path) == 0


I2V = ["--model", "{tiny}/TinyWan2.2-I2V-high.pth", "--output-low", "{out}/low.safetensors"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "{tiny}/TinyWan2.1-T2V-quant.pth"], "take the unquantized file"),
        (["--model", "{tiny}/TinyWan2.2-I2V-high.pth"], "--model-low"),
        ([*I2V, "--model-low", "{tiny}/TinyWan2.2-I2V-low.pth"], "takes 36 latent channels"),
        ([*I2V, "--model-low", "{tiny}/TinyWan2.2-I2V-high.pth"], "same file"),
        (["--model", "{tiny}/wide.safetensors", "-o", "{tiny}/wide.safetensors"], "and it is read. Choose another"),
        (["-o", "{tiny}/data.safetensors"], "and it is read. Choose another"),
        (["--start", "{tiny}/wide.safetensors", "-o", "{tiny}/wide.safetensors"], "and it is read. Choose another"),
        ([*I2V, "--model-low", "{tiny}/TinyWan2.1-T2V.pth"], "experts differ"),
        (["--model", "{tiny}/none.pth"], "none.pth"),
        (["--data", "{tiny}/none.safetensors"], "turbo-core train data"),
        (["--data", "{tiny}/tiny_wan_vae.safetensors"], "no training data"),
        (["--steps", "0"], "at least 1"),
        (["--lr", "0"], "above 0"),
        (["--topk", "1.5"], "topk"),
        (["--boundary", "900"], "between 0 and 1"),
        (["--sigma-max", "1"], "above 14.1"),
        (["-o", "{out}/none/new.safetensors"], "Create it first"),
        (["-o", "{out}/new.pth"], "does not end in .safetensors"),
        (["--data", "{tiny}/images.safetensors"], "without for others"),
        (["--model-low", "{tiny}/TinyWan2.2-I2V-low.pth"], "--output-low belong together"),
        (["--start", "{tiny}/TinyWan2.1-T2V-quant.pth"], "take the unquantized file"),
        (["--start", "{tiny}/TinyWan2.2-I2V-high.pth"], "--model-low"),
        (["--start-low", "{tiny}/TinyWan2.1-T2V.pth"], "one for each expert"),
        (["--start", "{tiny}/wide.safetensors"], "differ in ffn_dim"),
        (["--start", "{tiny}/TinyWan2.1-T2V.pth", "--start-low", "{tiny}/TinyWan2.1-T2V.pth"], "one for each expert"),
        (
            ["--model-low", "{tiny}/x.pth", "--output-low", "{out}/../{out.name}/new.safetensors"],
            "so is another",
        ),
    ],
)
def test_bad_input(more, message, tiny, tmp_path, capsys):
    assert train("sparsify", tiny, tmp_path, *(word.format(tiny=tiny, out=tmp_path) for word in more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new.safetensors").exists()


@pytest.mark.parametrize("alone", ["-0.1", "1.5"])
def test_more_than_all_steps_alone(alone, tiny, tmp_path, capsys):
    assert train("distill", tiny, tmp_path, f"--alone={alone}") == 2
    assert "--alone is a share of the steps" in capsys.readouterr().err


def test_a_sparse_start_is_not_for_a_dense_student(tiny, tmp_path, capsys):
    state, _ = checkpoint.load(tiny / "TinyWan2.1-T2V.pth")
    dense = {name: tensor for name, tensor in state.items() if "proj_l" not in name}
    assert len(dense) < len(state)
    write_safetensors(tmp_path / "dense.safetensors", dense, {"format": "pt", "config": CONFIG})
    more = ["--model", tmp_path / "dense.safetensors", "--start", tiny / "TinyWan2.1-T2V.pth"]
    assert train("distill", tiny, tmp_path, *more) == 2
    assert "has sparse attention" in capsys.readouterr().err


def test_a_name_that_cannot_be_written_is_told_before_hours_of_encoding(tiny, monkeypatch, capsys):
    monkeypatch.setattr(videos, "encode", lambda *_, **__: pytest.fail("encoded"))
    assert encode(tiny, out="nowhere/data.safetensors") == 2
    assert "There is no folder" in capsys.readouterr().err


def test_videos_that_will_not_do(tiny, tmp_path, capsys):
    assert encode(tiny, "--frames", "9") == 2
    assert "expected at least 9" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train"])
    assert main(["evaluate", str(tmp_path), "-o", str(tmp_path / "out")]) == 2
    assert "lacks" in capsys.readouterr().err


@pytest.mark.skipif(not FOLDER.is_dir(), reason="this copy comes without models/tinywan")
def test_reports_that_cannot_be(tmp_path, capsys):
    (tmp_path / "file").touch()
    for more, message in ((["--prompts", "0"], "at least one"), (["-o", str(tmp_path / "file")], "Choose another")):
        assert main(["evaluate", str(FOLDER), "-o", str(tmp_path / "out"), *more]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("again", [True, False])
def test_evaluate_does_what_was_asked_and_writes_table_and_picture(again, tmp_path, monkeypatch, capsys):
    scores = {"colour": 1.0, "shape": 0.5, "motion": 0.5, "background": 1.0, "all": 0.25, "low": 0.1, "high": 0.4}
    found, asked = [{"name": "rCM, 4 steps", "bytes": 2_000_000} | scores], []

    def watched(folder, out, count, again, log):
        asked.append((folder, out, count, again))
        out.mkdir()
        return found

    monkeypatch.setattr(evaluate, "evaluate", watched)
    monkeypatch.setattr(report, "picture", lambda rows, folder, path: asked.append((rows, folder, path)))
    out = tmp_path / "out"
    command = ["evaluate", str(tmp_path), "-o", str(out), "--prompts", "7", *(["--again"] if again else [])]
    assert main(command) == 0
    assert asked == [(tmp_path, out, 7, again), (found, tmp_path, out / "quality.png")]
    assert (out / "quality.md").read_text() == report.markdown(found)
    assert "25.0%" in capsys.readouterr().out
