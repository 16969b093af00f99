"""TinyWan, the small trained family in models/tinywan of this repository, and its way into a ComfyUI."""

import os
import shutil
from pathlib import Path

from ..errors import TurboError
from ..files import written_aside

FOLDER = Path(__file__).resolve().parents[2] / "models" / "tinywan"
# below a family's folder, which is laid out as a ComfyUI's models folder is: ComfyUI can be pointed at it
FILES = {
    "teacher": "diffusion_models/TinyWan2.1-T2V-teacher.safetensors",
    "student": "diffusion_models/TinyWan2.1-T2V-rCM.safetensors",
    "turbo": "diffusion_models/TinyWan2.1-T2V.safetensors",
    "vae": "vae/TinyWan2.1_VAE.safetensors",
    "text": "text_encoders/TinyWan_umt5.safetensors",
}
PAIR = {
    "high": "diffusion_models/TinyWan2.2-I2V-high.safetensors",
    "low": "diffusion_models/TinyWan2.2-I2V-low.safetensors",
}


def install(models, progress=None) -> list[Path]:
    """Copy the family into the sub-folders of a ComfyUI's models folder; returns the copies.

    progress: callable (path), after each file. Raises TurboError when models is no folder or cannot be written, and
    where the family is missing.
    """
    models, copies = Path(models), []
    if not os.path.isdir(models):  # Path's own raises for names that no disk takes
        raise TurboError(f"There is no folder {models}. Give the models folder of a ComfyUI, for example ../../models.")
    files = [*FILES.values(), *PAIR.values()]
    missing = [name for name in files if not (FOLDER / name).is_file()]
    if missing:
        raise TurboError(
            f"This copy of TurboWan comes without {FOLDER / missing[0]}. Clone the repository, or reinstall the pack."
        )
    for name in files:
        target = models / name
        try:
            target.parent.mkdir(exist_ok=True)
            with written_aside(target) as aside:
                shutil.copyfile(FOLDER / name, aside)
        except OSError as error:
            raise TurboError(
                f"Could not write {target} ({error}). Check its rights and the free space, and stop a ComfyUI that has "
                "the file open."
            ) from error
        copies.append(target)
        if progress is not None:
            progress(target)
    return copies
