"""The shipped workflows in ComfyUI's page: nothing missing, nothing on top of each other, the prompt we expect."""

import copy
import itertools
import json

import pytest

from tests.helpers import comfyui as host
from tests.helpers import workflow_api

pytestmark = pytest.mark.page

# What a person would see, read from the page: stores are Pinia's, boxes are in the units of the canvas.
LOOK = """async () => {
  const stores = document.querySelector('#vue-app').__vue_app__.config.globalProperties.$pinia._s;
  const nodes = app.graph.nodes;
  return {
    missing: (stores.get('missingNodesError').missingNodesError?.nodeTypes ?? []).map(n => n.type ?? n),
    files: (stores.get('missingModel').missingModelCandidates ?? [])
      .filter(f => f.isMissing).map(f => [f.directory, f.name, f.url]),
    unknown: nodes.filter(n => !(n.type in LiteGraph.registered_node_types)).map(n => n.type),
    failed: nodes.filter(n => n.has_errors).map(n => n.type),
    links: [...app.graph.links.values()].filter(
      l => app.graph.getNodeById(l.origin_id)?.outputs[l.origin_slot]?.links?.includes(l.id)
        && app.graph.getNodeById(l.target_id)?.inputs[l.target_slot]?.link === l.id).map(l => l.id),
    values: Object.fromEntries(nodes.map(n => [n.id, (n.widgets ?? []).filter(w => w.serialize !== false)
      .map(w => w.value)])),
    boxes: nodes.map(n => [n.id, n.pos[0], n.pos[1] - 30, n.pos[0] + n.size[0], n.pos[1] + n.size[1]]),
    prompt: (await app.graphToPrompt()).output,
  };
}"""
# Boxes of the nodes as the newer, HTML-drawn kind of node has them, which are taller than the canvas-drawn ones.
DRAWN = """() => [...document.querySelectorAll('[data-node-id]')]
  .map(element => [element.dataset.nodeId, element.getBoundingClientRect()])
  .map(([id, box]) => [+id, box.left, box.top, box.right, box.bottom])"""
FIT = """() => {
  const boxes = app.graph.nodes.map(n => [n.pos[0], n.pos[1], n.pos[0] + n.size[0], n.pos[1] + n.size[1]]);
  const [left, top] = [0, 1].map(i => Math.min(...boxes.map(b => b[i])));
  const [right, bottom] = [2, 3].map(i => Math.max(...boxes.map(b => b[i])));
  const view = app.canvas.ds;
  view.scale = Math.min((innerWidth - 100) / (right - left), (innerHeight - 150) / (bottom - top));
  view.offset[0] = 60 / view.scale - left;
  view.offset[1] = 100 / view.scale - top;
  app.canvas.setDirty(true, true);
}"""


def _look(page, workflow):
    page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
    return page.evaluate(LOOK)


def _overlaps(boxes):
    pairs = itertools.combinations(boxes, 2)
    return [(a[0], b[0]) for a, b in pairs if a[1] < b[3] and b[1] < a[3] and a[2] < b[4] and b[2] < a[4]]


@pytest.mark.parametrize("name", workflow_api.names())
def test_a_workflow_opens_whole(page, name):
    workflow = workflow_api.load(name)
    seen = _look(page, workflow)
    assert seen["missing"] == [] and seen["unknown"] == []
    assert sorted(seen["links"]) == sorted(link[0] for link in workflow["links"])
    for node in workflow["nodes"]:
        assert seen["values"][str(node["id"])] == node.get("widgets_values", []), node["type"]
    assert _overlaps(seen["boxes"]) == []
    # also proves the converter that the server tests run the workflows with
    prompt = {number: {k: v for k, v in node.items() if k != "_meta"} for number, node in seen["prompt"].items()}
    for node in prompt.values():  # the picture in Load Video, once it has come
        node["inputs"].pop("video-preview", None)
    assert prompt == workflow_api.to_api(workflow, workflow_api.recorded_object_info())
    assert page.errors == []


@pytest.mark.parametrize("name", workflow_api.names())
def test_the_page_names_the_files_to_download_and_where_they_go(stub_page, name):
    workflow = workflow_api.load(name)
    files = _look(stub_page, workflow)["files"]
    if name in workflow_api.COMES_ALONG:
        assert {file for _, file, _ in files} == workflow_api.asked_for(workflow)
        assert not any(url for _, _, url in files)
    else:
        assert {(folder, file) for folder, file, _ in files} == workflow_api.files(workflow)
        assert all(url.startswith("https://huggingface.co/") and file in url for _, file, url in files)


@pytest.mark.parametrize("name", workflow_api.names())
def test_no_file_is_missing_where_all_are_in_place(host_page, name):
    seen = _look(host_page, workflow_api.load(name))
    assert seen["files"] == [] and seen["failed"] == []


@pytest.mark.parametrize("name", workflow_api.names())
def test_the_newer_kind_of_node_does_not_overlap_either(stub_page, name):
    setting = "value => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', value)"
    stub_page.evaluate(setting, True)
    workflow = workflow_api.load(name)
    try:
        stub_page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
        stub_page.evaluate(FIT)
        drawn = f"document.querySelectorAll('[data-node-id]').length >= {len(workflow['nodes'])}"
        stub_page.wait_for_function(drawn, timeout=60_000)
        stub_page.wait_for_timeout(300)  # widgets settle in the frames after that
        boxes = stub_page.evaluate(DRAWN)
    finally:
        stub_page.evaluate(setting, False)
    assert {box[0] for box in boxes} == {node["id"] for node in workflow["nodes"]}
    assert _overlaps(boxes) == []


