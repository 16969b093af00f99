"""ComfyUI for tests: where it lies, the pack as it loads it, a server on the CPU and a client for it."""

import asyncio
import importlib.util
import io
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACK = HERE.parents[1]
PARTS = (
    "__init__.py", "pyproject.toml", "nodes", "turbo_core", "kernels", "workflows", "subgraphs", "web", "locales",
)  # fmt: skip
FINAL = {"execution_success", "execution_error", "execution_interrupted"}
PREVIEW = 1  # type of the binary messages that carry a preview image

# Files of the small family under the names the shipped workflows ask for.
PUBLISHED = {
    "diffusion_models/TurboWan2.1-T2V-1.3B-480P-quant.pth": "TinyWan2.1-T2V-quant.pth",
    "diffusion_models/TurboWan2.1-T2V-1.3B-480P.pth": "TinyWan2.1-T2V.pth",
    "diffusion_models/TurboWan2.1-T2V-14B-480P-quant.pth": "TinyWan2.1-T2V-quant.pth",
    "diffusion_models/TurboWan2.1-T2V-14B-720P-quant.pth": "TinyWan2.1-T2V-quant.pth",
    "diffusion_models/TurboWan2.2-I2V-A14B-high-720P-quant.pth": "TinyWan2.2-I2V-high-quant.pth",
    "diffusion_models/TurboWan2.2-I2V-A14B-low-720P-quant.pth": "TinyWan2.2-I2V-low-quant.pth",
    "diffusion_models/wan2.1_t2v_14B_bf16.safetensors": "tiny_wan_stock_bf16.safetensors",
    "vae/wan_2.1_vae.safetensors": "tiny_wan_vae.safetensors",
    "text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors": "tiny_umt5.safetensors",
}
LORAS = (
    "loras/lightx2v_T2V_14B_cfg_step_distill_v2_lora_rank64_bf16.safetensors",
    "loras/Wan21_T2V_14B_MoviiGen_lora_rank32_fp16.safetensors",
)


@dataclass
class Server:
    url: str
    base: Path
    log_path: Path
    process: subprocess.Popen

    @property
    def log(self):
        return self.log_path.read_text("utf-8", "replace")


@dataclass
class Run:
    """What came of one prompt: the server's messages in order, its previews, and the refusal where it was refused."""

    messages: list = field(default_factory=list)
    previews: list = field(default_factory=list)
    refusal: dict | None = None

    @property
    def status(self):
        return "refused" if self.refusal else self.messages[-1]["type"]

    @property
    def error(self):
        """The exception message of an execution_error, or the text of a refusal."""
        return json.dumps(self.refusal) if self.refusal else self.messages[-1]["data"].get("exception_message", "")

    def progress(self, node):
        return [m["data"]["value"] for m in self.messages if m["type"] == "progress" and m["data"]["node"] == node]

    def videos(self, base):
        """Paths of the videos that the prompt's output nodes report."""
        outputs = [m["data"]["output"] for m in self.messages if m["type"] == "executed"]
        files = [f for output in outputs if output for f in output.get("images", ())]
        paths = [base / f["type"] / f["subfolder"] / f["filename"] for f in files]
        return [path for path in paths if path.suffix == ".mp4"]


def find_comfyui():
    """The folder of a ComfyUI, or None; run.py looks in the same places."""
    candidates = [os.environ.get("COMFYUI_DIR"), PACK.parent.parent, Path.home() / "ComfyUI"]
    return next((Path(c) for c in candidates if c and (Path(c) / "comfyui_version.py").is_file()), None)


def lacks():
    """Why nothing here can run in a ComfyUI, or None."""
    if find_comfyui() is None:
        return "no ComfyUI found: set COMFYUI_DIR"
    if importlib.util.find_spec("comfy_kitchen") is None or importlib.util.find_spec("aiohttp") is None:
        return "this Python lacks ComfyUI's requirements: run `python run.py host`"
    return None


def load_pack(folder, name):
    """Import the pack from `folder` under a name of our choosing, as ComfyUI does; returns the package."""
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def make_base(base, tiny=None, copies=("ComfyUI-TurboWan",)):
    """A ComfyUI base directory: the pack once per name, TinyWan, LoRAs, two pictures, and the random family of a
    folder `tiny` under the published names.
    """
    from turbo_core import tinywan

    for name in copies:
        for part in PARTS:
            if (PACK / part).is_dir():
                ignore = shutil.ignore_patterns("__pycache__")
                shutil.copytree(PACK / part, base / "custom_nodes" / name / part, ignore=ignore)
            elif (PACK / part).is_file():
                (base / "custom_nodes" / name).mkdir(parents=True, exist_ok=True)
                shutil.copy(PACK / part, base / "custom_nodes" / name / part)
    for published, file in PUBLISHED.items() if tiny else ():
        target = base / "models" / published
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tiny / file, target)
    (base / "models").mkdir(parents=True, exist_ok=True)
    tinywan.install(base / "models")
    for seed, lora in enumerate(LORAS):
        _write_lora(base / "models" / lora, seed)
    write_interpolation(base / "models" / "frame_interpolation" / "film_net_fp16.safetensors")
    _write_pictures(base / "input")
    return base


