"""Modules of the caller: lazy parameters get their shapes, and the scores are found in the output."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from tutelage.data.batch import Arguments, Batch
from tutelage.errors import CapabilityError, ModelError
from tutelage.students.projectors import device_of, eval_no_grad
from tutelage.taps import OutputReader, call_model, reader_of, set_reader


def prepare_outputs(
    model: nn.Module, example: Batch, outputs: str | int | None = None, class_axis: int | None = None
) -> nn.Module:
    """``model``, with the shapes of its lazy parameters and a note of how its output is read; run once.

    Args:
        model: changed in place.
        example: a few samples.
        outputs: the key, attribute or position of the scores in the output; a model without it is read as always.
        class_axis: the axis of the classes in the scores. Default: the one that leaves the shape of the labels.

    Raises:
        ModelError: a lazy module does not take the example.
        CapabilityError: the classes can be on two axes.
    """
    lazy = any(is_lazy(x) for x in (*model.parameters(), *model.buffers()))
    inputs = example.to("cpu" if lazy else device_of(model)).inputs
    try:
        with eval_no_grad(model), torch.random.fork_rng(devices=[], enabled=not lazy):
            output = call_model(model, inputs)
    except Exception as error:
        if lazy:
            raise ModelError(
                f"the lazy {type(model).__name__} does not take the data: {error}",
                remedy="make model and data agree in shapes and input names",
            ) from error
        return model  # the checks of an experiment run it again and tell what is wrong
    is_transformers = callable(getattr(getattr(model, "config", None), "to_dict", None))
    axis = -1 if class_axis is None and is_transformers else class_axis
    set_reader(model, _reader(OutputReader(outputs), output, example, axis))
    return model


def find_class_axis(scores: torch.Size, labels: torch.Size) -> int:
    """The axis without which the scores have the shape of the labels: 1, or -1 for the last one or none.

    Torch's ``cross_entropy`` has the classes on axis 1, models of transformers have them on the last axis.

    Raises:
        CapabilityError: both have.
    """
    if len(scores) < 3 or labels != (scores[0], *scores[2:]):
        return -1
    if labels == scores[:-1]:
        raise CapabilityError(
            f"scores are {tuple(scores)}, labels {tuple(labels)}: the classes can be on axis 1 or on the last",
            remedy="give class_axis=1, as for torch's cross_entropy, or class_axis=-1",
        )
    return 1


def _reader(reader: OutputReader, output: Any, example: Batch, class_axis: int | None) -> OutputReader:
    """``reader`` for the axis of the classes, or for one number in a row, if the model gives that."""
    try:
        shape = reader.read(output).shape
    except ModelError:
        return reader
    labels = example.labels.shape
    axis = find_class_axis(shape, labels) if class_axis is None and example.task == "classes" else class_axis
    reader = replace(reader, class_axis=-1 if axis is None else axis)
    shape = reader.read(output).shape
    if example.task == "classes" and (shape == (*labels, 1) or (shape == labels and len(labels) == 1)):
        return replace(reader, form="logit")
    return replace(reader, form="column") if shape == labels and example.targets is not None else reader


@dataclass(frozen=True)
class SplitInputs:
    """Converts batches of named inputs of which each model takes its own; see :func:`split_inputs`."""

    to_batch: Callable[[Any], Batch]
    student: frozenset[str]
    teacher: frozenset[str]

    def __call__(self, raw: Any) -> Batch:
        """The batch, with what only the teacher takes in ``teacher_inputs``."""
        batch = self.to_batch(raw)
        if not isinstance(batch.inputs, dict) or batch.teacher_inputs is not None:
            return batch
        own, theirs = (
            {k: v for k, v in batch.inputs.items() if k not in names} for names in (self.teacher, self.student)
        )
        return replace(batch, inputs=own, teacher_inputs=theirs)


def split_inputs(
    to_batch: Callable[[Any], Batch], example: Batch, student: nn.Module, teacher: nn.Module | None
) -> Callable[[Any], Batch]:
    """``to_batch``, or a conversion that gives named inputs of one model's ``forward`` alone to that model alone.

    A name that neither model takes is left to both, whose errors name it.

    Args:
        to_batch: converts what a loader yields.
        example: a batch that it returned.
        student: any module.
        teacher: any module; ``None`` for no teacher in this process.
    """
    names = example.inputs
    if (
        teacher is None
        or not isinstance(names, dict)
        or isinstance(names, Arguments)
        or example.teacher_inputs is not None
    ):
        return to_batch
    own, theirs = arguments_of(student), arguments_of(teacher)
    only_own = frozenset(k for k in names if theirs is not None and k not in theirs and (own is None or k in own))
    only_theirs = frozenset(k for k in names if own is not None and k not in own and (theirs is None or k in theirs))
    return SplitInputs(to_batch, only_own, only_theirs) if only_own or only_theirs else to_batch


def arguments_of(model: nn.Module) -> frozenset[str] | None:
    """The names that a model's ``forward`` takes; ``None`` for any."""
    try:
        given = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return None
    return None if any(p.kind is p.VAR_KEYWORD for p in given) else frozenset(p.name for p in given)


def gives_one_score(model: nn.Module) -> bool:
    """Whether a model gives one number for two classes."""
    return reader_of(model).form == "logit"
