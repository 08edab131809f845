"""Teachers of many kinds, and their scores by hand."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.multioutput import MultiOutputClassifier
from torch import Tensor, nn

from support.matrix_loaders import (
    WEIGHT,
    WIDTH,
    Loader,
    front,
    labels,
)
from tutelage.teachers import StoredProbabilities


@dataclass
class Teacher:
    """What ``distill`` gets as a teacher, and its scores for each batch, by hand."""

    given: Any
    scores: list[Tensor]


def count_outputs(task: str) -> int:
    return 1 if task == "regression" else 2


class Linear(nn.Module):
    """The teacher's module, right on every label."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(WEIGHT[:outputs].clone())
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        out: Tensor = self.dropout(front(x, lengths)) @ self.weight.t()
        return out


def linear(data: Loader) -> tuple[Linear, list[Tensor]]:
    model = Linear(count_outputs(data.task)).requires_grad_(False).eval()
    return model, [model(**inputs) for inputs, _ in data.plain]


def of_module(change: Callable[[Linear], Any]) -> Callable[[Loader], Teacher]:
    def make(data: Loader) -> Teacher:
        model, scores = linear(data)
        return Teacher(change(model), scores)

    return make


def training_mode(model: Linear) -> nn.Module:
    return copy.deepcopy(model).requires_grad_().train()


def script(model: Linear) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(copy.deepcopy(model))


def export(data: Loader) -> tuple[Any, list[Tensor]]:
    model, scores = linear(data)
    inputs = data.plain[0][0]
    rows = torch.export.Dim("rows", min=1)
    shapes: dict[str, Any] = {name: {0: rows} for name in inputs}
    if inputs["x"].ndim == 3:
        shapes["x"] = {0: rows, 1: torch.export.Dim("length", min=1)}
    given = {"args": (), "kwargs": inputs} if data.keywords else {"args": tuple(inputs.values()), "kwargs": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(model, **given, dynamic_shapes=shapes), scores


def exported(change: Callable[[Any], Any]) -> Callable[[Loader], Teacher]:
    def make(data: Loader) -> Teacher:
        program, scores = export(data)
        return Teacher(change(program), scores)

    return make


def onnx(data: Loader) -> Teacher:
    _, scores = linear(data)
    weight = WEIGHT[: count_outputs(data.task)].t().contiguous().numpy()
    x = data.plain[0][0]["x"]
    sizes = ["rows", *(["length"] if x.ndim == 3 else []), WIDTH] if x.ndim < 4 else ["rows", *x.shape[1:]]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, sizes)]
    nodes, at = [], "x"
    constants = [helper.make_tensor("w", TensorProto.FLOAT, weight.shape, weight.flatten())]
    if x.ndim == 3:
        constants.append(helper.make_tensor("axis", TensorProto.INT64, [1], [1]))
        nodes.append(helper.make_node("ReduceMean", [at, "axis"], ["mean"], keepdims=0))
        at = "mean"
    if "lengths" in data.plain[0][0]:
        inputs.append(helper.make_tensor_value_info("lengths", TensorProto.FLOAT, ["rows"]))
        constants.append(helper.make_tensor("last", TensorProto.INT64, [1], [1]))
        nodes += [helper.make_node("Unsqueeze", ["lengths", "last"], ["column"]),
                  helper.make_node("Mul", [at, "column"], ["scaled"])]  # fmt: skip
        at = "scaled"
    nodes.append(helper.make_node("MatMul", [at, "w"], ["scores"]))
    output = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["rows", weight.shape[1]])
    graph = helper.make_graph(nodes, "teacher", inputs, [output], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return Teacher(onnxruntime.InferenceSession(model.SerializeToString()), scores)


def estimator(kinds: dict[str, Callable[[], Any]]) -> Callable[[Loader], Teacher]:
    def make(data: Loader) -> Teacher:
        tables = [
            np.concatenate([v.reshape(len(v), -1).numpy() for v in inputs.values()], 1) for inputs, _ in data.plain
        ]
        table = np.concatenate([t[:, : tables[0].shape[1]] for t in tables if t.shape[1] >= tables[0].shape[1]])
        targets = np.concatenate(
            [target(data, i).numpy() for i, t in enumerate(tables) if t.shape[1] >= tables[0].shape[1]]
        )
        model = kinds[data.task]().fit(table, targets)
        scores = []
        for t in tables:
            if t.shape[1] != table.shape[1]:
                scores.append(torch.zeros(0))
            elif data.task == "classes":
                scores.append(torch.from_numpy(np.log(model.predict_proba(t).clip(1e-30))).float())
            elif data.task == "regression":
                scores.append(torch.from_numpy(model.predict(t)).float()[:, None])
            else:
                p = np.stack([one[:, 1] for one in model.predict_proba(t)], 1)
                scores.append(torch.from_numpy(np.log(p) - np.log(1 - p)).float())
        return Teacher(model, scores)

    return make


def target(data: Loader, number: int) -> Tensor:
    inputs, own = data.plain[number]
    return labels(inputs["x"], inputs.get("lengths")) if own is None else own


def stored(data: Loader) -> Teacher:
    _, scores = linear(data)
    return Teacher(StoredProbabilities(), scores)


def ensemble(data: Loader) -> Teacher:
    model, scores = linear(data)
    other = copy.deepcopy(model)
    other.weight.mul_(0.5)
    both = [other(**inputs) for inputs, _ in data.plain]
    if data.task != "classes":
        return Teacher([model, other], [(a + b) / 2 for a, b in zip(scores, both, strict=True)])
    mean = [(0.5 * a.softmax(-1) + 0.5 * b.softmax(-1)).log() for a, b in zip(scores, both, strict=True)]
    return Teacher([model, other], mean)


TEACHERS: dict[str, Callable[[Loader], Teacher]] = {
    "module": of_module(lambda m: m),
    "in training mode": of_module(training_mode),
    "function": of_module(lambda m: lambda *a, **k: m(*a, **k)),
    "function to NumPy": of_module(lambda m: lambda *a, **k: m(*a, **k).numpy()),
    "scripted": of_module(script),
    "exported program": exported(lambda program: program),
    "its module": exported(lambda program: program.module()),
    "ONNX session": onnx,
    "linear estimator": estimator(
        {"classes": LogisticRegression, "regression": LinearRegression,
         "multi-label": lambda: MultiOutputClassifier(LogisticRegression())}
    ),
    "boosted trees": estimator(
        {"classes": lambda: HistGradientBoostingClassifier(max_iter=2, min_samples_leaf=2),
         "regression": lambda: HistGradientBoostingRegressor(max_iter=2, min_samples_leaf=2),
         "multi-label": lambda: MultiOutputClassifier(HistGradientBoostingClassifier(max_iter=2, min_samples_leaf=2))}
    ),
    "stored probabilities": stored,
    "ensemble": ensemble,
}  # fmt: skip
