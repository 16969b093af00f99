"""Files that nodes read and write: where they lie, what they may be called, what is wrong with them."""

import contextlib
import os
import re
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import folder_paths
from comfy_api.latest import io

from ...turbo_core import tinywan
from ...turbo_core.checkpoint import files_of
from ...turbo_core.checkpoint.formats import FORMATS
from ...turbo_core.checkpoint.others.sharded import INDEX
from ...turbo_core.checkpoint.read import SAFETENSORS_SUFFIXES, open_tensors
from ...turbo_core.errors import TurboError, quoted, shown
from ...turbo_core.files import is_device

MODELS = "diffusion_models"
_FORBIDDEN = re.compile(r'[<>:"|?*\\\x00-\x1f]')
_SHARD = re.compile(r"-\d+-of-\d+\.(?:safetensors|sft)$")
_LONGEST = 200  # bytes of one part of a path: file systems hold 255, and a number, .safetensors and .part are added


def register_tinywan():
    """Have the host search models/tinywan of this pack too, after the person's own folders: its workflows run at once.

    Nothing is copied, and what a person keeps under the same name comes first.
    """
    for kind in sorted({os.path.dirname(name) for name in tinywan.FILES.values()}):
        folder = tinywan.FOLDER / kind
        if folder.is_dir():
            folder_paths.add_model_folder_path(kind, str(folder))


def file_input(name, tooltip, kind=MODELS):
    """An input that offers the files in models/`kind`, for model_file."""
    return io.Combo.Input(name, options=_listed(kind), tooltip=tooltip)


def _listed(kind):
    """The host's list of the files in models/`kind`, with an index in place of the shards that lie beside it."""
    names = {}
    for name in folder_paths.get_filename_list(kind):
        index = _SHARD.sub(INDEX, name)
        names[name if index == name or folder_paths.get_full_path(kind, index) is None else index] = True
    return list(names)


def file_stem(name):
    """What a file made from this one is called; an index has the name of its folders, as all are called the same."""
    path = Path(name)
    if path.name.endswith(INDEX) and path.parent.name:
        return "_".join(path.parent.parts)
    return path.stem


def model_file(name, kind=MODELS):
    """Path of a file in models/`kind`. Raises TurboError where none is chosen or it is gone."""
    if not isinstance(name, str) or not name.strip():
        raise TurboError(f"No file is chosen, got {quoted(name)}: choose one that lies in models/{kind}.")
    try:
        return folder_paths.get_full_path_or_raise(kind, name)
    except (FileNotFoundError, ValueError) as error:  # ValueError: a name that no disk takes
        raise TurboError(
            f"{shown(name)} was not found in models/{kind}: press R, choose one that is listed."
        ) from error


def listed_files(*names, kind=MODELS):
    """Paths of those files in models/`kind` that are there, of an index also its shards; what is no name of one is left
    out."""
    found = (folder_paths.get_full_path(kind, name) for name in names if isinstance(name, str))
    paths = []
    for path in filter(None, found):
        paths.append(path)
        with contextlib.suppress(TurboError, OSError):  # a damaged index is told when it is read
            paths += (str(file) for file in files_of(path) if str(file) != path)
    return paths


def read_tensors(path):
    """(tensors, metadata) of a file that turbo_core's reader, which trusts nothing, found whole.

    A safetensors file that is called so and stays mapped is then read by the host, whose memory management knows its
    own mapping. Raises TurboError for one that is damaged, refused, cut short meanwhile or no such file.
    """
    file = open_tensors(path, writable=True)
    if not stays_mapped(file):
        return {name: file.disk.read(tensor) for name, tensor in file.tensors.items()}, file.metadata
    if file.container == "safetensors" and Path(path).suffix.lower() in SAFETENSORS_SUFFIXES:
        return comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
    return file.tensors, file.metadata


def stays_mapped(file, disable_dynamic=False):
    """Whether the tensors of an open file are to stay mapped: where the host counts on it, and drops and reads weights
    again as memory asks, and where the free memory does not hold the two copies that loading makes."""
    if comfy.utils.DISABLE_MMAP:
        return False
    dynamic = comfy.model_patcher.CoreModelPatcher is not comfy.model_patcher.ModelPatcher and not disable_dynamic
    return dynamic or file.disk.stays_mapped(file.tensors.values(), copies=2)


