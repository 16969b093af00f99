"""What nodes report, in the page: the whole text in the node, to scroll and to copy, also from the host's cache."""

import shutil

import pytest

from tests.helpers import comfyui as host
from tests.helpers import workflow_api
from tests.helpers.page import opened

pytestmark = pytest.mark.page
SPARSE, DENSE = "TurboWan2.1-T2V-1.3B-480P-quant.pth", "TurboWan2.1-T2V-1.3B-480P.pth"
STOCK = "wan2.1_t2v_14B_bf16.safetensors"
NAME = "\ub3d9\uc601\uc0c1 \U0001f600"  # in Korean, with a space and a face
REPORTING = (
    "TurboDoctor",
    "TurboLoraReport",
    "TurboConvert",
    "TurboMerge",
    "TurboSave",
    "TurboCompare",
    "TurboSampler",
)
BUILD = """([spec, gap]) => {
  app.graph.clear();
  const nodes = {};
  let x = 0;
  for (const [name, type, values, links] of spec) {
    const node = nodes[name] = LiteGraph.createNode(type);
    app.graph.add(node);
    node.pos = [x, 100];
    x += node.size[0] + gap;
    for (const widget of node.widgets ?? []) if (widget.name === 'control_after_generate') widget.value = 'fixed';
    for (const [input, value] of Object.entries(values)) node.widgets.find(w => w.name === input).value = value;
    for (const [input, [source, slot]] of Object.entries(links))
      nodes[source].connect(slot, node, node.inputs.findIndex(i => i.name === input));
  }
}"""
FIELD = """type => {
  const node = app.graph.nodes.find(n => n.type === type);
  const widget = node.widgets.find(w => w.name === 'report');
  return widget ? widget.element.querySelector('textarea').value : '';
}"""
# the middle of the last line, once it is scrolled to, must be the field itself and not what lies on top of it
SHOWN = """type => {
  const node = app.graph.nodes.find(n => n.type === type);
  const view = app.canvas.ds;
  view.scale = 1;
  view.offset[0] = 200 - node.pos[0];
  view.offset[1] = 120 - node.pos[1];
  app.canvas.setDirty(true, true);
  return new Promise(done => setTimeout(() => {
    const text = node.widgets.find(w => w.name === 'report').element.querySelector('textarea');
    text.scrollTop = text.scrollHeight;
    const box = text.getBoundingClientRect();
    const hit = document.elementFromPoint(box.left + 20, box.bottom - 10);
    done({reached: text.scrollTop + text.clientHeight >= text.scrollHeight - 1, onTop: hit === text,
          height: box.height, width: box.width, lines: text.value.split('\\n').length,
          kept: getComputedStyle(text).whiteSpace.includes('pre')});
  }, 700));
}"""


def _graph(mark):
    """[(name, type, values, links)] of every node that reports; mark keeps the files of two runs apart."""
    model, prompt, latent = {"model": ["sparse", 0]}, {"positive": ["text", 0]}, {"latent_image": ["latent", 0]}
    return [
        ["sparse", "TurboLoader", {"model_name": SPARSE}, {}],
        ["dense", "TurboLoader", {"model_name": DENSE}, {}],
        ["clip", "TurboTextEncoderLoader", {"text_encoder": "umt5_xxl_fp8_e4m3fn_scaled.safetensors"}, {}],
        ["text", "CLIPTextEncode", {"text": f"a red circle {mark}"}, {"clip": ["clip", 0]}],
        ["latent", "EmptyHunyuanLatentVideo", {"width": 80, "height": 48, "length": 9}, {}],
        ["sampler", "TurboSampler", {"steps": 1}, model | prompt | latent],
        ["save", "TurboSave", {"filename_prefix": f"diffusion_models/{mark}"}, model],
        ["doctor", "TurboDoctor", {}, model],
        ["lora", "TurboLoraReport", {"lora_name": host.LORAS[0].removeprefix("loras/")}, model],
        ["convert", "TurboConvert",
         {"source": f"{NAME}.pth", "format": "int8_row", "filename": f"{mark} {NAME}"}, {}],
        ["merge", "TurboMerge", {"finetune": "finetune.safetensors", "base": STOCK, "turbo": DENSE,
                                 "filename": f"{mark} merged"}, {}],
        ["compare", "TurboCompare", {"steps": 2},
         {"model_a": ["dense", 0], "model_b": ["sparse", 0]} | prompt | latent],
        ["keep", "SaveLatent", {}, {"samples": ["sampler", 0]}],  # the sampler is no output node
    ]  # fmt: skip


def _run(page):
    before = len(host.get_json(page.server, "/history"))
    page.evaluate("() => app.queuePrompt(0, 1)")
    for _ in range(600):
        history = host.get_json(page.server, "/history")
        if len(history) > before:
            entry = list(history.values())[-1]
            assert entry["status"]["status_str"] == "success", entry["status"]["messages"][-1]
            page.wait_for_timeout(500)
            return entry
        page.wait_for_timeout(100)
    raise AssertionError(f"the run did not end: {page.server.log[-2000:]}")


