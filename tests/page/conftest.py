"""Fixtures of the page tests: Chromium, and ComfyUI's page from a stub or from a real server.

They need Chromium (Debian: apt-get install chromium), the PyPI packages playwright and comfyui-frontend-package, and
for the real server what tests/host needs. None of that is part of the pack's test extra: without it the tests skip.
"""

import importlib.util
import json
import os
import shutil

import pytest

from .. import workflow_api
from ..host import server as host
from ..host.conftest import find_comfyui
from . import stub

ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
)
# The page first opens a graph of its own; one opened before that is done would be mixed up with it.
READY = "window.app && window.app.vueAppReady && window.LiteGraph && window.app.graph?.nodes.length"


@pytest.fixture(scope="session")
def browser():
    names = os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome"
    path = next((found for found in map(shutil.which, filter(None, names)) if found), None)
    if path is None:
        pytest.skip("no Chromium found: apt-get install chromium, or set CHROMIUM")
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    with api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        yield running
        running.close()


def _open(browser, url):
    page = browser.new_page(viewport={"width": 2000, "height": 1100})
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.goto(url)
    page.wait_for_function(READY, timeout=90_000)
    page.wait_for_load_state("networkidle")
    return page


@pytest.fixture(scope="session")
def stub_page(browser):
    """The page with the recorded object_info; no model file is there."""
    if stub.frontend_folder() is None or importlib.util.find_spec("aiohttp") is None:
        pytest.skip("no page found: pip install comfyui-frontend-package aiohttp")
    with stub.serve(workflow_api.recorded_object_info()) as url:
        yield _open(browser, url)


@pytest.fixture(scope="session")
def host_page(browser, tmp_path_factory):
    """The page of a real ComfyUI with one copy of the pack and every file the workflows ask for, only small."""
    if find_comfyui() is None or importlib.util.find_spec("comfy_kitchen") is None:
        pytest.skip("no ComfyUI found, or this Python lacks its requirements: run `python run.py host`")
    from turbo_core.tiny_family import make_tiny

    tiny, base = tmp_path_factory.mktemp("tiny"), tmp_path_factory.mktemp("base")
    make_tiny(tiny)
    host.make_base(base, tiny)
    settings = base / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps({"Comfy.TutorialCompleted": True}))
    server = host.start(find_comfyui(), base)
    try:
        page = _open(browser, server.url)
        page.server = server
        yield page
    finally:
        host.stop(server)


@pytest.fixture(params=["stub", "host"])
def page(request):
    return request.getfixturevalue(f"{request.param}_page")
