"""Teachers that are no torch modules: functions, programs, ONNX sessions, estimators, stored probabilities."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tutelage.errors import ModelError, shorten

FLOOR = -1e4
"""The log-probability of an impossible class: its softmax is 0 at any temperature below 100."""


class FunctionModel(nn.Module):
    """A function of a model's inputs as a module without parameters.

    Args:
        function: takes tensors, as a module of the same data would, and returns scores, a tensor or an array.
        name: of what it stands for, for messages.
        digest: changes whenever the function does; ``None``: unknown, so its outputs cannot be cached.
    """

    def __init__(self, function: Callable[..., Any], name: str = "function", digest: str | None = None) -> None:
        super().__init__()
        self._function = (function,)  # in a tuple, a module does not become a part with modes and parameters
        self.name, self.digest = name, digest

    def __deepcopy__(self, memo: dict[int, Any]) -> FunctionModel:
        return FunctionModel(*self._function, self.name, self.digest)

    def forward(self, *inputs: Tensor, **named: Tensor) -> Any:
        """What the function returns; arrays become tensors on the inputs' device, in float32."""
        output = self._function[0](*inputs, **named)
        if isinstance(output, (np.ndarray, list)):
            device = next(x.device for x in (*inputs, *named.values()) if isinstance(x, Tensor))
            output = torch.as_tensor(np.asarray(output), dtype=torch.float32).to(device)
        return output


class StoredProbabilities(nn.Module):
    """A teacher whose class probabilities come with the data.

    A batch has them in ``teacher_inputs``; in a mapping, :func:`tutelage.data.as_batch` finds them under the key
    ``teacher_probabilities``, ``[B, C]``.
    """

    tasks = ("classes",)

    def forward(self, probabilities: Tensor) -> Tensor:
        """Log-probabilities ``[B, C]``.

        Raises:
            ModelError: rows that are no probabilities.
        """
        return log_probabilities(probabilities)


def log_probabilities(probabilities: Tensor) -> Tensor:
    """Scores whose softmax is ``probabilities``, ``[..., C]``; raises :class:`ModelError` if these are none."""
    p = probabilities.float()
    if bool((p < 0).any()) or not bool(((p.sum(-1) - 1).abs() < 1e-2).all()):
        raise ModelError(
            f"a row of the teacher's probabilities is {shorten([round(v, 4) for v in _worst(p).tolist()])}",
            remedy="give numbers from 0 to 1 that sum to 1 in each row; for logits use softmax first",
        )
    return p.log().clamp(min=FLOOR)


def _worst(p: Tensor) -> Tensor:
    rows = p.flatten(0, -2)
    return rows[int(((rows < 0).any(-1) * 2 + (rows.sum(-1) - 1).abs().nan_to_num(9.0)).argmax())]


def as_model(teacher: Any) -> nn.Module:
    """A teacher as a module: a module as it is, anything else wrapped.

    Takes a function, a program of ``torch.export``, an ``onnxruntime.InferenceSession``, and an estimator with
    ``predict_proba`` or ``predict``.

    Raises:
        ModelError: something else.
    """
    if isinstance(teacher, nn.Module):
        # The module of an exported program has no modes.
        exported = isinstance(teacher, torch.fx.GraphModule) and hasattr(teacher, "_guards_fn")
        return FunctionModel(teacher, "exported program") if exported else teacher
    if isinstance(teacher, torch.export.ExportedProgram):
        return FunctionModel(teacher.module(), "exported program")
    if hasattr(teacher, "get_inputs") and hasattr(teacher, "run"):
        return from_onnx(teacher)
    if hasattr(teacher, "predict_proba") or (hasattr(teacher, "predict") and hasattr(teacher, "fit")):
        return from_estimator(teacher)
    if callable(teacher) and not isinstance(teacher, type):
        return FunctionModel(teacher, getattr(teacher, "__name__", type(teacher).__name__))
    raise ModelError(
        f"the teacher is of type {type(teacher).__name__}, which is not supported",
        remedy="give a torch.nn.Module, a function of a batch's inputs, an onnxruntime.InferenceSession, a fitted "
        "estimator with predict_proba, or a list of modules",
    )


