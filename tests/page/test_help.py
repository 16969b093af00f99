"""Help pages and translations as ComfyUI's page shows them, from a real server."""

import json
import urllib.request

import pytest

from tests.helpers.page import opened
from tests.tools.record_schemas import read

pytestmark = pytest.mark.page

SHOW_HELP = """async type => {
  const stores = document.querySelector('#vue-app').__vue_app__.config.globalProperties.$pinia._s;
  app.graph.clear();
  const node = LiteGraph.createNode(type);
  app.graph.add(node);
  app.canvas.select(node);
  stores.get('canvas').updateSelectedItems();
  await new Promise(done => setTimeout(done, 300));
  stores.get('rightSidePanel').openPanel('info');
}"""
LOADED = """name => {
  const picture = document.querySelector(`img[src$="docs/images/${name}.webp"]`);
  return picture && picture.complete && picture.naturalWidth > 0;
}"""
FACE = """type => {
  app.graph.clear();
  const node = LiteGraph.createNode(type);
  app.graph.add(node);
  return {title: node.title, outputs: node.outputs.map(o => o.localized_name),
          inputs: Object.fromEntries(node.inputs.map(i => [i.name, i.localized_name])),
          widgets: Object.fromEntries((node.widgets ?? []).map(w => [w.name, w.label ?? w.name]))};
}"""


@pytest.fixture
def in_language(browser, host_page):
    """A function that opens a page of the host in a language; English is set again afterwards."""
    pages = []

    def setting(language):
        data = json.dumps(language).encode()
        url = f"{host_page.server.url}/settings/Comfy.Locale"
        urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": "application/json"})).close()

    def in_it(language):
        setting(language)
        pages.append(opened(browser, host_page.server.url, viewport={"width": 1700, "height": 1100}))
        return pages[-1]

    yield in_it
    setting("en")
    for page in pages:
        page.close()


@pytest.mark.parametrize("language", ("en", "ko"))
def test_help_with_its_picture(in_language, language):
    page = in_language(language)
    for node_id in ("TurboSampler", "TurboCompare"):
        page.evaluate(SHOW_HELP, node_id)
        page.wait_for_function(LOADED, arg=node_id, timeout=60_000)
        title = read(language)[node_id]["display_name"]
        assert title in page.locator("h1").all_inner_texts()


@pytest.mark.parametrize("language", ("en", "ko", "zh", "ja"))
def test_nodes_in_every_language(in_language, language):
    page = in_language(language)
    for node_id, texts in read(language).items():
        face = page.evaluate(FACE, node_id)
        assert face["title"] == texts["display_name"]
        shown = face["inputs"] | face["widgets"]
        names = {key: value["name"] for key, value in texts["inputs"].items()}
        assert {key: shown[key] for key in names} == names
        for i, output in texts.get("outputs", {}).items():
            assert face["outputs"][int(i)] == output.get("name", face["outputs"][int(i)])
