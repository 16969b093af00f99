"""Checkpoints of Wan models in every format: inspect, load, convert, quantize, merge.

Imports run one way: read, write, sharded, formats, names, shapes -> describe -> encode, loading -> converting ->
merging.
"""

from .converting import Converted, Progress, convert, quantize
from .describe import Description
from .loading import WORLD, Opened, inspect, load, opened, weights
from .merging import Merged, merge
from .others.sharded import files_of

__all__ = [
    "WORLD", "Converted", "Description", "Merged", "Opened", "Progress", "convert", "files_of", "inspect", "load",
    "merge", "opened", "quantize", "weights",
]  # fmt: skip
