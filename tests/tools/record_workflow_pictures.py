"""Draws the workflows as ComfyUI's page shows them: a picture beside each JSON, and all of them in docs/workflows.jpg.

Those that need no downloads are run, and their picture is four moments of the video.

    python -m tests.tools.record_workflow_pictures http://127.0.0.1:8188 [00_start_here ...]

Needs a running ComfyUI with this pack and the files that tests/helpers/comfyui.py puts there, Chromium, Playwright and
Pillow. Needed when a workflow's face changes.
"""

import io
import json
import sys
import urllib.parse
from pathlib import Path

from tests.helpers import comfyui as host
from tests.helpers import workflow_api
from tests.helpers.page import browsing, opened

ROOT = Path(__file__).resolve().parents[2]
WIDTH, TILE, COLUMNS, GAP, TITLE = 1200, 520, 3, 12, 30
VIEW = {"width": 2200, "height": 1500}

# Shows the whole graph and returns where it is on the page.
SHOW = """async ([workflow, view]) => {
  const rest = ms => new Promise(r => setTimeout(r, ms));
  await app.loadGraphData(workflow);
  await rest(1500);
  const boxes = [...app.graph._groups.map(g => [...g._bounding]),
                 ...app.graph.nodes.map(n => [n.pos[0], n.pos[1] - 30, n.size[0], n.size[1] + 30])];
  const left = Math.min(...boxes.map(b => b[0])) - 15, top = Math.min(...boxes.map(b => b[1])) - 15;
  const right = Math.max(...boxes.map(b => b[0] + b[2])) + 15, bottom = Math.max(...boxes.map(b => b[1] + b[3])) + 15;
  const scale = Math.min(1, (view.width - 200) / (right - left), (view.height - 250) / (bottom - top));
  app.canvas.ds.scale = scale;
  app.canvas.ds.offset = [120 / scale - left, 100 / scale - top];
  app.canvas.setDirty(true, true);
  await rest(1500);
  const canvas = app.canvas.canvas.getBoundingClientRect();
  return {x: canvas.x + 120, y: canvas.y + 100, width: (right - left) * scale, height: (bottom - top) * scale};
}"""


def record(url: str, workflows: list[Path]) -> None:
    """Photograph some workflows; their notes are not shown."""
    from PIL import Image

    run = [path for path in workflows if path.stem in workflow_api.COMES_ALONG]
    for path in run:  # before Playwright has a loop of its own
        moments(_result(url, path)).save(path.with_suffix(".jpg"), quality=85)
    workflows = [path for path in workflows if path not in run]
    with browsing() as browser:
        page = opened(browser, url, viewport=VIEW, device_scale_factor=2)
        for path in workflows:
            workflow = json.loads(path.read_text(encoding="utf-8"))
            workflow["nodes"] = [n for n in workflow["nodes"] if n["type"] != "MarkdownNote"]
            box = page.evaluate(SHOW, [workflow, VIEW])
            image = Image.open(io.BytesIO(page.screenshot(clip=box))).convert("RGB")
            image = image.resize((WIDTH, round(image.height * WIDTH / image.width)), Image.LANCZOS)
            image.save(path.with_suffix(".jpg"), quality=80)


def _result(url, path):
    """Frames, as Pillow images, of the video that a workflow makes on this server."""
    import av

    server = host.Server(url, None, None, None)
    prompt = workflow_api.to_api(workflow_api.load(path.stem), workflow_api.recorded_object_info())
    run = host.run(server, prompt)
    files = [f for m in run.messages if m["type"] == "executed" for f in (m["data"]["output"] or {}).get("images", ())]
    status, video = host.get(server, "/view?" + urllib.parse.urlencode(files[-1]))
    assert status == 200, f"{path.stem}: {run.status} {run.error}"
    with av.open(io.BytesIO(video)) as container:
        return [frame.to_image() for frame in container.decode(video=0)]


def moments(frames, size=300, count=4):
    """Some frames of a video side by side, first to last, and what made them."""
    from PIL import Image, ImageDraw, ImageFont

    sheet = Image.new("RGB", (count * (size + GAP) - GAP, size + TITLE), (24, 24, 26))
    for i in range(count):
        frame = frames[i * (len(frames) - 1) // (count - 1)].resize((size, size), Image.BICUBIC)
        sheet.paste(frame, (i * (size + GAP), 0))
    label = f"TinyWan, which comes with the pack: four of {len(frames)} frames, 4 steps"
    ImageDraw.Draw(sheet).text((4, size + 4), label, fill=(225, 225, 225), font=ImageFont.load_default(18))
    return sheet


def contact_sheet() -> None:
    """All recorded pictures, in the order of the README's table, with their names there."""
    from PIL import Image, ImageDraw, ImageFont

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    paths = sorted((ROOT / "workflows").glob("*.jpg"), key=lambda path: readme.index(f"workflows/{path.stem}.json"))
    names = [readme.split(f"](workflows/{path.stem}.json")[0].rsplit("[", 1)[1] for path in paths]
    tiles = [Image.open(path) for path in paths]
    tiles = [tile.resize((TILE, round(tile.height * TILE / tile.width)), Image.LANCZOS) for tile in tiles]
    high = max(tile.height for tile in tiles) + TITLE + GAP
    rows = -(-len(tiles) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (TILE + GAP) + GAP, rows * high + GAP), (24, 24, 26))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(20)
    for i, (tile, name) in enumerate(zip(tiles, names)):
        x, y = GAP + i % COLUMNS * (TILE + GAP), GAP + i // COLUMNS * high
        pen.text((x, y), name, fill=(225, 225, 225), font=font)
        sheet.paste(tile, (x, y + TITLE))
    sheet.save(ROOT / "docs" / "workflows.jpg", quality=85)


if __name__ == "__main__":
    wanted = [ROOT / "workflows" / f"{name}.json" for name in sys.argv[2:]]
    record(sys.argv[1].rstrip("/"), wanted or sorted((ROOT / "workflows").glob("*.json")))
    contact_sheet()
