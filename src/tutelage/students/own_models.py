"""Modules of the caller: lazy parameters get their shapes, and the scores are found in the output."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from tutelage.data.batch import Batch
from tutelage.errors import ModelError
from tutelage.students.projectors import device_of, eval_no_grad
from tutelage.taps import OutputReader, call_model, reader_of, set_reader


def prepare_outputs(model: nn.Module, example: Batch, outputs: str | int | None = None) -> nn.Module:
    """``model``, with the shapes of its lazy parameters and a note of how its output is read; run once.

    Args:
        model: changed in place.
        example: a few samples.
        outputs: the key, attribute or position of the scores in the output; a model without it is read as always.

    Raises:
        ModelError: a lazy module does not take the example.
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
    set_reader(model, _reader(OutputReader(outputs), output, example))
    return model


def _reader(reader: OutputReader, output: Any, example: Batch) -> OutputReader:
    """``reader`` for one number in a row, where that is what the model gives."""
    try:
        shape = reader.read(output).shape
    except ModelError:
        return reader
    labels = example.labels.shape
    if example.task == "classes" and (shape == (*labels, 1) or (shape == labels and len(labels) == 1)):
        return replace(reader, form="logit")
    return replace(reader, form="column") if shape == labels and example.targets is not None else reader


def gives_one_score(model: nn.Module) -> bool:
    """Whether a model gives one number for two classes."""
    return reader_of(model).form == "logit"
