"""Every node with what no page lets through but a link does: nothing, other models, absurd numbers, impossible names.

Each case is an error that names the cure, leaves no file behind, and leaves a host that works.
"""

import asyncio
import importlib
import json
import math
import os
import shutil
import socket

import pytest
import torch

from tests.helpers.lab import HIGH, STOCK, T2V, small_flux

SHAPE = (1, 16, 2, 8, 10)
NAN, BLOCK = math.nan, "block (TurboWan)"


@pytest.fixture(scope="module", autouse=True)
def _no_network(comfy):
    """Nothing is to be downloaded: a connection fails the test."""
    connect = socket.socket.connect

    def refused(*args):
        raise AssertionError(f"connects to {args[1]}")

    socket.socket.connect = refused
    yield
    socket.socket.connect = connect


@pytest.fixture(scope="module")
def given(comfy, lab):
    """Models and inputs that are good, by name; they are shared, as in a graph."""
    with torch.inference_mode():
        models = {"t2v": lab.load(T2V), "i2v": lab.load(HIGH), "stock": lab.load(STOCK), "flux": small_flux(comfy)}
    return models | {"positive": lab.positive(), "latent": lab.latent(SHAPE)}


@pytest.fixture(scope="module")
def expected(lab, given):
    with torch.inference_mode():
        return lab.turbo(given["t2v"], given["latent"], steps=1)


@pytest.fixture
def place(lab, tmp_path, monkeypatch):
    """The host's folders, in a folder of the test's own."""
    import folder_paths

    for name in ("diffusion_models", "text_encoders", "loras", "output", "temp"):
        (tmp_path / name).mkdir()
    for name in (T2V, STOCK):
        shutil.copy(lab.path(name), tmp_path / "diffusion_models" / name)
    for kind in ("diffusion_models", "text_encoders", "loras"):
        paths = [str(tmp_path / kind)], {".pth", ".safetensors"}
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, paths)
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    return tmp_path


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def refused(lab, given, expected, place):
    """Run a node with good inputs, some replaced by bad ones: it raises, leaves nothing, and a good run follows."""

    def check(node, match, error=None, **changes):
        before = files(place)
        with pytest.raises(error or lab.pack.errors.TurboError, match=match) as caught:
            lab.pack.nodes[node].execute(**{**good(node, given), **changes})
        print(f"{node}: {caught.value}")
        assert files(place) == before
        assert torch.equal(lab.turbo(given["t2v"], given["latent"], steps=1), expected)

    return check


def good(node, given):
    """Inputs that this node takes."""
    model, run = given["t2v"], {"positive": given["positive"], "latent_image": given["latent"], "seed": 0, "steps": 1}
    return {
        "TurboLoader": {"model_name": T2V},
        "TurboLoraReport": {"model": model, "lora_name": STOCK},
        "QuantizeW8A8": {"model": model, "format": BLOCK},
        "SparseLowBitAttention": {"model": model, "topk": 0.3, "precision": "bf16"},
        "TurboScheduler": {"steps": 4, "sigma_max": 0.0},
        "TurboSampler": {"model": model, **run, "sigma_max": 0.0},
        "TurboSave": {"model": model, "filename_prefix": "x"},
        "TurboTextEncoderLoader": {"text_encoder": "x"},
        "TurboSize": {"resolution": "480p", "aspect_ratio": "16:9", "seconds": 5.0},
        "TurboCompare": {"model_a": model, "model_b": model, **run},
        "TurboDoctor": {},
        "TurboConvert": {"source": T2V, "format": "bf16"},
        "TurboMerge": {"finetune": STOCK, "base": STOCK, "turbo": T2V, "strength": 1.0, "format": "bf16"},
    }[node]


def test_every_node_is_in_the_matrix(pack, given):
    tested = {case[0] for case in NOTHING} | {"TurboDoctor"}  # which has nothing that must be connected
    assert tested == set(pack.nodes)
    for node in pack.nodes:
        required = {i.id for i in pack.nodes[node].define_schema().inputs if not i.optional}
        names = {name for case in NOTHING if case[0] == node for name in case[1]}
        assert names <= required and good(node, given).keys() <= {i.id for i in pack.nodes[node].define_schema().inputs}


