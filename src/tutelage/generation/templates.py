"""Prompts as Jinja templates of the recipe, checked before any request is sent."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, UndefinedError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tutelage.errors import ConfigError, DataError, suggest
from tutelage.generation.requests import canonical_json

Key = tuple[str | int, ...]

PromptTemplate = Callable[[Mapping[str, Any], str], str]
"""Renders values, which the second argument names in messages; raises :class:`DataError` if they do not fit."""


class PromptTemplates:
    """The templates of a recipe; ``where`` gives file and line of a key."""

    def __init__(self, where: Callable[[Key], str]) -> None:
        self.where = where
        self.texts: dict[str, str] = {}
        self._environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, autoescape=False)

    def add(self, key: Key, text: str, names: Collection[str]) -> PromptTemplate:
        """Compile the template of a key such as ``("generate", "user")``, which can use ``names``."""
        self.texts[".".join(str(part) for part in key)] = text
        try:
            tree = self._environment.parse(text)
            template = self._environment.from_string(text)
        except TemplateSyntaxError as error:
            raise ConfigError(
                f"is not a Jinja template: {error.message}", where=self._line(key, text, error.lineno),
                remedy="see https://jinja.palletsprojects.com for the syntax",
            ) from None  # fmt: skip
        unknown = sorted(meta.find_undeclared_variables(tree) - set(names))
        if unknown:
            line = next(n for n, row in enumerate(text.splitlines(), 1) if unknown[0] in row)
            raise ConfigError(
                f"unknown placeholder {unknown[0]!r}" + suggest(unknown[0], list(names)),
                where=self._line(key, text, line), remedy=f"the template can use: {', '.join(names)}",
            )  # fmt: skip
        place = self.where(key)

        def fill(values: Mapping[str, Any], what: str) -> str:
            remedy = "correct the template or the value"
            try:
                return template.render(values).strip()
            except UndefinedError as error:
                problem, remedy = error.message, "add the value, or write {{ name|default('') }}"
            except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, OverflowError) as error:
                problem = f"the template fails: {error}"
            raise DataError(f"{what}: {problem}", where=place, remedy=remedy)

        return fill

    def _line(self, key: Key, text: str, number: int) -> str:
        """File and line of a line of a template; a text of several lines begins below its key."""
        place = self.where(key)
        name, _, line = place.rpartition(":")
        if line.isdecimal():
            first = int(line) + ("\n" in text)
            place = f"{name}:{first + number - 1}"
        return f"{place}: {'.'.join(str(part) for part in key)}"

    @property
    def version(self) -> str:
        """A hash of all templates: data from other templates has another version."""
        return hashlib.sha256(canonical_json(self.texts)).hexdigest()[:12]
