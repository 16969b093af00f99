"""Overlapping tiles of a picture's plane, and how they are blended into one."""

import torch

SIDE, OVERLAP = 32, 8  # in latent pixels, each of them 8 of the video


def spans(total: int) -> list[tuple[int, int]]:
    """(start, stop) of tiles that cover an axis; each overlaps the one before by OVERLAP, the last may be short."""
    starts = range(0, max(1, total - OVERLAP), SIDE - OVERLAP)
    return [(start, min(start + SIDE, total)) for start in starts]


def tiles(height: int, width: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(rows, columns) of every tile, as spans."""
    return [(rows, columns) for rows in spans(height) for columns in spans(width)]


def weights(span: tuple[int, int], total: int, scale: int) -> torch.Tensor:
    """A tile's share along an axis, scale times finer than the span: a slope in each overlap, the two of which add up
    to 1."""
    start, stop = span
    slope = (torch.arange(OVERLAP * scale) + 0.5) / (OVERLAP * scale)
    share = torch.ones((stop - start) * scale)
    if start > 0:
        share[: len(slope)] *= slope
    if stop < total:
        share[-len(slope) :] *= 1 - slope
    return share