# None where something must be: from a node that gives nothing, which the host lets through
NOTHING = [
    ("TurboLoader", {"model_name": "choose one", "dtype": "dtype must be one of default"}),
    ("TurboLoraReport", {"model": "connect one", "lora_name": "choose one", "strength": "number from -100"}),
    ("QuantizeW8A8", {"model": "connect one", "format": "must be one of block", "layers": "must be one of all"}),
    (
        "SparseLowBitAttention",
        {
            "model": "connect one",
            "topk": "from 0 to 1",
            "precision": "one of bf16, int8",
            "mode": "one of auto",
            "start_percent": "from 0 to 1",
            "end_percent": "from 0 to 1",
            "min_tokens": "from 0 to",
        },
    ),
    ("TurboScheduler", {"steps": "set steps to 4"}),
    (
        "TurboSampler",
        {
            "model": "connect one",
            "positive": "connect a CLIP Text Encode",
            "latent_image": "connect an empty video latent",
            "seed": "seed must be a number",
            "steps": "set steps to 4",
            "mode": "one of SDE, ODE",
            "boundary": "from 0 to 1",
        },
    ),
    ("TurboSave", {"model": "connect one", "filename_prefix": "write a name"}),
    ("TurboTextEncoderLoader", {"text_encoder": "choose one"}),
    ("TurboSize", {"resolution": "one of 480p", "aspect_ratio": "one of 1:1", "seconds": "from 0 to 60"}),
    (
        "TurboCompare",
        {
            "model_a": "connect one",
            "model_b": "connect one",
            "positive": "connect a CLIP Text Encode",
            "latent_image": "connect an empty video latent",
            "seed": "seed must be a number",
            "steps": "set steps to 4",
            "mode": "one of SDE, ODE",
            "tokens": "from 16 to 8192",
        },
    ),
    ("TurboConvert", {"source": "choose one", "format": "Expected one of int8_block"}),
    (
        "TurboMerge",
        {
            "finetune": "choose one",
            "base": "choose one",
            "turbo": "choose one",
            "strength": "from -2",
            "format": "Expected one of int8_block",
        },
    ),
]


@pytest.mark.parametrize(("node", "name", "match"), [(n, k, m) for n, case in NOTHING for k, m in case.items()])
def test_nothing_where_something_must_be(refused, node, name, match):
    refused(node, match, **{name: None})


def test_optional_inputs_left_open(lab, given, place):
    nodes, model = lab.pack.nodes, given["t2v"]
    nodes["TurboDoctor"].execute(None)
    nodes["QuantizeW8A8"].execute(model, BLOCK, skip_blocks=None, pattern=None)
    nodes["SparseLowBitAttention"].execute(model, 0.3, "bf16", dense_blocks=None)
    nodes["TurboSize"].execute("480p", "16:9", 5.0, None)
    assert nodes["TurboConvert"].execute(T2V, "bf16", None)[0].endswith("_bf16.safetensors")


OTHER_MODELS = {
    "QuantizeW8A8": ("model", "Wan model, got Flux.*pattern"),
    "SparseLowBitAttention": ("model", "Wan model, got Flux.*connect"),
    "TurboScheduler": ("model", "Wan model, got Flux.*connect"),
    "TurboSampler": ("model", "Wan model, got Flux.*connect"),
    "TurboSave": ("model", "Wan model, got Flux.*connect"),
    "TurboCompare": ("model_b", "Wan model, got Flux.*connect"),
}


@pytest.mark.parametrize("node", OTHER_MODELS)
def test_a_model_of_another_family(refused, given, node):
    name, match = OTHER_MODELS[node]
    refused(node, match, **{name: given["flux"]})


def test_other_wan_models_and_flux_where_any_will_do(lab, refused, given):
    refused("TurboSampler", "Wan model, got Flux", model_low=given["flux"])
    refused("TurboSampler", "different families", model_low=given["i2v"])
    refused("TurboCompare", "one family", model_b=given["i2v"])
    refused("QuantizeW8A8", "connect one", model=None, pattern="*")
    assert "not a Wan model" in lab.pack.nodes["TurboDoctor"].execute(given["flux"])[0]


