"""The shipped workflow files: sound as JSON graphs, complete, and readable. Needs neither a host nor a browser."""

import itertools
import json
import re

import pytest

from tests.helpers import workflow_api
from turbo_core import tinywan

NAMES = workflow_api.names()
SHIPPED = {  # and the frames that each makes
    "00_start_here": 33,
    "01_start_here_image": 33,
    "turbowan_compare": 81,
    "turbowan_finish_video": 161,
    "turbowan_first_last_frame": 81,
    "turbowan_i2v_a14b": 81,
    "turbowan_long_chained": 161,
    "turbowan_long_windows": 161,
    "turbowan_lora": 81,
    "turbowan_low_memory": 81,
    "turbowan_many_prompts": 81,
    "turbowan_t2v_14b_720p": 81,
    "turbowan_t2v_ksampler": 81,
    "turbowan_t2v_turbo_sampler": 81,
    "turbowan_video_to_video": 81,
    "wan_stock_faster": 81,
}
MATCHING = "COMFY_MATCHTYPE_V3"  # an output of the type of what is connected; here lists of prompts
WEIGHT_FOLDERS = {"diffusion_models", "frame_interpolation", "loras", "text_encoders", "vae"}


@pytest.fixture(scope="module")
def schema():
    return workflow_api.recorded_object_info()


INNER = {name: graph for name in NAMES for graph in workflow_api.inner_graphs(workflow_api.load(name))}


@pytest.fixture(params=NAMES)
def workflow(request):
    return workflow_api.load(request.param)


@pytest.fixture(params=[*NAMES, *(f"inside {name}" for name in INNER)])
def graph(request):
    """What a person sees at once: a workflow as it opens, or the inside of its one node."""
    if request.param in NAMES:
        return workflow_api.load(request.param)
    inner = INNER[request.param.removeprefix("inside ")]
    return inner | {"last_node_id": inner["state"]["lastNodeId"], "last_link_id": inner["state"]["lastLinkId"]}


def _nodes(workflow):
    return {node["id"]: node for node in workflow["nodes"]}


def _notes(workflow):
    return "\n".join(node["widgets_values"][0] for node in workflow["nodes"] if node["type"] in workflow_api.NOTES)


def test_all_are_there_each_with_its_thumbnail():
    assert list(SHIPPED) == NAMES
    for name in NAMES:
        picture = (workflow_api.FOLDER / f"{name}.jpg").read_bytes()  # the page looks for .jpg, for no other
        assert picture[:2] == b"\xff\xd8" and len(picture) < 150_000


def test_numbers_are_unique_and_the_counters_ahead_of_them(graph):
    nodes, links = [node["id"] for node in graph["nodes"]], [link[0] for link in graph["links"]]
    assert len(set(nodes)) == len(nodes) and max(nodes) <= graph["last_node_id"]
    assert len(set(links)) == len(links) and max(links) <= graph["last_link_id"]


def test_links_agree_with_both_of_their_ends(graph):
    nodes = _nodes(graph)
    for number, source, output, target, slot, kind in graph["links"]:
        start = graph["inputs"][output] if source == -10 else nodes[source]["outputs"][output]
        end = graph["outputs"][slot] if target == -20 else nodes[target]["inputs"][slot]
        assert number in start.get("links", start.get("linkIds"))
        assert number == end["link"] if target != -20 else number in end["linkIds"]
        assert start["type"] == end["type"] == kind
    numbers = {link[0] for link in graph["links"]}
    for node in graph["nodes"]:
        assert {slot.get("link") for slot in node["inputs"]} - {None} <= numbers, node["type"]
        assert {link for slot in node["outputs"] for link in slot["links"] or ()} <= numbers, node["type"]


def test_a_node_that_stands_for_a_graph_has_its_inputs_and_outputs(workflow):
    kinds = {inner["id"]: inner for inner in workflow_api.inner_graphs(workflow)}
    for node in workflow["nodes"]:
        if (inner := kinds.pop(node["type"], None)) is None:
            continue
        for side in ("inputs", "outputs"):
            faces = [
                [(slot["name"], slot["type"], slot.get("label")) for slot in whole[side]] for whole in (node, inner)
            ]
            assert faces[0] == faces[1]
        typed = [slot for slot in node["inputs"] if "widget" in slot]
        assert len(node["widgets_values"]) == len(typed) == len(node["properties"]["proxyWidgets"])
        inside = _nodes(inner)
        for (number, name), slot, value in zip(node["properties"]["proxyWidgets"], typed, node["widgets_values"]):
            (link,) = next(given for given in inner["inputs"] if given["name"] == slot["name"])["linkIds"]
            _, _, _, target, place, _ = next(found for found in inner["links"] if found[0] == link)
            assert (str(target), inside[target]["inputs"][place]["name"]) == (number, name)
            assert value in inside[target]["widgets_values"], "the inside opens with another value"
    assert not kinds, "a graph that no node stands for"


