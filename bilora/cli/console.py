"""Where tables are printed."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_WIDTH = 250
"""Columns of a table where there is no terminal to ask."""


def console_for_tables() -> "Console":
    """Standard output, wide enough for a table of several methods where it is a file or a pipe."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=PLAIN_WIDTH)
