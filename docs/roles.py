"""Docstrings use Sphinx's roles and directives in a few places; here they become Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe


def as_markdown(text: str) -> str:
    """``:func:`x``` as code, ``:math:`x``` and ``.. math::`` as formulas, ``::`` before a block as a block."""
    text = re.sub(r":math:`([^`]+)`", r"$\1$", text)
    text = re.sub(r":(?:func|class|mod|meth|data|attr):`~?([^`]+)`", r"`\1`", text)
    text = re.sub(
        r"^\.\. math::((?:\n?.*\S)(?:\n[ \t]+\S.*)*)$",
        lambda m: f"$$\n{' '.join(m[1].split())}\n$$",
        text,
        flags=re.M,
    )
    return re.sub(r"::$", ":", text, flags=re.M).replace("``", "`")


class Roles(griffe.Extension):
    """Changes every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, loader: Any, **_: Any) -> None:
        """A module, class, function or attribute has been read."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