# what each input is called, and what is wrong with it
LATENTS = {
    "no batch": (16, 8, 10),
    "no videos": (0, 16, 2, 8, 10),
    "no frames": (1, 16, 0, 8, 10),
    "no height": (1, 16, 2, 0, 10),
    "one dimension more": (1, 16, 2, 8, 10, 1),
}


@pytest.mark.parametrize("node", ["TurboSampler", "TurboCompare"])
@pytest.mark.parametrize("shape", LATENTS.values(), ids=LATENTS)
def test_latents_of_no_video(refused, node, shape):
    refused(node, r"\[batch, channels, frames, height, width\].*connect", latent_image={"samples": torch.zeros(shape)})


def test_latents_without_samples(refused):
    refused("TurboSampler", "holds no latent", latent_image={})


@pytest.mark.parametrize("shape", [(1, 4, 8, 10), (1, 4, 2, 8, 10), (1, 48, 2, 8, 10)])
def test_latents_of_another_vae(lab, refused, given, shape):
    """Empty ones of any kind become the model's own, as in the host's sampler; a picture in them does not."""
    refused("TurboSampler", f"{shape[1]} channels.*takes 16.*VAE", latent_image=lab.latent(shape, seed=1))
    out = lab.turbo(given["t2v"], lab.latent(shape), steps=1)
    assert out.shape == (1, 16, 1 if len(shape) == 4 else 2, 8, 10) and out.isfinite().all()


@pytest.mark.parametrize("model", ["t2v", "i2v", "stock"])
@pytest.mark.parametrize("shape", [(1, 16, 2, 5, 7), (1, 16, 1, 1, 1), (1, 16, 3, 9), (2, 16, 1, 1, 23)])
def test_odd_sizes_are_padded_and_cut_again(lab, given, model, shape):
    """Sparse, with the trained branch and without, and in int8 scores: 5 x 7 makes patches of 3 x 4."""
    for precision in ("bf16", "int8"):
        out = lab.turbo(lab.attention(given[model], 0.3, precision), lab.latent(shape, seed=2), steps=2)
        assert out.shape == (shape if len(shape) == 5 else (1, 16, 1, 3, 9)) and out.isfinite().all()


def test_batches_that_differ_are_repeated(lab, given):
    start = {"concat_latent_image": torch.zeros(3, 16, 2, 5, 7), "concat_mask": torch.ones(1, 1, 2, 5, 7)}
    latent = {**lab.latent((2, *SHAPE[1:])), "batch_index": [0], "noise_mask": torch.ones(3, 5, 5)}
    out = lab.turbo(given["i2v"], latent, steps=1, positive=lab.positive(**start))
    assert out.shape == (2, *SHAPE[1:]) and out.isfinite().all()


def test_start_image_of_the_vae_of_the_5b_model(refused, lab, given):
    image = {"concat_latent_image": torch.zeros(1, 48, 2, 4, 5), "concat_mask": torch.ones(1, 1, 2, 8, 10)}
    refused("TurboSampler", "48 channels.*Wan 2.1's", model=given["i2v"], positive=lab.positive(**image))


@pytest.mark.parametrize("node", ["TurboSampler", "TurboCompare"])
def test_conditioning_that_is_empty_or_of_another_encoder(lab, refused, node):
    refused(node, "positive holds no prompt: connect", positive=[])
    refused(node, "width 64, got 768.*umT5", positive=[[torch.zeros(1, 77, 768), {}]])
    image = {"concat_latent_image": torch.zeros(1, 4, 2, 8, 10)}
    refused(node, "start image.*4 channels.*takes 16", positive=lab.positive(**image))


