"""Range checks of method settings, in one wording."""

import math

from bilora.errors import UserError


def check_positive(method: str, name: str, value: float) -> None:
    """Raise a UserError unless ``value`` is finite and above 0."""
    if not _is_number(value) or value <= 0:
        raise UserError(f"{method}: {name} must be a finite number above 0, got {value!r}")


def check_not_negative(method: str, name: str, value: float) -> None:
    """Raise a UserError unless ``value`` is finite and at least 0."""
    if not _is_number(value) or value < 0:
        raise UserError(f"{method}: {name} must be a finite number of at least 0, got {value!r}")


def check_count(method: str, name: str, value: int) -> None:
    """Raise a UserError unless ``value`` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{method}: {name} must be an integer of at least 1, got {value!r}")


def check_choice(method: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise a UserError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise UserError(f"{method}: {name} must be one of {', '.join(choices)}, got {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
