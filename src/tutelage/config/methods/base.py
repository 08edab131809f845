"""The base of the options of all methods, and checks that several of them share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BeforeValidator

from tutelage.config.base import Count, Section
from tutelage.config.messages import Misfit
from tutelage.errors import shorten, suggest


class MethodOptions(Section):
    """The options of a method: the section ``method`` of a recipe, and what the method's class takes."""

    needs_teacher: ClassVar[bool] = True
    """Whether there must be a teacher."""
    cross_tokenizer: ClassVar[bool] = False
    """Whether teacher and student may have different tokenizers."""
    accepts_remote_teacher: ClassVar[bool] = False
    """Whether the most probable next tokens, which a server gives, are enough."""


def known(what: str, table: Mapping[str, Any]) -> AfterValidator:
    """A name must be one of ``table``."""

    def check(name: str) -> str:
        if name not in table:
            raise ValueError(f"unknown {what} {shorten(name)}{suggest(name, table)}; allowed: {', '.join(table)}")
        return name

    return AfterValidator(check)


def check_labels_weight(alpha: float, hard: float | None) -> None:
    """Raise :class:`Misfit` where the labels are to weigh what ``alpha`` leaves of 1, and that is below 0."""
    if hard is None and alpha > 1:
        raise Misfit(
            f"alpha: {alpha:g} leaves {1 - alpha:g} for the labels; give at most 1, or 'hard' too",
            "alpha",
        )


def auto_or_list(of: str, example: str) -> BeforeValidator:
    """``auto`` is ``None``; all else must be a list of what ``of`` says."""

    def check(given: Any) -> Any:
        if given is None or given == "auto":
            return None
        if not isinstance(given, list) or not given:
            raise ValueError(f"{shorten(given)} is no list of {of}; allowed: auto, or {example}")
        return given

    return BeforeValidator(check)


def _layers(given: Any) -> Any:
    listed = isinstance(given, list) and given
    if not isinstance(given, str) and not listed:
        raise ValueError(f"{shorten(given)} is neither the name of a map of layers nor a list such as [4, 8, 12]")
    return given


Layers = Annotated[list[Count | None], BeforeValidator(_layers)]
