"""ComfyUI nodes of TurboWan: thin adapters, the only code of the pack that imports comfy."""

import importlib
import logging
import re
import sys
from pathlib import Path

from comfy_api.latest import ComfyExtension

FILES = ("loader", "lora_report", "quantize", "attention", "scheduler", "sampler", "save", "text", "size",
         "vae", "compare", "doctor", "convert", "merge")  # fmt: skip
MINIMUM_COMFYUI = (0, 33)
KNOWN_COMFYUI = (0, 39)  # the newest whose calls the tests have met; they run on 0.33 as a whole
LIBRARIES = ("einops", "numpy", "safetensors")  # those of requirements.txt; the host's own file has all others


def _check_host():
    from comfyui_version import __version__

    version = tuple(map(int, re.findall(r"\d+", __version__)[:2]))
    needed, known = (".".join(map(str, number)) for number in (MINIMUM_COMFYUI, KNOWN_COMFYUI))
    if version < MINIMUM_COMFYUI:
        raise RuntimeError(f"TurboWan needs ComfyUI {needed} or newer, this is {__version__}: update ComfyUI.")
    if version > KNOWN_COMFYUI:
        logging.info(
            "TurboWan knows ComfyUI %s to %s, this is %s: it asks ComfyUI what it has and goes its way where it does "
            "not know a call. Where something is wrong, update TurboWan.",
            needed,
            known,
            __version__,
        )


def _cure(error):
    """One line for the host's log: what is missing and the command that brings it."""
    import comfyui_version

    module, what = getattr(error, "name", None) or "", " ".join(str(error).split())
    if module.startswith(__package__.rpartition(".")[0]):
        return f"TurboWan is not whole ({what}). Cure: install it again."
    if module.partition(".")[0] in LIBRARIES:
        cause, folder, more = "lacks a library", Path(__file__).resolve().parent.parent, ""
    else:
        cause = f"does not fit this ComfyUI {comfyui_version.__version__} and its libraries"
        folder, more = Path(comfyui_version.__file__).resolve().parent, " If that does not help, update TurboWan."
    command = f'"{sys.executable}" -m pip install -r "{folder / "requirements.txt"}"'
    return f"TurboWan {cause} ({what}). Cure: {command}, then restart.{more}"


class TurboWanExtension(ComfyExtension):
    async def get_node_list(self):
        _check_host()
        try:
            files = [importlib.import_module(f".{name}", __package__) for name in FILES]
            from .checks.graph import watch_requests
            from .host.files import register_tinywan
            from .host.schedule import register_scheduler
            from .reports.advice import tell_of_scheduler
            from .reports.faults import guarded
        except (ImportError, AttributeError) as error:  # a name that a library of another version does not have
            raise ImportError(_cure(error)) from error

        register_scheduler(tell_of_scheduler)
        register_tinywan()
        watch_requests()
        return [guarded(node) for file in files for node in file.NODES]
