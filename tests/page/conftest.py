"""Fixtures of the page tests: Chromium, and ComfyUI's page from a stub or from a real server.

They need Chromium (Debian: apt-get install chromium), the PyPI packages playwright and comfyui-frontend-package, and
for the real server what tests/host needs. None of that is part of the pack's test extra: without it the tests skip.
"""

import json
from pathlib import Path

import pytest

from tests.helpers import comfyui as host
from tests.helpers import workflow_api
from tests.helpers.page import browsing, lacks, opened
from tests.helpers.tiny_family import make_tiny
from tests.page import stub

HERE = Path(__file__).resolve().parent
VIEW = {"width": 2000, "height": 1100}


def pytest_addoption(parser):
    parser.addoption(
        "--screenshots", metavar="FOLDER", help="where the walk of tests/page/test_start.py leaves pictures"
    )


def pytest_collection_modifyitems(items):
    reason = lacks()
    for item in items:
        if reason and HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def browser():
    with browsing() as running:
        yield running


@pytest.fixture(scope="session")
def stub_page(browser):
    """The page with the recorded object_info; no model file is there."""
    with stub.serve(workflow_api.recorded_object_info()) as url:
        yield opened(browser, url, viewport=VIEW)


@pytest.fixture(scope="session")
def host_page(browser, tmp_path_factory):
    """The page of a real ComfyUI with one copy of the pack and every file the workflows ask for, only small."""
    if reason := host.lacks():
        pytest.skip(reason)
    tiny, base = tmp_path_factory.mktemp("tiny"), tmp_path_factory.mktemp("base")
    make_tiny(tiny)
    host.make_base(base, tiny)
    settings = base / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps({"Comfy.TutorialCompleted": True}))
    server = host.start(host.find_comfyui(), base)
    try:
        page = opened(browser, server.url, viewport=VIEW)
        page.server = server
        yield page
    finally:
        host.stop(server)


@pytest.fixture(params=["stub", "host"])
def page(request):
    return request.getfixturevalue(f"{request.param}_page")
