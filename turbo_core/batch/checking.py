"""What a batch would meet, looked at without making anything: the devices, and the folder of the videos."""

import os
import shutil
from pathlib import Path

import torch

from ..devices import available_memory, pick_device
from ..errors import TurboError
from ..files import check_free, human_bytes
from .making import LEAST_FREE
from .manifest import NAME

_BYTES = 0.25  # of a pixel: a guess for busy pictures


def about_devices(devices: list) -> list[tuple[str, str, str]]:
    """Rows for a person, a device each. Raises TurboError for one that cannot be used."""
    rows = []
    for name in dict.fromkeys(devices):
        device = pick_device(name)
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
        else:
            free, total = available_memory() or (0, 0)
        processes = f"{devices.count(name)} processes, " if devices.count(name) > 1 else ""
        rows.append((f"device {device}", f"{processes}{human_bytes(free)} free", f"of {human_bytes(total)}"))
    return rows


def about_folder(folder, pixels: int) -> list[tuple[str, str, str]]:
    """A row for a person; pixels: of all frames that are to be made. Raises TurboError where nothing can be written
    there, another batch is at work, or the disk is full."""
    folder = Path(folder)
    there = next(place for place in (folder, *folder.absolute().parents) if os.path.exists(place))
    if not os.path.isdir(there):
        raise TurboError(f"{there} is a file. Expected a folder for the videos: choose another name.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise TurboError(f"{there} may not be written to. Check its rights, or choose another folder.")
    if there == folder:
        check_free(folder / NAME)
    free = shutil.disk_usage(there).free
    if free < LEAST_FREE:
        raise TurboError(f"The disk of {folder} is full ({human_bytes(free)} free). Free space.")
    wanted = int(pixels * _BYTES)
    verdict = "enough" if wanted < free else "perhaps too little"
    told = f"{verdict}: the videos take {human_bytes(wanted)} or so"
    return [(f"folder {folder}", f"{human_bytes(free)} free", told)]
