"""The layers of a text model: where its hidden states, queries, keys and values are, found by two dry runs.

No names of families: layers are the longest list of like modules that each give ``[B, L, D]``; a value is what
attention passes on where a token sees itself alone, as in a text of one token; queries and keys are made of what the
value is made of; and whether their product is the attention is computed and compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tutelage.data.batch import Batch
from tutelage.errors import ConfigError, ModelError
from tutelage.methods.text_terms import seen_tokens
from tutelage.students import eval_no_grad
from tutelage.students.projectors import device_of
from tutelage.taps import Needs, observe

CLOSE = {torch.float32: 2e-6, torch.float64: 1e-9}
"""Error of rounding, relative to the largest entry, of what is computed again."""
CLOSE_HALF = 1e-2


class Channels(NamedTuple):
    """Some channels of a tap: queries, keys or values ``[B, L, width]``, heads joined."""

    tap: str
    start: int
    stop: int

    @property
    def width(self) -> int:
        """How many channels."""
        return self.stop - self.start

    def of(self, hidden: Mapping[str, Tensor]) -> Tensor:
        """The channels, of what was seen."""
        return hidden[self.tap][..., self.start : self.stop]


@dataclass(frozen=True)
class Attention:
    """What a layer's attention is made of.

    Attributes:
        queries: before any rotation.
        keys: before any rotation.
        values: what is averaged.
        heads: into which all are split; ``None`` where neither the model's config nor the dry run tells.
        plain: whether attention is softmax(QK/sqrt(d)) of these and nothing else.
    """

    queries: Channels
    keys: Channels
    values: Channels
    heads: int | None
    plain: bool


@dataclass(frozen=True)
class Layer:
    """A layer, and its call where the same module is several layers."""

    path: str
    call: int | None
    width: int

    @property
    def state(self) -> str:
        """The tap of the hidden state that it gives."""
        return self.path if self.call is None else f"{self.path}@{self.call}"

    @property
    def entry(self) -> str:
        """The tap of the hidden state that it takes."""
        return f"{self.state}:input"


class Call(NamedTuple):
    """A module's call in a dry run."""

    path: str
    number: int
    began: int
    """How many calls had ended when it began."""
    linear: bool
    given: Tensor | None
    gave: Any


@dataclass(frozen=True)
class Stack:
    """The layers of a model, in order.

    Attributes:
        layers: all of them.
        last: the tap of the last hidden state, after the norm that some models have behind the layers.
    """

    who: str
    model: nn.Module
    example: Batch
    layers: tuple[Layer, ...]
    last: str

    @property
    def width(self) -> int:
        """Of the hidden states."""
        return self.layers[0].width

    @property
    def embeddings(self) -> str:
        """The tap of what goes into the first layer."""
        return self.layers[0].entry

    def attentions(self, numbers: Sequence[int]) -> list[Attention]:
        """Those of some layers, counted from 1.

        Raises:
            ModelError: a layer without queries, keys and values that can be told apart.
        """
        calls = _watched(self.model, self.example)
        alone = _watched(self.model, _first_token(self.example))
        return [self._attention(self.layers[n - 1], calls, alone) for n in numbers]

    def _attention(self, layer: Layer, calls: list[Call], alone: list[Call]) -> Attention:
        within = _within(layer, alone)
        candidates = [
            self._made_of(parts, taker, calls)
            for values, taker in _values(within)
            for parts in _queries_and_keys(values, taker, within)
        ]
        if not candidates:
            raise ModelError(
                f"no queries, keys and values are found in the {self.who}'s layer {layer.path!r}",
                remedy="its attention is not made by linear layers of one input, or heads are mixed in one: pair "
                "modules by name, with kind: feature",
            )
        return next((one for one in candidates if one.plain), candidates[0])

    def _made_of(self, parts: tuple[Channels, Channels, Channels], taker: Call, calls: list[Call]) -> Attention:
        """An attention by its parts; plain where their product is what the next layer takes."""
        by_name = {(c.path, c.number): c for c in calls}
        q, k, v = (_seen(by_name, part) for part in parts)
        context = by_name[taker.path, taker.number].given
        assert context is not None
        known = getattr(getattr(self.model, "config", None), "num_attention_heads", None)
        heads = [known] if isinstance(known, int) else [h for h in range(1, v.shape[-1] + 1) if v.shape[-1] % h == 0]
        visible = seen_tokens(self.example).to(v.device)
        queries, keys, values = _numbered(parts, calls)
        for h in heads:
            for swapped in (False, True):
                made = _attended(*((k, q) if swapped else (q, k)), v, h, visible)
                if made is not None and _is_made(made[visible], context[visible], _uniform_attention(v, visible)):
                    first, second = (keys, queries) if swapped else (queries, keys)
                    return Attention(first, second, values, h, plain=True)
        return Attention(queries, keys, values, known if isinstance(known, int) else None, plain=False)