def from_onnx(session: Any, output: str | None = None) -> FunctionModel:
    """An ONNX model as a teacher.

    Args:
        session: an ``onnxruntime.InferenceSession``.
        output: the name of the scores. Default: ``logits``, or the only output.

    Raises:
        ModelError: several outputs, and none is chosen.
    """
    names = [one.name for one in session.get_outputs()]
    output = output or ("logits" if "logits" in names else names[0] if len(names) == 1 else None)
    if output not in names:
        raise ModelError(
            f"the output with the scores is unknown; the ONNX model has: {shorten(', '.join(names))}",
            remedy=f"choose the scores: tutelage.teachers.from_onnx(session, output={names[-1]!r})",
        )
    inputs = session.get_inputs()
    kinds = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16,
             "tensor(int64)": np.int64, "tensor(int32)": np.int32}  # fmt: skip

    def run(*values: Tensor, **named: Tensor) -> Any:
        given = {one.name: x for one, x in zip(inputs, values, strict=False)} | named
        missing = [one.name for one in inputs if one.name not in given]
        if missing:
            raise ModelError(
                f"the ONNX model needs the input {shorten(missing[0])}",
                remedy="name the data's inputs like the model's",
            )
        feed = {one.name: given[one.name].detach().cpu().numpy() for one in inputs}
        feed = {one.name: feed[one.name].astype(kinds.get(one.type, feed[one.name].dtype)) for one in inputs}
        return session.run([output], feed)[0]

    return FunctionModel(run, "ONNX model")


def from_estimator(estimator: Any, classes: Sequence[Any] | None = None) -> FunctionModel:
    """A fitted estimator, such as one of scikit-learn, XGBoost or LightGBM, as a teacher.

    A classifier gives the log of ``predict_proba``, a regressor ``predict``. The estimator gets one row of numbers
    for each sample; several inputs become columns, one after the other, and names become the columns of a data frame
    if the estimator knows names.

    Args:
        estimator: fitted.
        classes: the estimator's classes in the order of the label indices. Default: the classes are these indices.

    Raises:
        ModelError: it has no probabilities, or classes that are no indices.
    """
    proba = getattr(estimator, "predict_proba", None)
    if not callable(proba) and hasattr(estimator, "decision_function"):
        raise ModelError(
            f"{type(estimator).__name__} has no predict_proba",
            remedy="fit sklearn.calibration.CalibratedClassifierCV around it, which gives probabilities",
        )
    own = list(getattr(estimator, "classes_", ())) if callable(proba) else []
    several = bool(own) and isinstance(own[0], np.ndarray)
    columns = _columns(estimator, own, classes) if own and not several else None

    def run(*values: Any, **named: Tensor) -> Any:
        table = _table(estimator, values, named)
        expected = getattr(estimator, "n_features_in_", table.shape[1])
        if table.shape[1] != expected:
            given, name = table.shape[1], type(estimator).__name__
            raise ModelError(
                f"{name} was fitted on rows of {expected} numbers, but a row of the batch has {given}",
                remedy="give all samples that size, or use a function as teacher that makes such rows",
            )
        if not callable(proba):
            return np.asarray(estimator.predict(table), dtype=np.float32).reshape(len(table), -1)
        p = proba(table)
        if isinstance(p, list):  # one table for each of several labels
            p = np.stack([np.asarray(one)[:, -1] for one in p], 1)
            return np.log(p.clip(1e-38)) - np.log((1 - p).clip(1e-38))
        if columns is not None:
            full = np.zeros((len(p), columns[1]))
            full[:, columns[0]] = p
            p = full
        return log_probabilities(torch.from_numpy(np.ascontiguousarray(p))).numpy()

    return FunctionModel(run, type(estimator).__name__, _digest(estimator))


def _columns(estimator: Any, own: list[Any], classes: Sequence[Any] | None) -> tuple[list[int], int]:
    """The label index of each of an estimator's columns, and the number of classes."""
    if classes is not None:
        order = list(classes)
        unknown = [c for c in own if c not in order]
        if unknown:
            raise ModelError(
                f"{type(estimator).__name__} has a class {shorten(unknown[0])} that is not in classes",
                remedy=f"give all of {shorten(', '.join(map(str, own)))}",
            )
        return [order.index(c) for c in own], len(order)
    if not all(isinstance(c, (int, np.integer)) and c >= 0 for c in own):
        raise ModelError(
            f"the classes of {type(estimator).__name__} are {shorten(', '.join(map(str, own)))}, not label indices",
            remedy="use tutelage.teachers.from_estimator(estimator, classes=[...]), in the order of the labels",
        )
    return [int(c) for c in own], int(max(own)) + 1


def _table(estimator: Any, values: tuple[Any, ...], named: Mapping[str, Tensor]) -> Any:
    """The rows of numbers that an estimator gets."""
    known = getattr(estimator, "feature_names_in_", None)
    if named and known is not None and set(known) <= set(named):
        named = {name: named[name] for name in known}
    values = values[0] if len(values) == 1 and isinstance(values[0], tuple) else values
    parts = [x.detach().cpu().numpy() for x in (*values, *named.values())]
    table = np.concatenate([x.reshape(len(x), -1) for x in parts], 1)
    if known is None or len(known) != table.shape[1]:
        return table
    import pandas as pd  # type: ignore[import-untyped]  # the estimator was fitted on a frame

    return pd.DataFrame(table, columns=known)


def _digest(estimator: Any) -> str | None:
    try:
        return hashlib.sha256(pickle.dumps(estimator)).hexdigest()[:16]
    except (pickle.PicklingError, TypeError, AttributeError):
        return None
