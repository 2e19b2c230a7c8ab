"""What spaces are called in figures and tables, and in which order they stand."""

from collections.abc import Iterable

SPACE_TITLES = {
    "lora": "LoRA space (A, B as trained)",
    "lora_balanced": "LoRA space (A, B balanced)",
    "full": "full space (merged W)",
    "all": "all parameters",
}
"""Panel titles, in the order in which spaces stand side by side."""


def in_space_order(spaces: Iterable[str]) -> list[str]:
    """The spaces present, LoRA spaces left of full space."""
    order = list(SPACE_TITLES)
    return sorted(set(spaces), key=lambda s: (order.index(s) if s in order else len(order), s))
