"""The layers of a text model: its hidden states, queries, keys and values, found by two dry runs.

This works without a list of model families. Layers are the longest list of modules of one class that each return
``[B, L, D]``. Values are the output of a linear layer that attention returns unchanged for a text of one token.
Queries and keys are outputs of other linear layers of the same input. Whether softmax(QK/sqrt(d)) is the model's
attention is computed and compared.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tutelage.data.batch import Batch
from tutelage.errors import ModelError
from tutelage.methods.text_terms import non_padding
from tutelage.students import eval_no_grad
from tutelage.students.projectors import device_of
from tutelage.taps import Needs, observe

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-9}
"""Rounding error of a recomputed value, relative to the largest entry."""
TOLERANCE_HALF = 1e-2


class Channels(NamedTuple):
    """Some channels of a tap: queries, keys or values ``[B, L, width]``, heads joined."""

    tap: str
    start: int
    stop: int

    @property
    def width(self) -> int:
        """The number of channels."""
        return self.stop - self.start

    def of(self, hidden: Mapping[str, Tensor]) -> Tensor:
        """The channels of observed hidden states."""
        return hidden[self.tap][..., self.start : self.stop]


@dataclass(frozen=True)
class Attention:
    """The inputs of a layer's attention.

    Attributes:
        queries: before any rotation.
        keys: before any rotation.
        values: before the weighted mean.
        heads: their number; ``None`` if neither the model's config nor the dry run shows it.
        plain: whether attention is exactly softmax(QK/sqrt(d)) of these.
    """

    queries: Channels
    keys: Channels
    values: Channels
    heads: int | None
    plain: bool

    def scores(self, hidden: Mapping[str, Tensor]) -> Tensor:
        """``[B, H, L, L]`` attention scores of observed hidden states."""
        return attention_scores(self.queries.of(hidden), self.keys.of(hidden), self.heads or 1)


@dataclass(frozen=True)
class Layer:
    """A layer, with its call number if one module is several layers."""

    path: str
    call: int | None
    width: int

    @property
    def output(self) -> str:
        """The tap of its output hidden state."""
        return self.path if self.call is None else f"{self.path}@{self.call}"

    @property
    def input(self) -> str:
        """The tap of its input hidden state."""
        return f"{self.output}:input"


class Call(NamedTuple):
    """A module's call in a dry run."""

    path: str
    number: int
    began: int
    """The number of calls that had ended when it began."""
    is_linear: bool
    input: Tensor | None
    output: Any


@dataclass(frozen=True)
class LayerStack:
    """The layers of a model, in order."""

    who: str
    """``student`` or ``teacher``, for messages."""
    model: nn.Module
    example: Batch
    layers: tuple[Layer, ...]
    last: str
    """The tap of the last hidden state, after a final norm if the model has one."""

    @property
    def width(self) -> int:
        """Width of the hidden states."""
        return self.layers[0].width

    @property
    def embeddings(self) -> str:
        """The tap of the first layer's input."""
        return self.layers[0].input

    def attentions(self, numbers: Sequence[int]) -> list[Attention]:
        """The attention of some layers, counted from 1.

        Raises:
            ModelError: the queries, keys and values of a layer are not found.
        """
        calls = _record_calls(self.model, self.example)
        one_token = _record_calls(self.model, _first_tokens(self.example))
        return [self._attention(self.layers[n - 1], calls, one_token) for n in numbers]

    def _attention(self, layer: Layer, calls: list[Call], one_token: list[Call]) -> Attention:
        inner = _linear_calls(layer, one_token)
        candidates = [
            self._check_candidate(channels, consumer, calls)
            for values, consumer in _find_values(inner)
            for channels in _find_queries_and_keys(values, consumer, inner)
        ]
        if not candidates:
            raise ModelError(
                f"no queries, keys and values are found in the {self.who}'s layer {layer.path!r}",
                remedy="its attention does not use linear layers of one input, or mixes heads: pair modules by name, "
                "with kind: feature",
            )
        return next((one for one in candidates if one.plain), candidates[0])

    def _check_candidate(self, channels: tuple[Channels, Channels, Channels], consumer: Call, calls: list[Call]
    ) -> Attention:  # fmt: skip
        """The attention of queries, keys and values; plain if it reproduces the input of ``consumer``."""
        by_name = {(c.path, c.number): c for c in calls}
        q, k, v = (_output_channels(by_name, one) for one in channels)
        context = by_name[consumer.path, consumer.number].input
        assert context is not None
        configured = getattr(getattr(self.model, "config", None), "num_attention_heads", None)
        known = configured if isinstance(configured, int) else None
        heads = [h for h in range(1, v.shape[-1] + 1) if v.shape[-1] % h == 0] if known is None else [known]
        visible = non_padding(self.example).to(v.device)
        queries, keys, values = _with_call_numbers(channels, calls)
        for h in heads:
            for swapped in (False, True):
                if _is_attention(*((k, q) if swapped else (q, k)), v, h, visible, context):
                    first, second = (keys, queries) if swapped else (queries, keys)
                    return Attention(first, second, values, h, plain=True)
        return Attention(queries, keys, values, known, plain=False)


