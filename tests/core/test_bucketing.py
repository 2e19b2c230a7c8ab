"""Batches of neighbours in length."""

from functools import cache

import pytest

from analysis.core.bucketing import LAUNCHES, OVERHEAD, buckets


def cost(lengths, cuts, overhead):
    return sum(len(lengths[cut]) * lengths[cut][0] + overhead for cut in cuts)


def least(lengths, most, overhead):
    """The least cost of any way to cut, by trying all."""

    @cache
    def of(first):
        if first == len(lengths):
            return 0
        sizes = range(1, min(most, len(lengths) - first) + 1)
        return min(size * lengths[first] + overhead + of(first + size) for size in sizes)

    return of(0)


@pytest.mark.parametrize("most", [1, 2, 5, 32, 100])
@pytest.mark.parametrize(
    "lengths",
    [[64] * 7, [500, 400, 300, 20, 19, 18, 17], list(range(90, 10, -1)), [1000, *[3] * 40], [1]],
    ids=["equal", "a gap", "falling", "one long", "one"],
)
@pytest.mark.parametrize("overhead", [OVERHEAD, LAUNCHES])
def test_no_other_cut_costs_less(lengths, most, overhead):
    cuts = buckets(lengths, most, overhead)
    assert [i for cut in cuts for i in range(cut.start, cut.stop)] == list(range(len(lengths)))
    assert max(cut.stop - cut.start for cut in cuts) <= most
    assert cost(lengths, cuts, overhead) == least(lengths, most, overhead)


def test_batches_of_equal_lengths_are_full():
    assert [cut.stop - cut.start for cut in buckets([40] * 10, 4)] == [4, 4, 2]


def test_a_long_example_has_a_batch_of_its_own():
    assert [cut.stop - cut.start for cut in buckets([512, 10, 10, 9], 32)] == [1, 3]


def test_no_examples_make_no_batch():
    assert buckets([], 32) == []
