"""The LoRA files that a set of videos asks for: each is held to each model once."""

import torch

from ..checkpoint import Opened
from ..errors import TurboError
from ..files import digest
from .names import Lora
from .read import LoraFile


class Library:
    """The LoRA files of one or two models."""

    def __init__(self, models: list[Opened]):
        self._names = [f"{model.description.family} ({model.description.path})" for model in models]
        self._shapes = [{name: tuple(tensor.shape) for name, tensor in model.tensors.items()} for model in models]
        self._int8 = [{name for name, t in model.tensors.items() if t.dtype == torch.int8} for model in models]
        self._files, self._sound, self._digests = {}, set(), {}

    def file(self, lora: Lora, which: int) -> LoraFile:
        """A file held to model `which` by its header. Raises TurboError."""
        key = lora.file, which
        if key not in self._files:
            self._files[key] = LoraFile(lora.file, self._shapes[which], self._names[which])
        return self._files[key]

    def acting(self, loras, which: int) -> list[tuple[LoraFile, float]]:
        """Files and strengths of those that act, known to hold numbers. Raises TurboError."""
        found = [(self.file(lora, which), lora.strength) for lora in loras if lora.strength]
        for file, _ in found:
            if file.path not in self._sound:
                file.check_values()
                self._sound.add(file.path)
        return found

    def bytes(self, loras, which: int, itemsize: int) -> int:
        """Bytes that they take beside int8 weights; float weights do not grow. Raises TurboError for a file that does
        not fit model `which`."""
        files = [(self.file(lora, which), lora.strength) for lora in loras]
        return itemsize * sum(file.size_of(self._int8[which]) for file, strength in files if strength)

    def told(self, loras) -> list[dict] | None:
        """What a video's settings say of them: names, strengths, digests of the contents. None without any."""
        return [
            {"file": lora.file.name, "strength": lora.strength, "digest": self._digest(lora.file)} for lora in loras
        ] or None

    def _digest(self, path) -> str:
        if path not in self._digests:
            try:
                self._digests[path] = digest([path])
            except OSError as error:
                raise TurboError(f"{path} cannot be read ({error.strerror or error}). Check the path.") from error
        return self._digests[path]
