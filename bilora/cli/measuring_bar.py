"""A progress bar for measurements."""

from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class MeasuringBar:
    """A line on standard error for the measurement under way. A context manager: leaving removes it."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)

    def __enter__(self) -> "MeasuringBar":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar.tasks:  # stopping a bar that never started prints an empty line
            self._bar.stop()

    def watch(self, name: str) -> Callable[[int, int, str], None]:
        """What to tell of the progress of the measurement ``name``; its bar appears at the first word."""
        task = None

        def update(done: int, most: int, note: str) -> None:
            nonlocal task
            if task is None:
                for other in self._bar.task_ids:
                    self._bar.remove_task(other)
                task = self._bar.add_task(name, total=most, note=note)
                self._bar.start()
            self._bar.update(task, completed=done, total=most, note=note)

        return update
