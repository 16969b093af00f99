"""Checkpoints of Wan models in every format: inspect, load, convert, quantize, merge."""

from .converting import Converted, Progress, convert, quantize
from .describe import Description
from .loading import WORLD, inspect, load
from .merging import Merged, merge

__all__ = [
    "WORLD", "Converted", "Description", "Merged", "Progress", "convert", "inspect", "load", "merge", "quantize",
]  # fmt: skip