def _write_lora(path, seed):
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    key = "diffusion_model.blocks.0.self_attn.q.lora_{}.weight"
    state = {
        key.format(side): 0.1 * torch.randn(shape, generator=generator)
        for side, shape in (("down", (4, 256)), ("up", (256, 4)))
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path)


def write_interpolation(path):
    """A RIFE model of 8 channels that moves nothing and weighs both frames alike: what it makes is their mean."""
    import torch
    from safetensors.torch import save_file

    def layer(name, *shape, outputs=0):
        return {f"{name}.weight": torch.zeros(shape), f"{name}.bias": torch.zeros(shape[outputs])}

    state = layer("encode.cnn0", 16, 3, 3, 3) | layer("encode.cnn3", 16, 4, 4, 4, outputs=1)
    state |= layer("encode.cnn1", 16, 16, 3, 3) | layer("encode.cnn2", 16, 16, 3, 3)
    for i, planes in enumerate((15, 28, 28, 28, 28)):
        state |= layer(f"block{i}.conv0.0.0", 4, planes, 3, 3) | layer(f"block{i}.conv0.1.0", 8, 4, 3, 3)
        state |= layer(f"block{i}.lastconv.0", 8, 52, 4, 4, outputs=1)
        for j in range(8):
            state |= layer(f"block{i}.convblock.{j}.conv", 8, 8, 3, 3)
            state[f"block{i}.convblock.{j}.beta"] = torch.zeros(1, 8, 1, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path)


def _write_video(path, frames=9):
    """A bright square that moves over a dark ground, 160x96 at 16 frames a second."""
    import av
    import numpy

    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        for i in range(frames):
            picture = numpy.full((96, 160, 3), 40, numpy.uint8)
            picture[32:64, 8 * i : 8 * i + 32] = (220, 60, 60)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())


def _write_pictures(folder):
    """example.png, which ComfyUI ships, a lighter second.png, and the clip example.mp4."""
    from PIL import Image

    folder.mkdir()
    _write_video(folder / "example.mp4")
    first = Image.linear_gradient("L").resize((160, 96)).convert("RGB")
    first.save(folder / "example.png")
    first.point(lambda value: 255 - value // 2).save(folder / "second.png")


def start(comfyui, base, python=sys.executable, patience=180.0):
    """Start ComfyUI in `base` on a free port and wait until it answers. Raises RuntimeError with the log's end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--cpu", "--disable-api-nodes", "--database-url", "sqlite:///:memory:", "--preview-method", "latent2rgb"]
    command = [python, str(HERE / "media_stub.py"), "main.py", "--port", str(port), "--base-directory", str(base)]
    # one thread: on a busy machine, small matrices in several threads wait for each other ten times longer
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    log_path = base / "server.log"
    with open(log_path, "wb") as log:
        process = subprocess.Popen(
            command + options, cwd=comfyui, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    server = Server(f"http://127.0.0.1:{port}", base, log_path, process)
    deadline = time.monotonic() + patience
    while process.poll() is None and time.monotonic() < deadline:
        try:
            get(server, "/system_stats")
            return server
        except OSError:
            time.sleep(0.2)
    stop(server)
    raise RuntimeError(f"ComfyUI did not start, the end of its log:\n{server.log[-3000:]}")


def stop(server):
    server.process.terminate()
    try:
        server.process.wait(20)
    except subprocess.TimeoutExpired:
        server.process.kill()
        server.process.wait()


def get(server, path):
    """(status, body) of a GET request; an HTTP error is a status, a dead server an OSError."""
    try:
        with urllib.request.urlopen(server.url + path, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def get_json(server, path):
    status, body = get(server, path)
    assert status == 200, f"{path}: {status}"
    return json.loads(body)


def post(server, path, content):
    data = json.dumps(content).encode()
    request = urllib.request.Request(server.url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.status


def run(server, prompt, react=None, patience=120.0):
    """Queue a prompt, follow it over the websocket to its end and return the Run; react(message) sees each message."""
    return asyncio.run(asyncio.wait_for(_run(server, prompt, react), patience))


async def _run(server, prompt, react):
    import aiohttp

    result, client = Run(), uuid.uuid4().hex
    socket_url = f"{server.url}/ws?clientId={client}"
    async with aiohttp.ClientSession() as session, session.ws_connect(socket_url, max_msg_size=0) as events:
        async with session.post(f"{server.url}/prompt", json={"prompt": prompt, "client_id": client}) as answer:
            queued = await answer.json()
        if "prompt_id" not in queued:
            result.refusal = queued
            return result
        async for event in events:
            if event.type == aiohttp.WSMsgType.BINARY:
                if struct.unpack(">I", event.data[:4])[0] == PREVIEW:
                    result.previews.append(event.data[8:])
                continue
            message = json.loads(event.data)
            if message["data"].get("prompt_id") != queued["prompt_id"]:
                continue
            result.messages.append(message)
            if react is not None:
                await asyncio.to_thread(react, message)
            if message["type"] in FINAL:
                return result
    raise RuntimeError(f"ComfyUI closed the connection, the end of its log:\n{server.log[-3000:]}")


def preview_size(data):
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return image.size
