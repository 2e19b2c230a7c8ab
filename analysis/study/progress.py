"""What a study shows while it runs: a live bar on a terminal, plain lines elsewhere."""

from collections.abc import Sequence
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.text import Text


class Progress(Protocol):
    """Where a study reports to."""

    def start(self, total: int, finished: int) -> None:
        """``total`` cells in all, of which ``finished`` were there already."""

    def running(self, labels: Sequence[str]) -> None:
        """The cells being computed now."""

    def done(self, label: str, status: str, seconds: float, note: str = "") -> None:
        """A cell ended: ``status`` is ``computed``, ``found``, ``failed`` or ``skipped``; ``note`` says why."""

    def stop(self) -> None:
        """Nothing more will come."""


class Silent:
    """Shows nothing."""

    def start(self, total: int, finished: int) -> None: ...

    def running(self, labels: Sequence[str]) -> None: ...

    def done(self, label: str, status: str, seconds: float, note: str = "") -> None: ...

    def stop(self) -> None: ...


class Lines:
    """One plain line a finished cell: for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._total = self._finished = 0

    def start(self, total: int, finished: int) -> None:
        self._total, self._finished = total, finished
        self._print(f"{total} cells, {finished} of them finished before")

    def running(self, labels: Sequence[str]) -> None: ...

    def done(self, label: str, status: str, seconds: float, note: str = "") -> None:
        self._finished += 1
        reason = f": {note}" if note else ""
        self._print(f"[{self._finished}/{self._total}] {label}: {status} in {seconds:.1f} s{reason}")

    def stop(self) -> None: ...

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class LiveBar:
    """An overall bar with counts, and below it the running cells; failures stay above it as lines."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Bar(*columns, console=console)
        self._task = self._bar.add_task("cells", total=None)
        self._live = Live(self._bar, console=console, refresh_per_second=4)

    def start(self, total: int, finished: int) -> None:
        self._bar.update(self._task, total=total, completed=finished)
        self._live.start()

    def running(self, labels: Sequence[str]) -> None:
        self._live.update(Group(self._bar, *(Text(f"  {label}", style="dim") for label in labels)), refresh=True)

    def done(self, label: str, status: str, seconds: float, note: str = "") -> None:
        self._bar.advance(self._task)
        if status in ("failed", "skipped"):
            self._live.console.print(Text(f"{label}: {status}: {note}", style="red"))

    def stop(self) -> None:
        self._live.update(self._bar)
        self._live.stop()


def progress_for(console: Console) -> Progress:
    """A live bar where ``console`` is a terminal, lines elsewhere."""
    return LiveBar(console) if console.is_terminal else Lines(console)
