"""Our umT5 encoder against transformers': numbers, gradients, float16, and a table of tokens that is not copied."""

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers.tiny_family import tiny_tokenizer
from turbo_core.errors import TurboError
from turbo_core.pipeline.text import encode_text, load_text_encoder
from turbo_core.pipeline.umt5 import BUCKETS, UMT5, distance_buckets, finite
from turbo_core.tinywan.text import TEXT_CONFIG, tiny_text_encoder

IDS = torch.randint(2, 640, (3, 300), generator=torch.Generator().manual_seed(0))
MASK = torch.arange(300) < torch.tensor([300, 41, 1])[:, None]
RELATIVE = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"


@pytest.fixture(scope="module")
def state():
    return tiny_text_encoder(tiny_tokenizer())


@pytest.fixture
def file(state, tmp_path):
    def write(change=lambda name, tensor: tensor):
        path = tmp_path / "umt5.safetensors"
        save_file({name: change(name, tensor) for name, tensor in state.items()}, path)
        return path

    return write


def ours(state, dtype=torch.float32):
    model = UMT5(vocabulary=640, width=64, ffn=160, blocks=2, heads=4, head=16)
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert not missing
    return model.to(dtype)


def theirs(state, dtype=torch.float32):
    transformers = pytest.importorskip("transformers")
    config = transformers.UMT5Config(**TEXT_CONFIG, feed_forward_proj="gated-gelu", dropout_rate=0.0)
    model = transformers.UMT5EncoderModel(config)
    model.load_state_dict(state, strict=False)
    return model.to(dtype)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-6), (torch.float64, 1e-7), (torch.bfloat16, 2e-2)])
def test_the_numbers_are_those_of_transformers(state, dtype, most):
    """In float64 too, though norms are in float32 there as here."""
    got = ours(state, dtype)(IDS, MASK)[MASK].detach().double()
    want = theirs(state, dtype)(input_ids=IDS, attention_mask=MASK.long()).last_hidden_state[MASK].detach().double()
    assert (got - want).norm() < most * want.norm()


def test_the_gradients_are_those_of_transformers(state):
    """TinyWan's encoder is trained by them."""
    probe = torch.randn(3, 300, 64, generator=torch.Generator().manual_seed(1)) * MASK[..., None]
    models = ours(state), theirs(state)
    (models[0](IDS, MASK) * probe).sum().backward()
    (models[1](input_ids=IDS, attention_mask=MASK.long()).last_hidden_state * probe).sum().backward()
    expected = dict(models[1].named_parameters())
    for name, parameter in models[0].named_parameters():
        want = expected[name].grad
        assert (parameter.grad - want).norm() < 1e-5 * want.norm(), name


def test_distances_share_buckets_as_in_transformers():
    attention = theirs({}).encoder.block[0].layer[0].SelfAttention
    place = torch.arange(512)
    assert torch.equal(distance_buckets(512), attention._relative_position_bucket(place[None] - place[:, None]))
    assert distance_buckets(512).unique().tolist() == [*range(16), *range(17, BUCKETS)]  # 16: later by nothing


def test_sums_that_leave_float16_are_brought_back(state):
    """The full model's residuals do; a half precision repack would give NaN from there on."""
    x = torch.tensor([1.0, torch.inf, -torch.inf, 65504.0], dtype=torch.float16)
    assert finite(x).tolist() == [1.0, 64512.0, -64512.0, 64512.0] and torch.equal(finite(x[:1]), x[:1])
    loud = {
        name: 300 * tensor if name.endswith(("wo.weight", "wi_1.weight")) else tensor for name, tensor in state.items()
    }
    got = ours(loud, torch.float16)(IDS, MASK)[MASK].detach()
    want = theirs(loud, torch.float16)(input_ids=IDS, attention_mask=MASK.long()).last_hidden_state[MASK].detach()
    assert ours(loud)(IDS, MASK)[MASK].isfinite().all() and got.isfinite().all()
    assert (got - want).float().norm() < 2e-2 * want.float().norm()


def test_the_table_of_tokens_stays_in_its_file(file):
    """It is a third of the published encoder; a prompt needs a few hundred of its 256,384 rows."""
    path = file(lambda name, tensor: tensor.to(torch.bfloat16) if name == "shared.weight" else tensor)
    model, tokenize = load_text_encoder(path, dtype=torch.float32)
    assert model.shared.weight.dtype == torch.bfloat16 and model.encoder.final_layer_norm.weight.dtype == torch.float32
    got = encode_text(model, tokenize, ["a red circle"])
    model.shared.float()
    assert got.dtype == torch.float32 and torch.equal(got, encode_text(model, tokenize, ["a red circle"]))


def test_a_float8_table_is_widened(file):
    path = file(lambda name, tensor: tensor.to(torch.float8_e4m3fn) if name == "shared.weight" else tensor)
    model, tokenize = load_text_encoder(path, dtype=torch.float32)
    assert model.shared.weight.dtype == torch.float32
    assert encode_text(model, tokenize, ["a red circle"]).isfinite().all()


def test_a_table_of_another_number_of_buckets_is_refused(file):
    path = file(lambda name, tensor: tensor[:8].clone() if name == RELATIVE else tensor)
    with pytest.raises(TurboError, match=r"relative_attention_bias.weight is \[8, 4\], expected \[32, 4\]"):
        load_text_encoder(path)
