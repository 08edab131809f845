"""How a model is called, and which part of its output is its scores."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, is_lazy

from tutelage.errors import ModelError, first_line, shorten
from tutelage.taps.heads import count_tokens

_NONE: Mapping[str, Any] = MappingProxyType({})
_READER = "_tutelage_output_reader"


@dataclass(frozen=True)
class OutputReader:
    """Which part of a model's output is its scores.

    Attributes:
        key: the key, attribute or position of the scores; an output without it is read as by :func:`logits_of`.
        form: ``scores`` ``[..., C]``; ``column``: one number for each row, ``[...]``; ``logit``: the log-odds of
            class 1 of two classes, ``[...]`` or ``[..., 1]``, which become the scores 0 and z.
        class_axis: the axis of the classes, which becomes the last one.
    """

    key: str | int | None = None
    form: Literal["scores", "column", "logit"] = "scores"
    class_axis: int = -1

    def read(self, output: Any) -> Tensor:
        """The scores ``[..., C]``; raises :class:`ModelError` if there are none."""
        value = None if self.key is None else _item(output, self.key)
        scores = value if isinstance(value, Tensor) else logits_of(output)
        if -scores.ndim <= self.class_axis < scores.ndim:
            scores = scores.movedim(self.class_axis, -1)
        if self.form == "column":
            return scores[..., None]
        if self.form == "logit":
            scores = scores if scores.ndim > 1 and scores.shape[-1] == 1 else scores[..., None]
            return torch.cat([torch.zeros_like(scores), scores], -1)
        return scores


def set_reader(model: nn.Module, reader: OutputReader) -> None:
    """Read this model's outputs, and those of its copies, by ``reader``."""
    model.__dict__[_READER] = reader


def reader_of(model: nn.Module) -> OutputReader:
    """How a model's outputs are read."""
    reader: OutputReader = model.__dict__.get(_READER, OutputReader())
    return reader


def scores_of(model: nn.Module, inputs: Tensor | Mapping[str, Tensor], options: Mapping[str, Any] = _NONE) -> Tensor:
    """The scores ``[..., C]`` of a model for inputs, without the padding of a vocabulary."""
    return reader_of(model).read(call_model(model, inputs, options))[..., : count_tokens(model)]


def copy_model(model: nn.Module) -> nn.Module:
    """A copy of a model, without ``torch.compile``; also of one with ``torch.nn.utils.weight_norm``, which keeps a
    computed tensor.

    Raises:
        ModelError: it cannot be copied.
    """
    computed = [
        x for m in model.modules() for x in vars(m).values() if isinstance(x, Tensor) and x.grad_fn is not None
    ]
    memo: dict[int, Any] = {id(x): x.detach().clone() for x in computed}
    memo |= {id(b): _uninitialised(b) for b in model.buffers() if is_lazy(b)}
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper: train.compile compiles the copy
    try:
        with torch.no_grad():  # else the parameters of a scripted copy are computed tensors
            copied = copy.deepcopy(model, memo)
    except (TypeError, RuntimeError, AttributeError, ValueError, NotImplementedError) as error:
        raise ModelError(
            f"a {type(model).__name__} cannot be copied: {shorten(first_line(error))}",
            remedy="give a function that makes the module, as in student=lambda: Net()",
        ) from error
    for mine, own in zip(copied.parameters(), model.parameters(), strict=True):
        if mine.requires_grad != own.requires_grad:
            mine.requires_grad_(own.requires_grad)
    return copied


def _uninitialised(buffer: Tensor) -> Tensor:
    new: Any = UninitializedBuffer
    tensor: Tensor = new(device=buffer.device, dtype=buffer.dtype)
    return tensor


def call_model(
    model: nn.Module,
    inputs: Tensor | Mapping[str, Tensor],
    options: Mapping[str, Any] = _NONE,
    call: Callable[..., Any] | None = None,
) -> Any:
    """The output of a model for a tensor, for keyword arguments, or for positional arguments.

    Args:
        model: the module.
        inputs: its arguments. Positional ones (:class:`tutelage.data.Arguments`) are passed one by one if the model's
            ``forward`` takes so many, and else as one tuple.
        options: more keyword arguments, for inputs that are keyword arguments.
        call: runs in place of the model.
    """
    call = model if call is None else call
    if not isinstance(inputs, Mapping):
        return call(inputs)
    if not getattr(inputs, "is_positional", False):
        return call(**{**inputs, **options})
    values = tuple(inputs.values())
    return call(*values) if _takes(model, len(values)) else call(values)


def _takes(model: nn.Module, count: int) -> bool:
    """Whether a model's ``forward`` takes so many positional arguments."""
    forward: Any = model.forward
    if isinstance(model, torch.jit.ScriptModule):
        return len(forward.schema.arguments) > count  # the first is the module
    try:
        inspect.signature(forward).bind(*range(count))
    except (TypeError, ValueError):
        return False
    return True


def _item(output: Any, key: str | int) -> Any:
    if isinstance(output, Mapping):
        return output.get(key)
    if isinstance(key, int):
        return output[key] if isinstance(output, (tuple, list)) and -len(output) <= key < len(output) else None
    return getattr(output, key, None)


def logits_of(output: Any) -> Tensor:
    """The logits of a model's output: a tensor, ``.logits``, or the first item of a tuple.

    Raises:
        ModelError: there is no tensor.
    """
    if isinstance(output, Tensor):
        return output
    logits = _item(output, "logits")
    if logits is None and isinstance(output, (tuple, list)) and output:
        logits = output[0]
    if not isinstance(logits, Tensor):
        keys = list(output) if isinstance(output, Mapping) else list(getattr(output, "__dict__", ()))
        tensors = [k for k in keys if isinstance(_item(output, k), Tensor)]
        named = f"; it has {shorten(', '.join(map(str, tensors)))}" if tensors else ""
        raise ModelError(
            f"the model returned a {type(output).__name__} without logits{named}",
            remedy=f"name its scores, as in outputs={tensors[0]!r}"
            if tensors
            else "return a tensor, a tuple that starts with it, or an object with .logits",
        )
    return logits
