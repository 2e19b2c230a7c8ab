"""Running cells in worker processes: trainings first, the longest first; a training's measurements follow it."""

import heapq
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from analysis.core.processes import interrupts_held, one_thread_each, start_worker
from analysis.study.plan import Cell
from analysis.study.progress import Progress
from analysis.study.store import Store
from analysis.study.worker import BUSY, FAILED, SKIPPED, Outcome, attempt

RECHECK = 1.0
"""Seconds until a cell that another runner holds is looked at again."""

ATTEMPTS = 2
"""How often a cell is tried whose worker process died."""


@dataclass(frozen=True)
class Failure:
    """A cell without a result: its label, the reason in one line, and the name of its folder."""

    label: str
    reason: str
    name: str


def default_workers() -> int:
    """The cores this process may use, at most 8; 1 if there is a GPU."""
    import torch

    if torch.cuda.is_available():
        return 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, usable)


def run_cells(
    cells: Sequence[Cell], store: Store, *, workers: int, progress: Progress, retry_failed: bool = True
) -> list[Failure]:
    """Compute every one of ``cells`` that ``store`` lacks, and return those that failed or could not be tried.

    Each worker is a process of its own with one thread, so that results do not depend on how many there are. When the
    call is left by an exception (Ctrl-C among them) the workers are stopped first.

    Args:
        cells: what is wanted, each name once, with the trainings that its measurements need.
        store: where finished cells lie.
        workers: number of processes.
        progress: where to report.
        retry_failed: whether cells that failed in an earlier run are tried again; else they fail with that reason.
    """
    pending = [cell for cell in cells if store.record(cell.name) is None]
    progress.start(len(cells), len(cells) - len(pending))
    try:
        return _Run(pending, store, workers, progress, retry_failed).run() if pending else []
    finally:
        progress.stop()


def last_line(text: str) -> str:
    """Of an error's full text."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "failed")


class _Run:
    def __init__(
        self, pending: Sequence[Cell], store: Store, workers: int, progress: Progress, retry_failed: bool
    ) -> None:
        self.store, self.workers, self.progress = store, workers, progress
        self.order = {cell.name: i for i, cell in enumerate(pending)}
        self.ready: list[tuple[int, float, int, Cell]] = []
        self.waiting: dict[str, list[Cell]] = {}
        self.busy: list[tuple[float, Cell]] = []
        self.running: dict[Future[Outcome], Cell] = {}
        self.deaths: dict[str, int] = {}
        self.suspects: set[str] = set()
        self.failures: list[Failure] = []
        failed = {} if retry_failed else {cell.name: store.error(cell.name) for cell in pending}
        for cell in pending:
            if failed.get(cell.name) is not None:
                continue
            if cell.training is not None and cell.training.name in self.order:
                self.waiting.setdefault(cell.training.name, []).append(cell)
            else:
                self.queue(cell)
        for cell in pending:
            error = failed.get(cell.name)
            if error is not None:
                self.ended(cell, Outcome(FAILED, note=f"{last_line(error)} (before: --retry-failed tries it again)"))

    def run(self) -> list[Failure]:
        with one_thread_each():
            while self.unfinished():
                self.run_pool()
        return self.failures

    def unfinished(self) -> bool:
        return bool(self.ready or self.busy or self.running)

    def queue(self, cell: Cell) -> None:
        suspicion = 0 if cell.name in self.suspects else 1
        rank = suspicion if cell.training is None or not suspicion else 2
        heapq.heappush(self.ready, (rank, -cell.cost, self.order[cell.name], cell))

    def run_pool(self) -> None:
        """Work until nothing is left or a worker process dies, which ends its whole pool."""
        context = multiprocessing.get_context("spawn")
        others = set(multiprocessing.active_children())
        # Cells that were running when a process died run alone first, so that the next death has one culprit.
        alone = bool(self.suspects)
        workers = 1 if alone else self.workers
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker)
        try:
            while self.unfinished() and alone == bool(self.suspects):
                self.submit(pool, workers)
                self.collect()
        except BrokenProcessPool:
            dead = list(self.running.values())
            self.running.clear()
            for cell in dead:
                self.died(cell)
        except BaseException:
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def submit(self, pool: ProcessPoolExecutor, workers: int) -> None:
        now = time.monotonic()
        for entry in [entry for entry in self.busy if entry[0] <= now]:
            self.busy.remove(entry)
            self.queue(entry[1])
        while self.ready and len(self.running) < workers:
            cell = self.ready[0][-1]
            with interrupts_held():
                keep = cell.training is None or getattr(cell.compute, "keeps_points", False)
                future = pool.submit(attempt, self.store, cell.name, dict(cell.determinants), cell.compute, keep=keep)
            heapq.heappop(self.ready)
            self.running[future] = cell
        self.progress.running([cell.label for cell in self.running.values()])

    def collect(self) -> None:
        if not self.running:
            time.sleep(RECHECK / 4)
            return
        finished, _ = wait(self.running, timeout=RECHECK, return_when=FIRST_COMPLETED)
        for future in finished:
            outcome = future.result()
            self.ended(self.running.pop(future), outcome)

    def ended(self, cell: Cell, outcome: Outcome) -> None:
        self.suspects.discard(cell.name)
        if outcome.status == BUSY:
            self.busy.append((time.monotonic() + RECHECK, cell))
            return
        self.progress.done(cell.label, outcome.status, outcome.seconds, outcome.note)
        followers = self.waiting.pop(cell.name, [])
        if outcome.status in (FAILED, SKIPPED):
            self.failures.append(Failure(cell.label, outcome.note, cell.name))
            for follower in followers:
                self.ended(follower, Outcome(SKIPPED, note=f"{cell.label} failed"))
        else:
            for follower in followers:
                self.queue(follower)

    def died(self, cell: Cell) -> None:
        self.deaths[cell.name] = self.deaths.get(cell.name, 0) + 1
        if self.deaths[cell.name] < ATTEMPTS:
            self.suspects.add(cell.name)
            self.queue(cell)
            return
        reason = "the worker process died, most likely for lack of memory: use fewer workers or smaller batches"
        self.store.fail(cell.name, reason)
        self.ended(cell, Outcome(FAILED, note=reason))
