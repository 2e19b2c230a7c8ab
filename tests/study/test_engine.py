"""Worker processes: order, failures, deaths, and what a second run does."""

from pathlib import Path

import pytest
from study_work import Note

from analysis.study.engine import RECHECK, Failure, default_workers, run_cells
from analysis.study.plan import Cell
from analysis.study.store import Store


class Heard:
    """A progress that remembers."""

    def __init__(self) -> None:
        self.counts: tuple[int, int] = (-1, -1)
        self.ends: list[tuple[str, str]] = []
        self.most_running = 0
        self.stopped = False

    def start(self, total: int, finished: int) -> None:
        self.counts = (total, finished)

    def running(self, labels: list[str]) -> None:
        self.most_running = max(self.most_running, len(labels))

    def done(self, label: str, status: str, seconds: float, note: str = "") -> None:
        self.ends.append((label, status))

    def stop(self) -> None:
        self.stopped = True


def training(label: str, log: Path, what: str = "finish", cost: float = 1.0) -> Cell:
    return Cell("training", label, {"id": label}, Note(log, label, what), cost=cost)


def measuring(label: str, log: Path, of: Cell, what: str = "finish") -> Cell:
    return Cell("measure", label, {"id": label}, Note(log, label, what), training=of)


@pytest.mark.slow
def test_failures_and_deaths_stop_nothing_else_and_are_retried_alone(tmp_path: Path) -> None:
    log, store = tmp_path / "log", Store(tmp_path / "cells")
    good, bad, deadly = (
        training("good", log, cost=1),
        training("bad", log, "raise", cost=3),
        training("deadly", log, "die"),
    )
    cells = [
        good,
        bad,
        deadly,
        measuring("good/one", log, good),
        measuring("good/two", log, good, "raise"),
        measuring("bad/one", log, bad),
        measuring("deadly/one", log, deadly),
    ]
    heard = Heard()
    failures = run_cells(cells, store, workers=2, progress=heard)
    assert heard.counts == (7, 0)
    assert heard.most_running == 2
    assert heard.stopped
    assert dict(heard.ends) == {
        "good": "computed",
        "bad": "failed",
        "deadly": "failed",
        "good/one": "computed",
        "good/two": "failed",
        "bad/one": "skipped",
        "deadly/one": "skipped",
    }
    reasons = {failure.label: failure.reason for failure in failures}
    assert isinstance(failures[0], Failure)
    assert reasons["bad"] == "bad cannot"
    assert reasons["bad/one"] == "bad failed"
    assert "worker process died" in reasons["deadly"]
    assert "cannot\nmore" in (store.error(bad.name) or "")
    assert log.read_text().splitlines()[0] == "bad"  # the longest first
    assert store.record(good.name)["threads"] == "1"

    log.unlink()
    repaired = [cell if cell.label != "bad" else training("bad", log) for cell in cells]
    second = Heard()
    failures = run_cells([c for c in repaired if "deadly" not in c.label], store, workers=1, progress=second)
    assert second.counts == (5, 2)
    assert sorted(log.read_text().split()) == ["bad", "bad/one", "good/two"]
    assert [failure.label for failure in failures] == ["good/two"]


@pytest.mark.slow
def test_a_cell_another_runner_holds_is_awaited_and_not_computed_twice(tmp_path: Path) -> None:
    log, store = tmp_path / "log", Store(tmp_path / "cells")
    held = training("held", log)
    import threading

    release = threading.Event()

    def other_runner() -> None:
        with store.locked(held.name):
            release.wait()
            folder = store.begin(held.name, keep=True)
            (folder / "note.txt").write_text("theirs")
            store.finish(held.name, {})

    thread = threading.Thread(target=other_runner)
    thread.start()
    heard = Heard()
    threading.Timer(15 * RECHECK, release.set).start()
    assert run_cells([held, measuring("held/one", log, held)], store, workers=1, progress=heard) == []
    thread.join()
    assert heard.ends == [("held", "found"), ("held/one", "computed")]
    assert log.read_text().split() == ["held/one"]


def test_nothing_to_do_starts_no_process(tmp_path: Path) -> None:
    store = Store(tmp_path / "cells")
    cell = training("done", tmp_path / "log")
    store.begin(cell.name, keep=False)
    store.finish(cell.name, {})
    heard = Heard()
    assert run_cells([cell], store, workers=2, progress=heard) == []
    assert (heard.counts, heard.ends) == ((1, 1), [])


def test_default_workers_are_few() -> None:
    assert 1 <= default_workers() <= 8


@pytest.mark.slow
def test_what_failed_before_is_tried_again_only_when_asked(tmp_path: Path) -> None:
    log, store = tmp_path / "log", Store(tmp_path / "cells")
    bad, good = training("bad", log, "raise"), training("good", log)
    cells = [bad, measuring("bad/one", log, bad), good]
    run_cells(cells, store, workers=1, progress=Heard())
    log.unlink()
    heard = Heard()
    failures = run_cells(cells, store, workers=1, progress=heard, retry_failed=False)
    assert not log.exists()
    assert dict(heard.ends) == {"bad": "failed", "bad/one": "skipped"}
    assert "more (before: --retry-failed tries it again)" in failures[0].reason
    run_cells(cells, store, workers=1, progress=Heard(), retry_failed=True)
    assert log.read_text().split() == ["bad"]
