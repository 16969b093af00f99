"""The dtypes of the published unquantized file: norms float32, all else bf16, proj_l and modulation too."""

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.states import official, plain, same, saved
from tests.helpers.tiny_dits import tiny_state_dict, unquantized
from turbo_core import checkpoint
from turbo_core.checkpoint.formats import FLOATS, FORMATS, decode
from turbo_core.checkpoint.names import PROJ_L, is_delicate
from turbo_core.checkpoint.shapes import expected_shapes
from turbo_core.pipeline.plan import model_of
from turbo_core.wan import WanModel

PROJ = f"blocks.1.{PROJ_L}.weight"


@pytest.fixture
def bf16(state, tmp_path):
    return saved(unquantized(state), tmp_path / "bf16.pth")


@pytest.fixture
def upcast(state, tmp_path):
    return saved(unquantized(state, torch.float32), tmp_path / "upcast.pth")


def test_a_model_of_the_size_of_the_published_one_counts_as_it_does():
    names = expected_shapes(30, has_sla=True)
    state = unquantized({name: torch.zeros(1) for name in names})
    dtypes = [tensor.dtype for tensor in state.values()]
    assert (len(names), dtypes.count(torch.bfloat16), dtypes.count(torch.float32)) == (885, 705, 180)


def test_it_loads_as_it_is_stored(bf16, tiny, state):
    loaded, found = checkpoint.load(bf16)
    assert same(loaded, official(unquantized(state)))
    assert (found.format, found.has_sla) == ("bf16", True)
    assert model_of(found) == model_of(checkpoint.inspect(tiny / "TinyWan2.1-T2V.pth"))


def test_the_network_computes_what_it_computes_from_float32(bf16, upcast):
    networks = [WanModel.from_state_dict(checkpoint.load(path)[0]) for path in (bf16, upcast)]
    x = torch.randn(1, 16, 5, 16, 18, generator=torch.Generator().manual_seed(0))
    text = torch.randn(1, 7, 64, generator=torch.Generator().manual_seed(1))
    given = x, torch.tensor([900.0]), text
    with torch.inference_mode():
        ours, theirs = (network.float()(*given, topk=0.3) for network in networks)
    assert torch.equal(ours, theirs) and ours.abs().mean() > 0.01


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_holds_what_it_holds_of_the_upcast(bf16, upcast, tmp_path, format):
    written = []
    for path in (bf16, upcast):
        checkpoint.convert(path, tmp_path / f"{path.stem}-{format}.safetensors", format)
        written.append(load_file(tmp_path / f"{path.stem}-{format}.safetensors"))
    ours, theirs = written
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor.double(), theirs[name].double()), name
    # never narrower than it was, never wider than was asked for
    asked = FLOATS.get(format, torch.bfloat16)
    assert ours[PROJ].dtype == torch.promote_types(asked, torch.bfloat16)
    assert ours["blocks.0.norm3.weight"].dtype == torch.float32


def test_a_merge_is_that_of_the_upcast(bf16, upcast, tmp_path):
    base = plain(unquantized(tiny_state_dict(0)))
    finetune = {n: (t.float() * 1.01).to(t.dtype) for n, t in base.items()}
    base, finetune = saved(base, tmp_path / "base.pth"), saved(finetune, tmp_path / "finetune.pth")
    results = []
    for turbo in (bf16, upcast):
        target = tmp_path / f"merged-{turbo.name}.safetensors"
        checkpoint.merge(finetune, base, [turbo], target, "fp32")
        results.append(checkpoint.load(target)[0])
    assert same(*results)
    proj = decode(checkpoint.load(bf16)[0][PROJ], dtype=torch.float32)
    assert torch.equal(results[0][PROJ], proj) and is_delicate(PROJ)