NUMBERS = {
    "steps": ("set steps to 4", ["TurboSampler", "TurboCompare", "TurboScheduler"], [0, 9, 10**9, -1, NAN, 2.5, "4"]),
    "topk": ("topk must be a number", ["SparseLowBitAttention"], [-1, 2, NAN, math.inf, "0.1", True]),
    "coverage": ("from 0 to 1", ["SparseLowBitAttention"], [-1, 2, NAN, "0.5"]),
    "start_percent": ("from 0 to 1", ["SparseLowBitAttention"], [-1, 2, NAN]),
    "end_percent": ("from 0 to 1", ["SparseLowBitAttention"], [-1, 2, NAN]),
    "min_tokens": ("from 0 to", ["SparseLowBitAttention"], [-1, NAN, 1e18]),
    "seed": ("seed must be", ["TurboSampler", "TurboCompare"], [2**64, -(2**70), NAN]),
    "sigma_max": ("sigma_max must be", ["TurboSampler", "TurboScheduler"], [NAN, math.inf, -1, 1, "80"]),
    "boundary": ("from 0 to 1", ["TurboSampler"], [-1, 5, NAN]),
    "tokens": ("from 16 to", ["TurboCompare"], [0, -1, 10**9, NAN]),
    "seconds": ("from 0 to 60", ["TurboSize"], [-1, 1e9, NAN, math.inf, "5"]),
    "strength": ("strength must be", ["TurboMerge", "TurboLoraReport"], [NAN, 1e300, -math.inf]),
    "sigmas": (
        "use Turbo Scheduler",
        ["TurboSampler", "TurboCompare"],
        [torch.tensor(0.5), torch.zeros(2, 2), [0.9, 0.0], torch.tensor([0.9, NAN])],
    ),
}
CASES = [
    (node, name, value, match) for name, (match, nodes, values) in NUMBERS.items() for node in nodes for value in values
]


@pytest.mark.parametrize(("node", "name", "value", "match"), CASES)
def test_absurd_numbers(refused, node, name, value, match):
    refused(node, match, **{name: value})


def test_numbers_at_the_edge_work(lab, given):
    model = lab.attention(given["t2v"], 0.0, start_percent=0.9, end_percent=0.1)
    for seed in (-1, 0, 2**64 - 1):
        assert lab.turbo(model, given["latent"], seed=seed, steps=2).isfinite().all()
    assert lab.pack.nodes["TurboSize"].execute("480p", "16:9", 0)[2] == 1


CHOICES = [
    ("TurboLoader", "dtype", "int3"),
    ("QuantizeW8A8", "format", "int3"),
    ("QuantizeW8A8", "layers", "none"),
    ("SparseLowBitAttention", "precision", "fp3"),
    ("SparseLowBitAttention", "mode", "x"),
    ("SparseLowBitAttention", "selection", "x"),
    ("TurboSampler", "mode", "x"),
    ("TurboCompare", "mode", "x"),
    ("TurboSize", "resolution", "999p"),
    ("TurboSize", "aspect_ratio", "5:9"),
    ("TurboConvert", "format", "int3"),
    ("TurboMerge", "format", "int3"),
]


@pytest.mark.parametrize(("node", "name", "value"), CHOICES)
def test_choices_that_are_not_there(refused, node, name, value):
    refused(node, "one of", **{name: value})


IMAGES = {
    (1, 1, 400, 3): "crop it",
    (1, 0, 5, 3): "none of them 0",
    (5, 5): "height, width",
    (5, 5, 3): "height, width",
}


@pytest.mark.parametrize("shape", IMAGES)
def test_images_of_no_use(refused, shape):
    refused("TurboSize", IMAGES[shape], image=torch.zeros(shape))


def test_image_of_one_pixel_is_a_square(lab):
    width, height, _ = lab.pack.nodes["TurboSize"].execute("480p", "16:9", 5.0, torch.zeros(1, 1, 1, 3)).result
    assert width == height and width % 16 == 0


