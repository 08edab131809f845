"""The base of every section of a recipe, and the ranges of numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tutelage.config.messages import explain
from tutelage.errors import ConfigError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)


class _SectionType(ModelMetaclass):
    """Calling a section's class raises :class:`ConfigError`, with the messages of a recipe."""

    if not TYPE_CHECKING:

        def __call__(cls, **keywords: Any) -> Any:
            try:
                return super().__call__(**keywords)
            except ValidationError as error:
                problems = [explain(d, cls, cls.__name__, {}, {}) for d in error.errors(include_url=False)]
                raise ConfigError("\n".join(problems)) from None


class Section(BaseModel, metaclass=_SectionType):
    """Base of every section: unknown keys are errors, and 'yes' is not a number."""

    model_config = ConfigDict(extra="forbid", strict=True, validate_default=True)
