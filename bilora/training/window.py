"""The micro-batches of one optimizer step, kept so that they can run again."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class RngState:
    """State of torch's global generators, which draw the dropout masks."""

    cpu: Tensor
    cuda: list[Tensor]

    @classmethod
    def now(cls) -> "RngState":
        """The current state."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return cls(torch.get_rng_state(), cuda)

    def restore(self) -> None:
        """Make it current."""
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


@dataclass(frozen=True)
class MicroBatch:
    """Inputs of one forward–backward pass and the generators' state before it."""

    inputs: dict[str, Any]
    items: Tensor | int | None
    rng: RngState


@contextmanager
def rng_preserved() -> Iterator[None]:
    """Leave the global generators as they were, whatever the block draws."""
    before = RngState.now()
    try:
        yield
    finally:
        before.restore()