def find_layers(who: str, model: nn.Module, example: Batch) -> LayerStack:
    """The layers of a text model.

    Args:
        who: ``student`` or ``teacher``, for messages.
        model: runs once, in evaluation mode.
        example: a few texts, as the model reads them.

    Raises:
        CapabilityError: the example contains no texts.
        ModelError: no list of modules that return hidden states, or several models in one.
    """
    if getattr(model, "many", False):
        raise ModelError(
            f"the {who} is an ensemble, and this method needs the layers of one model",
            remedy="take one teacher, or kind: logit",
        )
    shape = non_padding(example).shape
    calls = _record_calls(model, example)
    stacks = []
    for path, module in model.named_modules():
        members = list(module.children()) if isinstance(module, (nn.ModuleList, nn.Sequential)) else []
        if not members or len({type(m) for m in members}) != 1 or not any(True for _ in members[0].children()):
            continue
        names = {f"{path}.{name}" if path else name for name, _ in module.named_children()}
        of_members = [c for c in calls if c.path in names]
        states = [_first_tensor(c.output) for c in of_members]
        if states and all(x is not None and x.ndim == 3 and x.shape[:2] == shape for x in states):
            widths = {x.shape[-1] for x in states if x is not None}
            if len(widths) == 1:
                stacks.append((path, of_members, widths.pop()))
    outer = [s for s in stacks if not any(s[0].startswith(f"{o[0]}.") or not o[0] for o in stacks if o is not s)]
    if not outer:
        raise ModelError(
            f"no layers are found in the {who}, {type(model).__name__}",
            remedy="it has no list of modules of one class that each return [B, L, D]: pair modules by name, with "
            "kind: feature",
        )
    path, of_members, width = max(outer, key=lambda stack: len(stack[1]))
    repeated = {c.path for c in of_members if c.number}
    layers = tuple(Layer(c.path, c.number if c.path in repeated else None, width) for c in of_members)
    return LayerStack(who, model, example, layers, _last_state(calls, path, layers, width))


def find_both_layers(student: nn.Module, teacher: nn.Module | None, example: Batch) -> tuple[LayerStack, LayerStack]:
    """The layers of student and teacher; raises as :func:`find_layers`."""
    assert teacher is not None
    return find_layers("student", student, example), find_layers("teacher", teacher, example.for_teacher())


def _last_state(calls: Sequence[Call], path: str, layers: Sequence[Layer], width: int) -> str:
    """The tap of the outermost module around the layers whose output is still a hidden state."""
    outputs = {c.path: c.output for c in calls}
    for name in (".".join(path.split(".")[:n]) for n in range(path.count(".") + 1)):
        output = outputs.get(name)
        state = _first_tensor(output)
        # the output of a bare model is its last hidden state, and no logits
        is_bare = isinstance(output, Mapping) and "last_hidden_state" in output
        if state is not None and state.ndim == 3 and state.shape[-1] == width and (name or is_bare):
            return f"{name}[0]" if isinstance(output, Mapping) else name
    return layers[-1].output