def find_layers(who: str, model: nn.Module, example: Batch) -> Stack:
    """The layers of a model of texts.

    Args:
        who: ``student`` or ``teacher``, for messages.
        model: runs once, in evaluation mode.
        example: a few texts, as the model sees them.

    Raises:
        CapabilityError: the example is no texts.
        ModelError: no list of like modules that give hidden states, or several models in one.
    """
    if getattr(model, "many", False):
        raise ModelError(
            f"the {who} is several models, and whose layers are meant is not said",
            remedy="take one teacher, or kind: logit",
        )
    shape = seen_tokens(example).shape
    calls = _watched(model, example)
    lists = []
    for path, module in model.named_modules():
        members = list(module.children()) if isinstance(module, (nn.ModuleList, nn.Sequential)) else []
        if not members or len({type(m) for m in members}) != 1 or not any(True for _ in members[0].children()):
            continue
        names = {f"{path}.{name}" if path else name for name, _ in module.named_children()}
        ran = [c for c in calls if c.path in names]
        states = [_tensor(c.gave) for c in ran]
        if ran and all(x is not None and x.ndim == 3 and x.shape[:2] == shape for x in states):
            widths = {x.shape[-1] for x in states if x is not None}
            if len(widths) == 1:
                lists.append((path, ran, widths.pop()))
    outer = [one for one in lists if not any(one[0].startswith(f"{other[0]}.") or not other[0] for other in lists
                                             if other is not one)]  # fmt: skip
    if not outer:
        raise ModelError(
            f"no layers are found in the {who}, {type(model).__name__}",
            remedy="a list of like modules, each giving [B, L, D]: pair modules by name, with kind: feature",
        )
    path, ran, width = max(outer, key=lambda one: len(one[1]))
    many = {c.path for c in ran if c.number}
    layers = tuple(Layer(c.path, c.number if c.path in many else None, width) for c in ran)
    return Stack(who, model, example, layers, _last_state(calls, path, layers, width))


def _last_state(calls: Sequence[Call], path: str, layers: Sequence[Layer], width: int) -> str:
    """The tap of what the outermost module around the layers gives that still is a hidden state."""
    around = [".".join(path.split(".")[:n]) for n in range(path.count(".") + 1)]
    by_path = {c.path: c.gave for c in calls}
    for name in around:
        gave = by_path.get(name)
        state = _tensor(gave)
        if state is not None and state.ndim == 3 and state.shape[-1] == width and (name or _is_bare(gave)):
            return f"{name}[0]" if isinstance(gave, Mapping) else name
    return layers[-1].state


def _is_bare(gave: Any) -> bool:
    """Whether a model's output is its last hidden state, and no scores."""
    return isinstance(gave, Mapping) and "last_hidden_state" in gave


# The dry run ------------------------------------------------------------------------------------------


def _watched(model: nn.Module, example: Batch) -> list[Call]:
    """Every module's calls, in the order of their ends, with the first tensor that each took and what it gave."""
    calls: list[Call] = []
    numbers: dict[str, int] = {}
    open_now: list[tuple[str, int, int, Tensor | None]] = []
    handles = []

    def watch(path: str, module: nn.Module) -> None:
        def enters(_: nn.Module, args: Any, kwargs: Any) -> None:
            numbers[path] = numbers.get(path, -1) + 1
            given = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
            open_now.append((path, numbers[path], len(calls), given))

        def leaves(_: nn.Module, args: Any, gave: Any) -> None:
            name, number, began, given = open_now.pop()
            calls.append(Call(name, number, began, isinstance(module, nn.Linear), given, gave))

        handles.append(module.register_forward_pre_hook(enters, with_kwargs=True))
        handles.append(module.register_forward_hook(leaves))

    for path, module in model.named_modules():
        watch(path, module)
    try:
        with eval_no_grad(model):
            observe(model, example.to(device_of(model)).inputs, Needs(logits=False))
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _tensor(gave: Any) -> Tensor | None:
    """The first tensor of what a module gave."""
    values = gave.values() if isinstance(gave, Mapping) else gave if isinstance(gave, (tuple, list)) else (gave,)
    return next((x for x in values if isinstance(x, Tensor)), None)


