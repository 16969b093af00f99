"""The pack in a real ComfyUI server, over HTTP: shipped workflows, previews, interrupt, errors, a second copy."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import uuid
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.helpers import comfyui as host
from tests.helpers import workflow_api
from tests.host import serving

pytestmark = pytest.mark.host
SAMPLERS = {"KSampler", "TurboSampler"}
OURS = {
    "TurboLoader",
    "QuantizeW8A8",
    "SparseLowBitAttention",
    "TurboScheduler",
    "TurboSampler",
    "TurboTextEncoderLoader",
}


def _node(prompt, *classes):
    return next(number for number, node in prompt.items() if node["class_type"] in classes)


def _video(path):
    """(width, height, frames, rate, frames as arrays)"""
    av = pytest.importorskip("av")
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(stream)]
        return stream.width, stream.height, len(frames), float(stream.average_rate), frames


def _frames(server, prompt):
    """Frames of the one video that a prompt makes."""
    run = host.run(server, prompt)
    assert run.status == "execution_success", run.error
    (path,) = run.videos(server.base)
    return _video(path)[-1]


def _latent(server, prompt):
    """What the sampler of a prompt gives, to the bit: H.264 makes one of two files of the same frames."""
    name = uuid.uuid4().hex
    saved = {"samples": [_node(prompt, *SAMPLERS), 0], "filename_prefix": name}
    run = host.run(server, prompt | {"latent": {"class_type": "SaveLatent", "inputs": saved}})
    assert run.status == "execution_success", run.error
    (path,) = (server.base / "output").glob(f"{name}*")
    return load_file(path)["latent_tensor"]


def _pictures(server, prompt, sources):
    """Pixels of each frame, as bytes, that nodes of a prompt give: a list for each of the sources."""
    names = [uuid.uuid4().hex for _ in sources]
    inputs = [{"images": source, "filename_prefix": name} for source, name in zip(sources, names)]
    run = host.run(server, prompt | {name: {"class_type": "SaveImage", "inputs": i} for name, i in zip(names, inputs)})
    assert run.status == "execution_success", run.error
    return [[_pixels(path) for path in sorted((server.base / "output").glob(f"{name}*"))] for name in names]


def _pixels(path):
    with Image.open(path) as image:
        return image.tobytes()


def _same(frames, others):
    return len(frames) == len(others) and all((a == b).all() for a, b in zip(frames, others))


def _free(server):
    """Make the server forget models and results: what comes next is computed, not remembered."""
    host.post(server, "/free", {"unload_models": True, "free_memory": True})


def _is_healthy(server, small):
    run = host.run(server, small("turbowan_t2v_turbo_sampler", steps=1))
    assert run.status == "execution_success", run.error


# Two parts; three clips. Turbo Compare shows its picture in the place of previews.
STEPS = {
    "turbowan_long_chained": 8,
    "turbowan_many_prompts": 12,
    "turbowan_video_to_video": 3,
    "turbowan_finish_video": 0,
}
CLIPS = {"turbowan_many_prompts": 3}  # of one run
FRAMES = {"turbowan_long_chained": 17, "turbowan_long_windows": 17, "turbowan_finish_video": 17}
SIZES = {"turbowan_compare": (160, 48), "turbowan_finish_video": (240, 144)}  # side by side; 1.5 times the clip
RATES = {"turbowan_finish_video": 32.0}


@pytest.mark.parametrize("name", workflow_api.names())
def test_every_shipped_workflow_makes_its_video_with_progress_and_previews(server, small, name):
    windows = name == "turbowan_long_windows"
    _free(server)
    prompt = small(name, *((80, 48, 17) if windows else ()))
    before = server.log.count("Context window 2/2")
    run = host.run(server, prompt)
    assert run.status == "execution_success", run.error
    steps = STEPS.get(name, 4)
    samplers = [number for number, node in prompt.items() if node["class_type"] in SAMPLERS]
    each = [1, 2, 3] if name == "turbowan_video_to_video" else [1, 2, 3, 4]
    assert [run.progress(number) for number in samplers] == [each * CLIPS.get(name, 1)] * len(samplers)
    assert len(run.previews) == steps
    assert all(min(host.preview_size(preview)) > 0 for preview in run.previews)
    paths = run.videos(server.base)
    assert len(paths) == CLIPS.get(name, 1)
    for path in paths:
        width, height, count, rate, frames = _video(path)
        assert (width, height, count, rate) == (
            *SIZES.get(name, (80, 48)),
            FRAMES.get(name, 9),
            RATES.get(name, 16.0),
        )
        assert frames[0].std() > 1, "the picture is of one colour"
    assert server.log.count("Context window 2/2") - before == (4 if windows else 0)


@pytest.mark.parametrize("name", ["00_start_here", "01_start_here_image", "turbowan_t2v_ksampler"])
def test_tinywan_says_once_that_a_prompt_is_not_of_its_world(server, small, name):
    files = {"model_name": "TinyWan2.1-T2V.safetensors", "text_encoder": "TinyWan_umt5.safetensors"}
    said = "TinyWan knows only its small world"
    for text, more in (("A red circle moves to the left on a black background.", 0), ("A dog runs.", 1)):
        before = server.log.count(said)
        prompt = small(name, 64, 64, 5, **({} if "image" in name else files | {"steps": 1}))
        for node in prompt.values():  # the negative one is nobody's description
            if node["class_type"] == "CLIPTextEncode":
                node["inputs"]["text"] = text
        words = {"class_type": "CLIPTextEncode", "inputs": {**prompt[_node(prompt, "CLIPTextEncode")]["inputs"]}}
        prompt["other"] = {**words, "inputs": words["inputs"] | {"text": "blurry"}}
        if name == "turbowan_t2v_ksampler":
            prompt[_node(prompt, "KSampler")]["inputs"]["negative"] = ["other", 0]
        run = host.run(server, prompt)
        assert run.status == "execution_success", run.error
        assert server.log.count(said) == before + more, text


def test_less_denoise_keeps_more_of_the_clip(server, small):
    """By the sampled latent, against that of the clip itself."""
    prompt = small("turbowan_video_to_video", seed=3)
    number = _node(prompt, "KSampler")
    saved = {"samples": [_node(prompt, "VAEEncode"), 0], "filename_prefix": "of-the-clip"}
    run = host.run(server, {**prompt, "latent": {"class_type": "SaveLatent", "inputs": saved}})
    assert run.status == "execution_success", run.error
    (path,) = (server.base / "output").glob("of-the-clip*")
    clip, apart = load_file(path)["latent_tensor"], []
    for steps in (1, 2, 3):
        prompt[number]["inputs"].update(steps=steps, denoise=steps / 4)
        apart.append((_latent(server, prompt) - clip).norm())
    assert apart == sorted(apart) and apart[0] < 0.8 * apart[-1]


def test_a_frame_between_two_is_made_of_both(server, small):
    prompt = small("turbowan_finish_video")
    sources = [[_node(prompt, kind), 0] for kind in ("ImageScaleBy", "FrameInterpolate")]
    large, smooth = _pictures(server, prompt, sources)
    assert smooth[::2] == large and len(set(smooth)) == 17


def test_a_last_frame_reaches_the_video(server, small):
    prompt = small("turbowan_first_last_frame", seed=5)
    last = next(number for number, node in prompt.items() if node["class_type"] == "LoadImage")
    videos = []
    for picture in ("example.png", "second.png"):
        prompt[last]["inputs"]["image"] = picture
        videos.append(_frames(server, prompt))
    assert not _same(*videos)


def test_the_second_part_begins_behind_the_last_frame_of_the_first(server, small):
    """In PNG files: H.264 changes random frames more than a bound could allow."""
    prompt = small("turbowan_long_chained", seed=5)
    decoders = [number for number, node in prompt.items() if node["class_type"] == "VAEDecodeTiled"]
    sources = [[number, 0] for number in decoders] + [prompt[_node(prompt, "CreateVideo")]["inputs"]["images"]]
    first, second, whole = _pictures(server, prompt, sources)
    assert len(first) == len(second) == 9 and len(set(whole)) == 17
    assert whole == [*first, *second[1:]]


def test_a_seed_gives_the_same_again_and_another_seed_another(server, small):
    latents = []
    for seed in (11, 12, 11):
        _free(server)
        latents.append(_latent(server, small("turbowan_t2v_turbo_sampler", seed=seed)))
    assert torch.equal(latents[0], latents[2]) and not torch.equal(latents[0], latents[1])


# one row of tokens, one column, both sides odd multiples of 16
@pytest.mark.parametrize("size", [(64, 16), (16, 208), (144, 112)])
def test_any_size_that_divides_by_sixteen(server, small, size):
    run = host.run(server, small("turbowan_t2v_turbo_sampler", *size, 5, steps=1))
    assert run.status == "execution_success", run.error
    assert _video(run.videos(server.base)[0])[:3] == (*size, 5)


@pytest.mark.parametrize("name", ["turbowan_t2v_ksampler", "turbowan_i2v_a14b"])
def test_a_batch_of_two_is_two_different_videos(server, small, name):
    frames = _frames(server, small(name, batch_size=2))
    assert len(frames) == 18 and not _same(frames[:9], frames[9:])


@pytest.mark.parametrize("name", ["turbowan_t2v_ksampler", "turbowan_t2v_turbo_sampler"])
def test_interrupt_stops_within_a_step_and_the_next_prompt_is_right(server, small, name):
    before = _latent(server, small(name, seed=7))
    # 5400 tokens: a step takes a second or two, so the request arrives in its middle
    prompt = small(name, 480, 320, 33, seed=8)

    def interrupt(message):
        if message["type"] == "progress" and message["data"]["value"] == 1:
            host.post(server, "/interrupt", {})

    run = host.run(server, prompt, interrupt)
    assert run.status == "execution_interrupted"
    # the step it arrives in does not finish; one more is allowed for a request that a busy machine delivers late
    assert run.progress(_node(prompt, *SAMPLERS)) in ([1], [1, 2])
    _free(server)
    assert torch.equal(before, _latent(server, small(name, seed=7)))


def test_nine_steps_are_sampled_with_a_warning_and_too_many_are_an_error(server, small):
    for name in ("turbowan_t2v_turbo_sampler", "turbowan_t2v_ksampler"):
        before = server.log.count("4 are enough")
        prompt = small(name, steps=9)
        run = host.run(server, prompt)
        assert run.status == "execution_success", run.error
        assert run.progress(_node(prompt, *SAMPLERS)) == list(range(1, 10))
        shown = json.dumps([m["data"] for m in run.messages if m["type"] == "executed"])
        assert (
            ("4 are enough" in shown)
            if name.endswith("turbo_sampler")
            else server.log.count("4 are enough") == before + 1
        )
    run = host.run(server, small("turbowan_t2v_turbo_sampler", steps=101))
    assert run.status == "refused" and "bigger than max" in run.error  # TurboSampler's own limit, before running
    run = host.run(server, small("turbowan_t2v_ksampler", steps=101))
    assert run.status == "execution_error"
    assert run.messages[-1]["data"]["node_type"] == "KSampler"
    assert re.search(r"100\b.*101\b", run.error) and "steps" in run.error, run.error
    _is_healthy(server, small)


@pytest.mark.parametrize("file", ["truncated.pth", "malicious.pth", "wan2.1_t2v_14B_bf16.safetensors"])
def test_a_wrong_file_makes_its_node_red_before_anything_runs(server, small, file):
    # a text-to-video model as the low-noise expert is a sound file in the wrong place: TurboSampler has to say so
    name = "turbowan_i2v_a14b" if file.startswith("wan2.1") else "turbowan_t2v_turbo_sampler"
    prompt = small(name)
    loader = [number for number, node in prompt.items() if node["class_type"] == "TurboLoader"][-1]
    prompt[loader]["inputs"]["model_name"] = file
    run = host.run(server, prompt)
    assert run.status == "refused"
    ((_, failed),) = run.refusal["node_errors"].items()
    assert failed["class_type"] == ("TurboSampler" if name.endswith("a14b") else "TurboLoader"), failed
    (error,) = failed["errors"]
    assert file in error["details"] and str(server.base) not in error["details"]
    assert not (server.base / "owned").exists(), "the pickle ran its code"
    _is_healthy(server, small)


def test_a_fault_inside_a_node_is_one_line_that_asks_for_a_report(server, small):
    inputs = {"source": "TurboWan2.1-T2V-1.3B-480P.pth", "format": "bf16", "filename": "fault", "overwrite": False}
    run = host.run(server, {"1": {"class_type": "TurboConvert", "inputs": inputs}})
    assert run.status == "execution_error"
    assert run.messages[-1]["data"]["exception_type"] == "TurboError"
    line = run.error.strip()
    assert line.startswith("TurboConvert: this should not have happened (KeyError: 'a fault of ours')"), line
    assert "report it" in line and line.isprintable() and "custom_nodes" not in line
    assert "in _rewrite" in server.log, "the log says where"
    _is_healthy(server, small)


def test_a_file_that_is_not_there_is_refused_before_running(server, small):
    run = host.run(server, small("turbowan_t2v_turbo_sampler", model_name="nowhere.pth"))
    assert run.status == "refused" and "nowhere.pth" in run.error


def test_both_copies_load_quickly_and_without_a_warning(server, object_info):
    lines = re.findall(r"([\d.]+) seconds(?: \(IMPORT FAILED\))?: .*custom_nodes[/\\](\S+)", server.log)
    times = {name: float(seconds) for seconds, name in lines}
    assert set(times) == set(serving.COPIES), server.log
    assert sum(times.values()) < 5, times  # by the clock, beside other runs
    started = re.sub(r"\x1b\[[\d;]*m", "", server.log.split("Starting server")[0])
    bad = [line for line in started.splitlines() if re.search(r"WARN|ERROR|Traceback|FAILED|Cannot import", line)]
    assert not [line for line in bad if "turbo" in line.lower()], bad
    assert not OURS - set(object_info)
    assert {object_info[name]["python_module"].split(".")[-1] for name in OURS} <= set(serving.COPIES)
    assert object_info["KSampler"]["input"]["required"]["scheduler"][0].count("turbo_rcm") == 1


def test_the_recorded_object_info_is_what_this_host_says(object_info):
    live, recorded = workflow_api.recordable(object_info), workflow_api.recorded_object_info()
    assert set(live) == set(recorded), "run tests/tools/record_object_info.py against a server"
    for name, node in live.items():
        if workflow_api.is_ours(node):
            assert node == recorded[name], f"{name} changed: run tests/tools/record_object_info.py against a server"


@pytest.mark.parametrize("copy", serving.COPIES)
def test_blueprints_are_served_to_the_node_library(server, copy):
    served = host.get_json(server, "/global_subgraphs")
    ours = {entry["name"]: i for i, entry in served.items() if entry["info"]["node_pack"] == f"custom_nodes.{copy}"}
    assert set(ours) == set(workflow_api.BLUEPRINTS)
    for name, number in ours.items():
        assert json.loads(host.get_json(server, f"/global_subgraphs/{number}")["data"]) == workflow_api.blueprint(name)


@pytest.mark.parametrize("copy", serving.COPIES)
def test_templates_thumbnails_and_help_are_where_the_page_looks_for_them(server, copy):
    assert sorted(host.get_json(server, "/workflow_templates")[copy]) == workflow_api.names()
    for name in workflow_api.names():
        status, picture = host.get(server, f"/api/workflow_templates/{copy}/{name}.jpg")
        assert status == 200 and picture[:2] == b"\xff\xd8" and len(picture) < 150_000, name
    for name in OURS:
        status, text = host.get(server, f"/extensions/{copy}/docs/{name}.md")
        assert status == 200 and text.startswith(b"# "), f"{name}: no help, is WEB_DIRECTORY set in __init__.py?"


def _queue(server, folder, prompts, **changes):
    """queue_prompts.py as a person runs it, on the API file of a workflow; (what it says, its exit code)."""
    stored = json.loads((workflow_api.API / "turbowan_t2v_ksampler.json").read_text("utf-8"))
    workflow, lines = folder / "workflow.json", folder / "prompts.txt"
    workflow.write_text(json.dumps(workflow_api.for_tiny_models(stored, **changes)), "utf-8")
    lines.write_text("\n".join(prompts), "utf-8")
    script = host.PACK / "workflows" / "api" / "queue_prompts.py"
    command = [sys.executable, script, workflow, lines, "-o", folder / "clips", "--server", server.url]
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=120)
    return done.stdout + done.stderr, done.returncode


def test_a_script_queues_prompts_and_fetches_the_clips(server, tmp_path):
    prompts = ['a red fox, "quoted"', "", "빨간 여우"]
    said, code = _queue(server, tmp_path, prompts)
    assert code == 0 and "2/2 " in said, said
    videos = [_video(tmp_path / "clips" / f"{name}_0.mp4") for name in ("0000", "0001")]
    assert [video[:4] for video in videos] == [(80, 48, 9, 16.0)] * 2 and not _same(videos[0][-1], videos[1][-1])
    asked = [entry["prompt"][2] for entry in list(host.get_json(server, "/history").values())[-2:]]
    text, sampler = _node(asked[0], "CLIPTextEncode"), _node(asked[0], "KSampler")
    assert [prompt[text]["inputs"]["text"] for prompt in asked] == [prompts[0], prompts[2]]
    assert [prompt[sampler]["inputs"]["seed"] for prompt in asked] == [0, 1]


def test_a_script_tells_of_a_clip_that_was_taken_out_of_the_queue(monkeypatch, tmp_path, capsys):
    """It waited for ever. And of two parts of a clip both get the prompt."""
    script = _script()
    asked = []

    def ask(address, data=None):
        asked.append((address, data))
        answers = {"/prompt": {"prompt_id": "p"}, "/queue": {"queue_running": [], "queue_pending": []}}
        return json.dumps(next((a for end, a in answers.items() if address.endswith(end)), {})).encode()

    monkeypatch.setattr(script, "ask", ask)
    (tmp_path / "prompts.txt").write_text("a fox")
    workflow = workflow_api.API / "turbowan_long_chained.json"
    monkeypatch.setattr(sys, "argv", ["", str(workflow), str(tmp_path / "prompts.txt"), "-o", str(tmp_path / "clips")])
    assert script.main() == 1 and "failed: taken out of the queue: a fox" in capsys.readouterr().out
    texts = [node["inputs"]["text"] for node in asked[0][1]["prompt"].values() if "text" in node["inputs"]]
    assert texts.count("a fox") == 2


def _script():
    spec = importlib.util.spec_from_file_location("queue_prompts", workflow_api.API / "queue_prompts.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_script_tells_what_the_server_refuses_and_what_fails(server, tmp_path):
    said, code = _queue(server, tmp_path, ["a fox"], model_name="nowhere.pth")
    assert code == 1 and "nowhere.pth was not found" in said and "Traceback" not in said
    said, code = _queue(server, tmp_path, ["a fox", "a boat"], steps=101)
    assert code == 1 and said.count("failed: ") == 2 and "4" in said, said
    server = SimpleNamespace(url="http://127.0.0.1:9")
    said, code = _queue(server, tmp_path, ["a fox"])
    assert code == 1 and "is ComfyUI running there?" in said and "Traceback" not in said


def test_a_script_tells_files_that_it_cannot_use(tmp_path):
    workflow = host.PACK / "workflows" / "turbowan_t2v_ksampler.json"
    api, none = workflow_api.API / workflow.name, tmp_path / "none.txt"
    for given, words in (
        ((workflow, none), "is no workflow in the API form"),
        ((api, none), "none.txt cannot be read"),
    ):
        command = [sys.executable, workflow_api.API / "queue_prompts.py", *given]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
