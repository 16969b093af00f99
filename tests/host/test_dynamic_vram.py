"""The host's dynamic VRAM on a CPU: its own casting code, with plain buffers where a card has virtual memory.

Dynamic VRAM is how ComfyUI runs on most cards: weights stay in the file's memory (assigned, not copied), each layer is
gathered into one buffer as it is needed, LoRAs are added there, int8 weights made int8 again. Only the allocator, the
pinning and the streams need a card; everything else is the host's real code.
"""

import pytest
import torch

from tests.helpers.lab import LINEAR, PROJ_L, QUANT, T2V


@pytest.fixture
def assigned(comfy, lab, monkeypatch):
    """Load or make a MODEL as a dynamic patcher has it loaded: tensors of the file become the parameters."""

    def make(run):
        with monkeypatch.context() as patch:
            patch.setattr(comfy.model_patcher.ModelPatcher, "is_dynamic", lambda self: True)
            return run()

    return make


@pytest.fixture
def dynamic(comfy, lab, monkeypatch):
    """x0 of one evaluation through the dynamic casting code, `vram` saying whether the allocator had room."""
    ops, memory = comfy.ops, comfy.memory_management
    monkeypatch.setattr(ops.comfy_aimdo.model_vbar, "vbar_fault", lambda v: v["signature"])
    monkeypatch.setattr(ops.comfy_aimdo.model_vbar, "vbar_signature_compare", lambda a, b: a is not None and a == b)
    monkeypatch.setattr(ops.comfy_aimdo.torch, "aimdo_to_tensor", lambda v, device: v["buffer"])
    monkeypatch.setattr(comfy.cli_args.args, "disable_pinned_memory", True)
    device = torch.device("cpu")

    def cast(s, input=None, dtype=None, bias_dtype=None, compute_dtype=None, want_requant=False, **_):
        """The part of the host's cast_bias_weight that it takes on a card, with that function's arguments."""
        if input is not None:
            dtype = dtype or input.dtype
            bias_dtype = bias_dtype or dtype
        if not hasattr(s, "_v"):
            return s.weight.to(dtype), None if s.bias is None else s.bias.to(bias_dtype), None
        ops.cast_modules_with_vbar([s], dtype, device, bias_dtype, False)
        weight, bias = ops.resolve_cast_module_with_vbar(s, dtype, device, bias_dtype, compute_dtype, want_requant)
        del s._prefetch
        return weight, bias, None

    def prepare(model, vram):
        for name, module in model.model.named_modules():
            if hasattr(module, "comfy_cast_weights"):
                module.comfy_cast_weights, module.seed_key, module._pin_state = True, name, {}
                size = 0
                for key in ("weight", "bias"):
                    tensor = getattr(module, key, None)
                    patched = f"{name}.{key}" in model.patches
                    patch = comfy.model_patcher.LowVramPatch(f"{name}.{key}", model.patches) if patched else None
                    if patch is not None:
                        patch._pin_state = {}
                    setattr(module, f"{key}_lowvram_function", patch)
                    setattr(module, f"{key}_function", [])
                    if tensor is not None and not isinstance(tensor, comfy.quant_ops.QuantizedTensor):
                        tensor._model_dtype = getattr(module, f"{key}_comfy_model_dtype", None) or tensor.dtype
                        tensor = memory.TensorGeometry(shape=tensor.shape, dtype=tensor._model_dtype)
                    size += memory.vram_aligned_size(tensor)
                if comfy.model_management.module_size(module) > 16 * 1024:  # the host's threshold for staging
                    buffer = torch.full((size,), 255, dtype=torch.uint8)  # poisoned: NaN where read before written
                    module._v = {"buffer": buffer, "signature": 1 if vram else None}
                    module._v_signature = None
            else:
                for key, parameter in module.named_parameters(recurse=False):
                    parameter.data = parameter.data.to(getattr(module, f"{key}_comfy_model_dtype"))

    def run(model, vram=True):
        prepare(model, vram)
        given = lab.inputs()
        options = {**model.model_options["transformer_options"], "sigmas": given["t"]}
        with monkeypatch.context() as patch:
            patch.setattr(ops, "cast_bias_weight", cast)
            results = [model.model.apply_model(**given, transformer_options=options) for _ in range(2)]
        assert torch.equal(*results), "the second use, already resident, differs from the first"
        return results[0]

    return run


@pytest.fixture
def with_lora(lab):
    return lambda model: lab.merged(model, lab.lora(model, LINEAR, PROJ_L))


@pytest.mark.parametrize("vram", [True, False])
@pytest.mark.parametrize("name", [T2V, QUANT])
def test_loaded_by_assignment_is_the_same_model(lab, assigned, dynamic, name, vram):
    """float32 proj_l among bf16 weights mapped from a .pth, int8 blocks with their scales: gathered and read back."""
    expected = lab.denoise(lab.load(name))
    model = assigned(lambda: lab.load(name))
    assert model.model.diffusion_model.blocks[0].norm3.weight.dtype in (torch.bfloat16, torch.float32)
    out = dynamic(model, vram)
    print("dynamic", name, vram, lab.distance(out, expected))
    assert lab.distance(out, expected) < (1e-5 if name == T2V else 5e-3)


@pytest.mark.parametrize("vram", [True, False])
@pytest.mark.parametrize("name", [T2V, QUANT])
def test_lora_on_the_fly(lab, assigned, dynamic, with_lora, name, vram):
    """Added in the buffer, int8 made anew, and not added twice when the layer is still there."""
    expected = lab.denoise(with_lora(lab.load(name)))
    model = assigned(lambda: lab.load(name))
    weights = lab.weights(model)
    out = dynamic(with_lora(model), vram)
    print("dynamic lora", name, vram, lab.distance(out, expected))
    assert lab.distance(out, expected) < (1e-5 if name == T2V else 2e-2)
    after = lab.weights(model)
    assert all(torch.equal(after[k], weights[k]) for k in weights), "the weights in the file's memory changed"


@pytest.mark.parametrize("kind", ["block", "row"])
def test_quantizing_an_assigned_model(lab, assigned, dynamic, with_lora, kind):
    """Same bits as from a copied one, own tensors, and it runs dynamically as well."""
    model = assigned(lab.load)
    quantized = assigned(lambda: lab.quantize(model, kind))
    plain = lab.quantize(lab.load(), kind)
    ours, theirs = lab.weights(quantized), lab.weights(plain)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k].float(), theirs[k].float()) for k in ours)
    out = dynamic(quantized)
    assert lab.distance(out, lab.denoise(plain)) < 5e-3


def test_saving_an_assigned_model(lab, assigned, dynamic, tmp_path):
    """Nothing is resident as a whole: TurboSave reads what lies in the file's memory."""
    model = assigned(lambda: lab.load(QUANT))
    dynamic(model)
    path = str(tmp_path / "saved.safetensors")
    lab.pack.saving.save_model(model, path)
    assert lab.same(lab.weights(lab.load(path)), lab.weights(lab.load(QUANT)))
