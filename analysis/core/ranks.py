"""Work shared between the ranks of an initialised ``torch.distributed``, as ``accelerate launch`` starts them."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

Item = TypeVar("Item")
Value = TypeVar("Value")


def shared(items: Sequence[Item], compute: Callable[[Item], Value]) -> Iterator[Value]:
    """``compute(item)`` of every item in order, on every rank; each is computed by one of them, as a whole.

    Results are therefore those of one process, and the same on all ranks, which may decide by them. Of a single item
    all get rank 0's. Every rank must ask for the same items and take the same number of results.

    Args:
        items: what to compute, in rounds of as many items as there are ranks.
        compute: its values are pickled where there are several ranks.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
    for start in range(0, len(items), world):
        round_ = items[start : start + world]
        mine = compute(round_[rank]) if rank < len(round_) else None
        found: list[Any] = [mine]
        if world > 1:
            found = [None] * world
            dist.all_gather_object(found, mine)
        yield from found[: len(round_)]
