"""Small text files beside weights: what a folder was made for and from, so that nothing else is taken for it."""

import json
from pathlib import Path

from ..errors import TurboError
from ..files import write_whole
from . import engine


def claim(path: Path, settings: dict, checkpoint: Path | None = None, free=lambda name: False) -> None:
    """Make the folder of a record for these settings, or find it made for the same; TurboError where it is not.

    checkpoint: the file that training will leave to go on from. As long as it is not there, a record binds nobody; once
    it is, there must be one. Not given: the record binds from the moment it is written. free: callable (name of a
    setting) -> whether it may differ all the same, since nothing was made of it yet.
    """
    work = path.parent
    try:
        work.mkdir(parents=True, exist_ok=True)
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except (OSError, ValueError) as error:
        raise TurboError(f"{work} cannot be used for training ({error}). Choose another folder.") from error
    begun = known is not None if checkpoint is None else checkpoint.exists()
    if not begun:
        if engine.rank() == 0:
            write_whole(path, json.dumps(settings))
    elif not isinstance(known, dict):
        raise TurboError(
            f"{work} holds a training, and {path.name} does not say of what. Take another folder, or remove it."
        )
    elif known != settings:
        other = {name for name in known | settings if known.get(name) != settings.get(name)}
        wrong = sorted(name for name in other if not free(name))
        if wrong:
            raise TurboError(
                f"{work} belongs to a training with other settings ({', '.join(wrong)}). Take another folder, or "
                "remove it."
            )
        if engine.rank() == 0:
            write_whole(path, json.dumps(settings))
