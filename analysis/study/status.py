"""How far a study is: which cells are done, running, failed, and which are still to do."""

from collections import Counter
from dataclasses import dataclass

from analysis.study.engine import Failure, last_line
from analysis.study.plan import plan_study
from analysis.study.spec import StudySpec
from analysis.study.store import Busy, Store

DONE, RUNNING, FAILED, BEGUN, TO_DO = "done", "running", "failed", "begun", "to do"
STATES = (DONE, RUNNING, FAILED, BEGUN, TO_DO)
"""``begun``: a killed attempt left something that the next one goes on from."""


@dataclass(frozen=True)
class StudyStatus:
    """State of every cell.

    Attributes:
        counts: (kind, state) → number of cells, kinds ``training`` and the names of measures.
        running: labels of the cells being computed now, by whichever process.
        failures: the failed ones, with the last line of their error.
        store: where the cells lie.
    """

    counts: Counter[tuple[str, str]]
    running: tuple[str, ...]
    failures: tuple[Failure, ...]
    store: Store

    def total(self, state: str) -> int:
        """Cells in a state."""
        return sum(number for (_, at), number in self.counts.items() if at == state)


def study_status(spec: StudySpec) -> StudyStatus:
    """Look at the cells of ``spec``, which may be computed meanwhile.

    Raises:
        UserError: a model or a data package that is not there.
    """
    store = Store(spec.folder / "cells")
    counts: Counter[tuple[str, str]] = Counter()
    running, failures = [], []
    for cell in plan_study(spec).cells:
        state = _state(store, cell.name)
        counts[str(cell.determinants.get("measure", cell.kind)), state] += 1
        if state == RUNNING:
            running.append(cell.label)
        elif state == FAILED:
            failures.append(Failure(cell.label, last_line(store.error(cell.name) or ""), cell.name))
    return StudyStatus(counts, tuple(running), tuple(failures), store)


def _state(store: Store, name: str) -> str:
    if store.record(name) is not None:
        return DONE
    if not store.folder.is_dir():
        return TO_DO
    try:
        with store.locked(name):
            pass
    except Busy:
        return RUNNING
    if store.error(name) is not None:
        return FAILED
    return BEGUN if store.partial(name).is_dir() else TO_DO
