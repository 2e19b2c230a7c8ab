import math

import pytest

from analysis.core import COLUMNS, row
from analysis.frame import rows_frame


def test_a_row_has_every_column_in_order_with_defaults():
    filled = row("spectrum", "eigenvalue", 3, index=1, space="full")
    assert tuple(filled) == COLUMNS
    assert (filled["value"], filled["index"], filled["space"], filled["kind"]) == (3.0, 1, "full", "")
    assert isinstance(filled["value"], float)
    assert all(math.isnan(filled[c]) for c in ("radius", "standard_error", "induced_norm", "residual", "chance"))
    assert row("quality", "loss", 1.0)["index"] == row("quality", "loss", 1.0)["direction_seed"] == -1


def test_a_table_of_rows_has_the_columns_in_their_types():
    frame = rows_frame([row("random", "loss_rise", 3, index=1, direction_seed=2), row("quality", "loss", 1)])
    assert tuple(frame) == COLUMNS
    assert frame["direction_seed"].tolist() == [2, -1]
    kinds = {name: dtype.kind for name, dtype in frame.dtypes.items()}
    assert [name for name, kind in kinds.items() if kind == "i"] == ["index", "direction_seed"]
    assert {"value", "radius", "y", "standard_error"} <= {name for name, kind in kinds.items() if kind == "f"}


def test_an_unknown_column_is_refused():
    with pytest.raises(ValueError, match="ranks"):
        row("spectrum", "eigenvalue", 3, ranks=1)
