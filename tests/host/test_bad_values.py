"""Every node with values that no page lets through but a link does: nothing, absurd numbers, other choices."""

import asyncio
import importlib
import json
import math

import pytest
import torch

from tests.helpers.good_inputs import BLOCK, good_inputs
from tests.helpers.lab import T2V

NAN = math.nan


def test_every_node_is_in_the_matrix(pack, given):
    tested = {case[0] for case in NOTHING} | {"TurboDoctor"}  # which has nothing that must be connected
    assert tested == set(pack.nodes)
    for node in pack.nodes:
        required = {i.id for i in pack.nodes[node].define_schema().inputs if not i.optional}
        names = {name for case in NOTHING if case[0] == node for name in case[1]}
        assert names <= required and good_inputs(node, given).keys() <= {
            i.id for i in pack.nodes[node].define_schema().inputs
        }


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
            "precision": "one of auto, bf16, int8",
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
    ("TurboVAE", {"vae": "connect one, from Load VAE"}),
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
    (
        "TurboPrompt",
        {
            "idea": "idea is empty",
            "camera": "one of as written",
            "light": "one of as written",
            "style": "one of as written",
            "seed": "seed must be a number",
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


STEPS = [0, 101, 10**9, -1, NAN, 2.5, "4"]
EDM, RISING, REPEATED = [80.0, 14.6, 1.0, 0.0], [0.1, 0.5, 0.9], [0.9, 0.5, 0.5, 0.0]
SIGMAS = [torch.tensor(row) for row in (EDM, RISING, REPEATED, [0.9, -0.1], [0.9, NAN, 0.0], [0.9, NAN], [0.9], [])]
SIGMAS += [torch.tensor(0.5), torch.zeros(2, 2), [0.9, 0.0]]
NUMBERS = {
    "steps": (
        "1 to 4 steps .*100 at most, got .*set steps to 4",
        ["TurboSampler", "TurboCompare", "TurboScheduler"],
        STEPS,
    ),
    "topk": ("topk must be a number", ["SparseLowBitAttention"], [-1, 2, NAN, math.inf, "0.1", True]),
    "coverage": ("from 0 to 1", ["SparseLowBitAttention"], [-1, 2, NAN, "0.5"]),
    "start_percent": ("from 0 to 1", ["SparseLowBitAttention"], [-1, 2, NAN]),
    "end_percent": ("from 0 to 1", ["SparseLowBitAttention"], [-1, 2, NAN]),
    "min_tokens": ("from 0 to", ["SparseLowBitAttention"], [-1, NAN, 1e18]),
    "max_length": ("from 1 to 4096", ["TurboPrompt"], [0, -1, 10**9, NAN, "9"]),
    "seed": ("seed must be", ["TurboSampler", "TurboCompare", "TurboPrompt"], [2**64, -(2**70), NAN]),
    "sigma_max": ("sigma_max must be", ["TurboSampler", "TurboScheduler"], [NAN, math.inf, -1, 1, 5.0, "80"]),
    "boundary": ("from 0 to 1", ["TurboSampler"], [-1, 5, NAN]),
    "tokens": ("from 16 to", ["TurboCompare"], [0, -1, 10**9, NAN]),
    "seconds": ("from 0 to 60", ["TurboSize"], [-1, 1e9, NAN, math.inf, "5"]),
    "strength": ("strength must be", ["TurboMerge", "TurboLoraReport"], [NAN, 1e300, -math.inf]),
    "sigmas": ("sigmas must fall from at most 1 to .*use Turbo Scheduler", ["TurboSampler", "TurboCompare"], SIGMAS),
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
    ("TurboPrompt", "camera", "x"),
    ("TurboPrompt", "light", "x"),
    ("TurboPrompt", "style", "x"),
    ("TurboConvert", "format", "int3"),
    ("TurboMerge", "format", "int3"),
]


@pytest.mark.parametrize(("node", "name", "value"), CHOICES)
def test_choices_that_are_not_there(refused, node, name, value):
    refused(node, "one of", **{name: value})


@pytest.mark.parametrize(
    "text",
    [
        "x",
        "0,,x",
        "-1",
        "2",
        "1-0",
        "0-2",
        "0 1",
        "0.5",
        "0-",
        "99999999999999999999",
        "first 3",
        "last 0",
        "last",
        "first -1",
    ],
)
def test_block_lists(lab, text):
    model = lab.load()
    for run in (lambda: lab.attention(model, dense_blocks=text), lambda: lab.quantize(model, skip_blocks=text)):
        with pytest.raises(lab.pack.errors.TurboError, match="not within 0 to 1; write it like"):
            run()


def test_block_lists_as_people_write_them(lab):
    parse = lab.pack.inputs.parse_blocks
    assert parse(" 0 , 3-5,5 , 39,", 40) == {0, 3, 4, 5, 39}
    assert parse("", 40) == parse(" , ", 40) == frozenset()
    assert parse("first 2, Last 1, 20", 40) == {0, 1, 20, 39}


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
        typed = {"steps": 101, "sigma_max": NAN}
        prompt = {"1": {"class_type": "TurboScheduler", "inputs": typed}}
        valid, errors, _ = asyncio.run(execution.validate_inputs("x", prompt, "1", {}))
        assert not valid and "4" in json.dumps(errors)
    finally:
        for name, node in before.items():
            if node is None:
                del nodes.NODE_CLASS_MAPPINGS[name]
            else:
                nodes.NODE_CLASS_MAPPINGS[name] = node