def check_plain_attention(stack: LayerStack, number: int, attention: Attention, setting: str) -> None:
    """Raise :class:`ModelError` unless the attention of layer ``number`` is exactly softmax(QK/sqrt(d)).

    ``setting`` is the option that avoids the comparison, for the message.
    """
    if not attention.plain:
        raise ModelError(
            f"attention in layer {number} of the {stack.who}, {type(stack.model).__name__}, is not "
            "softmax(QK/sqrt(d)) of its queries and keys alone: it has rotary or relative positions, or a window",
            where="method", remedy=f"set {setting}",
        )  # fmt: skip


def _record_calls(model: nn.Module, example: Batch) -> list[Call]:
    """Every module's calls, ordered by their end, with the first input tensor and the output of each."""
    calls: list[Call] = []
    numbers: dict[str, int] = {}
    running: list[tuple[str, int, int, Tensor | None]] = []
    handles = []

    def record(path: str, module: nn.Module) -> None:
        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            numbers[path] = numbers.get(path, -1) + 1
            first = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
            running.append((path, numbers[path], len(calls), first))

        def after(_: nn.Module, args: Any, output: Any) -> None:
            name, number, began, first = running.pop()
            calls.append(Call(name, number, began, isinstance(module, nn.Linear), first, output))

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))

    for path, module in model.named_modules():
        record(path, module)
    try:
        with eval_no_grad(model):
            observe(model, example.to(device_of(model)).inputs, Needs(logits=False))
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _first_tensor(output: Any) -> Tensor | None:
    """The first tensor of a module's output."""
    if isinstance(output, Mapping):
        output = tuple(output.values())
    values = output if isinstance(output, (tuple, list)) else (output,)
    return next((x for x in values if isinstance(x, Tensor)), None)


def _linear_calls(layer: Layer, calls: Sequence[Call]) -> list[Call]:
    """The calls of linear layers inside a layer's call."""
    end = next(i for i, c in enumerate(calls) if c.path == layer.path and c.number == (layer.call or 0))
    inside = calls[calls[end].began : end]
    return [c for c in inside if c.is_linear and c.input is not None and c.output.ndim == 3]


def _find_values(calls: Sequence[Call]) -> Iterator[tuple[Channels, Call]]:
    """The values, and the call whose input they are: for a text of one token attention does not change them."""
    for i, producer in enumerate(calls):
        for consumer in calls[i + 1 :]:
            if consumer.input is None or consumer.input.ndim != 3:
                continue
            width, total = consumer.input.shape[-1], producer.output.shape[-1]
            for start in range(0, total - width + 1, width) if total in (width, 3 * width) else ():
                x = consumer.input.float()
                error = (producer.output[..., start : start + width].float() - x).abs().max()
                tolerance = TOLERANCE.get(consumer.input.dtype, TOLERANCE_HALF)
                if error <= tolerance * x.abs().max().clamp(min=1e-12):
                    yield Channels(f"{producer.path}@{producer.number}", start, start + width), consumer


def _find_queries_and_keys(
    values: Channels, consumer: Call, calls: Sequence[Call]
) -> Iterator[tuple[Channels, Channels, Channels]]:
    """Queries, keys and values: thirds of one layer's output; or three layers of one input, or of one module."""
    path, _, number = values.tap.partition("@")
    producer = next(c for c in calls if c.path == path and c.number == int(number))
    width = values.width
    if producer.output.shape[-1] == 3 * width:
        q, k = (Channels(values.tap, s, s + width) for s in (0, width, 2 * width) if s != values.start)
        yield q, k, values
        return
    others = [c for c in calls if c is not consumer and c is not producer and c.output.shape == producer.output.shape]
    parent = path.rpartition(".")[0]
    same_input = [c for c in others if c.input is producer.input]
    siblings = [c for c in others if c.path.rpartition(".")[0] == parent and c.number == producer.number]
    for group in (same_input, siblings):
        if len(group) == 2:
            q, k = (Channels(f"{c.path}@{c.number}", 0, c.output.shape[-1]) for c in group)
            yield q, k, values


