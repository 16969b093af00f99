"""ComfyUI-TurboWan: TurboDiffusion's accelerations of Wan video models as ordinary ComfyUI nodes."""

from importlib.util import find_spec

WEB_DIRECTORY = "./web"  # help pages of the nodes


def __getattr__(name):
    # what every ComfyUI looks for, and one from before comfy_entrypoint looks for alone: its log then says this
    if name == "NODE_CLASS_MAPPINGS" and find_spec("comfy") and not find_spec("comfy_api"):
        raise ImportError("TurboWan needs ComfyUI 0.33 or newer, this one is much older: update ComfyUI.")
    raise AttributeError(name)


async def comfy_entrypoint():
    from .nodes import TurboWanExtension

    return TurboWanExtension()
