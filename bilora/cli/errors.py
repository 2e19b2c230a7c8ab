"""Errors become one line and an exit code here, and nowhere else."""

import sys
from collections.abc import Callable

import typer
from pydantic import ValidationError

from bilora.cli.processes import is_main_process
from bilora.errors import UserError

BAD_INPUT = 2
INTERRUPTED = 130


def exit_code(command: Callable[[], object]) -> int:
    """Run a command line in non-standalone mode; print what the user can mend as one line, and give the exit code.

    0 when it succeeded, 2 for bad input, 130 when interrupted. Any other exception is a defect of the program and is
    not caught.
    """
    result: object
    try:
        result = command()
    except (KeyboardInterrupt, typer.Abort):
        result = INTERRUPTED
    except UserError as error:
        _say(f"error: {error}")
        return BAD_INPUT
    except ValidationError as error:
        _say(f"error: {one_line(error)}")
        return BAD_INPUT
    except OSError as error:
        if error.filename is None:
            raise
        _say(f"error: {error.filename}: {error.strerror}")
        return BAD_INPUT
    except Exception as error:
        # Usage errors have no public common class that all supported versions of Typer share.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        if message():  # empty where the help was printed for want of a command
            _say(f"error: {message()}")
        return BAD_INPUT
    if result == INTERRUPTED:  # newer versions of Typer catch Ctrl-C themselves and return this
        _say("interrupted: give the same command again to continue")
    return result if isinstance(result, int) else 0


def one_line(error: ValidationError) -> str:
    """The first finding of pydantic as ``place: cause``, and how many more there are."""
    found = error.errors()
    first = found[0]
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        text = f"unknown key {place!r}"
    else:
        cause = first["msg"].removeprefix("Value error, ")
        own = first["type"] == "value_error"  # our own messages name what they are about
        text = cause if own or not place else f"{place}: {cause} (given: {first['input']!r})"
    return text + (f" (and {len(found) - 1} more)" if len(found) > 1 else "")


def _say(text: str) -> None:
    if is_main_process():
        print(" ".join(text.split()), file=sys.stderr)
