"""One look for every figure: a method keeps its colour, marker and line wherever it appears."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

COLUMN = 3.3
"""Width of a one-column figure, inches."""
PAGE = 6.8
"""Width of a two-column figure, inches."""

RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same figure on every machine
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "lines.linewidth": 1.3,
    "lines.markersize": 4,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.5,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "svg.hashsalt": "bilora",  # the same drawing gives the same bytes
}

SPACE_TITLES = {
    "lora": "LoRA space (A, B as trained)",
    "lora_balanced": "LoRA space (A, B balanced)",
    "full": "full space (merged W)",
    "all": "all parameters",
}
"""Panel titles, in the order in which spaces stand side by side."""


@dataclass(frozen=True)
class MethodStyle:
    """How one method is drawn."""

    colour: str
    marker: str
    line: Literal["-", "--", "-."] | tuple[float, tuple[float, ...]]


# Okabe and Ito's colours, which stay apart under the common colour-vision deficiencies; marker and line repeat the
# distinction for print in grey.
_KNOWN = {
    "Full FT": MethodStyle("#4D4D4D", "D", (0, (1, 1))),
    "LoRA": MethodStyle("#0072B2", "o", "-"),
    "LoRA-SAM": MethodStyle("#CC79A7", "s", (0, (5, 1.5))),
    "Flat-LoRA": MethodStyle("#009E73", "^", (0, (4, 1, 1, 1))),
    "Bi-LoRA": MethodStyle("#D55E00", "v", "-"),
}
_ALIASES = {"full": "fullft", "fullfinetuning": "fullft", "fft": "fullft"}
_FALLBACK = [
    MethodStyle("#E69F00", "P", (0, (2, 1))),
    MethodStyle("#56B4E9", "X", (0, (6, 1, 1, 1))),
    MethodStyle("#7B4F9D", "<", "-"),
    MethodStyle("#8C6D1F", ">", (0, (3, 1, 1, 1, 1, 1))),
    MethodStyle("#000000", "*", "--"),
    MethodStyle("#999999", "h", "-."),
]


def _plain(label: str) -> str:
    letters = "".join(c for c in label.casefold() if c.isalnum())
    return _ALIASES.get(letters, letters)


_BY_PLAIN_NAME = {_plain(label): label for label in _KNOWN}


def styles_for(labels: Iterable[str]) -> dict[str, MethodStyle]:
    """Style of every label, in drawing order.

    Known methods come first, in their fixed order and look, whatever their spelling (``bilora``, ``Bi-LoRA``). All
    other labels follow in alphabetical order and take the spare looks in that order, so that the same set of labels is
    always drawn alike.
    """
    names = sorted(set(labels))
    order = list(_BY_PLAIN_NAME)
    known = sorted((name for name in names if _plain(name) in _BY_PLAIN_NAME), key=lambda n: order.index(_plain(n)))
    styles: dict[str, MethodStyle] = {}
    spare = []
    for name in known:
        look = _KNOWN[_BY_PLAIN_NAME[_plain(name)]]
        if look in styles.values():  # two spellings of one method in one study
            spare.append(name)
        else:
            styles[name] = look
    spare += [name for name in names if name not in known]
    for position, name in enumerate(spare):
        styles[name] = _FALLBACK[position % len(_FALLBACK)]
    return styles


def in_space_order(spaces: Iterable[str]) -> list[str]:
    """The spaces present, LoRA spaces left of full space."""
    order = list(SPACE_TITLES)
    return sorted(set(spaces), key=lambda s: (order.index(s) if s in order else len(order), s))
