"""ComfyUI-TurboWan: TurboDiffusion's accelerations of Wan video models as ordinary ComfyUI nodes."""


async def comfy_entrypoint():
    from .nodes import TurboWanExtension

    return TurboWanExtension()
