"""Draws the moving picture of the README: the first eight prompts of TinyWan's quality report, none left out.

    python -m tests.tools.record_clips

Each is made as `python run.py demo` makes its own: 4 steps, sparse-linear attention at top-k 0.15, block int8, seed 0.
"""

import tempfile
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from turbo_core import checkpoint, pipeline
from turbo_core.tinywan import FILES, FOLDER, world

TARGET = Path(__file__).resolve().parents[2] / "docs" / "tinywan.webp"
COUNT, COLUMNS, TILE, GAP, TEXT = 8, 4, 176, 8, 22
DARK, LIGHT = (24, 24, 26), (225, 225, 225)


def make(dit, prompt):
    """uint8 [T, H, W, 3]."""
    files = dit, FOLDER / FILES["vae"], FOLDER / FILES["text"]
    return pipeline.generate(
        prompt, *files, size=(world.SIDE, world.SIDE), frames=world.FRAMES, steps=4, topk=0.15, seed=0
    ).frames


def sheet(frames, names):
    """One picture of all clips at one moment. frames: uint8 [H, W, 3] of each."""
    rows = -(-len(frames) // COLUMNS)
    image = Image.new("RGB", (COLUMNS * (TILE + GAP) + GAP, rows * (TILE + TEXT + GAP) + GAP), DARK)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    for i, (frame, name) in enumerate(zip(frames, names)):
        x, y = GAP + i % COLUMNS * (TILE + GAP), GAP + i // COLUMNS * (TILE + TEXT + GAP)
        image.paste(Image.fromarray(frame.numpy()).resize((TILE, TILE), Image.BICUBIC), (x, y))
        pen.text((x + TILE / 2, y + TILE + TEXT / 2), name, fill=LIGHT, font=font, anchor="mm")
    return image


def record() -> None:
    scenes = world.random_scenes(COUNT, torch.Generator().manual_seed(1000), held_out=None)
    prompts = [world.caption(scene, 1000 + i) for i, scene in enumerate(scenes)]
    names = ["{colour} {shape}, {motion}, {background}".format(**world.describe(scene)) for scene in scenes]
    with tempfile.TemporaryDirectory() as folder:
        dit = checkpoint.quantize(FOLDER / FILES["turbo"], Path(folder) / "turbo.safetensors", "int8_block").path
        clips = [make(dit, prompt) for prompt in prompts]
    moments = [sheet(frames, names) for frames in zip(*clips)]
    pause = 800  # on the last frame, so that an eye sees where a clip begins
    durations = [1000 // 16] * (len(moments) - 1) + [pause]
    options = {"duration": durations, "loop": 0, "quality": 75, "method": 6}
    moments[0].save(TARGET, save_all=True, append_images=moments[1:], **options)


if __name__ == "__main__":
    record()
