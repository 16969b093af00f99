"""What the header of a file tells, read once for as long as the file stays what it is."""

import functools

from ...turbo_core import checkpoint
from ...turbo_core.checkpoint.describe import Description
from ...turbo_core.checkpoint.lora_names import split_name
from ...turbo_core.checkpoint.names import looks_like
from ...turbo_core.checkpoint.read import open_tensors
from ...turbo_core.errors import TurboError
from ...turbo_core.files import state_of
from ..host.loading import text_encoder_sizes

_FIRST_OF_DECODER = "decoder.conv1.weight", "decoder.conv_in.weight"  # of Wan's own VAEs, and of others
KEPT = 128  # files whose header is remembered


def described(path) -> Description:
    """checkpoint.inspect of a model file. Raises TurboError like it."""
    return _read(checkpoint.inspect, path)


def check_lora(path):
    """Raise TurboError unless a file has at least one tensor of a LoRA, in any tool's spelling."""
    _read(_check_lora, path)


def text_width(path) -> int:
    """Width of what a umT5 file makes of a prompt. Raises TurboError for any other file."""
    return _read(_text_width, path)


def vae_channels(path) -> int | None:
    """Channels of the latents that a VAE file decodes, None where its names do not tell. Raises TurboError like the
    reader."""
    return _read(_vae_channels, path)


def _read(reader, path):
    parts = tuple(map(str, checkpoint.files_of(path)))
    found, error = _remembered(reader, parts, tuple(_state(part) for part in parts))
    if error is not None:
        raise TurboError(error)
    return found


@functools.lru_cache(KEPT)
def _remembered(reader, parts, states):
    """(what the reader says, None) or (None, what is wrong): an error is remembered like anything else."""
    try:
        return reader(parts[0]), None
    except TurboError as error:
        return None, str(error)


def _state(path):
    try:
        return state_of(path)
    except (OSError, ValueError):
        return None


def _check_lora(path):
    tensors = open_tensors(path, contents=False).tensors
    if any(split_name(name)[1] for name in tensors):
        return
    try:
        what = f"the model {checkpoint.inspect(path).family}: load it with Turbo Loader"
    except TurboError:
        what = f"{looks_like(tensors) or 'something else'}: choose a LoRA for Wan"
    raise TurboError(f"{path} is not a LoRA, it is {what}.")


def _text_width(path):
    return text_encoder_sizes(open_tensors(path, contents=False).tensors, path, contents=False)["width"]


def _vae_channels(path):
    tensors = open_tensors(path, contents=False).tensors
    first = next((tensors[name] for name in _FIRST_OF_DECODER if name in tensors), None)
    return first.shape[1] if first is not None and first.ndim in (4, 5) else None
