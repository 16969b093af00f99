"""What a batch would meet, looked at without making anything: the devices, and the folder of the videos."""

import torch

from ..devices import available_memory, pick_device
from ..errors import TurboError
from ..files import human_bytes
from .folder import Folder
from .making import LEAST_FREE
from .remote import folder_of

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
    folder = folder_of(folder)
    folder.check()
    free = folder.free()
    if free < LEAST_FREE:
        raise TurboError(f"The disk of {folder} is full ({human_bytes(free)} free). Free space.")
    wanted = int(pixels * _BYTES)
    if not isinstance(folder, Folder):
        return [(f"folder {folder}", "reached", f"the videos take {human_bytes(wanted)} or so")]
    verdict = "enough" if wanted < free else "perhaps too little"
    told = f"{verdict}: the videos take {human_bytes(wanted)} or so"
    return [(f"folder {folder}", f"{human_bytes(free)} free", told)]
