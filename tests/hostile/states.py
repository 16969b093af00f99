"""Models, merges, text encoders, VAEs and training data with names, types, shapes, scales and numbers gone wrong."""

import json
import math
from random import Random

import torch

from tests.hostile import honest
from tests.hostile.cases import Case
from tests.hostile.damage import damaged

_TYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64,
    torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64,
)  # fmt: skip
_NAMES = (
    "", "x", f"blocks.{'9' * 5000}.x",
    f"decoder.upsamples.{'9' * 5000}.x", f"encoder.block.{'9' * 5000}.layer.0.x", "__metadata__",
    "blocks.", "blocks.x", "blocks.-1.x", "blocks.99999999999.x", "blocks.١.self_attn.q.weight",
    "\ud800", "\x1b[2J", "y" * 3000, "y" * 3000 + "_scale", "head.modulation.",
    ".", "..", "ema.head.modulation", "a.head.modulation",
    "_orig_mod.head.modulation", "blocks.0.self_attn.q.int8_weight", "blocks.0.self_attn.q.scale", "img_emb.emb_pos",
    "blocks.0.self_attn.q.weight_scale", "scaled_fp8", "blocks.0.ffn.0.comfy_quant", "vace_patch_embedding.weight",
    "blocks.1.self_attn.q.weight", "blocks.0.cross_attn.k_img.weight", "token_embedding.weight", "shared.weight",
)  # fmt: skip
_VALUES = (math.nan, math.inf, -math.inf, 1e38, 3e38, 70000.0, -1.0, 0.0, 1e-45)


def changed(random: Random, state: dict) -> tuple[dict, bool]:
    """(the state after one to three changes, whether a number in it is no longer finite)."""
    state, infinite = dict(state), False
    for _ in range(random.choice((1, 1, 2, 3))):
        name = random.choice(list(state))
        tensor = state[name]
        kind = random.choice(
            ("type", "shape", "empty", "value", "value", "all", "gone", "name", "new", "twice", "scale")
        )
        if kind == "type":
            state[name] = tensor.to(random.choice(_TYPES))
        elif kind == "shape":
            state[name] = _reshaped(random, tensor)
        elif kind == "empty":
            state[name] = torch.zeros(
                random.choice(((0,), (0, 0), (), (1,), (0, tensor.shape[-1] if tensor.ndim else 1)))
            )
        elif kind in ("value", "all") and tensor.is_floating_point() and tensor.dtype.itemsize > 1 and tensor.numel():
            value, tensor = random.choice(_VALUES), tensor.clone()
            tensor.view(-1)[random.randrange(tensor.numel()) if kind == "value" else slice(None)] = value
            state[name] = tensor
        elif kind == "gone":
            del state[name]
        elif kind == "name":
            state[random.choice((*_NAMES, name[:-1], f"net.{name}", name.replace("0", "1")))] = state.pop(name)
        elif kind == "new":
            shape = random.choice(((), (1,), (3, 2), (0,), (64, 64), (1, 2, 64)))
            state[random.choice(_NAMES)] = torch.ones(shape).to(random.choice(_TYPES))
        elif kind == "twice":
            state[random.choice(("y" * 3000, f"net.{name}", f"_orig_mod.{name}", f"{name}_scale", f"{name} "))] = tensor
        elif kind == "scale":
            scales = [n for n in state if n.endswith("scale")]
            if scales:
                name = random.choice(scales)
                state[name] = _scale(random, state[name])
        if not state:
            break
    infinite = any(t.is_floating_point() and t.dtype.itemsize > 1 and not t.isfinite().all() for t in state.values())
    return state, infinite


def _reshaped(random, tensor):
    shapes = [(), (1,), (tensor.numel(),), tuple(tensor.shape)[::-1], (1, *tensor.shape), (*tensor.shape, 1)]
    shapes += [tuple(size + random.choice((-1, 0, 1, 64)) for size in tensor.shape), (2,) * 12]
    shape = random.choice(shapes)
    return torch.ones([max(0, size) for size in shape]).to(tensor.dtype)


def _scale(random, scale):
    value = random.choice((math.nan, math.inf, -1.0, 0.0, 1e300, 1e-300, 3e38))
    return random.choice(
        (
            scale.double() * 0 + value,
            (scale.double() * 0 + value).float(),
            scale.half(),
            scale.to(torch.float8_e4m3fn),
            scale.int(),
            torch.zeros(0),
            scale.repeat(2, 1) if scale.ndim == 2 else scale,
            torch.ones(64, 64),
            torch.tensor(value),
        )
    )


def written(random: Random, state: dict, name: str) -> dict[str, bytes]:
    """{name: bytes} of a state in a form that takes it."""
    types = {tensor.dtype for tensor in state.values()}
    as_pickle = "__metadata__" in state or any("\ud800" in key for key in state) or torch.complex64 in types
    if as_pickle or not state or random.random() < 0.5:
        return {f"{name}.pth": honest.pth(state)}
    return {f"{name}.safetensors": honest.safetensors(state, random.choice((None, honest.CONFIG)))}


