"""Prompts as Jinja templates of the recipe, checked before any request is sent."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError, TemplateSyntaxError, UndefinedError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tutelage.errors import ConfigError, DataError, suggest
from tutelage.generation.requests import canonical_json

Key = tuple[str | int, ...]


class PromptTemplates:
    """The templates of a recipe.

    Args:
        where: gives file and line of a key of the recipe.
    """

    def __init__(self, where: Callable[[Key], str]) -> None:
        self.where = where
        self.texts: dict[str, str] = {}
        self._environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, autoescape=False)

    def add(self, key: Key, text: str, names: Collection[str]) -> PromptTemplate:
        """Compile a template.

        Args:
            key: of the recipe, such as ``("generate", "user")``.
            text: the template.
            names: that it can use.

        Raises:
            ConfigError: it is no template, or uses another name; with its line.
        """
        self.texts[".".join(str(part) for part in key)] = text
        try:
            tree = self._environment.parse(text)
            template = self._environment.from_string(text)
        except TemplateSyntaxError as error:
            raise ConfigError(
                f"is no Jinja template: {error.message}", where=self._line(key, text, error.lineno),
                remedy="see https://jinja.palletsprojects.com for the syntax",
            ) from None  # fmt: skip
        unknown = sorted(meta.find_undeclared_variables(tree) - set(names))
        if unknown:
            line = next(n for n, row in enumerate(text.splitlines(), 1) if unknown[0] in row)
            raise ConfigError(
                f"unknown placeholder {unknown[0]!r}" + suggest(unknown[0], list(names)),
                where=self._line(key, text, line), remedy=f"it can use: {', '.join(names)}",
            )  # fmt: skip
        return PromptTemplate(template, self.where(key))

    def _line(self, key: Key, text: str, number: int) -> str:
        """Place of a line of a template; a text of several lines begins below its key."""
        name, _, line = self.where(key).rpartition(":")
        place = self.where(key)
        if line.isdecimal():
            offset = number if "\n" in text else number - 1
            place = f"{name}:{int(line) + offset}"
        return f"{place}: {'.'.join(str(part) for part in key)}"

    @property
    def version(self) -> str:
        """A hash of all templates: data from other templates has another version."""
        return hashlib.sha256(canonical_json(self.texts)).hexdigest()[:12]


class PromptTemplate:
    """A compiled template, and its place for messages."""

    def __init__(self, template: Template, where: str) -> None:
        self._template, self._where = template, where

    def __call__(self, values: Mapping[str, Any], what: str) -> str:
        """The text with ``values``; ``what`` names them in messages.

        Raises:
            DataError: a value is missing, or the template fails with it.
        """
        try:
            return self._template.render(values).strip()
        except UndefinedError as error:
            raise DataError(f"{what}: {error.message}", where=self._where,
                            remedy="give it a value, or write {{ name|default('') }}") from None  # fmt: skip
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, OverflowError) as error:
            raise DataError(f"{what}: the template fails: {error}", where=self._where,
                            remedy="correct the template or the value") from None  # fmt: skip
