"""Losses at many points of weight space: in one process or several, or shared between ranks; kept as they come."""

import hashlib
import multiprocessing
import pickle
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Protocol

import torch

from analysis.core.half import HalfSpace
from analysis.core.measure import Watch
from analysis.core.objective import Objective
from analysis.core.processes import interrupts_held, one_thread_each, start_worker
from analysis.core.ranks import from_all_ranks, from_first_rank, rank, ranks
from analysis.core.space import WeightSpace
from analysis.core.vectors import Vector
from analysis.landscape.store import Key, PointStore

Precision = Literal["full", "bfloat16"]
FORMAT = 2
"""Raised where what is stored of a point, or how it is computed, changes: older points are then not used."""
SHARED = 4
"""Points that each process of a rank computes before ranks exchange what they found: what a kill can lose."""


class Locate(Protocol):
    """From a key to a perturbation. Pickled to worker processes, where it must give the same."""

    @property
    def identity(self) -> str:
        """Names everything that :meth:`__call__` depends on besides the space."""
        ...

    def __call__(self, space: WeightSpace, key: Key) -> tuple[Vector, float] | None:
        """Direction and scale of the point ``key``; None for the space's own weights."""
        ...


@dataclass(frozen=True, eq=False)
class Job:
    """What is evaluated: a worker needs no more to answer for any key."""

    objective: Objective
    space: WeightSpace
    locate: Locate

    @property
    def identity(self) -> str:
        """:func:`identity_of` with what :attr:`locate` says of itself."""
        return identity_of(self.objective, self.space, self.locate.identity)


