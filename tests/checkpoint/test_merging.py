"""Carrying an acceleration over to a finetune: the formula, what has no counterpart, and what is refused."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.opens import counted_opens
from tests.helpers.states import official, plain
from tests.helpers.tiny_dits import TINY, tiny_state_dict
from turbo_core import checkpoint
from turbo_core.checkpoint import merge
from turbo_core.checkpoint.names import PROJ_L, is_quantizable
from turbo_core.errors import TurboError
from turbo_core.int8 import quantize_block

Q, NORM = "blocks.1.self_attn.q.weight", "blocks.0.norm3.weight"


def trained(state, seed, size=0.02):
    """The state after a little training: every tensor moved by `size` of its norm."""
    generator = torch.Generator().manual_seed(seed)
    moved = {}
    for name, tensor in state.items():
        noise = torch.randn(tensor.shape, generator=generator) * tensor.float().norm() / tensor.numel() ** 0.5
        moved[name] = (tensor.float() + size * noise).to(tensor.dtype)
    return moved


@pytest.fixture(scope="module")
def states():
    accelerated = tiny_state_dict(0)
    base = plain(accelerated)
    turbo = trained(base, 1) | {name: t for name, t in accelerated.items() if PROJ_L in name}
    return {"base": base, "turbo": turbo, "finetune": trained(base, 2)}


@pytest.fixture
def files(states, tmp_path):
    """The original and the accelerated model as published, the finetune as ComfyUI repacks it."""
    torch.save(states["base"], tmp_path / "base.pth")
    torch.save(states["turbo"], tmp_path / "turbo.pth")
    packed = {f"model.diffusion_model.{n}": t.contiguous() for n, t in official(states["finetune"]).items()}
    save_file(packed, tmp_path / "finetune.safetensors")
    return tmp_path


def run(files, *, finetune="finetune.safetensors", turbo=("turbo.pth",), **more):
    target = files / "out.safetensors"
    return merge(files / finetune, files / "base.pth", [files / name for name in turbo], target, **more)


def nothing_left(files):
    return not [path.name for path in files.iterdir() if path.name.startswith("out")]


@pytest.mark.parametrize("strength", [1.0, 0.5, -1.0])
def test_every_tensor_follows_the_formula(files, states, strength):
    done = run(files, strength=strength)
    out = load_file(done.path)
    finetune, base, turbo = (official(states[name]) for name in ("finetune", "base", "turbo"))
    for name, tensor in base.items():
        expected = finetune[name].double() + strength * (turbo[name].double() - tensor.double())
        assert torch.equal(out[name], expected.float().bfloat16()), name
        assert out[name].shape == tensor.shape
    proj_l = {name for name in turbo if PROJ_L in name}
    assert out.keys() == base.keys() | proj_l
    for name in proj_l:  # whole and in float32, whatever the strength
        assert out[name].dtype == torch.float32 and torch.equal(out[name], turbo[name])
    found = checkpoint.inspect(done.path)
    assert found.has_sla and found.format == "bf16" and found.family == checkpoint.inspect(files / "turbo.pth").family
    told = json.loads(found.metadata["turbowan.merged"])
    assert told == {"finetune": "finetune.safetensors", "base": "base.pth", "turbo": [["turbo.pth", strength]]}
    assert done.bytes == (files / "out.safetensors").stat().st_size


def test_merging_into_the_original_gives_the_accelerated_model_bit_for_bit(files, states):
    out = load_file(run(files, finetune="base.pth").path)
    assert all(torch.equal(out[name], tensor) for name, tensor in official(states["turbo"]).items())


def test_strength_zero_keeps_the_finetune(files, states):
    out = load_file(run(files, strength=0.0).path)
    assert all(torch.equal(out[name], tensor) for name, tensor in official(states["finetune"]).items())


def test_rcm_weights_take_an_sla_delta_and_two_deltas_add_up(files, states):
    rcm = trained(states["base"], 5)
    torch.save(rcm, files / "rcm.pth")
    one = load_file(run(files, finetune="rcm.pth").path)
    two = load_file(run(files, finetune="base.pth", turbo=("turbo.pth", "rcm.pth"), strength=[1.0, 1.0]).path)
    assert f"blocks.0.{PROJ_L}.weight" in one
    for name in one:  # base + (sla - base) + (rcm - base), in either order
        assert torch.equal(one[name], two[name]), name


def test_rcm_delta_keeps_the_proj_l_of_an_accelerated_finetune(files, states):
    torch.save(trained(states["base"], 5), files / "rcm.pth")
    out = load_file(run(files, finetune="turbo.pth", turbo=("rcm.pth",)).path)
    name = f"blocks.1.{PROJ_L}.bias"
    assert torch.equal(out[name], states["turbo"][name])


@pytest.mark.parametrize("format", ["int8_block", "int8_row", "fp8", "fp32"])
def test_formats_are_those_of_convert(files, format):
    """Merged straight into a format is as merged in float32 and then converted."""
    direct = load_file(run(files, format=format).path)
    wide = run(files, format="fp32").path
    again = load_file(checkpoint.convert(wide, files / "again.safetensors", format).path)
    assert direct.keys() == again.keys()
    for name in direct:
        if is_quantizable(name) or name.endswith(("_scale", "comfy_quant")) or format == "fp32":
            assert torch.equal(direct[name].float(), again[name].float()), name
        else:  # the rest is stored as the finetune has it
            assert torch.equal(direct[name].float(), again[name].to(direct[name].dtype).float()), name


def test_norms_are_as_wide_as_the_widest_file_has_them(files, states):
    torch.save(states["turbo"] | {NORM: states["turbo"][NORM].float()}, files / "turbo.pth")
    out = load_file(run(files).path)
    assert out[NORM].dtype == torch.float32 and out["blocks.1.norm3.weight"].dtype == torch.bfloat16


def test_what_only_the_finetune_has_is_kept(files, states):
    branch = {f"blocks.{n}.cross_attn.k_img.weight": torch.randn(256, 256).bfloat16() for n in (0, 1)}
    torch.save(states["finetune"] | branch, files / "i2v.pth")
    out = load_file(run(files, finetune="i2v.pth").path)
    assert all(torch.equal(out[name], tensor) for name, tensor in branch.items())


def test_distances_are_told_and_what_is_not_related_is_warned_of(files, states):
    done = run(files)
    assert list(done.distances) == [str(files / "finetune.safetensors"), str(files / "turbo.pth")]
    assert all(math.isclose(d, 0.02, rel_tol=0.05) for d in done.distances.values())
    assert [w for w in done.warnings if "proj_l" not in w] == []
    torch.save(plain(tiny_state_dict(77)), files / "other.pth")
    assert "other.pth is so far from base.pth" in run(files, finetune="other.pth").warnings[0]
    assert "turbo" not in run(files, finetune="other.pth").warnings[0]
    assert "same weights" in run(files, turbo=("base.pth",)).warnings[0]


@pytest.mark.parametrize("format", ["int8_row", "fp8"])
def test_quantized_finetune_is_decoded_with_a_warning(files, format):
    checkpoint.convert(files / "finetune.safetensors", files / "small.safetensors", format)
    done = run(files, finetune="small.safetensors")
    assert f"small.safetensors is quantized ({format})" in done.warnings[0]
    merged = load_file(done.path)
    whole = load_file(run(files).path)
    error = (merged[Q].float() - whole[Q].float()).norm() / whole[Q].float().norm()
    assert 0.002 < error < 0.05
    assert torch.equal(merged["head.head.weight"], whole["head.head.weight"])


@pytest.mark.parametrize("which", ["base.pth", "turbo.pth"])
def test_quantized_base_or_turbo_is_refused(files, states, which):
    state = states[which.removesuffix(".pth")]
    quantized = {name: t for name, t in state.items() if not is_quantizable(name)}
    for name in filter(is_quantizable, state):
        layer = name.removesuffix(".weight")
        quantized[f"{layer}.int8_weight"], quantized[f"{layer}.scale"] = quantize_block(state[name])
    torch.save(quantized, files / which)
    with pytest.raises(TurboError, match=rf"{which} is quantized .* \(without -quant"):
        run(files)
    assert nothing_left(files)


def test_other_sizes_and_families_are_refused(files, states):
    torch.save(tiny_state_dict(0, TINY._replace(in_dim=36)), files / "i2v.pth")
    with pytest.raises(TurboError, match=r"different sizes \(in_dim 16 / 36\)"):
        run(files, turbo=("i2v.pth",))
    torch.save(tiny_state_dict(0, blocks=3), files / "deep.pth")
    with pytest.raises(TurboError, match="num_layers 2 / 3"):
        run(files, turbo=("deep.pth",))
    branch = {f"blocks.{n}.cross_attn.k_img.weight": torch.randn(256, 256).bfloat16() for n in (0, 1)}
    torch.save(states["turbo"] | branch, files / "wide.pth")
    with pytest.raises(TurboError, match=r"k_img\.weight of wide\.pth is missing in finetune\.safetensors"):
        run(files, turbo=("wide.pth",))
    assert nothing_left(files)


def test_two_projections_are_refused_unless_the_base_has_one(files, states):
    torch.save(states["turbo"], files / "sla.pth")
    with pytest.raises(TurboError, match="both bring proj_l"):
        run(files, turbo=("turbo.pth", "sla.pth"))
    torch.save(states["turbo"] | trained(states["turbo"], 9), files / "accelerated.pth")
    with pytest.raises(TurboError, match="both bring proj_l"):
        run(files, finetune="accelerated.pth")
    done = merge(files / "accelerated.pth", files / "turbo.pth", [files / "turbo.pth"], files / "out.safetensors")
    name = f"blocks.0.{PROJ_L}.weight"  # three files have it: the formula, here with nothing to add
    assert torch.equal(load_file(done.path)[name], torch.load(files / "accelerated.pth")[name])


def test_arguments_that_make_no_sense(files):
    with pytest.raises(TurboError, match="at least one"):
        run(files, turbo=())
    with pytest.raises(TurboError, match="one for all or one each"):
        run(files, strength=[1.0, 0.5])
    with pytest.raises(TurboError, match="strengths"):
        run(files, strength=math.nan)
    with pytest.raises(TurboError, match="Unknown format"):
        run(files, format="int4")
    with pytest.raises(TurboError, match="one of the files to merge"):
        finetune = files / "finetune.safetensors"
        merge(finetune, files / "base.pth", [files / "turbo.pth"], finetune)
    with pytest.raises(TurboError, match=r"missing\.pth"):
        run(files, turbo=("missing.pth",))


@pytest.mark.parametrize("which", ["base.pth", "turbo.pth"])
def test_not_finite_weight_is_named_with_its_file(files, states, which):
    state = dict(states[which.removesuffix(".pth")])
    state[Q] = state[Q].clone()
    state[Q][0, 0] = math.nan
    torch.save(state, files / which)
    with pytest.raises(TurboError, match=rf"{which}: {Q} holds NaN"):
        run(files)
    assert nothing_left(files)


def test_progress_reaches_the_total_and_an_interrupt_leaves_nothing(files):
    calls = []
    done = run(files, progress=lambda *call: calls.append(call))
    counts, totals = zip(*calls)
    assert list(counts) == sorted(counts) and set(totals) == {counts[-1]} and counts[-1] <= done.bytes
    (files / "out.safetensors").write_bytes(b"precious")

    def stop(count, total):
        if count > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(files, progress=stop)
    assert (files / "out.safetensors").read_bytes() == b"precious"
    assert not list(files.glob("*.part"))


def test_each_file_is_opened_and_described_once(files, monkeypatch):
    opened, described = counted_opens(monkeypatch)
    run(files, turbo=("turbo.pth", "base.pth"))
    assert opened == described == dict.fromkeys(["finetune.safetensors", "base.pth", "turbo.pth"], 1)
