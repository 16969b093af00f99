"""Names of LoRA tensors, and arguments of the command."""

from random import Random

from tests.hostile import honest
from tests.hostile.cases import Case

_LONG = 100_000
_BITS = (
    "lora_unet_", "lora_unet__", "diffusion_model.", "base_model.model.", "transformer.", "transformer_2.", "lycoris_",
    "blocks.0.", "blocks_0_", "blocks.999.", "self_attn.q", "self_attn_q", "attn1.to_q", "ffn.net.0.proj", "lora_te1_",
    ".lora_A", ".lora_B.default", ".weight", ".lora_up.weight", ".lora.down.weight", ".alpha", ".diff_b", ".hada_w1_a",
    ".lokr_w2", ".dora_scale", ".lora_magnitude_vector", ".oft_blocks", "double_blocks.0", "down_blocks_1", "mid_block",
    "_lokr_a", "_oft_b", "_hada_", "blocks.", "_", ".", "a", "1", "\x1b[2J", "\n", "١", "layers.0.attention",
)  # fmt: skip


def lora(random: Random) -> Case:
    names = [_name(random) for _ in range(random.choice((1, 3, 20)))]
    if random.random() < 0.5:  # beside what belongs to a layer
        prefix = random.choice(("diffusion_model.", "base_model.model.", "transformer.", ""))
        names += [f"{prefix}blocks.1.self_attn.q.lora_{half}.weight" for half in "AB"]
    return Case("lora", arguments=tuple(names))


