"""Draws the pictures of the help pages: each node with its neighbours, photographed in ComfyUI's page.

    python -m tests.tools.record_help_pictures http://127.0.0.1:8188 [NodeId ...]

Needs a running ComfyUI with this pack and the files that tests/helpers/comfyui.py puts there, Chromium, Playwright and
Pillow. Needed when a node's face changes. TurboCompare_output is what the node draws for the small family.
"""

import io
import json
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

from tests.helpers.page import browsing, opened

IMAGES = Path(__file__).resolve().parents[2] / "web" / "docs" / "images"
LIMIT = 60_000  # bytes

TURBO_T2V, TURBO_QUANT = "TurboWan2.1-T2V-1.3B-480P.pth", "TurboWan2.1-T2V-1.3B-480P-quant.pth"
TURBO_14B = "TurboWan2.1-T2V-14B-480P-quant.pth"
HIGH, LOW = "TurboWan2.2-I2V-A14B-high-720P-quant.pth", "TurboWan2.2-I2V-A14B-low-720P-quant.pth"
BASE = "wan2.1_t2v_1.3B_bf16.safetensors"
STOCK, UMT5 = "wan2.1_t2v_14B_bf16.safetensors", "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
LORA = "Wan21_T2V_14B_MoviiGen_lora_rank32_fp16.safetensors"


def node(kind, title=None, **values):
    return {"kind": kind, "title": title, "values": values}


GAP = None  # room above a node, for a link that passes it

# Columns of nodes from left to right; links as "column.row.output > column.row.input". The node itself stands out.
PICTURES = {
    "TurboLoader": (
        [
            [node("TurboLoader", model_name=TURBO_14B), node("CLIPLoader", clip_name=UMT5, type="wan")],
            [node("LoraLoaderModelOnly", lora_name=LORA), node("CLIPTextEncode", text="A fishing boat ...")],
            [node("TurboSampler")],
        ],
        ["0.0.0 > 1.0.model", "0.1.0 > 1.1.clip", "1.0.0 > 2.0.model", "1.1.0 > 2.0.positive"],
    ),
    "TurboVAE": (
        [[node("VAELoader", vae_name="wan_2.1_vae.safetensors")], [node("TurboVAE")], [node("VAEDecode")]],
        ["0.0.0 > 1.0.vae", "1.0.0 > 2.0.vae"],
    ),
    "TurboTextEncoderLoader": (
        [[node("TurboTextEncoderLoader", text_encoder=UMT5)], [node("CLIPTextEncode", text="A fishing boat ...")]],
        ["0.0.0 > 1.0.clip"],
    ),
    "TurboSampler": (
        [
            [
                node("TurboLoader", "Turbo Loader (high noise)", model_name=HIGH),
                node("TurboLoader", "Turbo Loader (low noise)", model_name=LOW),
                node("WanImageToVideo"),
            ],
            [node("TurboSampler")],
            [node("VAEDecode")],
        ],
        ["0.0.0 > 1.0.model", "0.1.0 > 1.0.model_low", "0.2.0 > 1.0.positive", "0.2.2 > 1.0.latent_image"]
        + ["1.0.0 > 2.0.samples"],
    ),
    "TurboScheduler": (
        [
            [node("TurboLoader", model_name=TURBO_QUANT)],
            [node("TurboScheduler"), node("KSamplerSelect", sampler_name="lcm")],
            [node("SamplerCustom", cfg=1)],
        ],
        ["0.0.0 > 1.0.model", "0.0.0 > 2.0.model", "1.0.0 > 2.0.sigmas", "1.1.0 > 2.0.sampler"],
    ),
    "QuantizeW8A8": (
        [
            [node("UNETLoader", unet_name=STOCK)],
            [node("LoraLoaderModelOnly", lora_name=LORA)],
            [node("QuantizeW8A8")],
        ],
        ["0.0.0 > 1.0.model", "1.0.0 > 2.0.model"],
    ),
    "SparseLowBitAttention": (
        [
            [node("TurboLoader", model_name=TURBO_QUANT)],
            [node("SparseLowBitAttention", topk=0.15)],
            [node("TurboSampler")],
        ],
        ["0.0.0 > 1.0.model", "1.0.0 > 2.0.model"],
    ),
    "TurboSave": (
        [
            [node("UNETLoader", unet_name=STOCK)],
            [node("QuantizeW8A8")],
            [node("TurboSave", filename_prefix="diffusion_models/my_wan_int8")],
        ],
        ["0.0.0 > 1.0.model", "1.0.0 > 2.0.model"],
    ),
    "TurboSize": (
        [
            [node("LoadImage", image="example.png")],
            [GAP, node("TurboSize", resolution="720p")],
            [node("WanImageToVideo")],
        ],
        ["0.0.0 > 1.1.image", "0.0.0 > 2.0.start_image", "1.1.0 > 2.0.width", "1.1.1 > 2.0.height"]
        + ["1.1.2 > 2.0.length"],
    ),
    "TurboPrompt": (
        [
            [node("TurboTextEncoderLoader", text_encoder=UMT5), node("TurboPrompt", camera="follows", light="low sun")],
            [node("CLIPTextEncode")],
        ],
        ["0.0.0 > 1.0.clip", "0.1.0 > 1.0.text"],
    ),
    "TurboDoctor": ([[node("TurboLoader", model_name=TURBO_QUANT)], [node("TurboDoctor")]], ["0.0.0 > 1.0.model"]),
    "TurboCompare": (
        [
            [node("TurboLoader", model_name=TURBO_T2V)],
            [
                node("SparseLowBitAttention", "A: top-k 0.15", topk=0.15),
                node("SparseLowBitAttention", "B: top-k 0.1, int8", topk=0.1, precision="int8"),
            ],
            [node("TurboCompare")],
        ],
        ["0.0.0 > 1.0.model", "0.0.0 > 1.1.model", "1.0.0 > 2.0.model_a", "1.1.0 > 2.0.model_b"],
    ),
    "TurboConvert": ([[node("TurboConvert", source=TURBO_T2V, format="int8_row")]], []),
    "TurboMerge": (
        [[node("TurboMerge", finetune="my_wan_1.3B.safetensors", base=BASE, turbo=TURBO_T2V, format="int8_block")]],
        [],
    ),
    "TurboLoraReport": (
        [
            [node("TurboLoader", model_name=TURBO_14B)],
            [node("TurboLoraReport", lora_name=LORA)],
        ],
        ["0.0.0 > 1.0.model"],
    ),
}

