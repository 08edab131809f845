"""What every section of a recipe is made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Misfit(ValueError):
    """A value that does not fit its section, with the key in the section that is to blame."""

    def __init__(self, what: str, key: str) -> None:
        super().__init__(what)
        self.key = key


class Section(BaseModel):
    """Base of every section: unknown keys are errors, and 'yes' is not a number."""

    model_config = ConfigDict(extra="forbid", strict=True, validate_default=True)