def _within(layer: Layer, calls: Sequence[Call]) -> list[Call]:
    """The calls of linear layers inside a layer's call."""
    end = next(i for i, c in enumerate(calls) if c.path == layer.path and c.number == (layer.call or 0))
    inside = calls[calls[end].began : end]
    return [c for c in inside if c.linear and c.given is not None and c.gave.ndim == 3]


def _values(calls: Sequence[Call]) -> Iterator[tuple[Channels, Call]]:
    """The values, and the call that takes them in: in a text of one token they reach it as they are."""
    for i, made in enumerate(calls):
        for taker in calls[i + 1 :]:
            if taker.given is None or taker.given.ndim != 3:
                continue
            width, all_of_it = taker.given.shape[-1], made.gave.shape[-1]
            for start in range(0, all_of_it - width + 1, width) if all_of_it in (width, 3 * width) else ():
                if _close(made.gave[..., start : start + width], taker.given):
                    yield Channels(f"{made.path}@{made.number}", start, start + width), taker


def _queries_and_keys(
    values: Channels, taker: Call, calls: Sequence[Call]
) -> Iterator[tuple[Channels, Channels, Channels]]:
    """Queries, keys and values: thirds of one layer's output; or three layers with one input, or of one module."""
    path, _, number = values.tap.partition("@")
    made = next(c for c in calls if c.path == path and c.number == int(number))
    width = values.width
    if made.gave.shape[-1] == 3 * width:
        q, k = (Channels(values.tap, s, s + width) for s in (0, width, 2 * width) if s != values.start)
        yield q, k, values
        return
    others = [c for c in calls if c is not taker and c is not made and c.gave.shape == made.gave.shape]
    parent = path.rpartition(".")[0]
    shared = [c for c in others if c.given is made.given]
    siblings = [c for c in others if c.path.rpartition(".")[0] == parent and c.number == made.number]
    for found in (shared, siblings):
        if len(found) == 2:
            q, k = (Channels(f"{c.path}@{c.number}", 0, c.gave.shape[-1]) for c in found)
            yield q, k, values


def _seen(by_name: Mapping[tuple[str, int], Call], part: Channels) -> Tensor:
    path, _, number = part.tap.partition("@")
    x: Tensor = by_name[path, int(number)].gave
    return x[..., part.start : part.stop]


def _numbered(parts: Sequence[Channels], calls: Sequence[Call]) -> tuple[Channels, Channels, Channels]:
    """The parts with taps that say which call only where there are several."""
    many = {c.path for c in calls if c.number}
    names = [part.tap if part.tap.partition("@")[0] in many else part.tap.partition("@")[0] for part in parts]
    q, k, v = (part._replace(tap=name) for part, name in zip(parts, names, strict=True))
    return q, k, v


def _attended(q: Tensor, k: Tensor, v: Tensor, heads: int, visible: Tensor) -> Tensor | None:
    """``[B, L, D]`` values averaged by softmax(QK/sqrt(d))."""
    if any(x.shape[-1] % heads for x in (q, k, v)) or q.shape != k.shape:
        return None
    scores = attention_scores(q, k, heads).masked_fill(~visible[:, None, None, :], float("-inf"))
    split = v.float().unflatten(-1, (heads, -1)).transpose(1, 2)
    return (scores.softmax(-1) @ split).transpose(1, 2).flatten(2)


def attention_scores(queries: Tensor, keys: Tensor, heads: int) -> Tensor:
    """``[B, H, L, L]`` inner products over the root of a head's width, before any mask; float32 or more.

    Args:
        queries: ``[B, L, D]``, heads joined.
        keys: the same shape.
        heads: H, must divide D.
    """
    with torch.autocast(queries.device.type, enabled=False):
        q, k = (
            (x if x.dtype == torch.float64 else x.float()).unflatten(-1, (heads, -1)).transpose(1, 2)
            for x in (queries, keys)
        )
        return q @ k.mT / q.shape[-1] ** 0.5


