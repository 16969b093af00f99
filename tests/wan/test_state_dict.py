"""State dicts: official names and shapes, what round-trips, and what does not fit is named."""

import pytest
import torch

from tests.helpers.wan import DIM, FFN, HEADS, PROJ_L, TEXT, inputs, quantized, weights
from turbo_core import int8
from turbo_core.errors import TurboError
from turbo_core.wan import WanModel

ATTENTION = [f"{x}.{p}" for x in "qkvo" for p in ("weight", "bias")] + ["norm_q.weight", "norm_k.weight"]
BLOCK_NAMES = [f"{a}.{name}" for a in ("self_attn", "cross_attn") for name in ATTENTION] + [
    *("ffn.0.weight", "ffn.0.bias", "ffn.2.weight", "ffn.2.bias"),
    *("norm3.weight", "norm3.bias", "modulation"),
]
GLOBAL_LINEARS = ["patch_embedding", "head.head", "time_projection.1"] + [
    f"{kind}_embedding.{n}" for kind in ("text", "time") for n in (0, 2)
]
GLOBAL_NAMES = ["head.modulation"] + [f"{name}.{p}" for name in GLOBAL_LINEARS for p in ("weight", "bias")]
SD = weights(sla=True)
SCALE = "blocks.1.ffn.0.weight_scale"


def test_parameter_names_are_the_official_ones():
    model = WanModel(DIM, FFN, HEADS, 2, text_dim=TEXT, sla=True)
    block = [*BLOCK_NAMES, f"{PROJ_L}.weight", f"{PROJ_L}.bias"]
    assert sorted(model.state_dict()) == sorted(GLOBAL_NAMES + [f"blocks.{n}.{name}" for n in (0, 1) for name in block])
    assert model.has_sla
    plain = WanModel(DIM, FFN, HEADS, 1, text_dim=TEXT)
    assert sorted(plain.state_dict()) == sorted(GLOBAL_NAMES + [f"blocks.0.{name}" for name in BLOCK_NAMES])
    assert not plain.has_sla


def test_parameter_shapes_are_the_official_ones():
    with torch.device("meta"):
        model = WanModel(1536, 8960, 12, 1, in_dim=36, sla=True)
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    assert shapes["patch_embedding.weight"] == (1536, 36, 1, 2, 2) and shapes["text_embedding.0.weight"] == (1536, 4096)
    assert shapes["time_embedding.0.weight"] == (1536, 256) and shapes["time_projection.1.weight"] == (9216, 1536)
    assert shapes["head.head.weight"] == (64, 1536) and shapes["head.modulation"] == (1, 2, 1536)
    assert shapes["blocks.0.modulation"] == (1, 6, 1536) and shapes["blocks.0.ffn.0.weight"] == (8960, 1536)
    assert shapes["blocks.0.self_attn.norm_q.weight"] == (1536,)  # over the full width, not a head
    assert shapes[f"blocks.0.{PROJ_L}.weight"] == (128, 128)


@pytest.mark.parametrize("sla", [False, True])
@pytest.mark.parametrize("in_dim", [16, 36])
def test_state_dict_round_trip(in_dim, sla):
    sd = weights(sla=sla, in_dim=in_dim)
    model = WanModel.from_state_dict(sd)
    assert (model.in_dim, model.num_heads, len(model.blocks), model.has_sla) == (in_dim, HEADS, 2, sla)
    saved = model.state_dict()
    assert saved.keys() == sd.keys() and all(torch.equal(saved[k], sd[k]) for k in sd)
    assert not model.training and not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("quantize", [int8.quantize_block, int8.quantize_rows])
def test_quantized_state_dict_round_trip(quantize):
    sd = quantized(weights(sla=True), quantize)
    saved = WanModel.from_state_dict(sd).state_dict()
    assert saved.keys() == sd.keys()
    assert all(torch.equal(saved[k], sd[k]) and saved[k].dtype == sd[k].dtype for k in sd)


