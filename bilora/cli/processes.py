"""The processes of ``accelerate launch``: which of them speaks, and how they part."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from bilora.errors import UserError

Value = TypeVar("Value")


def is_main_process() -> bool:
    """Whether this process is the one of several (``accelerate launch``) that speaks."""
    return os.environ.get("RANK", "0") == "0"


def join_processes() -> None:
    """Join the processes of ``accelerate launch``, where there are several, so that they share the work."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState()


def from_main(compute: Callable[[], Value]) -> Value:
    """What ``compute`` gives on the main process, on every one of them: what it finds on disk may change meanwhile.

    Raises:
        UserError: as ``compute``, on every process.
    """
    if not _has_group():
        return compute()
    import torch.distributed as dist

    box: list[Any] = [None, None]
    if is_main_process():
        try:
            box[0] = compute()
        except UserError as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    value, refusal = box
    if refusal is not None:
        raise refusal
    return value


@contextmanager
def own_process_group() -> Iterator[None]:
    """End a process group that is opened inside the block.

    Left open until the interpreter ends, gloo's threads may be destroyed while they run, which aborts the process.
    """
    before = _has_group()
    try:
        yield
    finally:
        if _has_group() and not before:
            import torch.distributed as dist

            dist.destroy_process_group()


def _has_group() -> bool:
    if "torch" not in sys.modules:  # importing it takes seconds, and `bilora --help` has no use for it
        return False
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()
