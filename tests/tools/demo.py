"""Renders the shipped workflow 00_start_here in a real ComfyUI with TinyWan, the small trained family.

    python -m tests.tools.demo OUTPUT_FOLDER

From the repository root. Starts the ComfyUI in COMFYUI_DIR on a free port with this pack, runs the workflow over HTTP,
writes OUTPUT_FOLDER/comfyui-demo.mp4 and stops it again. Needs no GPU.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.helpers import comfyui as host
from tests.helpers import workflow_api

WORKFLOW = "00_start_here"
STAGES = {"TurboLoader": "model", "TurboTextEncoderLoader": "text", "CLIPTextEncode": "text", "TurboSampler": "4 steps",
          "VAELoader": "VAE", "VAEDecode": "decoding", "CreateVideo": "MP4", "SaveVideo": "MP4"}  # fmt: skip


class Stopwatch:
    """Seconds of each stage, from the server's messages as they arrive."""

    def __init__(self, prompt):
        self.prompt, self.seconds, self.stage, self.since = prompt, {}, None, time.perf_counter()

    def __call__(self, message):
        if message["type"] != "executing":
            return
        now, node = time.perf_counter(), self.prompt.get(message["data"]["node"])
        if self.stage is not None:
            self.seconds[self.stage] = self.seconds.get(self.stage, 0) + now - self.since
        self.stage, self.since = STAGES.get(node["class_type"]) if node else None, now


def render(server, output):
    """Run the workflow on a server; returns (the video's path in output, {stage: seconds}). Raises RuntimeError."""
    prompt = workflow_api.to_api(workflow_api.load(WORKFLOW), host.get_json(server, "/object_info"))
    watch = Stopwatch(prompt)
    run = host.run(server, prompt, watch)
    if run.status != "execution_success":
        raise RuntimeError(f"The workflow ended with {run.status}: {run.error}")
    (video,) = run.videos(server.base)
    output.mkdir(parents=True, exist_ok=True)
    return shutil.copy(video, output / "comfyui-demo.mp4"), watch.seconds


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m tests.tools.demo", description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, metavar="OUTPUT_FOLDER")
    options = parser.parse_args(arguments)
    comfyui = Path(os.environ.get("COMFYUI_DIR", "")).resolve()
    if not (comfyui / "comfyui_version.py").is_file():
        print(f"No ComfyUI in {comfyui}: set COMFYUI_DIR to its folder (0.33 or newer).", file=sys.stderr)
        return 1
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as base:
        try:
            server = host.start(comfyui, host.make_base(Path(base)))
        except (OSError, RuntimeError, ValueError) as error:
            print(error, file=sys.stderr)
            return 1
        started = time.perf_counter() - began
        try:
            video, seconds = render(server, options.output)
        except (OSError, RuntimeError, ValueError) as error:
            print(error, file=sys.stderr)
            return 1
        finally:
            host.stop(server)
    stages = ", ".join(f"{stage} {spent:.1f} s" for stage, spent in seconds.items())
    print(f"{video}: {WORKFLOW} in ComfyUI")
    print(f"ComfyUI's start {started:.1f} s, {stages}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
