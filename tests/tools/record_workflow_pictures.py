"""Draws the workflows as ComfyUI's page shows them: a picture beside each JSON, and all of them in docs/workflows.jpg.

    python -m tests.tools.record_workflow_pictures http://127.0.0.1:8188 [00_start_here ...]

Needs a running ComfyUI with this pack and the files that tests/helpers/comfyui.py puts there, Chromium, Playwright and
Pillow. Needed when a workflow's face changes.
"""

import io
import json
import sys
from pathlib import Path

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
    """Photograph some workflows; the notes left of the graph are not shown."""
    from PIL import Image

    with browsing() as browser:
        page = opened(browser, url, viewport=VIEW, device_scale_factor=2)
        for path in workflows:
            workflow = json.loads(path.read_text(encoding="utf-8"))
            workflow["nodes"] = [n for n in workflow["nodes"] if n["type"] != "MarkdownNote" or n["pos"][0] >= 0]
            box = page.evaluate(SHOW, [workflow, VIEW])
            image = Image.open(io.BytesIO(page.screenshot(clip=box))).convert("RGB")
            image = image.resize((WIDTH, round(image.height * WIDTH / image.width)), Image.LANCZOS)
            image.save(path.with_suffix(".jpg"), quality=80)


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