def model(random: Random) -> Case:
    base = random.choice((honest.model(), honest.quantized(), honest.stock()))
    state, infinite = changed(random, base)
    nested = {"model": state, "step": 3} if random.random() < 0.1 else state
    files = {"model.pth": honest.pth(nested)} if nested is not state else written(random, state, "model")
    return Case("finite" if infinite else "checkpoint", files)


def merge(random: Random) -> Case:
    states = [honest.stock(0), honest.stock(1), random.choice((honest.model(2), honest.stock(2), honest.quantized(2)))]
    for at in random.sample(range(3), random.choice((1, 1, 2))):
        states[at], _ = changed(random, states[at])
    files = {}
    for name, state in zip("abc", states):
        files |= written(random, state, name)
    strength = random.choice((1.0, 1.0, 1.0, 0.5, 0.5, 0.0, -3.0, 1e300, math.nan))
    return Case("merge", files, arguments=(random.choice(("bf16", "int8_block", "fp16", "fp8")), strength))


def encoder(random: Random) -> Case:
    """A umT5 encoder with another state, in any of its spellings, or with damaged bytes."""
    base = random.choice((honest.encoder(), honest.official_encoder()))
    scaled = random.random() < 0.2
    state, _ = changed(random, _in_float8(base) if scaled else base)
    if random.random() < 0.2:
        data = damaged(random, random.choice((honest.safetensors, honest.pth))(base), 9000)
        return Case("encoder", {"encoder.pth": data, "spiece.model": honest.spiece()})
    return Case("encoder", written(random, state, "encoder") | {"spiece.model": honest.spiece()})


def _in_float8(state):
    result = dict(state)
    for name, tensor in state.items():
        if name.endswith(".weight") and tensor.ndim == 2 and "SelfAttention.q" in name:
            result[name] = tensor.to(torch.float8_e4m3fn)
            result[name.removesuffix("weight") + "scale_weight"] = torch.ones(1)
    return result


def tokenizer(random: Random) -> Case:
    """A damaged spiece.model or a tokenizer.json that is none, beside a good encoder."""
    files = {"encoder.pth": honest.pth(honest.official_encoder())}
    if random.random() < 0.6:
        data = damaged(random, honest.spiece(), random.choice((None, 200)))
        files["spiece.model"] = random.choice((data, data, data, b"", random.randbytes(300), honest.spiece()[:1000]))
        return Case("encoder", files, arguments=("spiece.model",))
    vocabulary = {f"t{i}": i for i in range(20)} | {"<unk>": 20}
    good = {
        "version": "1.0",
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
        "added_tokens": [],
    }
    broken = json.loads(json.dumps(good))
    place = random.choice((broken, broken["model"], broken["model"]["vocab"]))
    key = random.choice((*place, "normalizer", "pre_tokenizer", "decoder", "truncation", "padding"))
    place[key] = random.choice((None, 0, -1, 1 << 40, "", "x" * 5000, [], {}, [1], {"type": "x"}, "BPE", "Unigram"))
    text = random.choice(
        (json.dumps(broken).encode(), json.dumps(good).encode()[:-3], b"", b"[" * 100_000, b"\xff\xfe")
    )
    return Case("encoder", files | {"tokenizer.json": text}, arguments=("tokenizer.json",))


def vae(random: Random) -> Case:
    if random.random() < 0.4:
        base = random.choice((honest.safetensors, honest.pth))(honest.vae())
        return Case("vae", {"vae.pth": damaged(random, base, 12000)})
    return Case("vae", written(random, changed(random, honest.vae())[0], "vae"))


def training(random: Random) -> Case:
    """Latents and captions to train on, damaged or with shapes and numbers that do not fit together."""
    draw = torch.Generator().manual_seed(0)
    state = {
        "latents": torch.randn(3, 16, 2, 4, 4, generator=draw).bfloat16(),
        "text": torch.randn(4, 5, 64, generator=draw).bfloat16(),
        "lengths": torch.tensor([1, 5, 3, 2]),
        "captions_of": torch.tensor([[1], [2], [3]]),
    }
    if random.random() < 0.3:
        state["images"] = torch.randn(3, 20, 2, 4, 4, generator=draw).bfloat16()
    if random.random() < 0.3:
        return Case("training", {"data.safetensors": damaged(random, honest.safetensors(state), 600)})
    for _ in range(random.choice((1, 1, 2))):
        name = random.choice(list(state))
        tensor = state[name]
        if tensor.dtype == torch.int64 and random.random() < 0.5:
            state[name] = tensor + random.choice((-1, -5, 3, 10, 1 << 40, -(1 << 62)))
        else:
            state, _ = changed(random, {**state})
    state = {n: t for n, t in state.items() if "\ud800" not in n and n != "__metadata__" and t.dtype != torch.complex64}
    return Case("training", {"data.safetensors": honest.safetensors(state)})
