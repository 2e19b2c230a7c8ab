"""The ``bilora`` command."""

from collections.abc import Sequence
from typing import Annotated

import typer

from bilora.cli import compare, inspect, landscape, measure, methods, plot, study, train
from bilora.cli.errors import exit_code
from bilora.cli.processes import own_process_group

app = typer.Typer(
    name="bilora",
    help="Did my fine-tuning land in a flat minimum, in the full weight space that inference uses?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (train, measure, landscape, inspect, compare, study, plot, methods):
    command.register(app)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"bilora {version('bilora')}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for bad input, 130 when interrupted.

    Args:
        arguments: without the program's name; None takes those of the process.
    """
    given = None if arguments is None else list(arguments)
    with own_process_group():
        return exit_code(lambda: app(given, prog_name="bilora", standalone_mode=False))
