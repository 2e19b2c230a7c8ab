"""Settings of measures: one set of bounds for study files, the command line and direct calls."""

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bilora.errors import UserError

Radius = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""A perturbation radius: positive and finite."""
Radii = Annotated[tuple[Radius, ...], Field(min_length=1)]
"""At least one radius."""


class MeasureSettings(BaseModel):
    """Base of the settings of a measure: immutable, unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def checked(cls, **values: Any) -> Self:
        """The settings, for direct calls.

        Raises:
            UserError: a value is out of bounds; the line names the setting, the bound and the value.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            if not where:  # of several settings together
                raise UserError(first["msg"].removeprefix("Value error, ")) from error
            raise UserError(f"{where}: {first['msg']}, not {first['input']!r}") from error
