"""Names of new files as people write them, held to what every system can store."""

import os
import re

from ..turbo_core.errors import TurboError

_FORBIDDEN = re.compile(r'[<>:"|?*\\\x00-\x1f]')
_RESERVED = {"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in range(1, 10))}
_LONGEST = 200  # bytes of one part of a path: file systems hold 255, and a number, .safetensors and .part are added


def check_name(name):
    """Raise TurboError unless name, folders before it and all, can be written on Linux, macOS and Windows alike."""
    parts = name.replace(os.sep, "/").split("/")
    if parts[-1].strip(" .") == "":
        raise TurboError(f"{name!r} names no file: write a name, with folders before it if you like.")
    for part in parts:
        forbidden = _FORBIDDEN.search(part)
        if forbidden:
            raise TurboError(
                f"{name!r} holds {forbidden[0]!r}, which Windows does not allow in file names (nor any of "
                '< > : " | ? * \\ and control characters): leave it out. Folders are separated by /.'
            )
        if part.split(".")[0].rstrip().upper() in _RESERVED:
            raise TurboError(f"{name!r} holds {part!r}, a name that Windows keeps for a device: choose another one.")
        if part not in (".", "..") and part != part.rstrip(" ."):
            raise TurboError(f"{name!r}: {part!r} ends in a dot or a space, which Windows drops: leave it out.")
        if len(os.fsencode(part)) > _LONGEST:
            raise TurboError(f"{name[:40]!r}... is too long, more than {_LONGEST} bytes: choose a shorter name.")
