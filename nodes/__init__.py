"""ComfyUI nodes of TurboWan: thin adapters, the only code of the pack that imports comfy."""

from comfy_api.latest import ComfyExtension

MINIMUM_COMFYUI = (0, 33)


def _check_host():
    from comfyui_version import __version__

    if tuple(int(part) for part in __version__.split(".")[:2]) < MINIMUM_COMFYUI:
        needed = ".".join(map(str, MINIMUM_COMFYUI))
        raise RuntimeError(f"TurboWan needs ComfyUI {needed} or newer, this is {__version__}: update ComfyUI.")


class TurboWanExtension(ComfyExtension):
    async def get_node_list(self):
        _check_host()
        from . import attention, compare, convert, doctor, loader, quantize, sampling, save, size, text_encoder

        sampling.register_scheduler()
        modules = loader, quantize, attention, sampling, save, text_encoder, size, compare, doctor, convert
        return [node for module in modules for node in module.NODES]
