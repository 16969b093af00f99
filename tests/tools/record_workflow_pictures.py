"""Draws what the workflows make: a picture beside each JSON, and all of them in docs/workflows.jpg.

    python -m tests.tools.record_workflow_pictures [00_start_here ...]

Starts a ComfyUI of its own (COMFYUI_DIR, else ~/ComfyUI) and runs each workflow with TinyWan in the place of the files
that it asks for, at TinyWan's size and with prompts of TinyWan's world; each picture says so. Needs what the host tests
need, and some minutes of a CPU.
"""

import sys
import tempfile
from pathlib import Path

import av
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file, save_file

from tests.helpers import comfyui as host
from tests.helpers import workflow_api
from turbo_core import tinywan
from turbo_core.tinywan import world

ROOT = Path(__file__).resolve().parents[2]
WIDTH, GAP, BAND, TILE, TITLE, COLUMNS = 528, 8, 72, 240, 26, 4
DARK, LIGHT, FAINT = (24, 24, 26), (240, 240, 240), (170, 170, 175)
SIZE, FRAMES, MODEL = world.SIDE, world.FRAMES, "TinyWan"
TURBO, TEACHER, STUDENT = (Path(tinywan.FILES[name]).name for name in ("turbo", "teacher", "student"))
HIGH, LOW = (Path(tinywan.PAIR[name]).name for name in ("high", "low"))
FILES = {  # published: TinyWan's
    "TurboWan2.1-T2V-1.3B-480P-quant.pth": TURBO,
    "TurboWan2.1-T2V-1.3B-480P.pth": TURBO,
    "TurboWan2.1-T2V-14B-480P-quant.pth": TURBO,
    "TurboWan2.1-T2V-14B-720P-quant.pth": TURBO,
    "TurboWan2.2-I2V-A14B-high-720P-quant.pth": HIGH,
    "TurboWan2.2-I2V-A14B-low-720P-quant.pth": LOW,
    "wan2.1_t2v_14B_bf16.safetensors": TEACHER,
    "wan_2.1_vae.safetensors": Path(tinywan.FILES["vae"]).name,
    "umt5_xxl_fp8_e4m3fn_scaled.safetensors": Path(tinywan.FILES["text"]).name,
} | dict.fromkeys((Path(lora).name for lora in host.LORAS), "TinyWan_4_steps.safetensors")
# {workflow: (what its picture shows, prompts in the order of its text nodes)}; "colour shape motion background"
SHOWN = {
    "00_start_here": ("text to video, 4 steps", ()),
    "01_start_here_image": ("a picture that moves, two experts", ()),
    "turbowan_compare": ("what top-k 0.1 and int8 cost", ("yellow circle right navy",)),
    "turbowan_finish_video": ("below: larger; between two frames, their mean", ()),
    "turbowan_first_last_frame": ("between two pictures, two experts", ("red circle right black",)),
    "turbowan_i2v_a14b": ("a picture that moves, two experts", ("green cross up black",)),
    "turbowan_long_chained": (
        "65 frames: right, then on to the left",
        ("red circle right black", "red circle left black"),
    ),
    "turbowan_long_windows": ("65 frames in windows of 33", ("orange circle grows black",)),
    "turbowan_lora": ("with a LoRA", ("orange square up brown",)),
    "turbowan_low_memory": ("text to video, tiled VAE", ("white triangle shrinks navy",)),
    "turbowan_many_prompts": (
        "one clip of each prompt",
        ("red square left black", "blue triangle up black", "yellow cross down navy"),
    ),
    "turbowan_t2v_14b_720p": ("text to video, tiled VAE", ("magenta circle grows black",)),
    "turbowan_t2v_ksampler": ("text to video, KSampler", ("blue triangle up black",)),
    "turbowan_t2v_turbo_sampler": ("text to video, one node", ("cyan square down black",)),
    "turbowan_video_to_video": ("above: a drawn clip; below: as a green square", ("green square right navy",)),
    "wan_stock_faster": ("a stock model with a few-step LoRA", ("red circle down grey", "blurry")),
}
TYPED = "text", "value"  # inputs in which prompts are typed


