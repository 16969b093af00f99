"""The difference of two rows on the same prompts, against published figures and against counting."""

import itertools

import pytest

from turbo_core.tinywan.paired import compare, difference_interval, exact_p


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [
        ((36, 12, 2, 0), 0.0569, 0.3404),  # Newcombe 1998, table III, method 10
        ((20, 12, 2, 16), 0.0562, 0.3292),  # the same
        ((14, 5, 0, 22), 0.011, 0.226),  # Altman and others, Statistics with Confidence, table 6.2
    ],
)
def test_the_interval_is_the_published_one(counts, low, high):
    digits = 3 if high == 0.226 else 4
    assert difference_interval(*counts) == pytest.approx((low, high), abs=0.5001 * 10**-digits)


@pytest.mark.parametrize("counts", [(36, 12, 2, 0), (7, 0, 9, 3), (0, 3, 0, 0), (5, 0, 0, 0), (0, 0, 0, 4)])
def test_turned_round_it_is_the_same_interval(counts):
    both, first, second, neither = counts
    low, high = difference_interval(*counts)
    assert -1 <= low <= (first - second) / sum(counts) <= high <= 1
    assert difference_interval(both, second, first, neither) == pytest.approx((-high, -low))


def test_p_is_the_share_of_coin_throws_that_are_as_uneven():
    for first, second in itertools.product(range(6), repeat=2):
        throws = list(itertools.product((0, 1), repeat=first + second))
        uneven = sum(abs(2 * sum(throw) - len(throw)) >= abs(first - second) for throw in throws)
        assert exact_p(first, second) == pytest.approx(uneven / len(throws))
    assert exact_p(12, 2) == pytest.approx(0.0129, abs=5e-5)


def test_pairs_are_told_apart_where_two_intervals_overlap():
    first = [True] * 170 + [False] * 150
    second = [True] * 152 + [False] * 168
    paired = compare(first, second)  # 18 only in the first, none only in the second
    assert paired.difference == pytest.approx(18 / 320)
    assert 0 < paired.low < paired.difference < paired.high and paired.p < 1e-4
    crossed = compare(first, [*reversed(second)])
    assert crossed.low < 0 < crossed.high and crossed.p > 0.1


def test_rows_of_different_prompts():
    with pytest.raises(ValueError):
        compare([True], [True, False])
    assert compare([], []) == (0, -1, 1, 1)