def test_nodes_are_known_and_their_slots_and_widgets_are_those_of_the_schema(workflow, schema):
    laid_open, _ = workflow_api.flat(workflow)
    unknown = {node["type"] for node in laid_open} - set(schema) - set(workflow_api.NOTES)
    assert not unknown
    prompt = workflow_api.to_api(workflow, schema)  # raises for too few or too many widget values
    for number, node in prompt.items():
        inputs = schema[node["class_type"]]["input"]
        for name, (kind, *_) in inputs["required"].items():
            found = [given for given in node["inputs"] if given.split(".")[0] == name]
            assert found if kind == workflow_api.GROWING else name in node["inputs"], (node["class_type"], name)
        for name, value in node["inputs"].items():
            _check_value(node["class_type"], name, value, inputs)
        saved = [slot["type"] for slot in next(n for n in laid_open if str(n["id"]) == number)["outputs"]]
        kinds = schema[node["class_type"]]["output"]
        assert len(saved) == len(kinds)
        assert all(one in (kind, "STRING") if kind == MATCHING else one == kind for one, kind in zip(saved, kinds))


def _check_value(kind, name, value, inputs):
    spec = inputs["required"].get(name) or inputs.get("optional", {}).get(name)
    if isinstance(value, list) or spec is None or workflow_api.FILES.get(kind) == name:
        return  # a link, a part of a choice, a file of the user's machine
    options = spec[1] if len(spec) > 1 else {}
    if isinstance(spec[0], list):
        assert value in spec[0], (kind, name)
    elif spec[0] == "COMBO":
        assert value in options["options"], (kind, name)
    elif spec[0] in ("INT", "FLOAT"):
        assert options["min"] <= value <= options.get("max", value), (kind, name)


def _step(workflow, node):
    """Index of the group a node lies in, or None. Groups are numbered in reading order."""
    (left, top), (width, height) = node["pos"], node["size"]
    for index, (x, y, w, h) in enumerate(group["bounding"] for group in workflow["groups"]):
        if x <= left and y <= top - 30 and left + width <= x + w and top + height <= y + h:
            return index
    return None


def test_nothing_is_muted_or_bypassed_and_nodes_sit_in_numbered_groups(graph):
    for node in graph["nodes"]:
        assert node["mode"] == 0, node["type"]
        assert _step(graph, node) is not None or node["type"] in workflow_api.NOTES, node["type"]
    titles = [group["title"][:2] for group in graph["groups"]]
    assert titles == [f"{i + 1}." for i in range(len(titles))]


def test_nothing_lies_on_top_of_anything(graph):
    boxes = [(n["type"], *n["pos"], *n["size"]) for n in graph["nodes"]]
    groups = [(g["title"], *g["bounding"]) for g in graph["groups"]]
    for a, b in itertools.chain(itertools.combinations(boxes, 2), itertools.combinations(groups, 2)):
        across = a[1] < b[1] + b[3] and b[1] < a[1] + a[3]
        title = 0 if a in groups else 30  # a node's title is drawn above its position
        assert not (across and a[2] - title < b[2] + b[4] and b[2] - title < a[2] + a[4]), (a, b)


def test_links_lead_to_the_same_or_a_later_step(graph):
    nodes = _nodes(graph)
    for _, source, _, target, _, _ in graph["links"]:
        if min(source, target) < 0:
            continue
        start, end = (_step(graph, nodes[number]) for number in (source, target))
        assert start <= end, (nodes[source]["type"], nodes[target]["type"])


@pytest.mark.parametrize("name", [name for name in NAMES if name not in workflow_api.COMES_ALONG])
def test_the_note_names_every_file_with_its_folder_and_where_it_comes_from(name):
    workflow = workflow_api.load(name)
    notes, files = _notes(workflow), workflow_api.files(workflow)
    assert {file for _, file in files} == workflow_api.asked_for(workflow)
    assert {folder for folder, _ in files} <= WEIGHT_FOLDERS
    for folder, file in files:
        assert f"  {folder}/\n" in notes and f"    {file}\n" in notes
        assert re.search(rf"\[{re.escape(file)}\]\(https://huggingface\.co/[\w./-]+/{re.escape(file)}\)", notes)
    for said in ("16 fps", "81 frames", "4n + 1"):
        assert said in notes


@pytest.mark.parametrize("name", workflow_api.COMES_ALONG)
def test_a_workflow_without_downloads_asks_for_files_that_come_along(name):
    """No shell, no download: the pack has the host search models/tinywan, see tests/host/test_tinywan.py."""
    workflow = workflow_api.load(name)
    notes = _notes(workflow)
    files = {path.name: path for path in tinywan.FOLDER.glob("*/*.safetensors")}
    size = sum(path.stat().st_size for path in files.values())
    assert len(files) == 7 and f"seven files, {size / 1e6:.0f} MB" in notes
    assert workflow_api.asked_for(workflow) <= set(files) and "python" not in notes
    assert not workflow_api.files(workflow) and "http" not in json.dumps(workflow), "the page would offer a download"