def _uniform_attention(v: Tensor, visible: Tensor) -> Tensor:
    """``[N, D]`` what the tokens would take in if each saw all others alike."""
    mean = v.float().masked_fill(~visible.unsqueeze(-1), 0.0).sum(1) / visible.sum(1, keepdim=True).clamp(min=1)
    return mean.unsqueeze(1).expand(v.shape)[visible]


def _is_made(made: Tensor, seen: Tensor, uniform: Tensor) -> bool:
    """Whether attention is what was computed: to 1 % of how far it is from uniform, for a fresh model's is close."""
    scale, apart = seen.float().abs().max(), (seen.float() - uniform).abs().max()
    error = (made.float() - seen.float()).abs().max()
    return bool(error <= 0.01 * apart + CLOSE.get(seen.dtype, CLOSE_HALF) * scale)


def _close(made: Tensor, seen: Tensor) -> bool:
    error = (made.float() - seen.float()).abs().max()
    return bool(error <= CLOSE.get(seen.dtype, CLOSE_HALF) * seen.float().abs().max().clamp(min=1e-12))


def _first_token(batch: Batch) -> Batch:
    """The texts cut to their first token, which is there."""
    shape = seen_tokens(batch).shape
    assert isinstance(batch.inputs, dict)
    inputs = {name: x[:, :1] if x.shape[:2] == shape else x for name, x in batch.inputs.items()}
    if "attention_mask" in inputs:
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    return replace(batch, inputs=inputs, teacher_inputs=None)


# Which layer teaches which ----------------------------------------------------------------------------


def _uniform(students: int, teachers: int) -> list[int]:
    return [(2 * m * teachers + students) // (2 * students) for m in range(1, students + 1)]


def _last(students: int, teachers: int) -> list[int]:
    return [teachers - students + m for m in range(1, students + 1)]


LAYER_MAPS = {"uniform": _uniform, "skip": _uniform, "last": _last}
"""(number of the student's layers, of the teacher's) -> the teacher's layer for each of the student's, from 1."""


def check_layers(layers: str | Sequence[int | None], allowed: Sequence[str]) -> None:
    """Raise :class:`ConfigError` unless ``layers`` is a known map or a list of numbers."""
    if isinstance(layers, str):
        if layers not in allowed:
            raise ConfigError(
                f"layers={layers!r}", remedy=f"allowed: {', '.join(allowed)}, or a list such as [4, 8, 12]"
            )
    elif not layers or not all(n is None or (isinstance(n, int) and n >= 1) for n in layers):
        raise ConfigError(
            f"layers={list(layers)!r}",
            remedy="give the teacher's layer for each of the student's, counted from 1; null leaves one out",
        )


def mapped(
    layers: str | Sequence[int | None], student: Stack, teacher: Stack, *, but_last: bool = False
) -> list[tuple[int, int]]:
    """Pairs of layers of student and teacher, counted from 1.

    Args:
        layers: one of :data:`LAYER_MAPS`, or the teacher's layer for each of the student's.
        student: its layers.
        teacher: its layers.
        but_last: without the student's last layer.

    Raises:
        ModelError: a map that leads nowhere.
    """
    count, known = len(student.layers), len(teacher.layers)
    wanted = count - but_last
    if isinstance(layers, str):
        if layers == "last" and count > known:
            raise ModelError(
                f"layers: last, and the student has {count} layers, the teacher {known}",
                where="method.layers", remedy="list them",
            )  # fmt: skip
        listed: list[int | None] = [max(n, 1) for n in LAYER_MAPS[layers](count, known)[:wanted]]
    else:
        listed = list(layers)
        if len(listed) != wanted or any(n is not None and n > known for n in listed):
            what = f"{count} layers" + (", of which the last has no place here" if but_last else "")
            raise ModelError(
                f"layers {listed} for a student of {what}, and a teacher of {known}",
                where="method.layers",
                remedy=f"give {wanted} numbers from 1 to {known}, or null to leave one out",
            )
    pairs = [(m, n) for m, n in enumerate(listed, start=1) if n is not None]
    if not pairs:
        raise ModelError(
            f"no layer is left of a student of {count}" + (" but its last" if but_last else ""),
            where="method.layers", remedy="take a deeper student, or kind: logit",
        )  # fmt: skip
    return pairs
