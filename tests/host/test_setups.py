"""Set-ups that a person makes by mistake: each says so, on the node that can be changed; docs/setups.md lists them."""

import re
from pathlib import Path

import pytest

from tests.helpers.lab import HIGH, LOW, QUANT, STOCK, T2V

PAGE = Path(__file__).parents[2] / "docs" / "setups.md"


def _said(output):
    return "" if output.ui is None else output.ui["text"][0]


def _sampled(lab, model, *, low=None, positive=None, steps=1, **settings):
    latent = lab.latent()
    positive = lab.positive(**lab.picture(model, latent)) if positive is None else positive
    node = lab.pack.nodes["TurboSampler"]
    return _said(node.execute(model, positive, latent, 0, steps, 0.0, model_low=low, **settings))


def _refused(function, *args, **kwargs):
    with pytest.raises(ValueError) as raised:
        function(*args, **kwargs)
    return str(raised.value)


def _merged(lab, **files):
    names = {"finetune": "a.safetensors", "base": "b.safetensors", "turbo": "c.safetensors"} | files
    return _refused(lab.pack.nodes["TurboMerge"].execute, **names, strength=1.0, format="bf16")


# {set-up of the table: (node of the table, function of the lab that makes it and gives what is said)}
SETUPS = {
    "an image-to-video model with an empty latent and a plain prompt": (
        "Turbo Sampler",
        lambda lab: _refused(_sampled, lab, lab.load(HIGH), low=lab.load(LOW), positive=lab.positive()),
    ),
    "one file as both experts": ("Turbo Sampler", lambda lab: _sampled(lab, lab.load(HIGH), low=lab.load(HIGH))),
    "one expert alone through all steps": ("Turbo Sampler", lambda lab: _sampled(lab, lab.load(HIGH), steps=4)),
    "a model that is not distilled": ("Turbo Sampler", lambda lab: _sampled(lab, lab.load(STOCK))),
    "start_percent above end_percent": (
        "Sparse Low-Bit Attention",
        lambda lab: _said(
            lab.pack.nodes["SparseLowBitAttention"].execute(lab.load(), 0.1, "bf16", start_percent=0.8, end_percent=0.2)
        ),
    ),
    "a file that is int8 already, or the node twice": (
        "Quantize W8A8",
        lambda lab: _said(lab.pack.nodes["QuantizeW8A8"].execute(lab.load(QUANT), "row (ComfyUI native)")),
    ),
}


def _table():
    first = PAGE.read_text("utf-8").split("\n# ")[0]  # the second is test_red.py's
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \|$", first, re.MULTILINE)[1:]
    return {setup: (node, said) for setup, node, said in rows}


@pytest.mark.parametrize("setup", SETUPS)
def test_a_set_up_that_is_not_meant_says_so(lab, setup):
    node, make = SETUPS[setup]
    listed, said = _table()[setup]
    text = make(lab)
    assert listed == node and said in text, text
    assert "custom_nodes" not in text and "/" not in text, "neither a class path nor a folder"


def test_two_inputs_of_a_merge_that_are_one_file(lab, models_of_merge):
    node, said = _table()["one file given to two inputs"]
    assert node == "Turbo Merge"
    for twice in (("finetune", "base"), ("base", "turbo"), ("finetune", "turbo")):
        text = _merged(lab, **dict.fromkeys(twice, "d.safetensors"))
        assert f"{twice[0]} and {twice[1]} are the same file, d.safetensors" in text and said in text


@pytest.fixture
def models_of_merge(lab, tmp_path, monkeypatch):
    import folder_paths

    for name in "abcd":
        (tmp_path / f"{name}.safetensors").touch()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([str(tmp_path)], {".safetensors"}))
    folder_paths.filename_list_cache.pop("diffusion_models", None)
    yield
    folder_paths.filename_list_cache.pop("diffusion_models", None)


def test_guidance_above_one_with_our_scheduler_is_told_on_the_ksampler(lab, monkeypatch):
    import types

    node, said = _table()["cfg above 1 with the scheduler turbo_rcm"]
    # of two copies of the pack in this process the last one offers the scheduler
    handler = lab.comfy.samplers.SCHEDULER_HANDLERS["turbo_rcm"].handler
    names, sent = handler.keywords["tell"].__globals__["running"].__globals__, []
    prompt = {"5": {"inputs": {"cfg": 5.0}}, "6": {"inputs": {"cfg": 1.0}}, "7": {"inputs": {"cfg": ["1", 0]}}}
    prompt["9"] = {"inputs": {"cfg": 1.0, "denoise": 0.75}}
    queue = types.SimpleNamespace(get_current_queue_volatile=lambda: ([(0, "run", prompt)], []))
    server = types.SimpleNamespace(prompt_queue=queue, send_progress_text=lambda *told: sent.append(told))
    monkeypatch.setitem(names, "PromptServer", types.SimpleNamespace(instance=server))
    sampling = lab.load().get_model_object("model_sampling")
    for number, steps in (("5", 4), ("6", 4), ("7", 4), ("8", 4), ("6", 8), ("9", 5)):
        context = types.SimpleNamespace(prompt_id="run", node_id=number)
        monkeypatch.setitem(names, "get_executing_context", lambda context=context: context)
        lab.comfy.samplers.calculate_sigmas(sampling, "turbo_rcm", steps)
    (text, number), (many, of_many), (part, of_part) = sent
    assert number == "5" and said in text and node == "KSampler"
    node, said = _table()["more than 4 steps"]
    assert (of_many, of_part) == ("6", "9") and said in many and said in part and node == "Turbo Sampler, KSampler"
    assert "steps / denoise 0.75" in part and "denoise" not in many


def test_a_set_up_that_is_meant_says_nothing_but_the_time(lab):
    for text in (_sampled(lab, lab.load(T2V)), _sampled(lab, lab.load(HIGH), low=lab.load(LOW), steps=4)):
        assert text.startswith(("1 step in", "4 steps in")) and "\n" not in text
    assert _said(lab.pack.nodes["QuantizeW8A8"].execute(lab.load(T2V), "block (TurboWan)")) == ""
    assert _said(lab.pack.nodes["SparseLowBitAttention"].execute(lab.load(), 0.1, "bf16")) == ""


def test_the_table_holds_what_is_tested_and_nothing_else():
    others = {"one file given to two inputs", "cfg above 1 with the scheduler turbo_rcm", "more than 4 steps"}
    others |= {"TinyWan with a prompt that is not of its world"}  # tests/host/test_server.py
    assert set(_table()) == set(SETUPS) | others
