"""Two rows of the quality report on the same prompts: their difference, its interval, and how easily chance makes it.

What both rows get right or wrong says nothing about which is better, so the few prompts that only one of them gets
right tell a difference that two intervals, one of each row, would hide.
"""

import math
from typing import NamedTuple

from .judge import interval


class Paired(NamedTuple):
    """difference: share of the first less that of the second, with its 95 % interval; p: see exact_p."""

    difference: float
    low: float
    high: float
    p: float


def compare(first: list[bool], second: list[bool]) -> Paired:
    """Two rows' marks of the same prompts, in the same order. Raises ValueError where they are not as many."""
    pairs = list(zip(first, second, strict=True))
    counts = [sum(pair == wanted for pair in pairs) for wanted in ((1, 1), (1, 0), (0, 1), (0, 0))]
    _, only_first, only_second, _ = counts
    low, high = difference_interval(*counts)
    return Paired((only_first - only_second) / max(len(pairs), 1), low, high, exact_p(only_first, only_second))


def difference_interval(both: int, only_first: int, only_second: int, neither: int) -> tuple[float, float]:
    """95 % interval of the difference of two paired shares: Newcombe's tenth method, which puts Wilson's intervals of
    the two together and allows for their correlation (Statistics in Medicine 17, 1998, pages 2635 to 2650)."""
    count = both + only_first + only_second + neither
    if count == 0:
        return -1.0, 1.0
    first, second = both + only_first, both + only_second
    (low1, high1), (low2, high2) = (interval(right, count) for right in (first, second))
    share1, share2 = first / count, second / count
    together = _correlation(both, only_first, only_second, neither)

    def far(one, other):
        return math.sqrt(max(0.0, one * one - 2 * together * one * other + other * other))

    difference = share1 - share2
    return difference - far(share1 - low1, high2 - share2), difference + far(high1 - share1, share2 - low2)


def _correlation(both, only_first, only_second, neither) -> float:
    """Phi of a table of pairs, its numerator nearer to zero by half a pair's share where it is above zero."""
    sides = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    if sides == 0:
        return 0.0
    product, half = both * neither - only_first * only_second, (both + only_first + only_second + neither) / 2
    return (max(product - half, 0.0) if product > 0 else product) / math.sqrt(sides)


def exact_p(only_first: int, only_second: int) -> float:
    """McNemar's test, exact and two-sided: how often a coin that is thrown for each prompt on which two rows differ
    sets them as far apart."""
    count, few = only_first + only_second, min(only_first, only_second)
    return min(1.0, 2 * sum(math.comb(count, k) for k in range(few + 1)) / 2**count)
