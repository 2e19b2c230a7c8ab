"""What the name of a layer says: where it stands and what it does."""

import re

ATTENTION = re.compile(r"att(ention|n)", re.IGNORECASE)
MLP = re.compile(
    r"mlp|ffn|feed_?forward|dense_?relu_?dense|intermediate|output\.dense|(^|\.)fc\d|(^|\.)wi|(^|\.)wo$", re.I
)

NO_NUMBER = -1
"""``number`` of a layer whose name holds none."""


def kind_of(layer: str) -> str:
    """``"attention"``, ``"mlp"`` or ``"other"``, by the names that transformers' models use."""
    if ATTENTION.search(layer):
        return "attention"
    return "mlp" if MLP.search(layer) else "other"


def split_layer(name: str) -> tuple[str, int, str]:
    """A layer's name as (what stands before the first integer, that integer, the block after it).

    ``model.layers.3.mlp.gate_proj`` is ``("model.layers", 3, "mlp.gate_proj")``. A name without an integer has the
    number :data:`NO_NUMBER` and is a block of its own.
    """
    parts = name.split(".")
    for at, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[:at]), int(part), ".".join(parts[at + 1 :])
    return "", NO_NUMBER, name
