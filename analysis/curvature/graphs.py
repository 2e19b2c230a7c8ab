"""Operators whose products walk through autograd graphs: kept between products as far as memory allows, or rebuilt."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from analysis.core.memory import free_memory
from analysis.core.objective import Objective
from analysis.core.space import WeightSpace
from analysis.curvature.operator import CurvatureOperator
from analysis.curvature.probe import check_autocast
from analysis.curvature.second_derivatives import StoredSecondDerivatives
from bilora.errors import UserError

Graphs = Literal["auto", "retain", "rebuild"]


class GraphOperator(CurvatureOperator):
    """Products batch by batch through a graph that serves all vectors of a call.

    Args:
        objective: the mean loss.
        space: where, and with respect to which weights. They must not change during the operator's life.
        graphs: ``"retain"`` keeps every batch's graph from the first product on, ``"rebuild"`` none, ``"auto"`` as many
            as fit into ``budget``. The numbers are the same, bit for bit.
        budget: bytes, for ``"auto"``; by default graphs are kept while half of the memory stays free.
        autocast: run the model under autocast in this dtype, with the float32 weights as masters.
        offload: as :class:`CurvatureOperator`.

    Attributes:
        as :class:`CurvatureOperator`.

    Raises:
        UserError: an unknown ``graphs`` or ``autocast``, or as :class:`CurvatureOperator`.
    """

    def __init__(
        self,
        objective: Objective,
        space: WeightSpace,
        *,
        graphs: Graphs = "auto",
        budget: int | None = None,
        autocast: torch.dtype | None = None,
        offload: bool = False,
    ) -> None:
        if graphs not in ("auto", "retain", "rebuild"):
            raise UserError(f"graphs is {graphs!r}: choose auto, retain or rebuild")
        check_autocast(autocast)
        super().__init__(objective, space, offload=offload)
        if autocast is not None and self.dtype == torch.float64:
            raise UserError("autocast leaves float64 weights alone: measure a float32 model, or leave autocast out")
        if autocast is not None:
            self.label = f"{self.label} {str(autocast).removeprefix('torch.')} autocast".strip()
        self._autocast = autocast
        self._graphs: dict[int, Any] = {}
        self._meter = GraphMeter(space)
        self._keeping = graphs != "rebuild"
        self._budget = budget
        self._limited = graphs == "auto"

    @property
    def retained(self) -> int:
        """Number of batches whose graph is kept."""
        return len(self._graphs)

    def close(self) -> None:
        """Free the kept graphs. Products go on working, rebuilt each time."""
        self._graphs.clear()
        self._keeping = False

    @abstractmethod
    def _build(self, index: int) -> Any:
        """What products with batch ``index`` share."""

    def _kept(self, built: Any) -> Any:
        """What of it the products need."""
        return built

    @abstractmethod
    def _product(self, graph: Any, parts: list[Tensor], retain: bool) -> Sequence[Tensor | None]:
        """One batch's product with the vector ``parts``; None for parameters on which it is zero."""

    def _summed(self, rows: Tensor) -> Tensor:
        totals = torch.zeros(rows.shape, dtype=torch.float64, device=self.device)
        shapes = list(self.space.parameters.values())
        vectors = [
            [part.view_as(p) for part, p in zip(row.split([p.numel() for p in shapes]), shapes, strict=True)]
            for row in rows.to(self._at_device)
        ]
        with self._shared(totals):
            for index in self._mine:
                graph, kept = self._graph(index)
                for i, parts in enumerate(vectors):
                    retain = kept or i < len(vectors) - 1
                    self._add(totals[i], self._product(graph, parts, retain), self._share(index))
                del graph  # else two batches' graphs are alive while the next is built
        return totals

    def _graph(self, index: int) -> tuple[Any, bool]:
        """The batch's graph, and whether it outlives this call."""
        if index in self._graphs:
            return self._graphs[index], True
        built, keep = self._built(index)
        return self._kept(built), keep

    def _built(self, index: int) -> tuple[Any, bool]:
        """What :meth:`_build` gives, and whether its graph is kept."""
        if not self._keeping:
            return self._build_now(index), False
        # Asked at every graph, for other processes may do the same at the same time.
        room = self._room() if self._limited else None
        with self._meter.counting():
            built = self._build_now(index)
        self._keeping = room is None or self._meter.last <= room
        if self._keeping:
            self._graphs[index] = self._kept(built)
        return built, self._keeping

    def _room(self) -> int:
        if self._budget is None:
            return free_memory(self.device)
        return self._budget - self._meter.bytes

    def _build_now(self, index: int) -> Any:
        # The fused attention kernels have no second derivative (pytorch#116350); the decomposed one is exact.
        # Rebuilt graphs are made like kept ones, at 4 % more a product: how many are kept must not change a bit.
        with sdpa_kernel(SDPBackend.MATH), StoredSecondDerivatives():
            return self._build(index)

    def _output(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Loss and logits of batch ``index``."""
        with torch.autocast(self.device.type, self._autocast, enabled=self._autocast is not None):
            return self.objective.batch_output(self.space, index)


class GraphMeter:
    """Counts the bytes that the graphs built inside :meth:`counting` keep alive beyond the space's model.

    Attributes:
        bytes: of all so far.
        last: of the last one.
    """

    def __init__(self, space: WeightSpace) -> None:
        self.bytes = self.last = 0
        self._model = {p.untyped_storage().data_ptr() for p in space.model.parameters()}

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what is saved inside the block."""
        seen = set(self._model)  # an address may be used again once its tensor is freed
        before = self.bytes

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                self.bytes += storage.nbytes()
            return tensor.detach()  # a saved output that kept its own graph would be a cycle, never freed

        with torch.autograd.graph.saved_tensors_hooks(pack, _same):
            yield
        self.last = self.bytes - before


def _same(tensor: Tensor) -> Tensor:
    return tensor