def format_input(default=None):
    """The number format of a new file."""
    return io.Combo.Input(
        "format",
        options=list(FORMATS),
        default=default,
        tooltip="int8_block: 128x128 blocks as the published TurboWan files, for Turbo Loader. int8_row and fp8: "
        "ComfyUI's own formats, which its loaders read as well. bf16, fp16, fp32: unquantized.",
    )


def filename_input():
    """The name of a new file, for new_model."""
    return io.String.Input(
        "filename",
        default="",
        tooltip="Of the new file in models/diffusion_models; .safetensors is added. Empty: the source's name and the "
        "format. Press R afterwards and loaders list it.",
    )


def overwrite_input():
    """The leave to replace a file, for new_model."""
    return io.Boolean.Input("overwrite", default=False, advanced=True, tooltip="Replace a file of that name.")


def new_model(filename, overwrite):
    """Path of a new file below the folder named diffusion_models. Raises TurboError for any other place."""
    target = place_of_model(filename)
    if target.exists() and not overwrite:
        raise TurboError(f"{target} exists already. Choose another filename, or switch overwrite on.")
    return target


def place_of_model(filename):
    """Where a new model of this name would lie, whatever is there. Raises TurboError for a place that is not ours."""
    folders = [Path(folder) for folder in folder_paths.get_folder_paths(MODELS)]
    folder = next((f for f in folders if f.name == MODELS), folders[0])
    check_name(filename)
    if Path(filename).suffix.lower() != ".safetensors":
        filename += ".safetensors"
    target = Path(os.path.normpath(folder / filename))  # links are followed: models lie on other disks
    if not target.is_relative_to(os.path.normpath(folder)):
        raise _outside(filename, folder)
    return target


def new_output(prefix):
    """Path of a new numbered file below the host's output folder. Raises TurboError for any other place."""
    prefix = check_output(prefix)
    folder, name, counter, _, _ = folder_paths.get_save_image_path(prefix, folder_paths.get_output_directory())
    return os.path.join(folder, f"{name}_{counter:05}_.safetensors")


def check_output(prefix):
    """A prefix without space around it. Raises TurboError for one that is not below the host's output folder."""
    output, prefix = folder_paths.get_output_directory(), (prefix or "").strip()
    check_name(prefix)
    if not folder_paths.is_within_directory(output, os.path.join(output, os.path.normpath(prefix))):
        raise _outside(prefix, output)
    return prefix


def _outside(name, folder):
    return TurboError(f"{quoted(name)} lies outside {folder}. Expected a file name, or a folder below it and a name.")


def check_name(name):
    """Raise TurboError unless name, folders before it and all, can be written on Linux, macOS and Windows alike."""
    parts = name.replace(os.sep, "/").split("/")
    if parts[-1].strip(" .") == "":
        raise TurboError(f"{quoted(name)} names no file: write a name, with folders before it if you like.")
    for part in parts:
        forbidden = _FORBIDDEN.search(part)
        if forbidden:
            raise TurboError(
                f"{quoted(name)} holds {forbidden[0]!r}, which Windows does not allow in file names (nor any of "
                '< > : " | ? * \\ and control characters): leave it out. Folders are separated by /.'
            )
        if is_device(part):
            raise TurboError(
                f"{quoted(name)} holds {quoted(part)}, a name that Windows keeps for a device: choose another one."
            )
        if part not in (".", "..") and part != part.rstrip(" ."):
            raise TurboError(
                f"{quoted(name)}: {quoted(part)} ends in a dot or a space, which Windows drops: leave it out."
            )
        if len(os.fsencode(part)) > _LONGEST:
            raise TurboError(f"{name[:40]!r}... is too long, more than {_LONGEST} bytes: choose a shorter name.")


def as_listed(text):
    """A text that calls files of the host's folders as the page lists them: without the folder they lie in."""
    kinds = (folders for folders, _ in folder_paths.folder_names_and_paths.values())
    folders = {os.path.normpath(folder) for listed in kinds for folder in listed}
    folders |= {folder_paths.get_output_directory(), folder_paths.get_input_directory()}
    for folder in sorted(folders, key=len, reverse=True):  # the inner one first
        text = text.replace(os.path.join(folder, ""), "")
    return text


def progress_bar():
    """A callback (done, total) that moves the node's bar in the page and stops when the run is interrupted."""
    bar = comfy.utils.ProgressBar(1)

    def progress(done, total):
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    return progress