def test_a_dtype_is_for_the_matrices_only():
    sd = quantized(weights(sla=True), int8.quantize_block)
    stored = {k: v.half() if v.is_floating_point() else v for k, v in sd.items()}
    model = WanModel.from_state_dict(stored, dtype=torch.bfloat16)
    for name, t in model.state_dict().items():
        if t.dtype == torch.int8:
            continue
        small = ("norm_q.weight", "norm_k.weight", "modulation", "weight_scale")
        keeps = name.endswith(small) or "norm3" in name or "proj_l" in name
        assert t.dtype == (torch.float32 if keeps else torch.bfloat16), name


def test_heads_of_64_come_from_proj_l():
    sd = weights(sla=True)
    for n in (0, 1):
        sd[f"blocks.{n}.{PROJ_L}.weight"], sd[f"blocks.{n}.{PROJ_L}.bias"] = torch.eye(64), torch.zeros(64)
    model = WanModel.from_state_dict(sd)
    assert model.num_heads == 4 and model(*inputs(), topk=0.5).isfinite().all()
    assert WanModel.from_state_dict(weights(), num_heads=4).num_heads == 4


@pytest.mark.parametrize("name", [*GLOBAL_NAMES, "blocks.0.ffn.0.weight", *(k for k in SD if k[:8] == "blocks.1")])
def test_a_missing_key_is_named(name):
    with pytest.raises(TurboError, match=name):
        WanModel.from_state_dict({k: v for k, v in SD.items() if k != name})


def test_a_quantized_layer_without_its_bias_is_named():
    sd = quantized(SD, int8.quantize_rows)
    del sd["blocks.1.ffn.0.bias"]
    with pytest.raises(TurboError, match=r"blocks\.1\.ffn\.0\.bias"):
        WanModel.from_state_dict(sd)


@pytest.mark.parametrize(
    "extra",
    [
        {"blocks.0.cross_attn.k_img.weight": torch.zeros(1)},
        {"vace_blocks.0.x": torch.zeros(1)},
        {"blocks.0.nonsense.weight_scale": torch.zeros(1)},
        {"blocks.0.norm3.weight_scale": torch.zeros(1)},
        {"blocks.x.y": torch.zeros(1)},
    ],
)
def test_an_unknown_key_is_named(extra):
    with pytest.raises(TurboError, match=next(iter(extra))):
        WanModel.from_state_dict(SD | extra)


@pytest.mark.parametrize(
    "change",
    [
        {"blocks.1.ffn.2.weight": torch.zeros(DIM, FFN + 1)},
        {"blocks.0.self_attn.norm_q.weight": torch.zeros(128)},
        {"patch_embedding.weight": torch.zeros(DIM, 64)},
        {"blocks.1.ffn.0.weight": torch.zeros(FFN, DIM, dtype=torch.int8)},  # int8 without a scale
        {"blocks.1.ffn.0.weight": torch.zeros(FFN, DIM, dtype=torch.int8), SCALE: torch.ones(2, 3)},
        {"blocks.1.ffn.0.weight": torch.zeros(DIM, DIM, dtype=torch.int8), SCALE: torch.ones(2, 2)},
        {"blocks.1.ffn.0.weight": torch.zeros(FFN, DIM), SCALE: torch.ones(3, 2)},  # a scale without int8
    ],
)
def test_a_tensor_that_does_not_fit_is_named(change):
    with pytest.raises(TurboError, match=next(iter(change)).removesuffix(".weight")):
        WanModel.from_state_dict(SD | change)


@pytest.mark.parametrize("sd", [{}, {"img_in.weight": torch.zeros(4, 4)}, {k: v for k, v in SD.items() if k[0] != "b"}])
def test_no_wan_model_at_all(sd):
    with pytest.raises(TurboError, match="Wan"):
        WanModel.from_state_dict(sd)


def test_heads_that_do_not_divide():
    for heads in (3, 0, -1):
        with pytest.raises(TurboError, match=str(heads)):
            WanModel(DIM, FFN, heads, 1)
    with pytest.raises(TurboError, match="heads"):
        WanModel.from_state_dict(WanModel(64, 64, 1, 1, text_dim=TEXT).state_dict())  # heads of 128 are the default
