"""Models that are not Wan: refused, or quantized where a pattern names their layers."""

import pytest
import torch

from tests.helpers.lab import small_flux


@pytest.fixture
def flux(comfy):
    return small_flux(comfy)


def flux_output(lab, model):
    given = {"x": lab.draw(1, 16, 16, 16), "t": torch.tensor([0.7]), "c_crossattn": lab.draw(1, 12, 64, seed=1)}
    given |= {"y": lab.draw(1, 32, seed=2), "guidance": torch.tensor([3.5])}
    return lab.loaded(model).apply_model(**given, transformer_options={})


def test_another_model_needs_a_pattern(lab, flux):
    with pytest.raises(ValueError, match=r"Wan model, got Flux.*pattern"):
        lab.quantize(flux)
    with pytest.raises(ValueError, match="Wan model, got Flux"):
        lab.attention(flux)
    with pytest.raises(ValueError, match=r"none of the .* of Flux.*double_blocks.\*.img_attn.qkv"):
        lab.quantize(flux, pattern="blocks.*")


@pytest.mark.parametrize("kind", ["block", "row"])
def test_another_model_by_pattern(comfy, lab, flux, kind):
    before = flux_output(lab, flux)
    quantized = lab.quantize(flux, kind, pattern="double_blocks.*, single_blocks.*, -*mod*")
    weights = lab.weights(quantized)
    int8 = {name.removesuffix(".weight") for name, tensor in weights.items() if tensor.dtype == torch.int8}
    parts = ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")
    streams = {f"double_blocks.0.{stream}_{part}" for stream in ("img", "txt") for part in parts}
    assert int8 == streams | {"single_blocks.0.linear1", "single_blocks.0.linear2"}
    out = flux_output(lab, quantized)
    print("Flux", kind, lab.distance(out, before))
    assert 2e-3 < lab.distance(out, before) < 0.04
    patched = lab.merged(quantized, lab.lora(quantized, "diffusion_model.double_blocks.0.img_mlp.0"))
    assert lab.distance(flux_output(lab, patched), out) > 0.02
    assert torch.equal(flux_output(lab, quantized), out)
    assert torch.equal(flux_output(lab, flux), before)


def test_another_model_is_saved_and_loaded_by_the_host(comfy, lab, flux, tmp_path, monkeypatch):
    """In the row format, which is the host's own."""
    import folder_paths
    from comfy_extras.nodes_model_merging import ModelSave

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    quantized = lab.quantize(flux, "row", pattern="double_blocks.*, single_blocks.*, -*mod*")
    out = flux_output(lab, quantized)
    ModelSave().save(quantized, "flux")
    sd, metadata = comfy.utils.load_torch_file(str(next(tmp_path.iterdir())), return_metadata=True)
    again = comfy.sd.load_diffusion_model_state_dict({k: v.clone() for k, v in sd.items()}, metadata=metadata)
    assert torch.equal(flux_output(lab, again), out)
