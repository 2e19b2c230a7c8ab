"""The moments of a training step that a method may act on.

A method says *what* happens at each moment; :class:`bilora.training.MethodMixin` says *when*. One optimizer step is

1. for each micro-batch of the accumulation window: ``with method.perturbed(step):`` forward, backward;
2. ``method.extra_passes(step, replay)`` once the window's gradient is complete (and reduced over processes);
3. gradient clipping, apart for each of ``method.clip_groups()``;
4. ``method.before_update(step)``, the optimizer's update, ``method.after_update(step)``.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor, nn


@dataclass(frozen=True)
class Step:
    """Where training stands: optimizer step ``index`` (from 0) of ``total``, and the run's seed."""

    index: int
    total: int
    seed: int


@dataclass(kw_only=True)
class Method:
    """A training method. Its dataclass fields are its settings; validation lives in ``__post_init__``.

    Subclasses set the class variables and override only the moments they need. A method belongs to one model at a
    time: :meth:`prepare` starts it afresh.
    """

    name: ClassVar[str]
    """Registry name."""
    summary: ClassVar[str]
    """One line for ``bilora methods``."""
    source: ClassVar[str]
    """The paper."""
    passes: ClassVar[float]
    """Forward–backward passes per micro-batch: what a step costs."""
    needs_lora: ClassVar[bool] = True
    """Whether the model must carry a LoRA adapter."""
    replays: ClassVar[bool] = False
    """Whether :meth:`extra_passes` runs the window again, so that its inputs must be kept."""

    def settings(self) -> dict[str, Any]:
        """The settings as plain values, for records and for the registry."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def prepare(self, model: nn.Module, seed: int) -> None:
        """Bind to ``model`` before the optimizer is built; may add trainable parameters. Draws from ``seed`` alone."""

    def optimizer_groups(self) -> list[tuple[list[nn.Parameter], dict[str, Any]]]:
        """Parameters that need optimizer settings of their own, each list with its settings (``lr``, …)."""
        return []

    def clip_groups(self) -> list[list[nn.Parameter]]:
        """Parameters whose gradients are clipped apart from the rest, so that they cannot shrink each other's step."""
        return []

    @contextmanager
    def perturbed(self, step: Step) -> Iterator[None]:
        """The weights in force while a micro-batch runs forward and backward. Must restore them bit for bit."""
        yield

    def extra_passes(self, step: Step, replay: Callable[[], None]) -> None:
        """Called with the window's gradient in ``.grad``; leaves there the gradient to descend along.

        ``replay()`` clears the gradients and runs the same micro-batches again, with the same dropout masks.
        """

    def before_update(self, step: Step) -> None:
        """Act on the clipped gradients or the weights before the optimizer's update."""

    def after_update(self, step: Step) -> None:
        """Act on the weights after the optimizer's update (not called when the update was skipped)."""

    def probe(self, loss: Callable[[], float]) -> None:
        """Called at logging steps; ``loss()`` is the loss of the last micro-batch without gradient, same dropout."""

    def metrics(self) -> dict[str, float]:
        """Values for the training log."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run, or a later analysis, needs beyond the model and the optimizer."""
        return {}

    def state_metadata(self) -> dict[str, str]:
        """Text that makes :meth:`state_dict` readable without the method object."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from :meth:`state_dict`; called after :meth:`prepare`."""

    def finish(self) -> None:
        """Leave an ordinary model behind. :meth:`state_dict` keeps answering afterwards."""