# Builds the graph and answers with its box in pixels of the page.
DRAW = """async ([columns, links, own, first]) => {
  app.graph.clear();
  app.graph.state.lastNodeId = first;  // the page remembers widget values by node id
  const placed = [];
  let x = 0;
  for (const column of columns) {
    let y = 0, width = 0;
    placed.push(column.map(entry => {
      if (!entry) { y += 150; return null; }
      const {kind, title, values} = entry;
      const node = LiteGraph.createNode(kind);
      app.graph.add(node);
      if (title) node.title = title;
      for (const [name, value] of Object.entries(values)) {
        const widget = node.widgets.find(w => w.name === name);
        if (widget.options.values && !widget.options.values.includes(value)) widget.options.values.push(value);
        widget.value = value;
      }
      node.pos = [x, y];
      const size = node.computeSize();
      node.setSize([Math.max(size[0], 300), kind === 'CLIPTextEncode' ? 140 : Math.max(size[1], node.size[1])]);
      if (kind === own) { node.color = '#2a5d4f'; node.bgcolor = '#1f4239'; }
      y += node.size[1] + 70;
      width = Math.max(width, node.size[0]);
      return node;
    }));
    x += width + 60;
  }
  for (const link of links) {
    const [from, to] = link.split(' > ').map(end => end.split('.'));
    const [a, b] = [from, to].map(([c, r]) => placed[c][r]);
    a.connect(Number(from[2]), b, b.inputs.findIndex(i => i.name === to[2]));
  }
  app.canvas.setDirty(true, true);
  await new Promise(r => setTimeout(r, 600));  // pictures on nodes make them grow
  const boxes = placed.flat().filter(n => n)
    .map(n => [n.pos[0], n.pos[1] - 30, n.pos[0] + n.size[0], n.pos[1] + n.size[1]]);
  const side = (i, f) => f(...boxes.map(b => b[i]));
  const [left, top, right, bottom] = [side(0, Math.min), side(1, Math.min), side(2, Math.max), side(3, Math.max)];
  const margin = 20;
  app.canvas.ds.scale = 1;
  app.canvas.ds.offset = [420 - left, 140 - top];
  app.canvas.setDirty(true, true);
  await new Promise(r => setTimeout(r, 600));
  const canvas = app.canvas.canvas.getBoundingClientRect();
  return {x: canvas.x + 420 - margin, y: canvas.y + 140 - margin,
          width: right - left + 2 * margin, height: bottom - top + 2 * margin};
}"""


