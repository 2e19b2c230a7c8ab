"""``bilora methods``: what can be trained with."""

import typer


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command("methods")(methods)


def methods() -> None:
    """List the training methods, what a step of each costs, and where they come from."""
    from rich.console import Console
    from rich.table import Table

    from bilora.methods import METHODS

    table = Table()
    table.add_column("name", no_wrap=True)
    table.add_column("passes", justify="right")
    table.add_column("what it does")
    table.add_column("settings", no_wrap=True)
    table.add_column("source")
    for name, method in METHODS.items():
        settings = "\n".join(f"{key}={value}" for key, value in method().settings().items())
        table.add_row(name, f"{method.passes:g}", method.summary, settings, method.source)
    Console().print(table)
