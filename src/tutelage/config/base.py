"""The base of every section of a recipe, and the ranges of numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from tutelage.config.lines import Key
from tutelage.config.messages import Misfit, Source, explain, key_parts
from tutelage.errors import ConfigError, TutelageError, shorten, suggest

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
Share = Annotated[float, Field(gt=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


def matching(pattern: str, what: str) -> AfterValidator:
    """A text must match ``pattern``; ``what`` describes such a text."""

    def check(text: str) -> str:
        if not re.search(pattern, text):
            raise ValueError(f"{shorten(text)} is not {what}; give {what}")
        return text

    return AfterValidator(check)


HttpUrl = Annotated[str, matching(r"^https?://[^\s?#@]+$", "an http address without a login or a query")]
RecipeName = Annotated[
    str, matching(r"^[A-Za-z0-9][A-Za-z0-9._-]*$", "a name of ASCII letters, digits, '.', '_' and '-'")
]


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
                raise ConfigError(explain(error, cls, keywords, Source(cls.__name__))) from None


class Section(BaseModel, metaclass=_SectionType):
    """Base of every section: unknown keys are errors, and 'yes' is not a number."""

    model_config = ConfigDict(extra="forbid", strict=True, validate_default=True)

    def misfits(self) -> Iterator[tuple[str, str]]:
        """The keys whose values do not fit the other keys, each with "what is wrong; what to do"."""
        yield from ()

    @model_validator(mode="after")
    def _check_misfits(self) -> Self:
        if misfits := list(self.misfits()):
            raise Misfit(misfits)
        return self


class LocatedSection(Section):
    """A whole recipe, which knows the line of each of its keys."""

    _source: Source = PrivateAttr(default_factory=Source)

    def where(self, key: Key) -> str:
        """The file and line, or the override, of a key such as ``("generate", "user")``."""
        return self._source.where(key)

    def locate(self, error: TutelageError) -> None:
        """Put file and line in front of the key at the start of ``error.where``, if there is one."""
        key = (error.where or "").partition(": ")[0]
        if key.partition(".")[0] in type(self).model_fields and (place := self._source.find(key_parts(key))):
            error.where = f"{place}: {error.where}"

    @contextmanager
    def locating(self) -> Iterator[None]:
        """Every error raised inside is located by :meth:`locate`."""
        try:
            yield
        except TutelageError as error:
            self.locate(error)
            raise


def by_kind(union: Any) -> dict[str, Any]:
    """The classes of a union of sections, by their ``kind``, in alphabetical order."""
    return dict(sorted((section.model_fields["kind"].default, section) for section in get_args(union)))


def known(what: str, table: Mapping[str, Any]) -> AfterValidator:
    """A name must be one of ``table``."""

    def check(name: str) -> str:
        if name not in table:
            raise ValueError(f"unknown {what} {shorten(name)}{suggest(name, table)}; allowed: {', '.join(table)}")
        return name

    return AfterValidator(check)


def known_source(what: str, names: Sequence[str], prefixes: Sequence[str] | None = None) -> Callable[[str], str]:
    """A check that a string is one of ``names`` without a colon, or PREFIX:NAME; with ``None`` any prefix."""

    def check(name: str) -> str:
        prefix, colon, rest = name.partition(":")
        fits = prefix and rest and (prefixes is None or prefix in prefixes) if colon else name in names
        if not fits:
            raise ValueError(f"unknown {what} {shorten(name)}{suggest(name, names)}; allowed: {', '.join(names)}")
        return name

    return check
