"""Work shared between the ranks of an initialised ``torch.distributed``, as ``accelerate launch`` starts them."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

Item = TypeVar("Item")
Value = TypeVar("Value")


def ranks() -> int:
    """How many there are; 1 where ``torch.distributed`` is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number; 0 where it is alone."""
    return dist.get_rank() if ranks() > 1 else 0


def from_first_rank(value: Value) -> Value:
    """Rank 0's value on every rank: what ranks compute alike may still differ in the last bit."""
    if ranks() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    received: Value = box[0]
    return received


def from_all_ranks(value: Value) -> list[Value]:
    """Every rank's value, in the order of ranks."""
    if ranks() == 1:
        return [value]
    found: list[Any] = [None] * ranks()
    dist.all_gather_object(found, value)
    return found


def shared(items: Sequence[Item], compute: Callable[[Item], Value]) -> Iterator[Value]:
    """``compute(item)`` of every item in order, on every rank; each is computed by one of them, as a whole.

    Results are therefore those of one process, and the same on all ranks, which may decide by them. Of a single item
    all get rank 0's. Every rank must ask for the same items and take the same number of results.

    Args:
        items: what to compute, in rounds of as many items as there are ranks.
        compute: its values are pickled where there are several ranks.
    """
    for start in range(0, len(items), ranks()):
        round_ = items[start : start + ranks()]
        mine = compute(round_[rank()]) if rank() < len(round_) else None
        found: list[Any] = from_all_ranks(mine)
        yield from found[: len(round_)]
