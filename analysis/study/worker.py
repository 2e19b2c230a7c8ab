"""What a worker process does with a cell: take its lock, compute, store."""

import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.study.store import Busy, Store

COMPUTED, FOUND, BUSY, FAILED, SKIPPED = "computed", "found", "busy", "failed", "skipped"

Compute = Callable[[Path, Store], dict[str, Any]]
"""``compute(folder, store)`` leaves a cell's files in ``folder`` and returns what else its record should say."""


@dataclass(frozen=True)
class Outcome:
    """How an attempt at a cell ended.

    Attributes:
        status: ``computed``, ``found`` (finished by another process in between), ``busy`` (another process is at it),
            ``failed`` or ``skipped``.
        seconds: wall time.
        note: the reason, one line, where it failed.
    """

    status: str
    seconds: float = 0.0
    note: str = ""


def attempt(store: Store, name: str, determinants: dict[str, Any], compute: Compute, *, keep: bool) -> Outcome:
    """Compute the cell ``name`` unless it is finished or another process is at it.

    Args:
        store: where it goes.
        name: folder name of the cell.
        determinants: goes into its record.
        compute: the work.
        keep: whether what a killed attempt left behind is of use (a training's checkpoints).
    """
    started, cpu_started = time.monotonic(), time.process_time()
    try:
        with store.locked(name):
            if store.record(name) is not None:
                return Outcome(FOUND)
            try:
                folder = store.begin(name, keep=keep)
                extra = compute(folder, store)
                seconds = time.monotonic() - started
                took = {"seconds": round(seconds, 3), "cpu_seconds": round(time.process_time() - cpu_started, 3)}
                store.finish(name, {"determinants": determinants, **took, **extra})
            except Exception as error:
                with suppress(OSError):  # a full disk has no room for the reason either
                    store.fail(name, traceback.format_exc())
                reason = next(iter(str(error).splitlines()), "") or type(error).__name__
                return Outcome(FAILED, time.monotonic() - started, reason)
    except Busy:
        return Outcome(BUSY)
    return Outcome(COMPUTED, seconds)
