"""The processes of ``accelerate launch``: which of them speaks, and how they part."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def is_main_process() -> bool:
    """Whether this process is the one of several (``accelerate launch``) that speaks."""
    return os.environ.get("RANK", "0") == "0"


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