def shrink(png, width=1000):
    """A WebP of at most `width` pixels that stays below LIMIT."""
    from PIL import Image

    image = Image.open(io.BytesIO(png)).convert("RGB")
    if image.width > width:
        image = image.resize((width, round(image.height * width / image.width)), Image.LANCZOS)
    for quality in (80, 70, 60, 50):
        data = io.BytesIO()
        image.save(data, "WEBP", quality=quality, method=6)
        if data.tell() < LIMIT:
            return data.getvalue()
    raise ValueError(f"picture of {image.size} is {data.tell()} bytes at the lowest quality: show fewer nodes")


def _link(number, slot=0):
    return [str(number), slot]


def compare_output(url):
    """The picture that TurboCompare gives for the small family: top-k 0.5 against int8 attention at 0.15."""

    def attention(topk, precision):
        inputs = {"model": _link(1), "topk": topk, "precision": precision, "mode": "auto", "start_percent": 0}
        inputs |= {"end_percent": 1, "dense_blocks": "", "min_tokens": 0, "verbose": False}
        return {"class_type": "SparseLowBitAttention", "inputs": inputs}

    compare = {"model_a": _link(2), "model_b": _link(3), "positive": _link(5), "latent_image": _link(6), "seed": 0}
    latent = {"width": 416, "height": 240, "length": 33, "batch_size": 1}
    prompt = {
        "1": {"class_type": "TurboLoader", "inputs": {"model_name": TURBO_T2V, "dtype": "default"}},
        "2": attention(0.5, "bf16"),
        "3": attention(0.15, "int8"),
        "4": {"class_type": "TurboTextEncoderLoader", "inputs": {"text_encoder": UMT5}},
        "5": {"class_type": "CLIPTextEncode", "inputs": {"clip": _link(4), "text": "A fishing boat"}},
        "6": {"class_type": "EmptyHunyuanLatentVideo", "inputs": latent},
        "7": {"class_type": "TurboCompare", "inputs": compare | {"steps": 4, "mode": "SDE", "tokens": 512}},
    }
    request = urllib.request.Request(f"{url}/prompt", json.dumps({"prompt": prompt}).encode())
    number = json.load(urllib.request.urlopen(request))["prompt_id"]
    while not (history := json.load(urllib.request.urlopen(f"{url}/history/{number}"))):
        time.sleep(0.5)
    image = history[number]["outputs"]["7"]["images"][0]
    return urllib.request.urlopen(f"{url}/view?{urllib.parse.urlencode(image)}").read()


def main(url, only):
    IMAGES.mkdir(exist_ok=True)
    with browsing() as browser:
        page = opened(browser, url, viewport={"width": 2200, "height": 1500})
        for i, name in enumerate(only or PICTURES):
            columns, links = PICTURES[name]
            box = page.evaluate(DRAW, [columns, links, name, 1000 * (i + 1)])
            (IMAGES / f"{name}.webp").write_bytes(shrink(page.screenshot(clip=box)))
    if not only or "TurboCompare" in only:
        (IMAGES / "TurboCompare_output.webp").write_bytes(shrink(compare_output(url)))


if __name__ == "__main__":
    main(sys.argv[1].rstrip("/"), sys.argv[2:])
