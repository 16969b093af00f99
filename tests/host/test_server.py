"""The pack in a real ComfyUI server, over HTTP: shipped workflows, previews, interrupt, errors, a second copy."""

import pickle
import re

import pytest

from .. import workflow_api
from . import server as host
from .conftest import find_comfyui

pytestmark = pytest.mark.host
COPIES = ("ComfyUI-TurboWan", "TurboWan-second-copy")
SAMPLERS = {"KSampler", "TurboSampler"}
OURS = {
    "TurboLoader",
    "QuantizeW8A8",
    "SparseLowBitAttention",
    "TurboScheduler",
    "TurboSampler",
    "TurboTextEncoderLoader",
}


@pytest.fixture(scope="session")
def server(tiny, tmp_path_factory):
    """One server for all tests, with two copies of the pack: whatever works here also works beside another copy."""
    base = host.make_base(tmp_path_factory.mktemp("base"), tiny, COPIES)
    _write_bad_files(base / "models" / "diffusion_models", base)
    running = host.start(find_comfyui(), base)
    yield running
    host.stop(running)


class _Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def _write_bad_files(folder, base):
    whole = next(folder.glob("*.pth")).read_bytes()
    (folder / "truncated.pth").write_bytes(whole[: len(whole) // 2])
    (folder / "malicious.pth").write_bytes(pickle.dumps({"blocks.0.ffn.0.weight": _Payload(base / "owned")}))


@pytest.fixture(scope="session")
def object_info(server):
    return host.get_json(server, "/object_info")


@pytest.fixture
def small(object_info):
    """Makes the prompt of a shipped workflow, at a size that a CPU renders in a second."""

    def make(name, width=80, height=48, length=9, **changes):
        prompt = workflow_api.to_api(workflow_api.load(name), object_info)
        for node in prompt.values():
            inputs = node["inputs"]
            if node["class_type"] == "CLIPLoader":  # takes no umT5 but the full one
                node.update(class_type="TurboTextEncoderLoader", inputs={"text_encoder": inputs["clip_name"]})
            if isinstance(inputs.get("width"), int):
                inputs.update(width=width, height=height)
            if "length" in inputs:
                inputs["length"] = length
            if "megapixels" in inputs:
                inputs["megapixels"] = 0.01  # the test picture of 160x96 becomes 128x80
            inputs.update({key: value for key, value in changes.items() if key in inputs})
        return prompt

    return make


def _node(prompt, *classes):
    return next(number for number, node in prompt.items() if node["class_type"] in classes)


def _video(path):
    """(width, height, frames, rate, frames as arrays)"""
    av = pytest.importorskip("av")
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(stream)]
        return stream.width, stream.height, len(frames), float(stream.average_rate), frames


def _is_healthy(server, small):
    run = host.run(server, small("turbowan_t2v_turbo_sampler", steps=1))
    assert run.status == "execution_success", run.error


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("turbowan_t2v_ksampler", (80, 48)),
        ("turbowan_t2v_turbo_sampler", (80, 48)),
        ("turbowan_i2v_a14b", (128, 80)),
        ("wan_stock_faster", (80, 48)),
    ],
)
def test_every_shipped_workflow_makes_its_video_with_progress_and_previews(server, small, name, size):
    prompt = small(name)
    run = host.run(server, prompt)
    assert run.status == "execution_success", run.error
    assert run.progress(_node(prompt, *SAMPLERS)) == [1, 2, 3, 4]
    assert len(run.previews) == 4
    assert all(min(host.preview_size(preview)) > 0 for preview in run.previews)
    (path,) = run.videos(server.base)
    width, height, count, rate, frames = _video(path)
    assert (width, height, count, rate) == (*size, 9, 16.0)
    assert frames[0].std() > 1, "the picture is of one colour"


def test_no_shipped_workflow_is_left_out_above():
    marks = test_every_shipped_workflow_makes_its_video_with_progress_and_previews.pytestmark
    cases = next(mark.args[1] for mark in marks if mark.name == "parametrize")
    assert sorted(name for name, _ in cases) == workflow_api.names()


