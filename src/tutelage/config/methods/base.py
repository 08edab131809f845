"""The base of the options of all methods, and checks that several of them share."""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator

from tutelage.config.base import Count, Section
from tutelage.errors import shorten


class MethodOptions(Section):
    """The options of a method: the section ``method`` of a recipe, and what the method's class takes."""

    needs_teacher: ClassVar[bool] = True
    """Whether there must be a teacher."""
    cross_tokenizer: ClassVar[bool] = False
    """Whether teacher and student may have different tokenizers."""
    accepts_remote_teacher: ClassVar[bool] = False
    """Whether the most probable next tokens, which a server returns, are enough."""


def labels_weight_misfit(alpha: float, hard: float | None) -> Iterator[tuple[str, str]]:
    """The misfit of an ``alpha`` above 1 without ``hard``: the labels would get a negative weight."""
    if hard is None and alpha > 1:
        yield "alpha", f"{alpha:g} leaves {1 - alpha:g} for the labels; give at most 1, or 'hard' too"


def auto_or_list(of: str, example: str) -> BeforeValidator:
    """``auto`` is ``None``; any other value must be a list of ``of``."""

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
