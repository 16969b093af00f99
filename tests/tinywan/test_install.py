"""turbo-core tinywan puts the trained family where ComfyUI's loaders look."""

import pytest

from turbo_core import tinywan
from turbo_core.cli import main
from turbo_core.errors import TurboError

pytestmark = pytest.mark.skipif(not tinywan.FOLDER.is_dir(), reason="this copy comes without models/tinywan")


def test_every_file_lies_where_its_loader_looks(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    assert main(["tinywan", str(tmp_path)]) == 0
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert files == [
        "diffusion_models/TinyWan2.1-T2V-rCM.safetensors",
        "diffusion_models/TinyWan2.1-T2V-teacher.safetensors",
        "diffusion_models/TinyWan2.1-T2V.safetensors",
        "diffusion_models/TinyWan2.2-I2V-high.safetensors",
        "diffusion_models/TinyWan2.2-I2V-low.safetensors",
        "text_encoders/TinyWan_umt5.safetensors",
        "vae/TinyWan2.1_VAE.safetensors",
    ]
    for file in files:
        copy = tmp_path / file
        assert copy.read_bytes() == (tinywan.FOLDER / file).read_bytes()


def test_a_folder_that_holds_no_models_is_taken_by_force_only(tmp_path, capsys):
    """A person's home folder got three folders of weights."""
    (tmp_path / "Documents").mkdir()
    assert main(["tinywan", str(tmp_path)]) == 2
    assert "expected folders such as diffusion_models" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["Documents"]
    assert main(["tinywan", str(tmp_path), "--force"]) == 0 and (tmp_path / "vae").is_dir()


def test_bad_input_names_the_cure(tmp_path, monkeypatch):
    with pytest.raises(TurboError, match="models folder of a ComfyUI"):
        tinywan.install(tmp_path / "none")
    (tmp_path / "vae").write_text("a file")
    with pytest.raises(TurboError, match="rights"):
        tinywan.install(tmp_path)
    monkeypatch.setattr(tinywan, "FOLDER", tmp_path / "gone")
    with pytest.raises(TurboError, match="Clone the repository"):
        tinywan.install(tmp_path)


def test_the_demo_needs_no_random_family(tmp_path):
    from tests.helpers.comfyui import make_base

    base = make_base(tmp_path / "base")
    assert (base / "models" / tinywan.FILES["vae"]).is_file()