FORBIDDEN = ["a:b", "C:x", "a<b", "a>b", "a|b", 'a"b', "a?b", "a*b", "a\nb", "a\x00b", "%date:yyyy-MM-dd%"]
NAMES = (
    dict.fromkeys(FORBIDDEN, "does not allow in file names.*leave it out")
    | dict.fromkeys(["CON", "con.safetensors", "a/NUL.x/b", "LPT1/x", "Com9 .x"], "keeps for a device: choose another")
    | dict.fromkeys(["x.", "a /b", "a./b"], "ends in a dot or a space.*leave it out")
    | dict.fromkeys(["a/", "/", ".", "..", "a/..", " . "], "names no file: write a name")
    | dict.fromkeys(["../x", "a/../../x", "/tmp/x"], "lies outside.*Expected a file name")
    | {"x" * 300: "too long.*shorter", "한" * 90: "too long.*shorter"}
)


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:20])
@pytest.mark.parametrize("node", ["TurboConvert", "TurboMerge", "TurboSave"])
def test_names_that_some_system_cannot_store(refused, node, name):
    refused(node, NAMES[name], **{"filename_prefix" if node == "TurboSave" else "filename": name})


@pytest.mark.parametrize("name", ["한글 이름", "v1.2", " padded ", ".hidden", "a/../b", "console", "COM10"])
def test_names_that_are_fine(lab, given, place, name):
    lab.pack.nodes["TurboSave"].execute(given["t2v"], name)
    lab.pack.nodes["TurboConvert"].execute(T2V, "bf16", name)
    assert len(files(place)) == 4


@pytest.mark.skipif(os.sep == "\\", reason="there a backslash separates folders")
def test_backslash_is_no_separator_here(refused):
    refused("TurboConvert", r"separated by /", filename="..\\x")


@pytest.mark.parametrize("name", ["gone.pth", "../../gone.pth", "/etc/passwd", ".", "a\x00b"])
def test_files_that_are_gone(refused, name):
    for node, given in {
        "TurboLoader": "model_name",
        "TurboTextEncoderLoader": "text_encoder",
        "TurboLoraReport": "lora_name",
        "TurboConvert": "source",
        "TurboMerge": "base",
    }.items():
        refused(node, "not found", FileNotFoundError, **{given: name})


def test_damaged_loras_and_text_encoders(lab, refused, place):
    for kind, node, name in (
        ("loras", "TurboLoraReport", "lora_name"),
        ("text_encoders", "TurboTextEncoderLoader", "text_encoder"),
    ):
        for file, data in {"empty.safetensors": b"", "page.safetensors": b"<html>", "page.pth": b"<html>"}.items():
            (place / kind / file).write_bytes(data)
            refused(node, f"{file} is damaged.*Download", **{name: file})


@pytest.mark.parametrize("name", [T2V, "TinyWan2.1_VAE.pth", "tiny_umt5_enc.pth", STOCK])
def test_text_encoders_that_are_none(lab, refused, place, name):
    """The host takes any file for CLIP and starts it with random weights."""
    shutil.copy(lab.path(name), place / "text_encoders" / name)
    refused("TurboTextEncoderLoader", "not a umT5 encoder.*umt5_xxl_fp16", text_encoder=name)


def test_the_host_refuses_what_is_not_connected(comfy, pack, given):
    """Its own validation, by the schemas: every required link, and every number typed into the page."""
    execution, nodes = importlib.import_module("execution"), importlib.import_module("nodes")
    known = dict(pack.nodes)
    before = {name: nodes.NODE_CLASS_MAPPINGS.get(name) for name in known}
    nodes.NODE_CLASS_MAPPINGS.update(known)
    try:
        for name, node in known.items():
            prompt = {"1": {"class_type": name, "inputs": {}}}
            required = {i.id for i in node.define_schema().inputs if not i.optional}
            valid, errors, _ = asyncio.run(execution.validate_inputs("x", prompt, "1", {}))
            missing = {error["extra_info"]["input_name"] for error in errors if "missing" in error["type"]}
            assert missing == required and valid == (not required), name
        typed = {"steps": 9, "sigma_max": NAN}
        prompt = {"1": {"class_type": "TurboScheduler", "inputs": typed}}
        valid, errors, _ = asyncio.run(execution.validate_inputs("x", prompt, "1", {}))
        assert not valid and "4" in json.dumps(errors)
    finally:
        for name, node in before.items():
            if node is None:
                del nodes.NODE_CLASS_MAPPINGS[name]
            else:
                nodes.NODE_CLASS_MAPPINGS[name] = node