def identity_of(objective: Objective, space: WeightSpace, what: str) -> str:
    """Digest of the examples, the weights, what computes, and ``what`` is computed of them."""
    computing = (FORMAT, torch.__version__, space.device.type)
    data = (objective.digest, objective.shifted)
    digest = hashlib.sha256(f"{computing} {data} {space.name} {what}".encode())
    for name, tensor in space.model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Points:
    """Metrics at points of weight space. A context manager; leaving ends its worker processes.

    Every point is evaluated as a whole by one process, so that the result does not depend on how many there are (with
    equal numbers of threads: workers have one each).

    Args:
        objective: the data side.
        space: the model side; its weights are bit-identical afterwards.
        locate: where the point of a key is.
        workers: processes on this machine; 1 is this one. Ranks of an initialised ``torch.distributed`` (as started
            by ``accelerate launch``) share the points as well, and every rank gets all results.
        store: keeps points and knows those of an earlier run. Rank 0's counts.
        watch: told of (points done, points asked for).
    """

    def __init__(
        self,
        objective: Objective,
        space: WeightSpace,
        locate: Locate,
        *,
        workers: int = 1,
        store: PointStore | None = None,
        watch: Watch | None = None,
    ) -> None:
        self._evaluator = _Evaluator(Job(objective, space, locate))
        self._workers = workers
        self._store = store
        self._watch = watch
        self._pool: ProcessPoolExecutor | None = None
        self._others: set[Any] = set()
        self._known: dict[tuple[Precision, Key], dict[str, float]] = {}
        self._told: tuple[int, int] | None = None
        self.evaluated = 0
        """Points computed by now, those of an earlier run not counted."""
        self.most = 0
        """Points that will be asked for, for ``watch``; what was asked for if it is more."""
        if store is not None and rank() == 0:
            store.open(self._evaluator.job.identity)

    def __enter__(self) -> "Points":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is None:
            return
        if error is not None:
            for process in set(multiprocessing.active_children()) - self._others:
                process.terminate()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool = None

    def __call__(self, keys: Sequence[Key], precision: Precision = "full") -> list[dict[str, float]]:
        """Metrics (``loss``, ``accuracy`` where there is one) at every key, in their order."""
        asked = list(dict.fromkeys(keys))
        stored = {key: self._from_store(precision, key) for key in asked if (precision, key) not in self._known}
        for key, metrics in from_first_rank(stored).items():
            if metrics is not None:
                self._known[precision, key] = metrics
        todo = [key for key in asked if (precision, key) not in self._known]
        self._report()
        share = SHARED * self._workers * ranks() if ranks() > 1 else max(len(todo), 1)
        for start in range(0, len(todo), share):
            mine = todo[start : start + share][rank() :: ranks()]
            several = self._workers > 1 and len(mine) > 1
            found = self._in_pool(mine, precision) if several else self._here(mine, precision)
            for key, metrics in _gathered(found).items():
                if (precision, key) not in self._known:
                    self._keep(precision, key, metrics)
        return [self._known[precision, key] for key in keys]

    def cosine(self, key: Key) -> float:
        """Cosine of the perturbation that bfloat16 realises at ``key`` with the one asked for."""
        return self._evaluator.cosine(key)

    def _here(self, keys: Sequence[Key], precision: Precision) -> dict[Key, dict[str, float]]:
        found = {}
        for key in keys:
            found[key] = self._evaluator(key, precision)
            self._keep(precision, key, found[key])
        return found

    def _in_pool(self, keys: Sequence[Key], precision: Precision) -> dict[Key, dict[str, float]]:
        if self._pool is None:
            self._others = set(multiprocessing.active_children())
            self._pool = ProcessPoolExecutor(
                self._workers,
                multiprocessing.get_context("spawn"),
                initializer=_start_worker,
                # By value: shared tensors take a file descriptor each, of which there are too few for many batches.
                initargs=(pickle.dumps(self._evaluator.job),),
            )
        with one_thread_each(), interrupts_held():
            futures = {self._pool.submit(_in_worker, key, precision): key for key in keys}
        found = {}
        for future in as_completed(futures):
            key = futures[future]
            found[key] = future.result()
            self._keep(precision, key, found[key])
        return found

    def _from_store(self, precision: Precision, key: Key) -> dict[str, float] | None:
        return None if self._store is None or rank() else self._store.get(_address(precision, key))

    def _keep(self, precision: Precision, key: Key, metrics: dict[str, float]) -> None:
        self._known[precision, key] = metrics
        self.evaluated += 1
        if self._store is not None and rank() == 0:
            self._store.add(_address(precision, key), metrics)
        self._report()

    def _report(self) -> None:
        now = (len(self._known), max(self.most, len(self._known)))
        if self._watch is not None and now != self._told:
            self._told = now
            self._watch(*now, "points")


def _address(precision: Precision, key: Key) -> Key:
    """Points of both precisions lie in one store: the first entry tells them apart."""
    return (0.0 if precision == "full" else 16.0, *key)


class _Evaluator:
    """Metrics at a key, with a bfloat16 copy once one is asked for."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._half: HalfSpace | None = None

    def __call__(self, key: Key, precision: Precision) -> dict[str, float]:
        job = self.job
        space: Any = job.space if precision == "full" else self._in_half()
        direction, scale = job.locate(job.space, key) or ({}, 0.0)
        with space.perturbed(direction, scale):
            return job.objective.evaluate(space)

    def cosine(self, key: Key) -> float:
        place = self.job.locate(self.job.space, key)
        return 1.0 if place is None else self._in_half().realised(*place)[1]

    def _in_half(self) -> HalfSpace:
        if self._half is None:
            self._half = HalfSpace(self.job.space)
        return self._half


_worker: _Evaluator | None = None


def _start_worker(job: bytes) -> None:
    global _worker
    start_worker()
    _worker = _Evaluator(pickle.loads(job))


def _in_worker(key: Key, precision: Precision) -> dict[str, float]:
    assert _worker is not None
    return _worker(key, precision)


def _gathered(found: dict[Key, dict[str, float]]) -> dict[Key, dict[str, float]]:
    return {key: metrics for part in from_all_ranks(found) for key, metrics in part.items()}