@pytest.mark.parametrize("name", ["turbowan_t2v_ksampler", "turbowan_t2v_turbo_sampler"])
def test_interrupt_stops_within_a_step_and_the_next_prompt_is_right(server, small, name):
    before = _video(host.run(server, small(name, seed=7, filename_prefix="before")).videos(server.base)[0])
    # 5400 tokens: a step takes a second or two, so the request arrives in its middle
    prompt = small(name, 480, 320, 33, seed=8)

    def interrupt(message):
        if message["type"] == "progress" and message["data"]["value"] == 1:
            host.post(server, "/interrupt", {})

    run = host.run(server, prompt, interrupt)
    assert run.status == "execution_interrupted"
    # the step it arrives in does not finish; one more is allowed for a request that a busy machine delivers late
    assert run.progress(_node(prompt, *SAMPLERS)) in ([1], [1, 2])
    host.post(server, "/free", {"unload_models": True, "free_memory": True})  # else the answer comes from the cache
    after = host.run(server, small(name, seed=7, filename_prefix="after"))
    assert after.status == "execution_success" and after.progress(_node(prompt, *SAMPLERS)) == [1, 2, 3, 4]
    frames = _video(after.videos(server.base)[0])[-1]
    assert all((a == b).all() for a, b in zip(before[-1], frames, strict=True))


def test_nine_steps_are_an_error_that_says_what_to_do(server, small):
    run = host.run(server, small("turbowan_t2v_turbo_sampler", steps=9))
    assert run.status == "refused" and "bigger than max" in run.error  # TurboSampler's own limit, before running
    run = host.run(server, small("turbowan_t2v_ksampler", steps=9))
    assert run.status == "execution_error"
    assert run.messages[-1]["data"]["node_type"] == "KSampler"
    assert re.search(r"9\b.*\b4\b|\b4\b.*9\b", run.error) and "steps" in run.error, run.error
    _is_healthy(server, small)


@pytest.mark.parametrize("file", ["truncated.pth", "malicious.pth", "wan2.1_t2v_14B_bf16.safetensors"])
def test_a_wrong_file_is_an_error_of_its_node_that_names_it(server, small, file):
    # a text-to-video model as the low-noise expert is a sound file in the wrong place: TurboSampler has to say so
    name = "turbowan_i2v_a14b" if file.startswith("wan2.1") else "turbowan_t2v_turbo_sampler"
    prompt = small(name)
    loader = [number for number, node in prompt.items() if node["class_type"] == "TurboLoader"][-1]
    prompt[loader]["inputs"]["model_name"] = file
    run = host.run(server, prompt)
    assert run.status == "execution_error"
    failed = run.messages[-1]["data"]
    assert failed["node_type"] == ("TurboSampler" if name.endswith("a14b") else "TurboLoader"), failed
    assert failed["exception_type"].endswith("TurboError") and file in run.error, failed["exception_message"]
    assert not (server.base / "owned").exists(), "the pickle ran its code"
    _is_healthy(server, small)


def test_a_file_that_is_not_there_is_refused_before_running(server, small):
    run = host.run(server, small("turbowan_t2v_turbo_sampler", model_name="nowhere.pth"))
    assert run.status == "refused" and "nowhere.pth" in run.error


def test_both_copies_load_quickly_and_without_a_warning(server, object_info):
    lines = re.findall(r"([\d.]+) seconds(?: \(IMPORT FAILED\))?: .*custom_nodes[/\\](\S+)", server.log)
    times = {name: float(seconds) for seconds, name in lines}
    assert set(times) == set(COPIES), server.log
    assert sum(times.values()) < 2, times
    started = re.sub(r"\x1b\[[\d;]*m", "", server.log.split("Starting server")[0])
    bad = [line for line in started.splitlines() if re.search(r"WARN|ERROR|Traceback|FAILED|Cannot import", line)]
    assert not [line for line in bad if "turbo" in line.lower()], bad
    assert not OURS - set(object_info)
    assert {object_info[name]["python_module"].split(".")[-1] for name in OURS} <= set(COPIES)
    assert object_info["KSampler"]["input"]["required"]["scheduler"][0].count("turbo_rcm") == 1


def test_the_recorded_object_info_is_what_this_host_says(object_info):
    live, recorded = workflow_api.recordable(object_info), workflow_api.recorded_object_info()
    assert set(live) == set(recorded), "run tests/record_object_info.py against a server"
    for name, node in live.items():
        if workflow_api.is_ours(node):
            assert node == recorded[name], f"{name} changed: run tests/record_object_info.py against a server"


@pytest.mark.parametrize("copy", COPIES)
def test_templates_thumbnails_and_help_are_where_the_page_looks_for_them(server, copy):
    assert sorted(host.get_json(server, "/workflow_templates")[copy]) == workflow_api.names()
    for name in workflow_api.names():
        status, picture = host.get(server, f"/api/workflow_templates/{copy}/{name}.jpg")
        assert status == 200 and picture[:2] == b"\xff\xd8" and len(picture) < 150_000, name
    for name in OURS:
        status, text = host.get(server, f"/extensions/{copy}/docs/{name}.md")
        assert status == 200 and text.startswith(b"# "), f"{name}: no help, is WEB_DIRECTORY set in __init__.py?"