def _name(random):
    bits = [random.choice(_BITS) for _ in range(random.choice((1, 2, 4, 8)))]
    if random.random() < 0.5:
        at = random.randrange(len(bits))
        bits[at] *= max(1, random.choice((1000, _LONG, _LONG)) // len(bits[at]))
    if random.random() < 0.2:
        bits = bits * (_LONG // max(1, len("".join(bits)))) + [random.choice(("", ".", "x", "\n"))]
    return "".join(bits)


_PATHS = (
    "none.pth", "x" * 300 + ".pth", "a\x1b[2J.pth", ".", "/", "", "..", "model.pth", "vae.pth", "encoder.pth",
    "pipe.safetensors",
    "pipe.safetensors", "a\nb.pth", "no/such/x.pth", "-x.pth", "\ud800.pth", "x\0.pth", "folder",
)  # fmt: skip
_TARGETS = (
    "out.safetensors", "out.pth", "out", "x" * 300 + ".safetensors", "é" * 150 + ".safetensors",
    "no/such/out.safetensors",
    "folder", "a\x1b]0;x\x07.safetensors", "model.pth", ".safetensors", "out.SAFETENSORS", "pipe.safetensors",
    "pipe.mp4",
    "a\nb.safetensors", "out.safetensors/", "x\0.safetensors", "\ud800.safetensors",
)  # fmt: skip
_WHOLE = (
    "0",
    "1",
    "-1",
    "5",
    "6",
    "81",
    "1000000001",
    "99999999999999999999",
    "1e9",
    "nan",
    "",
    "1_000",
    "٣",
    "0x10",
    " 4",
)
_REAL = ("0", "0.1", "1", "-1", "nan", "inf", "-inf", "1e400", "1e-400", "", "x", "0,5", "2")
_FRAMES = ("16x16", "32x32", "0x0", "-16x16", "1x1", "17x16", "1e3x16", "x", "480p", "480p-9:0", "480p-0:1",
    "720p-9:16", "99999999999x16",
           "16x16x16", "٣٢x٣٢", "nanxnan", "p", "1000000p", "480p-1:99999999999999999999")  # fmt: skip
_PROMPTS = ("a ship", "", "\ud800", "\x1b[2J", "x" * 50_000, "&amp;" * 5000, "<pad>" * 100, "\0", "<extra_id_0>")
_VIDEOS = (
    "out.mp4",
    "out.avi",
    "out",
    "folder",
    "no/such/out.mp4",
    "x" * 300 + ".mp4",
    "pipe.mp4",
    "out.MKV",
    "a\x1b[2J.mp4",
    "x\0.mp4",
)


def command(random: Random) -> Case:
    """A verb with arguments of which at least one is nobody's wish."""
    verb = random.choice(("inspect", "convert", "quantize", "merge", "plan", "plan", "generate", "generate", "other"))
    pick = random.choice
    if verb == "inspect":
        words = [verb, *(pick(_PATHS) for _ in range(pick((1, 1, 2))))]
    elif verb in ("convert", "quantize"):
        words = [
            verb,
            pick(("model.pth", "model.pth", pick(_PATHS))),
            pick(_TARGETS),
            "--format",
            pick(("int8_block", "bf16", "x", "")),
        ]
    elif verb == "merge":
        words = [
            verb,
            "model.pth",
            "--base",
            pick(("model.pth", pick(_PATHS))),
            "--turbo",
            pick(("model.pth", pick(_PATHS))),
        ]
        words += ["-o", pick(_TARGETS), "--strength", pick(_REAL)]
    elif verb == "plan":
        words = [
            verb,
            *_some(
                random, {"--size": _FRAMES, "--frames": _WHOLE, "--memory": _REAL, "--topk": _REAL, "--experts": _WHOLE}
            ),
        ]
        words += [pick(_PATHS)] if random.random() < 0.2 else []
    elif verb == "generate":
        words = _generate(random)
    else:
        words = [
            pick(("", "x" * 300, "\x1b[2J", "--version", "--help", "inspect", "-")),
            *(pick(_PATHS) for _ in range(pick((0, 1, 3)))),
        ]
    files = {"model.pth": honest.pth(honest.stock()), "vae.pth": honest.pth(honest.vae())}
    files |= {"encoder.pth": honest.pth(honest.official_encoder()), "spiece.model": honest.spiece(), "folder/x": b""}
    return Case("command", files, arguments=tuple(words))


def _some(random, choices):
    """Some of the options, each with any of its values."""
    words = []
    for name, values in choices.items():
        if random.random() < 0.4:
            words += [f"{name}={random.choice(values)}"]
    return words


def _generate(random):
    pick = random.choice
    words = ["generate", "--prompt", pick(_PROMPTS), "--device", "cpu"]
    files = {"--dit": "model.pth", "--vae": "vae.pth", "--text-encoder": "encoder.pth", "--tokenizer": "spiece.model"}
    wrong = pick((*files, None, None, None))
    for name, path in files.items():
        words += [f"{name}={pick(_PATHS) if name == wrong else path}"]
    given = {"--steps": "1", "--frames": "1", "--size": "16x16", "-o": "out.mp4"}
    more = {
        "--seed": _WHOLE,
        "--steps": _WHOLE,
        "--frames": _WHOLE,
        "--size": _FRAMES,
        "--topk": _REAL,
        "--boundary": _REAL,
    }
    more |= {
        "--sigma-max": _REAL,
        "--device": ("cpu", "cuda:99", "x", "mps", ""),
        "--dtype": ("float32", "x"),
        "-o": _VIDEOS,
    }
    more |= {
        "--contact-sheet": ("sheet.png", "sheet.psd", "folder", "x"),
        "--json": ("x.json", "folder", "pipe.mp4", "none/x.json"),
    }
    more |= {"--image": _PATHS, "--dit-low": _PATHS}
    for name in random.sample(list(more), pick((1, 1, 2, 3))):
        given[name] = pick(more[name])
    # what is large and right would be computed
    if given["--size"] in ("480p", "720p-9:16", "1000000p"):
        given["--frames"] = "6"
    if given["--frames"] in ("81", "1000000001"):
        given["--frames"] = "82"
    for name, value in given.items():
        words += ["-o", value] if name == "-o" else [f"{name}={value}"]
    return words
