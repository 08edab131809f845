"""Batches that are tuples whose positions the user names."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from tutelage.data.batch import Batch
from tutelage.errors import CapabilityError, ConfigError, DataError, shorten

LABELS = ("y", "label", "labels", "target", "targets")
IDS = ("id", "ids")
UNUSED = "_"
NOT_INPUTS = (*LABELS, *IDS, UNUSED)


@dataclass(frozen=True)
class NamedPositions:
    """Converts tuples of tensors to batches by the names of their positions; see :func:`name_positions`.

    Attributes:
        names: of the positions.
        to_batch: converts ``(inputs, labels)``, or a mapping of keyword arguments with a key ``labels``.
        student: the student's argument for each input that it takes.
        teacher: the teacher's; ``None``: the same as the student's.
    """

    names: tuple[str, ...]
    to_batch: Callable[[Any], Batch]
    student: Mapping[str, str]
    teacher: Mapping[str, str] | None = None

    def __call__(self, raw: Any) -> Batch:
        """The batch of a tuple or list."""
        if not isinstance(raw, (tuple, list)) or len(raw) != len(self.names):
            given = f"{type(raw).__name__} of {len(raw)}" if isinstance(raw, (tuple, list)) else type(raw).__name__
            raise DataError(
                f"batch={self.names} names {len(self.names)} positions, but the loader yields a {given}",
                remedy="name each position of the loader's tuples; use '_' for a position that is not used",
            )
        values = dict(zip(self.names, raw, strict=True))
        labels = next((values[name] for name in self.names if name in LABELS), None)
        batch = self._convert(values, self.student, labels)
        for name in set(self.names) & set(IDS):
            batch = replace(batch, ids=torch.as_tensor(values[name]).long())
        if self.teacher is not None:
            batch = replace(batch, teacher_inputs=self._convert(values, self.teacher, labels).inputs)
        return batch

    def _convert(self, values: Mapping[str, Any], arguments: Mapping[str, str], labels: Any) -> Batch:
        has = {} if labels is None else {"labels": labels}
        if len(arguments) > 1:
            return self.to_batch({argument: values[name] for name, argument in arguments.items()} | has)
        return self.to_batch((*(values[name] for name in arguments), *has.values()))

    def notes(self) -> list[str]:
        """A sentence for each model that does not get all inputs."""
        sentences = []
        for who, arguments in (("student", self.student), ("teacher", self.teacher or self.student)):
            if left := [name for name in self.names if name not in (*NOT_INPUTS, *arguments)]:
                own = ", ".join(arguments)
                sentences.append(f"batch: the {who} takes {own}; {', '.join(left)} is not passed to it")
        return sentences


def name_positions(
    names: Sequence[str], to_batch: Callable[[Any], Batch], student: nn.Module, teachers: Sequence[Any] = ()
) -> NamedPositions:
    """The conversion of tuples whose positions have ``names``.

    ``y``, ``label``, ``labels``, ``target`` or ``targets`` are the labels, ``id`` or ``ids`` the sample ids, ``_`` is
    not used. The others are inputs. A model gets those that its ``forward`` has as arguments; if it has other
    names, it gets them in this order.

    Args:
        names: one for each position.
        to_batch: converts ``(inputs, labels)``, or a mapping of keyword arguments with a key ``labels``.
        student: takes the inputs.
        teachers: take the same inputs as each other.

    Raises:
        ConfigError: the names are no names, or are ambiguous.
        CapabilityError: a model takes other inputs.
    """
    given = tuple(names) if isinstance(names, (tuple, list)) else ()
    once = [name for name in given if name != UNUSED]
    if not given or not all(isinstance(name, str) for name in given) or len(set(once)) != len(once):
        raise ConfigError(
            f"batch={shorten(names)} is not a list of different names",
            remedy="name each position of the loader's tuples, as in ('x', 'length', 'y')",
        )
    inputs = [name for name in given if name not in NOT_INPUTS]
    for kind, named in (("labels", [n for n in given if n in LABELS]), ("ids", [n for n in given if n in IDS])):
        if len(named) > 1:
            raise ConfigError(f"batch={given}: both {' and '.join(named)} are {kind}", remedy="rename one of them")
    if not inputs:
        raise ConfigError(f"batch={given} names no input", remedy="name the input too, as in ('x', 'y')")
    own = _arguments(inputs, student, "student")
    theirs = [_arguments(inputs, teacher, "teacher") for teacher in teachers if isinstance(teacher, nn.Module)]
    if any(one != theirs[0] for one in theirs):
        raise CapabilityError(
            f"the teachers take different inputs of batch={given}", remedy="use teachers with the same inputs"
        )
    return NamedPositions(given, to_batch, own, theirs[0] if theirs and theirs[0] != own else None)


def _arguments(inputs: Sequence[str], model: nn.Module, who: str) -> dict[str, str]:
    """The argument of ``forward`` for each input that a model takes."""
    try:
        signature = inspect.signature(getattr(model, "_orig_mod", model).forward)
    except (TypeError, ValueError):
        return {name: name for name in inputs}
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    own = [p for p in signature.parameters.values() if p.kind not in variable]
    required = [p.name for p in own if p.default is p.empty]
    named = {name: name for name in inputs if any(p.name == name for p in own)}
    if any(p.kind in variable for p in signature.parameters.values()):
        return {name: name for name in inputs}
    if set(required) <= set(named) and named:
        return named
    in_order = dict(zip(inputs, [p.name for p in own], strict=False))
    if len(required) <= len(inputs) and all(in_order.get(name) == name for name in named):
        return in_order
    raise CapabilityError(
        f"the {who}, a {type(model).__name__}, takes {', '.join(p.name for p in own) or 'no input'}, "
        f"but batch= names {', '.join(inputs)}",
        remedy="use the names of the arguments of forward, or pass to_batch=, a function that makes a Batch",
    )
