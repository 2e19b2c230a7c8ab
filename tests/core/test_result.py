import math

import pytest

from analysis.core import COLUMNS, row


def test_a_row_has_every_column_in_order_with_defaults():
    filled = row("spectrum", "eigenvalue", 3, index=1, space="full")
    assert tuple(filled) == COLUMNS
    assert (filled["value"], filled["index"], filled["space"], filled["kind"]) == (3.0, 1, "full", "")
    assert isinstance(filled["value"], float)
    assert all(math.isnan(filled[c]) for c in ("radius", "standard_error", "induced_norm", "residual", "chance"))
    assert row("quality", "loss", 1.0)["index"] == -1


def test_an_unknown_column_is_refused():
    with pytest.raises(ValueError, match="ranks"):
        row("spectrum", "eigenvalue", 3, ranks=1)