def _output_channels(by_name: Mapping[tuple[str, int], Call], channels: Channels) -> Tensor:
    path, _, number = channels.tap.partition("@")
    x: Tensor = by_name[path, int(number)].output
    return x[..., channels.start : channels.stop]


def _with_call_numbers(channels: Sequence[Channels], calls: Sequence[Call]) -> tuple[Channels, Channels, Channels]:
    """The channels, whose taps have a call number only if their module has several calls."""
    repeated = {c.path for c in calls if c.number}
    paths = [one.tap.partition("@")[0] for one in channels]
    q, k, v = (one if path in repeated else one._replace(tap=path) for one, path in zip(channels, paths, strict=True))
    return q, k, v


def _is_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, visible: Tensor, context: Tensor) -> bool:
    """Whether ``context`` is softmax(QK/sqrt(d))V, to 1 % of its distance from uniform attention."""
    if any(x.shape[-1] % heads for x in (q, k, v)) or q.shape != k.shape:
        return False
    scores = attention_scores(q, k, heads).masked_fill(~visible[:, None, None, :], float("-inf"))
    split = v.float().unflatten(-1, (heads, -1)).transpose(1, 2)
    result = (scores.softmax(-1) @ split).transpose(1, 2).flatten(2)[visible].float()
    mean = v.float().masked_fill(~visible.unsqueeze(-1), 0.0).sum(1) / visible.sum(1, keepdim=True).clamp(min=1)
    uniform, context = mean.unsqueeze(1).expand(v.shape)[visible], context[visible]
    scale, distance = context.float().abs().max(), (context.float() - uniform).abs().max()
    error = (result - context.float()).abs().max()
    return bool(error <= 0.01 * distance + TOLERANCE.get(context.dtype, TOLERANCE_HALF) * scale)


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


def _first_tokens(batch: Batch) -> Batch:
    """The texts cut to their first token."""
    shape = non_padding(batch).shape
    assert isinstance(batch.inputs, dict)
    inputs = {name: x[:, :1] if x.shape[:2] == shape else x for name, x in batch.inputs.items()}
    if "attention_mask" in inputs:
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    return replace(batch, inputs=inputs, teacher_inputs=None)


def map_layers(
    layers: str | Sequence[int | None], student: LayerStack, teacher: LayerStack, *, exclude_last: bool = False
) -> list[tuple[int, int]]:
    """Pairs of layers of student and teacher, counted from 1.

    Args:
        layers: ``uniform`` or ``skip``: m N / M, rounded, for layer m of M; ``last``: the last M of N; or the
            teacher's layer for each of the student's.
        student: its layers.
        teacher: its layers.
        exclude_last: without the student's last layer.

    Raises:
        ModelError: the map does not fit the numbers of layers.
    """
    students, teachers = len(student.layers), len(teacher.layers)
    length = students - exclude_last
    if isinstance(layers, str):
        if layers == "last" and students > teachers:
            raise ModelError(
                f"layers: last, and the student has {students} layers, the teacher {teachers}",
                where="method.layers", remedy="list them",
            )  # fmt: skip
        last = layers == "last"
        listed: list[int | None] = [
            max(teachers - students + m if last else (2 * m * teachers + students) // (2 * students), 1)
            for m in range(1, length + 1)
        ]
    else:
        listed = list(layers)
        if len(listed) != length or any(n is not None and n > teachers for n in listed):
            what = f"{students} layers" + (", of which the last is excluded" if exclude_last else "")
            raise ModelError(
                f"layers {listed} for a student of {what}, and a teacher of {teachers}",
                where="method.layers",
                remedy=f"give {length} numbers from 1 to {teachers}, or null to leave one out",
            )
    pairs = [(m, n) for m, n in enumerate(listed, start=1) if n is not None]
    if not pairs:
        raise ModelError(
            f"no layer is left of a student of {students}" + (" without its last" if exclude_last else ""),
            where="method.layers", remedy="take a deeper student, or kind: logit",
        )  # fmt: skip
    return pairs