def test_notes_of_the_start_are_in_the_language_of_the_page(host_page, language="ko"):
    translated = json.loads((host.PACK / "web" / "notes.json").read_text("utf-8"))[language]
    choose = "language => app.extensionManager.setting.set('Comfy.Locale', language)"
    notes = "() => app.graph.nodes.filter(n => n.type === 'MarkdownNote').map(n => n.widgets[0].value)"
    host_page.evaluate(choose, language)
    host_page.wait_for_timeout(2500)  # the page reads the nodes anew and opens its graph again
    try:
        host_page.evaluate("workflow => app.loadGraphData(workflow)", workflow_api.load("00_start_here"))
        host_page.wait_for_timeout(1500)
        shown = host_page.evaluate(notes)
        assert len(shown) == 3 and set(shown) <= set(translated.values())
        host_page.evaluate("workflow => app.loadGraphData(workflow)", workflow_api.load("turbowan_lora"))
        host_page.wait_for_timeout(500)
        assert "## Files" in host_page.evaluate(notes)[0], "others stay as they are"
    finally:
        host_page.evaluate(choose, "en")
        host_page.wait_for_timeout(2500)


def test_a_missing_node_would_be_noticed(stub_page):
    workflow = copy.deepcopy(workflow_api.load("turbowan_t2v_ksampler"))
    next(node for node in workflow["nodes"] if node["type"] == "TurboLoader")["type"] = "NoSuchLoader"
    seen = _look(stub_page, workflow)
    assert seen["missing"] == seen["unknown"] == ["NoSuchLoader"]


ADDED = """name => app.graph.nodes.some(n => n.subgraph && n.title === name)"""


@pytest.mark.parametrize("name", workflow_api.BLUEPRINTS)
def test_a_node_of_the_library_stands_for_a_whole_workflow(host_page, name):
    """Found as a person does: a double click on the empty canvas, a name, Enter."""
    host_page.keyboard.press("Escape")  # what lies over the canvas from before
    host_page.evaluate("() => app.graph.clear()")
    host_page.wait_for_timeout(300)
    host_page.mouse.dblclick(900, 500)
    # on a busy machine the field opens late, and what is typed before is lost
    host_page.wait_for_function("() => document.activeElement.tagName === 'INPUT'", timeout=60_000)
    host_page.keyboard.type(name, delay=5)
    host_page.get_by_text("Blueprint", exact=True).first.wait_for(timeout=60_000)
    host_page.keyboard.press("Enter")
    host_page.wait_for_function(ADDED, arg=name, timeout=60_000)
    prompt = host_page.evaluate("async () => (await app.graphToPrompt()).output")
    workflow = workflow_api.exported(workflow_api.BLUEPRINTS[name])
    outside = {"SaveVideo", "LoadImage"}
    assert _typed(prompt) == _typed({n: node for n, node in workflow.items() if node["class_type"] not in outside})
    assert host_page.errors == []


def _typed(prompt):
    """[(title, {input: value})] of a prompt, without links, which are numbered otherwise."""
    return sorted(
        (node["_meta"]["title"], sorted((k, v) for k, v in node["inputs"].items() if not isinstance(v, list)))
        for node in prompt.values()
    )


def _made_small(workflow):
    """With the loader that takes a small text encoder, and a size typed into the latent."""
    (graph,) = workflow["definitions"]["subgraphs"]
    (outer,) = (node for node in workflow["nodes"] if node["type"] == graph["id"])
    (loader, latent) = (
        next(node for node in graph["nodes"] if node["type"] == kind)
        for kind in ("CLIPLoader", "EmptyHunyuanLatentVideo")
    )
    loader.update(type="TurboTextEncoderLoader", widgets_values=loader["widgets_values"][:1])
    loader["inputs"] = [{**loader["inputs"][0], "name": "text_encoder", "widget": {"name": "text_encoder"}}]
    proxies = outer["properties"]["proxyWidgets"]
    outer["properties"]["proxyWidgets"] = [[n, "text_encoder" if w == "clip_name" else w] for n, w in proxies]
    latent["widgets_values"] = [80, 48, 9, 1]
    gone = {slot["link"] for slot in latent["inputs"]}
    graph["links"] = [link for link in graph["links"] if link["id"] not in gone]
    for node in graph["nodes"]:
        for slot in node["outputs"]:
            slot["links"] = [link for link in slot["links"] or () if link not in gone]
    for slot in latent["inputs"]:
        slot["link"] = None
    return workflow


def test_a_workflow_runs_from_the_page(host_page):
    """Run button to video, through the one node that stands for the graph, which shows what the sampler in it says."""
    workflow = _made_small(workflow_api.load("turbowan_t2v_turbo_sampler"))
    assert _look(host_page, workflow)["missing"] == []
    before = set(host.get_json(host_page.server, "/history"))  # of tests that ran earlier
    host_page.evaluate("() => app.queuePrompt(0, 1)")
    outputs = host_page.server.base / "output" / "video"
    for _ in range(1200):
        history = host.get_json(host_page.server, "/history")
        if set(history) > before:
            break
        host_page.wait_for_timeout(100)
    (entry,) = (entry for number, entry in history.items() if number not in before)
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"][-1]
    assert [path.suffix for path in outputs.iterdir()] == [".mp4"]
    host_page.wait_for_function(
        "() => app.graph.nodes.find(n => n.subgraph).widgets.some(w => w.value?.startsWith?.('4 steps in '))"
    )
