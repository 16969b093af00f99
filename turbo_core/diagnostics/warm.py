"""The kernels that a card is going to need, compiled ahead into Triton's cache by several processes: turbo-core warm.

Else the first prompt waits for them, one after the other. The card need not be there: an image for it can be made on a
machine without one.
"""

import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from ..checkpoint import Description
from ..devices import pick_device
from ..dispatch import cannot_run, whole_name
from ..errors import TurboError, quoted, shown
from ..pipeline.inputs import DEFAULT_TOPK
from ..wan.model import PATCH

MOST_JOBS = 8  # processes; each has torch and Triton in memory, half a GB


def target_of(text: str | None):
    """((backend, architecture, threads of a warp), name of the card or None) for "sm_90", or of the card that is here.

    Raises TurboError where there is no card, or the architecture is none that the kernels are for.
    """
    try:
        import triton
    except ImportError as error:
        raise TurboError(
            "Compiling kernels needs the Python package triton, which is not installed. Cure: pip install triton (on "
            "Windows triton-windows)."
        ) from error
    if text is not None:
        match = re.fullmatch(r"sm_(\d{2,3})", text)
        if match is None or int(match[1]) < 80:
            raise TurboError(
                f"--target is an NVIDIA card's architecture from sm_80 on, such as sm_90; got {quoted(text)}."
            )
        return ("cuda", int(match[1]), 32), None
    device = whole_name(pick_device())
    reason = cannot_run(device)
    if reason:
        raise TurboError(f"There is no card here to compile for ({reason}): name one, for example --target sm_90.")
    found = triton.runtime.driver.active.get_current_target()
    return (found.backend, found.arch, found.warp_size), torch.cuda.get_device_name(device)


def video_of(model: Description, latent, precision: str) -> dict:
    """What a block of a model launches for a video, see compiling.block_of_a_video. latent: (T, H, W) of it. Raises
    TurboError for weights that are not int8: what they launch, every model launches."""
    if model.format not in ("int8_block", "int8_row"):
        raise TurboError(f"{model.path} is {model.format}: only W8A8 weights have kernels of their own. Leave it out.")
    tokens = 1
    for size, patch in zip(latent, PATCH):
        tokens *= size // patch
    sizes = {"dim": model.dim, "ffn": model.ffn_dim, "heads": model.num_heads, "tokens": tokens}
    return sizes | {"rows": model.format == "int8_row", "precision": precision, "topk": DEFAULT_TOPK}


def warm(target, card=None, videos=(), jobs: int | None = None, progress: Callable | None = None) -> list[dict]:
    """Compile for a target in `jobs` processes, default one a core.

    Returns what each launch came to: {"kernel", "seconds", "hash" or "failed"}; launches that the compiler cannot tell
    apart have one hash. progress: callable ("compile", done, total). Raises TurboError when a process ends early.
    """
    jobs = jobs or min(os.cpu_count() or 1, MOST_JOBS)
    work = {"target": target, "card": card, "videos": list(videos), "of": jobs}
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", f"{__package__}.compiling"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    # in files: a compiler that fails says more than a pipe holds, and would wait for a reader
    errors = [tempfile.TemporaryFile("w+", errors="replace") for _ in range(jobs)]  # noqa: SIM115 (closed by who reads them)
    children = [subprocess.Popen(command, text=True, env=environment, stderr=file, **pipes) for file in errors]
    said, results, total = queue.SimpleQueue(), [], 0
    try:
        for share, (child, file) in enumerate(zip(children, errors)):
            threading.Thread(target=_listen, args=(child, work | {"share": share}, file, said), daemon=True).start()
        ended = 0
        while ended < jobs:
            line = said.get()
            if "ended" in line:
                if line["ended"]:
                    raise TurboError(f"warm: a compiling process ended with {line['ended']} ({line['error']}).")
                ended += 1
            elif "launches" in line:
                total += line["launches"]
            else:
                results.append(line)
            if progress and total:
                progress("compile", len(results), total)
    finally:
        for child in children:
            if child.poll() is None:
                child.terminate()
            child.wait()
    return results


def _listen(child, job, errors, said):
    """Hand a process its job, and on what it says, line by line; its end last, with the last line of its errors."""
    with suppress(BrokenPipeError), child.stdin as into:  # it may have ended before
        into.write(json.dumps(job))
    for line in child.stdout:
        if line.startswith("{"):  # else a library's
            said.put(json.loads(line))
    ended = child.wait()
    errors.seek(0)
    with errors:
        said.put({"ended": ended, "error": shown((errors.read().strip().splitlines() or ["no message"])[-1], 200)})
