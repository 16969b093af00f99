"""Fixtures of the page tests: Chromium, and ComfyUI's page from a stub or from a real server.

They need Chromium (Debian: apt-get install chromium), the PyPI packages playwright and comfyui-frontend-package, and
for the real server what tests/host needs. None of that is part of the pack's test extra: without it the tests skip.
"""

import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.helpers import comfyui as host
from tests.helpers import workflow_api
from tests.helpers.comfyui import find_comfyui
from tests.page import stub

ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
)
# The page first opens a graph of its own; one opened before that is done would be mixed up with it.
READY = "window.app && window.app.vueAppReady && window.LiteGraph && window.app.graph?.nodes.length"


HERE = Path(__file__).resolve().parent


def _chromium():
    names = os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome"
    return next((found for found in map(shutil.which, filter(None, names)) if found), None)


def _missing():
    """What the page tests lack here, or None."""
    packages = [name for name in ("playwright", "comfyui_frontend_package", "aiohttp") if not find_spec(name)]
    if packages:
        return f"page tests need {', '.join(packages).replace('_', '-')}: install it with pip"
    return None if _chromium() else "page tests need Chromium: apt-get install chromium, or set CHROMIUM to its path"


def pytest_collection_modifyitems(items):
    reason = _missing()
    for item in items:
        if reason and HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=_chromium(), args=list(ARGUMENTS))
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
    with stub.serve(workflow_api.recorded_object_info()) as url:
        yield _open(browser, url)


@pytest.fixture(scope="session")
def host_page(browser, tmp_path_factory):
    """The page of a real ComfyUI with one copy of the pack and every file the workflows ask for, only small."""
    if find_comfyui() is None or not find_spec("comfy_kitchen"):
        pytest.skip("no ComfyUI found, or this Python lacks its requirements: run `python run.py host`")
    from tests.helpers.tiny_family import make_tiny

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