def record(names):
    """Run workflows by name and draw their pictures."""
    with tempfile.TemporaryDirectory() as folder:
        base = host.make_base(Path(folder) / "base")
        _few_step_lora(base / "models" / "loras" / "TinyWan_4_steps.safetensors")
        server = host.start(host.find_comfyui(), base)
        try:
            for name in names:
                prompt = _for_tinywan(name, base / "input")
                run = host.run(server, prompt, patience=1200)
                assert run.status == "execution_success", f"{name}: {run.status} {run.error}"
                _drawn(name, run, base).save(ROOT / "workflows" / f"{name}.jpg", quality=85)
                print(name, flush=True)
        finally:
            host.stop(server)


def _few_step_lora(path, rank=64):
    """What makes TinyWan's student of its teacher, as a LoRA: the largest singular values of the differences."""
    teacher, student = (load_file(tinywan.FOLDER / tinywan.FILES[name]) for name in ("teacher", "student"))
    state = {}
    for key, before in teacher.items():
        if before.ndim != 2 or not key.startswith("blocks."):
            continue
        u, s, v = torch.linalg.svd(student[key].float() - before.float(), full_matrices=False)
        name = f"diffusion_model.{key.removesuffix('.weight')}"
        state[f"{name}.lora_up.weight"] = (u * s)[:, :rank].contiguous()
        state[f"{name}.lora_down.weight"] = v[:rank].contiguous()
    save_file(state, path)


def _scene(words):
    return torch.tensor([values.index(word) for values, word in zip(world.ATTRIBUTES.values(), words.split())])


def _for_tinywan(name, folder):
    """The prompt of a workflow with TinyWan's files, size and world; writes what it begins with."""
    prompt = workflow_api.exported(name)
    _, scenes = SHOWN[name]
    if name in workflow_api.COMES_ALONG:
        return prompt
    long = FRAMES * 2 - 1 if name == "turbowan_long_windows" else FRAMES
    prompt = workflow_api.for_tiny_models(prompt, SIZE, SIZE, long)
    for node in prompt.values():
        if "context_overlap" in node["inputs"]:
            node["inputs"]["context_overlap"] = FRAMES * 30 // 81  # the workflow's share of a window
    typed = [
        (node, key)
        for node in prompt.values()
        for key in TYPED
        if isinstance(node["inputs"].get(key), str) and " " in node["inputs"][key]
    ]
    for (node, key), words in zip(typed, scenes, strict=False):
        node["inputs"][key] = world.caption(_scene(words), 0) if " " in words else words
    pictures = iter(("first.png", "last.png"))
    for node in prompt.values():
        for key, value in node["inputs"].items():
            if isinstance(value, str) and value in FILES:
                node["inputs"][key] = FILES[value]
        if node["class_type"] == "LoadImage":
            node["inputs"]["image"] = next(pictures)
        elif node["class_type"] == "LoadVideo":
            node["inputs"]["file"] = "clip.mp4"
    begins = name in ("turbowan_first_last_frame", "turbowan_i2v_a14b", "turbowan_long_chained")
    truth = _truth(scenes[0] if begins else "red square right navy")
    truth[0].save(folder / "first.png")
    truth[-1].save(folder / "last.png")
    _write_clip(folder / "clip.mp4", truth)
    return prompt


def _truth(words):
    """The clip that a prompt asks for, as TinyWan was shown it."""
    clip = world.render(_scene(words)[None], FRAMES, SIZE, SIZE, torch.Generator().manual_seed(0))[0]
    pixels = ((clip.permute(1, 2, 3, 0) + 1) * 127.5).round().to(torch.uint8).numpy()
    return [Image.fromarray(frame) for frame in pixels]


