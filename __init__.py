"""ComfyUI-TurboWan: TurboDiffusion's accelerations of Wan video models as ordinary ComfyUI nodes."""

WEB_DIRECTORY = "./web"  # help pages of the nodes


async def comfy_entrypoint():
    from .nodes import TurboWanExtension

    return TurboWanExtension()
