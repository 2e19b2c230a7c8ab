"""What is shown while a study runs."""

import io

from rich.console import Console

from analysis.study.progress import Lines, LiveBar, Progress, progress_for


def play(progress: Progress) -> None:
    progress.start(3, 1)
    progress.running(["LoRA, seed 0: training"])
    progress.done("LoRA, seed 0: training", "computed", 1.25)
    progress.done("LoRA, seed 0: random [full]", "failed", 0.5, "no [bold] reason")
    progress.stop()


def test_plain_lines_without_a_terminal() -> None:
    console = Console(file=io.StringIO(), width=40)
    progress = progress_for(console)
    assert isinstance(progress, Lines)
    play(progress)
    assert console.file.getvalue().splitlines() == [
        "3 cells, 1 of them finished before",
        "[2/3] LoRA, seed 0: training: computed in 1.2 s",
        "[3/3] LoRA, seed 0: random [full]: failed in 0.5 s: no [bold] reason",
    ]


def test_live_bar_with_counts_running_cells_and_failures() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)
    progress = progress_for(console)
    assert isinstance(progress, LiveBar)
    play(progress)
    shown = console.file.getvalue()
    for part in ("1/3", "3/3", "  LoRA, seed 0: training", "random [full]: failed: no [bold] reason"):
        assert part in shown
