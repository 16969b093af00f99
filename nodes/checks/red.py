"""What makes a node red in the page before anything runs: checks for the nodes' validate_inputs.

The host repeats an answer for every input that validate_inputs names, and shows its own checks of such an input no
more: so it names one, and the others are taken from the graph.
"""

import logging
import os

from ...turbo_core.checkpoint.loading import check_read
from ...turbo_core.checkpoint.merging import check_related
from ...turbo_core.errors import TurboError
from ..host.files import MODELS, as_listed, check_output, model_file, place_of_model
from ..host.inputs import check_experts, check_text, no_picture
from ..host.loading import is_ours
from .graph import file_behind, inputs_of, source, taking
from .headers import check_lora, described, text_width, vae_channels

_SIZES = "task", "dim", "ffn_dim", "num_layers", "in_dim", "text_dim"


def red(check, *values) -> bool | str:
    """True, or the text of the TurboError that a check raises. What else fails in it is left to the run to tell."""
    try:
        check(*values)
    except TurboError as error:
        return as_listed(str(error))
    except Exception as error:  # a fault of a check must not stop a run that may be sound
        logging.warning("TurboWan: %s could not be checked before the run: %r", check.__name__, error, exc_info=True)
    return True


def model(name):
    """A file for Turbo Loader."""
    path = _chosen(name)
    if path is not None and is_ours(found := described(path)):
        check_read(found)


def text_encoder(name):
    """A file for Turbo Text Encoder Loader."""
    path = _chosen(name, "text_encoders")
    if path is not None:
        text_width(path)


def lora(name):
    """A file for Turbo LoRA Report."""
    path = _chosen(name, "loras")
    if path is not None:
        check_lora(path)


def output(prefix):
    """The name of a file for Turbo Save."""
    if prefix is not None:
        check_output(prefix)


def conversion(name, number):
    """The source of Turbo Convert, and the name of what it writes."""
    path = _chosen(name)
    if path is not None:
        check_read(described(path))
    _new_name(number)


def merging(name, number, check_different):
    """The files of Turbo Merge, `name` the last of them, and the name of what it writes."""
    given = inputs_of(number) | {"turbo": name}
    names = {key: value for key in ("finetune", "base", "turbo") if isinstance(value := given.get(key), str)}
    files = {key: described(model_file(value)) for key, value in names.items()}
    if len(files) == 3:
        check_different(**names)
        check_related(files["finetune"], files["base"], [files["turbo"]])
    _new_name(number)


def sampling(number):
    """What of Turbo Sampler's links can be followed to files: two experts, a picture, the text encoder, the VAE."""
    given = inputs_of(number)
    files = {name: file_behind(given.get(name), "model") for name in ("model", "model_low")}
    high, low = map(_known, files.values())
    if high and low:
        facts = [{name: getattr(file, name) for name in _SIZES} for file in (high, low)]
        check_experts(*facts, *map(os.path.basename, files.values()))
    if high:
        _prompt(high, given)
        _decoding(high, number)


def comparing(number, check_alike):
    """What of Turbo Compare's links can be followed to files: two models of one family, the text encoder."""
    given = inputs_of(number)
    paths = [file_behind(given.get(name), "model") for name in ("model_a", "model_b")]
    files = list(filter(None, map(_known, paths)))
    if len(files) == 2:
        check_alike(*((file.dim, file.num_heads, file.num_layers, file.in_dim) for file in files))
    for file in files[:1]:
        _prompt(file, given)


def _known(path):
    """What a file is; None where it is not known, or no sound file, which is for its loader to tell."""
    return None if path is None else _read_or_none(described, path)


def _read_or_none(reader, path):
    """What a reader says of a file; None for one that is not ours to read: the host may do so well."""
    try:
        return reader(path)
    except TurboError:
        return None


def _prompt(file, given):
    """A prompt that comes right out of ComfyUI's own encoder: nothing on the way could have brought a picture."""
    kind, number = source(given.get("positive")) or (None, None)
    if kind != "CLIPTextEncode":
        return
    if file.task == "i2v" and file.in_dim == file.out_dim + 20:
        raise no_picture(os.path.basename(file.path))
    path = file_behind(inputs_of(number).get("clip"), "clip")
    width = None if path is None else _read_or_none(text_width, path)
    if width is not None:
        check_text(width, file.text_dim)


def _decoding(file, number):
    """The VAE that is to decode what a sampler makes: told before the sampling, not after it."""
    for decoder in taking(number, 0, "samples"):
        path = file_behind(inputs_of(decoder).get("vae"), "vae")
        channels = None if path is None else _read_or_none(vae_channels, path)
        if channels is not None and channels != file.out_dim:
            raise TurboError(
                f"{os.path.basename(path)} decodes latents of {channels} channels, {os.path.basename(file.path)} makes "
                f"{file.out_dim}: choose the VAE of this model (Wan 2.1's for all but the 5B model)."
            )


def _chosen(name, kind=MODELS):
    """Path of a file that is chosen; None for a name that comes through a link."""
    return None if name is None else model_file(name, kind)


def _new_name(number):
    name = inputs_of(number).get("filename")
    if isinstance(name, str) and name.strip():
        place_of_model(name.strip())