def test_notes_call_nodes_by_their_titles(workflow, schema):
    titles = {name: node["display_name"] for name, node in schema.items() if node.get("display_name")}
    renamed = [name for name, title in titles.items() if title != name and " " in title]
    assert "CLIPLoader" in renamed
    assert not [name for name in renamed if re.search(rf"\b{name}\b", _notes(workflow))]


def test_links_offered_for_download_are_those_of_the_note(workflow):
    models = [model for node in workflow_api.flat(workflow)[0] for model in node["properties"].get("models", ())]
    assert all(model["url"] in _notes(workflow) for model in models)


def _length(prompt, value):
    """Frames of a video: a number, or the seconds of the TurboSize that it comes from."""
    return value if isinstance(value, int) else round(prompt[value[0]]["inputs"]["seconds"] * 16) + 1


@pytest.mark.parametrize("name", NAMES)
def test_it_makes_the_listed_frames_at_sixteen_a_second(schema, name):
    prompt = workflow_api.to_api(workflow_api.load(name), schema)
    nodes = [node["inputs"] for node in prompt.values()]
    cut = [node["inputs"] for node in prompt.values() if node["class_type"] == "ImageFromBatch"]
    sized = [inputs for inputs in nodes if "length" in inputs and "width" in inputs]
    if not sized and not cut:  # it takes a whole video: 81 frames, and others between them
        (times,) = [inputs["multiplier"] for inputs in nodes if "multiplier" in inputs]
        (rate,) = [inputs["fps"] for inputs in nodes if "fps" in inputs]
        assert rate == 16 * times and SHIPPED[name] == 80 * times + 1
        return
    lengths = [_length(prompt, inputs["length"]) for inputs in sized or cut]
    dropped = sum(inputs.get("batch_index") == 1 for inputs in nodes)  # the frame that two parts share
    assert sum(lengths) - dropped == SHIPPED[name]
    assert max(lengths) == min(SHIPPED[name], 81) or any(inputs.get("context_length") == 81 for inputs in nodes)
    (rate,) = [node["inputs"]["fps"] for node in prompt.values() if node["class_type"] == "CreateVideo"]
    from_video = isinstance(rate, list) and prompt[rate[0]]["class_type"] == "GetVideoComponents"
    assert rate == 16 or from_video


def test_tiles_never_cut_time(schema):
    # Wan's VAE carries features from frame to frame: a piece decoded by itself starts with one frame where four belong
    for name in NAMES:
        for node in workflow_api.to_api(workflow_api.load(name), schema).values():
            if node["class_type"] == "VAEDecodeTiled":
                assert node["inputs"]["temporal_size"] >= SHIPPED[name]


def test_turbowan_workflows_sample_without_guidance_on_the_rcm_schedule(schema):
    for name in NAMES:
        for node in workflow_api.to_api(workflow_api.load(name), schema).values():
            if node["class_type"] == "KSampler":
                given = node["inputs"]
                assert (given["cfg"], given["steps"] / given["denoise"], given["sampler_name"]) == (1, 4, "lcm")
                assert (node["inputs"]["scheduler"] == "turbo_rcm") == name.startswith("turbowan")


def test_the_api_files_are_the_workflows():
    cure = "run python -m tests.tools.record_api"
    assert sorted(path.stem for path in workflow_api.API.glob("*.json")) == NAMES, cure
    for name in NAMES:
        stored = json.loads((workflow_api.API / f"{name}.json").read_text("utf-8"))
        assert stored == workflow_api.exported(name), f"{name}: {cure}"


def test_the_blueprints_are_nodes_of_the_workflows():
    cure = "run python -m tests.tools.record_api"
    assert {path.stem for path in workflow_api.SUBGRAPHS.glob("*.json")} == set(workflow_api.BLUEPRINTS), cure
    for name in workflow_api.BLUEPRINTS:
        stored = json.loads((workflow_api.SUBGRAPHS / f"{name}.json").read_text("utf-8"))
        assert stored == workflow_api.blueprint(name), f"{name}: {cure}"


def test_the_start_workflows_open_in_pages_without_subgraphs_too():
    assert not set(INNER) & set(workflow_api.COMES_ALONG)


def test_no_path_of_a_machine_and_no_trace_of_other_packs(workflow):
    text = json.dumps(workflow)
    assert not re.search(r"/home/|/root|/tmp|/work/|[A-Z]:\\\\|localhost|127\.0\.0\.1", text)
    packs = {
        n["properties"].get("cnr_id") for n in workflow_api.flat(workflow)[0] if n["type"] not in workflow_api.NOTES
    }
    assert packs <= {"comfy-core", "comfyui-turbowan"}
