"""What may be compared: numbers of one definition only."""

import pandas as pd

from bilora.errors import UserError


def check_same_m(frame: pd.DataFrame) -> None:
    """Refuse a comparison of methods whose m-sharpness was measured with different m in the same place.

    Args:
        frame: tidy rows of a study; those of other measures play no part, nor do methods without m-sharpness.

    Raises:
        UserError: in one space and split, two methods have different values of m.
    """
    rows = frame[frame["measure"] == "m_sharpness"]
    sizes = rows.assign(m=rows["kind"].str.split().str[0])
    for (space, split), part in sizes.groupby(["space", "split"], sort=False):
        by_method = {str(method): sorted(set(values)) for method, values in part.groupby("method", sort=False)["m"]}
        (first, expected), *others = by_method.items()
        for method, found in others:
            if found != expected:
                raise UserError(
                    f"m-sharpness in space {space} on {split} has {', '.join(expected)} for {first} but "
                    f"{', '.join(found)} for {method}: values of different m are not comparable, measure all with one m"
                )