@pytest.mark.parametrize("vue", (False, True), ids=("canvas", "nodes2"))
def test_every_report_shows_its_last_line(browser, host_page, vue):
    models = host_page.server.base / "models" / "diffusion_models"
    shutil.copy(models / STOCK, models / "finetune.safetensors")
    shutil.copy(models / DENSE, models / f"{NAME}.pth")
    page = opened(browser, host_page.server.url, viewport={"width": 1600, "height": 1100})
    page.server = host_page.server
    setting = "value => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', value)"
    page.evaluate(setting, vue)
    try:
        page.evaluate("() => app.refreshComboInNodes()")
        mark = f"report {'nodes2' if vue else 'canvas'}"
        page.evaluate(BUILD, [_graph(mark), 60])
        entry = _run(page)
        numbers = page.evaluate("() => Object.fromEntries(app.graph.nodes.map(n => [n.type, n.id]))")
        told = {}
        for kind in REPORTING:
            text = told[kind] = page.evaluate(FIELD, kind)
            assert text == entry["outputs"][str(numbers[kind])]["text"][0], kind
            assert text
            seen = page.evaluate(SHOWN, kind)
            assert seen["reached"] and seen["onTop"] and seen["kept"], (kind, seen)
            assert seen["height"] >= 45 and seen["width"] >= 200, (kind, seen)
        assert "MB" in told["TurboConvert"] and NAME in told["TurboConvert"]
        assert len(told["TurboDoctor"].splitlines()) > 40
        # another page, the same graph: the host computes nothing but the doctor, and says all of it again
        workflow = page.evaluate("() => app.graph.serialize()")
        page.reload()
        page.wait_for_function("window.app?.vueAppReady && app.graph?.nodes.length", timeout=60_000)
        page.wait_for_timeout(500)
        page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
        assert page.evaluate(FIELD, "TurboConvert") == ""
        _run(page)
        for kind in REPORTING:
            if kind != "TurboDoctor":
                assert page.evaluate(FIELD, kind) == told[kind], kind
        assert page.errors == []
    finally:
        page.evaluate(setting, False)
        page.close()


def test_a_page_that_is_loaded_again_in_the_middle_of_a_run_and_a_second_tab(browser, host_page):
    """Both show what their own nodes say, and neither what the other's do."""
    context = browser.new_context(viewport={"width": 1600, "height": 1100})
    server = host_page.server
    first = opened(context, server.url)
    spec = {row[0]: row for row in _graph("tabs")}
    spec["latent"][2].update(width=480, height=320, length=33)
    names = ("sparse", "clip", "text", "latent", "sampler", "keep")
    said = f"([kind, words]) => ({FIELD})(kind).includes(words)"
    try:
        for steps in (4, 16, 64):  # as many as it takes for the page to be there again before the run is over
            spec["sampler"][2]["steps"] = steps
            first.evaluate(BUILD, [[spec[name] for name in names], 60])
            first.wait_for_timeout(1500)  # in which the page keeps the graph for the case that it is loaded again
            first.evaluate("() => app.queuePrompt(0, 1)")
            first.wait_for_function("() => app.graph.nodes.some(n => n.type === 'TurboSampler' && n.progress > 0)")
            first.reload()
            first.wait_for_function("window.app?.vueAppReady && app.graph?.nodes.some(n => n.type === 'TurboSampler')")
            if host.get_json(server, "/queue")["queue_running"]:
                break
        else:
            pytest.fail("each run was over before the page was there again")
        first.wait_for_function(said, arg=["TurboSampler", f"{steps} steps in "], timeout=120_000)
        second = opened(context, server.url)
        second.evaluate(BUILD, [[["doctor", "TurboDoctor", {}, {}]], 60])
        second.evaluate("() => app.queuePrompt(0, 1)")
        second.wait_for_function(said, arg=["TurboDoctor", "TurboWan"])
        first.bring_to_front()
        first.wait_for_timeout(500)
        assert f"{steps} steps in " in first.evaluate(FIELD, "TurboSampler")
        assert first.errors == second.errors == []
    finally:
        context.close()


RED = """() => app.graph.nodes.filter(n => n.has_errors)
  .map(n => [n.type, n.widgets.find(w => w.name === 'report')?.value])"""
PRESS_RUN = """async name => {
  app.graph.nodes.find(n => n.type === 'TurboLoader').widgets[0].value = name;
  await app.queuePrompt(0, 1);
}"""
TURBO = "TurboWan2.1-T2V-1.3B-480P-quant.pth"
# what a node that stands for a graph says with each of these files in it; none is there, so that nothing runs
ONE_NODE = """async files => {
  const node = app.graph.nodes.find(n => n.subgraph), told = [];
  const widget = name => node.widgets.find(w => w.name === name);
  widget('clip_name').value = 'nowhere.safetensors';
  for (const file of files) {
    widget('model_name').value = file;
    await app.queuePrompt(0, 1);
    told.push(widget('report')?.value);
  }
  return told;
}"""
LOADER = """() => {
  const node = app.graph.nodes.find(n => n.type === 'TurboLoader');
  return [node.widgets.length, ...node.size];
}"""


def test_a_red_node_says_why(host_page):
    """Before anything runs; and says it no more when it is mended."""
    page, pictured = host_page, "TurboWan2.2-I2V-A14B-high-720P-quant.pth"
    page.evaluate("workflow => app.loadGraphData(workflow)", workflow_api.load("turbowan_t2v_14b_720p"))
    before = page.evaluate(LOADER)
    page.evaluate(PRESS_RUN, "nowhere.pth")
    ((kind, said),) = page.evaluate(RED)
    assert kind == "TurboLoader" and said.startswith("nowhere.pth was not found in models/diffusion_models: press R")
    assert page.get_by_text("nowhere.pth was not found").count(), "nor is it in the corner of the page"
    page.evaluate(PRESS_RUN, pictured)
    ((kind, said),) = page.evaluate(RED)
    assert kind == "TurboSampler" and said.startswith(f"{pictured} is an image-to-video model and got no picture")
    assert page.evaluate(LOADER) == before, "the loader says it still"
    page.evaluate("workflow => app.loadGraphData(workflow)", workflow_api.load("turbowan_t2v_turbo_sampler"))
    told = page.evaluate(ONE_NODE, [pictured, TURBO])
    assert [said.partition(" got no picture")[0] for said in told] == [f"{pictured} is an image-to-video model and", ""]
    assert page.errors == []
