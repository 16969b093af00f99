"""ComfyUI's page in Chromium, for tests and for whoever photographs it."""

import contextlib
import os
import shutil
from importlib.util import find_spec

ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
)
# The page first opens a graph of its own; one opened before that is done would be mixed up with it.
READY = "window.app && window.app.vueAppReady && window.LiteGraph && window.app.graph?.nodes.length"


def lacks():
    """What a page in Chromium lacks here, or None."""
    packages = [name for name in ("playwright", "comfyui_frontend_package", "aiohttp") if not find_spec(name)]
    if packages:
        return f"page tests need {', '.join(packages).replace('_', '-')}: install it with pip"
    return None if _chromium() else "page tests need Chromium: apt-get install chromium, or set CHROMIUM to its path"


def _chromium():
    names = os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome"
    return next((found for found in map(shutil.which, filter(None, names)) if found), None)


@contextlib.contextmanager
def browsing():
    """Chromium, as long as it is open."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=_chromium(), args=list(ARGUMENTS))
        yield running
        running.close()


def opened(browser, url, ready=READY, **options):
    """ComfyUI's page at this address, ready for a graph; errors of the page gather in its list `errors`."""
    page = browser.new_page(**options)
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.goto(url)
    page.wait_for_function(ready, timeout=90_000)
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(1000)  # on a busy machine the page's own graph is looked through after that
    return page
