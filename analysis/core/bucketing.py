"""Which examples share a batch, so that little is padding."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

OVERHEAD = 128
"""Tokens that a forward pass on a CPU could run through in the time that a batch costs by itself."""
LAUNCHES = 4096
"""The same on a GPU, where a small batch takes as long as launching its kernels does."""


def buckets(lengths: Sequence[int], most: int, overhead: int = OVERHEAD) -> list[slice]:
    """Where to cut examples, sorted by falling length, into batches.

    Minimises ``Σ (examples·longest + overhead)`` over batches of at most ``most`` examples: a batch ends early where
    shorter examples follow that would be padded by more than another batch costs.

    Args:
        lengths: tokens of each example, never rising.
        most: examples a batch, at least 1.
        overhead: what a batch costs by itself, in tokens.
    """
    count = len(lengths)
    # cost[i]: of the examples from i on; their first batch ends before end[i].
    cost, end = np.zeros(count + 1), np.zeros(count, dtype=int)
    for first in reversed(range(count)):
        size = np.arange(1, min(most, count - first) + 1)
        costs = size * lengths[first] + cost[first + size]
        best = int(np.argmin(costs[::-1]))  # the largest batch of equally good ones
        end[first] = first + len(size) - best
        cost[first] = costs[::-1][best] + overhead
    cuts = [0]
    while cuts[-1] < count:
        cuts.append(int(end[cuts[-1]]))
    return [slice(start, stop) for start, stop in pairwise(cuts)]
