"""The grammar of taps: ``PATH[@CALL][:input|:output][ITEM]...``

==================================  ===================================================================
``layer.1``                         the module's output; of a tuple its first tensor
``layer.1@0``, ``layer.1@-1``       the output of its first and last call, if it runs several times
``layer.1:input``                   its first argument
``layer.1:input[hidden_states]``    the argument of that name, passed by keyword or position
``encoder.attention[1]``            an item of a tuple or list
``block[attn]``, ``[logits]``       an item of a dictionary or of an output class; an empty path is the model
==================================  ===================================================================

Items may follow each other: ``block[states][-1]``.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from tutelage.errors import ModelError, nearest

_TAP = re.compile(
    r"(?P<path>[^@:\[\]]*)(?:@(?P<call>-?[0-9]+))?(?::(?P<side>input|output))?(?P<items>(?:\[[^\[\]]+\])*)"
)


@dataclass(frozen=True)
class Tap:
    """A parsed tap.

    Attributes:
        text: the tap as a string.
        path: of the module; empty for the model itself.
        call: the number of the call, from 0, or from the end if negative; ``None`` for a module that runs once.
        side: the module's input or output.
        items: keys or indices that lead to the tensor.
    """

    text: str
    path: str
    call: int | None = None
    side: Literal["input", "output"] = "output"
    items: tuple[str, ...] = ()


def parse_tap(text: str) -> Tap:
    """Parse a tap; raises :class:`ModelError` for a syntax error."""
    match = _TAP.fullmatch(text)
    if match is None:
        raise ModelError(
            f"syntax error: {_syntax_error(text)}",
            where=f"tap {text!r}",
            remedy="a tap is PATH[@CALL][:input|:output][ITEM]..., such as layer.1, layer.1@0, "
            "layer.1:input[hidden_states] or attention[1]",
        )
    path, call, side, items = match["path"], match["call"], match["side"], match["items"]
    return Tap(
        text,
        path,
        None if call is None else int(call),
        "input" if side == "input" else "output",
        tuple(items[1:-1].split("][")) if items else (),
    )


def _syntax_error(text: str) -> str:
    if text.count("[") != text.count("]") or "[]" in text:
        return "its square brackets are empty or not closed"
    _, at, call = text.partition("@")
    if at and not re.match(r"-?[0-9]+(?:$|[:\[])", call):
        return "'@' must be followed by the number of a call"
    _, colon, side = text.partition(":")
    if colon and not re.match(r"(?:input|output)(?:$|[@:\[])", side):
        return f"':' must be followed by input or output, not {side.partition('[')[0]!r}"
    return "its parts are in the wrong order"


def resolve(model: nn.Module, text: str) -> tuple[Tap, nn.Module]:
    """The parsed tap and its module. A module whose name contains special characters of the grammar has priority.

    Raises:
        ModelError: a syntax error, or no such module (names the three nearest).
    """
    try:
        return Tap(text, text), model.get_submodule(text)
    except AttributeError:
        pass
    tap = parse_tap(text)
    try:
        return tap, model.get_submodule(tap.path)
    except AttributeError:
        names = [name for name, _ in model.named_modules() if name]
        raise ModelError(
            f"{type(model).__name__} has no module {tap.path!r}",
            remedy=f"nearest: {', '.join(nearest(tap.path, names) or names[:3]) or 'none, it has no modules inside'}",
        ) from None


def find_module(model: nn.Module, tap: str) -> nn.Module:
    """The module of ``tap``; raises :class:`ModelError` as :func:`resolve`."""
    return resolve(model, tap)[1]


# torch.compile traces these functions as part of the model: plain Python, and an error is returned as a string.


def of_output(tap: Tap, output: Any) -> Tensor | str:
    """The tensor of ``tap`` in its module's output, or an error message."""
    return _tensor(tap, output, tap.items)


def of_input(tap: Tap, args: Sequence[Any], kwargs: Mapping[str, Any], names: Sequence[str]) -> Tensor | str:
    """The tensor of ``tap`` among its module's arguments, or an error message.

    Args:
        tap: on the input.
        args: positional arguments.
        kwargs: arguments by name.
        names: of the module's parameters, in order.
    """
    given = {**{str(i): x for i, x in enumerate(args)}, **dict(zip(names, args, strict=False)), **kwargs}
    item = tap.items[0] if tap.items else "0"
    if item not in given and item.isdecimal() and int(item) < len(names):
        item = names[int(item)]
    if item not in given and not tap.items and kwargs:
        item = next(iter(kwargs))
    if item not in given:
        return f"is not passed; the arguments are {', '.join(given) or 'none'}"
    return _tensor(tap, given[item], tap.items[1:])


def _tensor(tap: Tap, value: Any, items: Sequence[str]) -> Tensor | str:
    for item in items:
        inside = contents(value)
        ordered = list(inside.values()) if isinstance(value, (tuple, list)) or hasattr(value, "to_tuple") else []
        if item in inside:
            value = inside[item]
        elif _INDEX.fullmatch(item) and -len(ordered) <= int(item) < len(ordered):
            value = ordered[int(item)]
        else:
            return f"has no item {item!r} in a {type(value).__name__}; it has {', '.join(inside) or 'none'}"
    if isinstance(value, (tuple, list)) and not items:
        value = next((x for x in value if isinstance(x, Tensor)), value)
    if isinstance(value, Tensor):
        return value
    named = ", ".join(f"{tap.text}[{key}]" for key in contents(value))
    return f"is a {type(value).__name__}, not a tensor" + (f"; tap an item of it: {named}" if named else "")


_INDEX = re.compile("-?[0-9]+")


def contents(value: Any) -> dict[str, Any]:
    """The items of a tuple, list, dictionary or output class, by their names in a tap's brackets."""
    if isinstance(value, Mapping):
        return {str(key): x for key, x in value.items()}
    if isinstance(value, (tuple, list)):
        names = getattr(value, "_fields", None) or [str(i) for i in range(len(value))]
        return dict(zip(names, value, strict=True))
    return {name: getattr(value, name) for name in getattr(type(value), "__dataclass_fields__", {})}