def _write_clip(path, frames):
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=16, options={"crf": "10"})
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv420p"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_image(frame)))
        file.mux(stream.encode())


def _drawn(name, run, base):
    """The picture of a finished run."""
    what, _ = SHOWN[name]
    clips = [_frames(path) for path in run.videos(base)]
    if name == "turbowan_compare":
        outputs = [m["data"]["output"] or {} for m in run.messages if m["type"] == "executed"]
        (file,) = (f for out in outputs for f in out.get("images", ()) if f["filename"].endswith(".png"))
        chart = Image.open(base / file["type"] / file["subfolder"] / file["filename"]).convert("RGB")
        return labelled([chart], what)
    if name in ("turbowan_video_to_video", "turbowan_finish_video"):
        before = [_on_ground(frame, clips[0][0].size) for frame in moments(_frames(base / "input" / "clip.mp4"), 2)]
        head = MODEL if name == "turbowan_video_to_video" else "A drawn clip"  # no model runs, and none is there
        return labelled(before + moments(clips[0], 2), what, head)
    if len(clips) > 1:
        return labelled([frame for clip in clips for frame in moments(clip, 3)], what)
    return labelled(moments(clips[0], 4), what)


def _frames(path):
    with av.open(str(path)) as container:
        return [frame.to_image() for frame in container.decode(video=0)]


def _on_ground(frame, size):
    """A frame as large as it is, in the middle of an empty one of that size."""
    ground = Image.new("RGB", size, DARK)
    ground.paste(frame, tuple((whole - part) // 2 for whole, part in zip(size, frame.size)))
    return ground


def moments(frames, count):
    """Some frames of a video, first to last."""
    return [frames[i * (len(frames) - 1) // (count - 1)] for i in range(count)]


def labelled(tiles, what, head=MODEL):
    """Tiles in as many columns as rows, and below them who made them, and what."""
    columns = round(len(tiles) ** 0.5)
    side = (WIDTH - GAP * (columns - 1)) // columns
    high = side * tiles[0].height // tiles[0].width
    rows = len(tiles) // columns
    sheet = Image.new("RGB", (WIDTH, rows * (high + GAP) + BAND), DARK)
    for i, tile in enumerate(tiles):
        place = i % columns * (side + GAP), i // columns * (high + GAP)
        sheet.paste(tile.resize((side, high), Image.LANCZOS), place)
    pen, top = ImageDraw.Draw(sheet), rows * (high + GAP)
    pen.text((6, top), head, fill=LIGHT, font=ImageFont.load_default(30))
    pen.text((6, top + 38), what, fill=FAINT, font=ImageFont.load_default(24))
    return sheet


def contact_sheet():
    """All recorded pictures, in the order of the README's table, with their names there."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    paths = sorted((ROOT / "workflows").glob("*.jpg"), key=lambda path: readme.rindex(f"workflows/{path.stem}.json"))
    names = [readme.rsplit(f"](workflows/{path.stem}.json", 1)[0].rsplit("[", 1)[1] for path in paths]
    tiles = [Image.open(path) for path in paths]
    tiles = [tile.resize((TILE, tile.height * TILE // tile.width), Image.LANCZOS) for tile in tiles]
    high = max(tile.height for tile in tiles) + TITLE + GAP
    rows = -(-len(tiles) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (TILE + GAP) + GAP, rows * high + GAP), DARK)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(18)
    for i, (tile, name) in enumerate(zip(tiles, names)):
        x, y = GAP + i % COLUMNS * (TILE + GAP), GAP + i // COLUMNS * high
        pen.text((x, y), name, fill=LIGHT, font=font)
        sheet.paste(tile, (x, y + TITLE))
    sheet.save(ROOT / "docs" / "workflows.jpg", quality=85)


if __name__ == "__main__":
    record(sys.argv[1:] or workflow_api.names())
    contact_sheet()
