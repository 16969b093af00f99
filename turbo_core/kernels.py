"""Bridge to the Triton kernels in the sibling folder `kernels/`.

Inside ComfyUI the pack is imported under a name of the host's choosing, and `kernels` as an absolute name belongs to
another package, so the folder is reached through this module's path: `from .kernels.some_file import some_kernel`.
An installed wheel maps the folder to the package `turbo_core.kernels`, which then takes this module's place.
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parent.parent / "kernels")]
