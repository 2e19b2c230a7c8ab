"""One look for every figure: a method keeps its colour, marker and line wherever it appears."""

import hashlib
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

Line = Literal["-"] | tuple[float, tuple[float, ...]]
"""A solid line, or offset and lengths of dashes and gaps in line widths."""


@dataclass(frozen=True)
class MethodStyle:
    """How one method is drawn."""

    colour: str
    marker: str
    line: Line


_SOLID: Line = "-"
_DOTTED: Line = (0, (1, 1))
_DASHED: Line = (0, (5, 1.5))
_DASH_DOT: Line = (0, (4, 1, 1, 1))
_SHORT: Line = (0, (2, 1))
_DASH_DOTS: Line = (0, (3, 1, 1, 1, 1, 1))
_LONG: Line = (0, (9, 1.5))

# Okabe and Ito's colours and others that stay apart under the common colour-vision deficiencies as well. No two have
# the same marker and line, and those of similar colours differ in both: also apart in grey.
_KNOWN = {
    "full": MethodStyle("#4D4D4D", "D", _DOTTED),
    "lora": MethodStyle("#0072B2", "o", _SOLID),
    "lora_sam": MethodStyle("#CC79A7", "s", _DASHED),
    "flat_lora": MethodStyle("#009E73", "^", _DASH_DOT),
    "bilora": MethodStyle("#D55E00", "v", _SOLID),
    "sam": MethodStyle("#E69F00", "P", _SHORT),
    "asam": MethodStyle("#663300", "X", _SHORT),
    "lora_esam": MethodStyle("#9900FF", "<", _DASHED),
    "lora_looksam": MethodStyle("#330099", ">", _DASH_DOTS),
    "s2_sam": MethodStyle("#56B4E9", "d", _LONG),
    "sl_sam": MethodStyle("#99CC66", "p", _SHORT),
    "wsam": MethodStyle("#996633", "h", _LONG),
    "fmlora": MethodStyle("#000000", "*", _DASHED),
    "efmlora": MethodStyle("#330066", "8", _LONG),
    "lora_obar": MethodStyle("#9999FF", "P", _DASH_DOT),
    "lora_nbar": MethodStyle("#6633CC", "X", _SOLID),
    "rwp_full": MethodStyle("#330033", "d", _DASH_DOTS),
    "rwp_lora": MethodStyle("#663366", "*", _LONG),
    "rop": MethodStyle("#9966FF", "D", _DASH_DOTS),
}
"""The methods of :data:`bilora.methods.METHODS`, in the order in which they are drawn."""

_ALIASES = {"fullft": "full", "fullfinetuning": "full", "fft": "full", "eflatlora": "efmlora"}

# Looks of labels that are no methods, of other colours and so never those of a method.
_COLOURS = (
    "#332288",
    "#44AA99",
    "#117733",
    "#999933",
    "#882255",
    "#AA4499",
    "#661100",
    "#CC6677",
    "#6699CC",
    "#8C6D1F",
)
_MARKERS = ("h", "p", "<", ">", "*", "8", "H", "d")
_LINES = (_SOLID, _DASHED, _DASH_DOT, _SHORT, _DASH_DOTS, _LONG)


def _plain(label: str) -> str:
    letters = "".join(c for c in label.casefold() if c.isalnum())
    return _ALIASES.get(letters, letters)


_BY_PLAIN_NAME = {_plain(name): look for name, look in _KNOWN.items()}


def style_of(label: str) -> MethodStyle:
    """The look of one method, by its name alone: always the same, whatever else is drawn.

    Methods of the registry have looks of their own, in any spelling (``bilora``, ``Bi-LoRA``). The look of another
    label comes from its hash, one of 480: of two labels that happen to look alike, rename one.
    """
    known = _BY_PLAIN_NAME.get(_plain(label))
    if known is not None:
        return known
    number = int.from_bytes(hashlib.sha256(label.encode()).digest()[:8])
    number, colour = divmod(number, len(_COLOURS))
    number, marker = divmod(number, len(_MARKERS))
    return MethodStyle(_COLOURS[colour], _MARKERS[marker], _LINES[number % len(_LINES)])


def styles_for(labels: Iterable[str]) -> dict[str, MethodStyle]:
    """:func:`style_of` every label in drawing order: methods of the registry, then others in alphabetical order."""
    order = list(_BY_PLAIN_NAME)
    known = {name: order.index(_plain(name)) for name in set(labels) if _plain(name) in _BY_PLAIN_NAME}
    return {name: style_of(name) for name in sorted(set(labels), key=lambda n: (known.get(n, len(order)), n))}


def spare_styles(names: Iterable[str]) -> dict[str, MethodStyle]:
    """Looks for what is no method, such as a pair of solutions: none is a method's, and the first ten differ in colour.

    They go by the names' alphabetical order, so that the same names always look alike.
    """
    return {
        name: MethodStyle(
            _COLOURS[position % len(_COLOURS)], _MARKERS[position % len(_MARKERS)], _LINES[position % len(_LINES)]
        )
        for position, name in enumerate(sorted(set(names)))
    }
