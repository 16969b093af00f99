"""The umT5 encoder: names, sizes, masking, tokenizers, float8 repacks, wrong files."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from tests.helpers.tiny_family import official_text_names, tiny_tokenizer
from turbo_core.errors import TurboError
from turbo_core.pipeline import text
from turbo_core.pipeline.text import clean_prompt, encode_text, load_text_encoder
from turbo_core.tinywan.text import TEXT_CONFIG, tiny_text_encoder

K = "encoder.block.0.layer.0.SelfAttention.k"
W = f"{K}.weight"
PROMPTS = ["Two stylish cats walk in the rain.", "a red circle", ""]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("text")
    state = tiny_text_encoder(tokenizer)
    save_file(state, folder / "tiny_umt5.safetensors")
    torch.save(official_text_names(state), folder / "tiny_umt5_enc.pth")
    (folder / "spiece.model").write_bytes(tokenizer)
    return folder


@pytest.fixture(scope="module")
def encoder(folder):
    return load_text_encoder(folder / "tiny_umt5.safetensors", dtype=torch.float32)


def naive_umt5(state, ids):
    """umT5 written out in float64: no attention scaling, position biases in every block, gated tanh GELU."""
    state = {key: value.double() for key, value in state.items() if value.is_floating_point()}
    heads, length = TEXT_CONFIG["num_heads"], len(ids)
    distance = torch.arange(length)[None, :] - torch.arange(length)[:, None]
    far = 8 + (torch.log(distance.abs().clamp_min(1).double() / 8) / math.log(16) * 8).long()
    bucket = 16 * (distance > 0) + torch.where(distance.abs() < 8, distance.abs(), far.clamp_max(15))

    def norm(x, weight):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight

    x = state["shared.weight"][ids]
    for index in range(TEXT_CONFIG["num_layers"]):
        a, f = f"encoder.block.{index}.layer.0", f"encoder.block.{index}.layer.1"
        y = norm(x, state[f"{a}.layer_norm.weight"])
        q, k, v = (
            (y @ state[f"{a}.SelfAttention.{n}.weight"].T).view(length, heads, -1).transpose(0, 1) for n in "qkv"
        )
        bias = state[f"{a}.SelfAttention.relative_attention_bias.weight"][bucket].permute(2, 0, 1)
        y = ((q @ k.mT + bias).softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + y @ state[f"{a}.SelfAttention.o.weight"].T
        y = norm(x, state[f"{f}.layer_norm.weight"])
        gate = F.gelu(y @ state[f"{f}.DenseReluDense.wi_0.weight"].T, approximate="tanh")
        y = gate * (y @ state[f"{f}.DenseReluDense.wi_1.weight"].T)
        x = x + y @ state[f"{f}.DenseReluDense.wo.weight"].T
    return norm(x, state["encoder.final_layer_norm.weight"])


def test_embeddings_equal_umt5_written_out_and_are_zero_after_the_prompt(encoder, tokenizer):
    model, tokenize = encoder
    context = encode_text(model, tokenize, PROMPTS)
    assert context.shape == (3, 512, 64)
    for row, prompt in zip(context, PROMPTS):
        ids = tokenize(prompt)
        expected = naive_umt5(tiny_text_encoder(tokenizer), ids).float()
        torch.testing.assert_close(row[: len(ids)], expected, atol=1e-5, rtol=1e-5)
        assert (row[len(ids) :] == 0).all()


def test_a_prompt_encodes_the_same_in_any_company(encoder):
    model, tokenize = encoder
    together = encode_text(model, tokenize, ["a red circle", "word " * 300])
    torch.testing.assert_close(together[:1], encode_text(model, tokenize, ["a red circle"]), atol=2e-6, rtol=0)


def test_a_long_prompt_is_cut_and_still_ends_in_the_end_token(encoder):
    model, tokenize = encoder
    seen = []
    hook = model.shared.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    context = encode_text(model, tokenize, ["walks through the rain " * 400])
    hook.remove()
    assert seen[0].shape == (1, 512) and seen[0][0, -1] == 1 and (seen[0][0, :-1] > 1).all()
    assert (context.abs().sum(-1) > 0).all()


def test_official_and_huggingface_names_give_the_same(folder, encoder):
    official = load_text_encoder(folder / "tiny_umt5_enc.pth", folder, dtype=torch.float32)
    assert torch.equal(encode_text(*official, PROMPTS), encode_text(*encoder, PROMPTS))


@pytest.mark.parametrize("key", ["scale_weight", "weight_scale", None])
def test_float8_repacks_are_widened_with_their_scale(key, folder, tokenizer, encoder, tmp_path, monkeypatch):
    state = tiny_text_encoder(tokenizer)
    name = "encoder.block.1.layer.1.DenseReluDense.wo"
    scale = torch.tensor(1.0 if key is None else 1 / 64)
    state[f"{name}.weight"] = (state[f"{name}.weight"] / scale).to(torch.float8_e4m3fn)
    if key:
        state[f"{name}.{key}"] = scale
    save_file(state, tmp_path / "fp8.safetensors")
    with monkeypatch.context() as patched:  # what it takes is known without reading it
        patched.setattr(text, "check_scale_values", lambda *_: pytest.fail("widened to know a size"))
        sized, _ = load_text_encoder(tmp_path / "fp8.safetensors", device="meta", dtype=torch.float32)
    model, _ = load_text_encoder(tmp_path / "fp8.safetensors", dtype=torch.float32)
    assert sum(p.nbytes for p in sized.parameters()) == sum(p.nbytes for p in model.parameters())
    original = encoder[0].state_dict()[f"{name}.weight"]
    loaded = model.state_dict()[f"{name}.weight"]
    assert ((loaded - original).norm() / original.norm()).item() < 0.04


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  two\n cats \t walk ", "two cats walk"),
        ("rain &amp; snow", "rain & snow"),
        ("rain &amp;amp; snow", "rain & snow"),  # the reference unescapes twice
        ("Keep_Case, and punctuation!", "Keep_Case, and punctuation!"),
    ],
)
def test_prompt_cleaning(text, cleaned):
    assert clean_prompt(text) == cleaned


def test_any_prompt_tokenizes(encoder):
    _, tokenize = encoder
    for prompt in ("日本 ünïcode 🎬", "\x00\x7f", "", "<extra_id_0> </s>"):
        ids = tokenize(prompt)
        assert ids[-1] == 1 and max(ids) < TEXT_CONFIG["vocab_size"]
        assert 2 not in ids  # unknown: the tokenizer falls back to bytes instead


def test_a_tokenizer_json_is_read(folder, encoder, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "red": 3, "circle": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    for place in (tmp_path, tmp_path / "tokenizer.json"):
        _, tokenize = load_text_encoder(folder / "tiny_umt5_enc.pth", place, dtype=torch.float32)
        assert tokenize("a red circle") == [2, 3, 4, 1]


def test_a_file_without_tokenizer_finds_the_published_folder_beside_it(folder, tokenizer, tmp_path):
    path = tmp_path / "encoder.pth"
    path.write_bytes((folder / "tiny_umt5_enc.pth").read_bytes())
    with pytest.raises(TurboError, match=r"carries no tokenizer.*Pass --tokenizer.*google/umt5-xxl"):
        load_text_encoder(path)
    (tmp_path / "google" / "umt5-xxl").mkdir(parents=True)
    (tmp_path / "google" / "umt5-xxl" / "spiece.model").write_bytes(tokenizer)
    _, tokenize = load_text_encoder(path)
    assert tokenize("")[-1] == 1


@pytest.mark.parametrize("name", ["spiece.model", "tokenizer.json"])
def test_a_damaged_tokenizer_is_named(folder, name, tmp_path):
    (tmp_path / name).write_bytes(b"\x00no tokenizer")
    with pytest.raises(TurboError, match=name):
        load_text_encoder(folder / "tiny_umt5_enc.pth", tmp_path)


def test_a_tokenizer_that_fails_when_it_is_used_is_named(folder, tmp_path):
    """Damaged files may load: without their unknown or end token, or with tokens that the encoder does not have."""
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "gone"}
    for vocabulary, words in ({"a": 0}, "fails .*UNK"), ({"a": 10**6, "gone": 1}, "token 1000000, expected below 640"):
        text = json.dumps({"version": "1.0", "added_tokens": [], "model": model | {"vocab": vocabulary}})
        (tmp_path / "tokenizer.json").write_text(text)
        _, tokenize = load_text_encoder(folder / "tiny_umt5_enc.pth", tmp_path)
        with pytest.raises(TurboError, match=words):
            tokenize("a" if "gone" in vocabulary else "unknown")


def test_a_long_error_of_a_tokenizer_is_shortened(folder, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "x" * 5000, "model": {}}))
    with pytest.raises(TurboError, match=r"not a tokenizer\.json") as error:
        load_text_encoder(folder / "tiny_umt5_enc.pth", tmp_path)
    assert len(str(error.value)) - len(str(tmp_path)) < 400


def foreign(state, kind):
    bias = "layer.0.SelfAttention.relative_attention_bias.weight"
    if kind == "not a umT5 encoder":
        return {"text_model.embeddings.weight": torch.zeros(4, 4)}
    if kind == "T5 encoder, not umT5":
        del state[f"encoder.block.1.{bias}"]
    elif kind == "missing":  # block 1 is gone, block 2 is there
        return {key.replace("block.1.", "block.2."): value for key, value in state.items()}
    elif kind == "lacks encoder.block.1.layer.1.layer_norm.weight":
        del state["encoder.block.1.layer.1.layer_norm.weight"]
    return state


@pytest.mark.parametrize(
    "kind",
    ["not a umT5 encoder", "T5 encoder, not umT5", "missing", "lacks encoder.block.1.layer.1.layer_norm.weight"],
)
def test_another_encoder_is_named(kind, tokenizer, tmp_path):
    save_file(foreign(tiny_text_encoder(tokenizer), kind), tmp_path / "other.safetensors")
    with pytest.raises(TurboError, match=rf"other\.safetensors.*{kind}"):
        load_text_encoder(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("encoder.block.1.layer.0.SelfAttention.q.weight"), "lacks encoder.block.1.layer.0"),
        (lambda s: s.update({W: s[W].to(torch.float8_e4m3fn), f"{K}.scale_weight": torch.ones(64, 64)}), "64 rows"),
        (lambda s: s.update({W: s[W][:8].contiguous()}), r"expected \[64, 64\]"),
        (lambda s: s.update({"shared.weight": torch.ones(4)}), "expected a matrix"),
        (lambda s: s.update({"spiece_model": torch.ones(4)}), "expected bytes"),
        (lambda s: s.update({"spiece_model": torch.zeros(0, dtype=torch.uint8)}), "is damaged"),
    ],
)
def test_an_encoder_that_is_not_whole(folder, tmp_path, change, words):
    """An encoder without its last q was one block shallower; a scale of any shape was multiplied."""
    state = load_file(folder / "tiny_umt5.safetensors")
    change(state)
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(TurboError, match=words):
        load_text_encoder(tmp_path / "x.safetensors")


def test_a_clip_model_with_a_token_embedding(tmp_path):
    state = {"token_embedding.weight": torch.ones(8, 4), "positional_embedding": torch.ones(77, 4)}
    save_file(state, tmp_path / "x.sft")
    with pytest.raises(TurboError, match="not a umT5 encoder"):
        load_text_encoder(tmp_path / "x.sft")


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("kind", ["scale_weight", "weight_scale", "weight_scale_inv"])
def test_float8_is_multiplied_by_its_scales_under_every_name(folder, tmp_path, encoder, official, kind):
    """LightX2V's repack has a scale a row beside Wan's own names: left out, it is another encoder."""
    state = load_file(folder / "tiny_umt5.safetensors")
    scales = {}
    for name in [name for name in state if ".layer." in name and state[name].ndim == 2 and "relative" not in name]:
        scale = state[name].abs().amax(1, keepdim=True) / 448
        state[name] = (state[name] / scale).to(torch.float8_e4m3fn)
        scales[name] = scale
    if official:
        names = official_text_names({name: name for name in state})
        scales = {theirs: scales[name] for theirs, name in names.items() if name in scales}
        state = {theirs: state[name] for theirs, name in names.items()}
    state |= {f"{name.removesuffix('.weight')}.{kind}": scale for name, scale in scales.items()}
    torch.save(state, tmp_path / "fp8.pth")
    model, _ = load_text_encoder(tmp_path / "fp8.pth", folder / "spiece.model", dtype=torch.float32)
    expected, found = (encode_text(m, encoder[1], PROMPTS[:1]) for m in (encoder[0], model))
    assert (found - expected).norm() / expected.norm() < 0.05


def test_a_scale_of_another_name_is_told(folder, tmp_path):
    state = load_file(folder / "tiny_umt5.safetensors")
    state[W] = state[W].to(torch.float8_e4m3fn)
    save_file(state | {f"{K}.scale": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(TurboError, match=r"SelfAttention.k.weight is fp8 and its scale.*k\.scale \[1\] may be it"):
        load_text_encoder(tmp_path / "x.safetensors")
