"""Loaders, students and teachers of many kinds: each combination trained by ``distill`` and by a loop by hand.

``python tests/support/matrix.py`` (with ``src`` and ``tests`` on the path) writes ``results/own-modules.json`` and
the table of ``docs/how-to/own-modules.md``; with numbers, those of these loaders alone.
"""

from __future__ import annotations

import copy
import gc
import json
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.multioutput import MultiOutputClassifier
from torch import Tensor, nn
from torch.nn import functional as F

from tutelage.data import as_batch
from tutelage.errors import TutelageError
from tutelage.experiment.distill import distill
from tutelage.methods import LogitMethod
from tutelage.teachers import StoredProbabilities

MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
ROOT = Path(__file__).parents[2]
RESULTS, PAGE = ROOT / "results" / "own-modules.json", ROOT / "docs" / "how-to" / "own-modules.md"
ROWS, BATCH, WIDTH, RATE, TEMPERATURE = 18, 6, 4, 0.1, 2.0
GENERATOR = torch.Generator().manual_seed(2)
X = torch.randn(ROWS, WIDTH, generator=GENERATOR)
LENGTHS = torch.rand(ROWS, generator=GENERATOR) + 0.5
WEIGHT = torch.randn(2, WIDTH, generator=GENERATOR)


def front(x: Tensor, lengths: Tensor | None) -> Tensor:
    """``[B, 4]`` of any of the inputs: numbers, sequences, images; each row times its length."""
    if x.ndim == 4:
        x = x.flatten(1)
    if x.ndim == 3:
        x = x.mean(1)
    return x if lengths is None else x * lengths.unsqueeze(1)


# Loaders --------------------------------------------------------------------------------------------


@dataclass
class Loader:
    """What ``distill`` gets, and the same batches for the loop by hand.

    Attributes:
        items: what the loader yields.
        plain: arguments of the model and labels (``None`` without) of each of these.
        loader: in place of the list of items.
        options: of ``distill``.
        evaluation: in place of the loader.
        keywords: whether the model gets the arguments by name.
    """

    items: list[Any]
    plain: list[tuple[dict[str, Tensor], Tensor | None]]
    task: str = "classes"
    loader: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    evaluation: Any = None
    keywords: bool = False


def parts(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return list(zip(*(x.split(BATCH) for x in tensors), strict=True))


def labels(x: Tensor = X, lengths: Tensor | None = None) -> Tensor:
    return (front(x, lengths) @ WEIGHT.T).argmax(1)


def simple(wrap: Callable[[Tensor, Tensor], Any], **rest: Any) -> Loader:
    pairs = parts(X, labels())
    return Loader([wrap(x, y) for x, y in pairs], [({"x": x}, y) for x, y in pairs], **rest)


class Rows(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> Any:
        return X[index], labels()[index]


class Stream:
    """A loader without a length."""

    def __iter__(self) -> Iterator[Any]:
        return iter(parts(X, labels()))


def nested() -> Loader:
    triples = parts(X, LENGTHS, labels(X, LENGTHS))
    return Loader([((x, n), y) for x, n, y in triples], [({"x": x, "lengths": n}, y) for x, n, y in triples])


def named_positions() -> Loader:
    triples = parts(X, LENGTHS, labels(X, LENGTHS))
    plain: list[Any] = [({"x": x, "lengths": n}, y) for x, n, y in triples]
    return Loader(list(triples), plain, options={"batch": ("x", "lengths", "y")}, keywords=True)


def alone(
    wrap: Callable[[Tensor], Any], evaluation: Callable[[Tensor, Tensor], Any], keywords: bool = False
) -> Loader:
    pairs = parts(X, labels())
    return Loader(
        [wrap(x) for x, _ in pairs], [({"x": x}, None) for x, _ in pairs],
        evaluation=[evaluation(x, y) for x, y in pairs], keywords=keywords,
    )  # fmt: skip


def regression() -> Loader:
    pairs = parts(X, X @ WEIGHT[0])
    return Loader(list(pairs), [({"x": x}, y) for x, y in pairs], task="regression")


def multi_label() -> Loader:
    pairs = parts(X, (X @ WEIGHT.T > 0).float())
    return Loader(list(pairs), [({"x": x}, y) for x, y in pairs], task="multi-label")


def of_lengths() -> Loader:
    sequences = [torch.randn(BATCH, n, WIDTH, generator=torch.Generator().manual_seed(n)) for n in (3, 5, 4)]
    pairs = [(x, labels(x)) for x in sequences]
    return Loader(list(pairs), [({"x": x}, y) for x, y in pairs])


def images() -> Loader:
    pairs = parts(X.view(ROWS, 1, 2, 2), labels())
    return Loader(list(pairs), [({"x": x}, y) for x, y in pairs])


def hub() -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"x": X.tolist(), "label": labels().tolist()})


def loader(dataset: Any) -> Any:
    return torch.utils.data.DataLoader(dataset, batch_size=BATCH)


LOADERS: dict[str, Callable[[], Loader]] = {
    "list of `(x, y)`": lambda: simple(lambda x, y: (x, y)),
    "list of `[x, y]`": lambda: simple(lambda x, y: [x, y]),
    "`DataLoader`": lambda: simple(
        lambda x, y: (x, y), loader=loader(torch.utils.data.TensorDataset(X, labels()))
    ),
    "`DataLoader` with ids": lambda: simple(
        lambda x, y: (x, y), loader=loader(torch.utils.data.TensorDataset(X, labels(), torch.arange(ROWS)))
    ),
    "NumPy arrays": lambda: simple(lambda x, y: (x.numpy(), y.numpy())),
    "lists of numbers": lambda: simple(lambda x, y: (x.tolist(), y.tolist())),
    "mapping with `labels`": lambda: simple(lambda x, y: {"x": x, "labels": y}, keywords=True),
    "mapping with texts": lambda: simple(
        lambda x, y: {"x": x, "label": y, "text": ["a"] * len(x)}, keywords=True
    ),
    "`(mapping, y)`": lambda: simple(lambda x, y: ({"x": x}, y), keywords=True),
    "nested `((x, lengths), y)`": nested,
    "`batch=(\"x\", \"lengths\", \"y\")`": named_positions,
    "`x` alone": lambda: alone(lambda x: x, lambda x, y: (x, y)),
    "`(x,)` alone": lambda: alone(lambda x: (x,), lambda x, y: (x, y)),
    "mapping without labels": lambda: alone(lambda x: {"x": x}, lambda x, y: {"x": x, "labels": y}, keywords=True),
    "numbers as labels": regression,
    "several labels": multi_label,
    "torch data set": lambda: simple(lambda x, y: (x, y), loader=Rows()),
    "Hugging Face data set": lambda: simple(lambda x, y: {"x": x, "labels": y}, loader=hub(), keywords=True),
    "stream without length": lambda: simple(
        lambda x, y: (x, y), loader=Stream(), evaluation=parts(X, labels()), options={"train": {"steps": 3}}
    ),
    "sequences of other lengths": of_lengths,
}  # fmt: skip


# Students -------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """A student: a body of some kind after the inputs."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Any:
        return self.body(front(x, lengths))


class Scripted(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, outputs)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        if x.dim() == 4:
            x = x.flatten(1)
        if x.dim() == 3:
            x = x.mean(1)
        if lengths is not None:
            x = x * lengths.unsqueeze(1)
        out: Tensor = self.body(x)
        return out


class Tied(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.second.weight = self.first.weight
        self.head = nn.Linear(WIDTH, outputs)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.second(self.first(x).tanh()))
        return out


class Stateful(nn.Linear):
    """A module with more state than tensors."""

    calls = 3

    def get_extra_state(self) -> Any:
        return {"calls": self.calls}

    def set_extra_state(self, state: Any) -> None:
        self.calls = state["calls"]


class Recurrent(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(1, 3, batch_first=True), nn.Linear(3, outputs)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.gru(x[..., None])[0][:, -1])
        return out


class Attention(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(2, 1, 4, dropout=0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, outputs)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.layer(x.view(-1, 2, 2)).flatten(1))
        return out


class Convolution(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.layer, self.head = nn.Conv1d(1, 2, 3), nn.Linear(4, outputs)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.layer(x[:, None]).flatten(1))
        return out


class Raw(nn.Module):
    """Parameters in a list and a dictionary."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(WIDTH, outputs))])
        self.bias = nn.ParameterDict({"all": nn.Parameter(torch.zeros(outputs))})

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weights[0] + self.bias["all"]


class Output(nn.Module):
    """A layer whose output has a certain form."""

    def __init__(self, outputs: int, form: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.form = nn.Linear(WIDTH, outputs), form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.layer(x), x)


def frozen(outputs: int) -> nn.Module:
    model = nn.Sequential(nn.Linear(WIDTH, 5), nn.ReLU(), nn.Linear(5, outputs))
    model[0].requires_grad_(False)
    return model


def scripted(outputs: int) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: nn.Module = torch.jit.script(Scripted(outputs))
    return model


def weight_norm(outputs: int) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: nn.Module = nn.utils.weight_norm(nn.Linear(WIDTH, outputs))
    return model


@dataclass(frozen=True)
class Student:
    """Makes a student of so many outputs.

    Attributes:
        read: the scores, from what the student returns, by hand.
        is_function: ``distill`` gets the function, and else a module.
        is_whole: ``make`` makes the whole student, and else what is put behind :func:`front`.
    """

    make: Callable[[int], nn.Module]
    read: Callable[[Any], Tensor] = lambda out: out
    is_function: bool = False
    is_whole: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    outputs: int | None = None

    def build(self, outputs: int) -> nn.Module:
        torch.manual_seed(0)
        return self.fresh(outputs)

    def fresh(self, outputs: int) -> nn.Module:
        made = self.make(self.outputs or outputs)
        return made if self.is_whole else Wrapped(made)


def one_score(out: Tensor) -> Tensor:
    return torch.stack([torch.zeros_like(out), out], 1)


parametrize = nn.utils.parametrizations
STUDENTS: dict[str, Student] = {
    "`nn.Sequential`": Student(lambda n: nn.Sequential(nn.Linear(WIDTH, 5), nn.ReLU(), nn.Linear(5, n))),
    "function that makes one": Student(lambda n: nn.Linear(WIDTH, n), is_function=True),
    "lazy": Student(lambda n: nn.Sequential(nn.LazyLinear(5), nn.ReLU(), nn.LazyLinear(n)), is_function=True),
    "old `weight_norm`": Student(weight_norm),
    "`weight_norm`": Student(lambda n: parametrize.weight_norm(nn.Linear(WIDTH, n))),
    "`spectral_norm`": Student(lambda n: parametrize.spectral_norm(nn.Linear(WIDTH, n))),
    "batch norm": Student(lambda n: nn.Sequential(nn.Linear(WIDTH, 5), nn.BatchNorm1d(5), nn.Linear(5, n))),
    "extra state": Student(lambda n: Stateful(WIDTH, n)),
    "frozen part": Student(frozen),
    "tied weights": Student(Tied),
    "GRU": Student(Recurrent),
    "attention": Student(Attention),
    "convolution": Student(Convolution),
    "bare parameters": Student(Raw),
    "`outputs=\"scores\"`": Student(
        lambda n: Output(n, lambda z, x: {"features": x, "scores": z}), lambda out: out["scores"],
        options={"outputs": "scores"},
    ),
    "tuple": Student(lambda n: Output(n, lambda z, x: (z, x)), lambda out: out[0]),
    "object with `.logits`": Student(lambda n: Output(n, lambda z, _: SimpleNamespace(logits=z)), lambda o: o.logits),
    "one score": Student(lambda n: Output(1, lambda z, _: z[:, 0]), one_score, outputs=1),
    "`torch.compile`": Student(
        lambda n: torch.compile(Wrapped(nn.Linear(WIDTH, n)), backend="eager"), is_whole=True  # type: ignore[arg-type,return-value]
    ),
    "`torch.jit.script`": Student(scripted, is_whole=True),
}  # fmt: skip


# Teachers -------------------------------------------------------------------------------------------


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
        if x.dim() == 4:
            x = x.flatten(1)
        if x.dim() == 3:
            x = x.mean(1)
        if lengths is not None:
            x = x * lengths.unsqueeze(1)
        out: Tensor = self.dropout(x) @ self.weight.t()
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


# One cell -------------------------------------------------------------------------------------------


def by_hand(student: nn.Module, read: Callable[[Any], Tensor], data: Loader, scores: list[Tensor]) -> nn.Module:
    student.train()
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=RATE)
    for (inputs, labels), teacher in zip(data.plain, scores, strict=True):
        z = read(student(**inputs) if data.keywords else student(*inputs.values()))
        if data.task == "classes":
            t = TEMPERATURE
            soft = F.kl_div((z / t).log_softmax(1), (teacher / t).softmax(1), reduction="batchmean") * t * t
            loss = soft if labels is None else 0.5 * soft + 0.5 * F.cross_entropy(z, labels)
        elif data.task == "regression":
            assert labels is not None
            z = z.view(-1)
            loss = 0.5 * F.mse_loss(z, teacher[:, 0]) + 0.5 * F.mse_loss(z, labels)
        else:
            assert labels is not None
            soft = two_sided(z / TEMPERATURE, teacher / TEMPERATURE) * TEMPERATURE**2
            loss = 0.5 * soft + 0.5 * F.binary_cross_entropy_with_logits(z, labels, reduction="sum") / len(z)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return student


def two_sided(z: Tensor, t: Tensor) -> Tensor:
    """KL of independent labels, summed over labels, mean over rows."""
    p = t.sigmoid()
    entropy = p * F.logsigmoid(t) + (1 - p) * F.logsigmoid(-t)
    return (entropy - p * F.logsigmoid(z) - (1 - p) * F.logsigmoid(-z)).sum(1).mean()


def with_probabilities(data: Loader, scores: list[Tensor]) -> Loader:
    """The loader with the probabilities of the teacher: a key of a mapping, or another place, by ``to_batch``."""
    names = data.options.get("batch")
    items = [(as_named(raw, names), s.softmax(-1)) for raw, s in zip(data.items, scores, strict=True)]

    def convert(pair: Any) -> Any:
        return replace(as_batch(pair[0], data.task), teacher_inputs=pair[1])  # type: ignore[arg-type]

    test = None
    if data.evaluation is not None:
        test = [(raw, s.softmax(-1)) for raw, s in zip(data.evaluation, scores, strict=True)]
    options = {k: v for k, v in data.options.items() if k != "batch"} | {"to_batch": convert}
    return replace(data, items=items, loader=None, evaluation=test, options=options)


def as_named(raw: Any, names: Any) -> Any:
    if names is None:
        return raw
    named = dict(zip(names, raw, strict=True))
    named["labels"] = named.pop("y")
    return named


def run_cell(loader_name: str, student_name: str, teacher_name: str, folder: Path) -> str:
    """``""`` where both loops give the same weights; else why it is refused, or what went wrong (with an ``!``)."""
    data, student = LOADERS[loader_name](), STUDENTS[student_name]
    teacher = made_teacher(loader_name, teacher_name)
    outputs = count_outputs(data.task)
    if teacher_name == "stored probabilities":
        data = with_probabilities(data, teacher.scores)
    alone = data.plain[0][1] is None
    method = LogitMethod(
        task=data.task,
        alpha=1.0 if alone else 0.5,  # type: ignore[arg-type]
        **({} if data.task == "regression" else {"temperature": TEMPERATURE}),
    )  # type: ignore[arg-type]
    given = (lambda: student.fresh(outputs)) if student.is_function else student.build(outputs)
    loader = data.items if data.loader is None else data.loader
    test = data.evaluation or (data.items if data.loader is None else data.loader)
    options: dict[str, Any] = {**data.options, **student.options}
    is_set = loader_name in ("torch data set", "Hugging Face data set") and data.loader is not None
    options["train"] = {"batch_size": BATCH, **options.get("train", {})} if is_set else options.get("train")
    try:
        with Unshuffled(is_set):
            done = distill(
                teacher.given, given, loader, eval_data=test, method=method, epochs=1, lr=RATE, optimizer="sgd",
                schedule="constant", baseline=False, out=folder, verbose=False, **options,
            )  # fmt: skip
    except TutelageError as error:
        trained = (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").stat().st_size > 0
        return f"{'! after training: ' if trained else ''}{error}" if "\n  -> " in str(error) else f"! {error}"
    except Exception as error:  # noqa: BLE001  # a cell that is neither right nor refused
        return f"! {type(error).__name__}: {error}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    mine = student.build(outputs)
    inputs = {name: x[:2] for name, x in data.plain[0][0].items()}
    if any(nn.parameter.is_lazy(p) for p in mine.parameters()):
        with torch.no_grad():
            mine.eval()(**inputs)
    read = (lambda out: out) if data.task == "regression" and student_name == "one score" else student.read
    by_hand(mine, read, data, teacher.scores)
    return difference(done.student, mine)


def difference(one: nn.Module, other: nn.Module) -> str:
    a, b = ({k.removeprefix("_orig_mod."): v for k, v in m.state_dict().items()} for m in (one, other))
    if set(a) != set(b):
        return f"! other weights: {set(a) ^ set(b)}"
    far = [k for k in a if isinstance(a[k], Tensor) and not torch.allclose(a[k], b[k], rtol=0, atol=1e-6)]
    return f"! {far[0]} differs by {float((a[far[0]] - b[far[0]]).abs().max()):.2g}" if far else ""


@cache
def made_teacher(loader_name: str, teacher_name: str) -> Teacher:
    return TEACHERS[teacher_name](LOADERS[loader_name]())


class Unshuffled:
    """Data sets of the caller are read in order, as in the loop by hand."""

    def __init__(self, active: bool) -> None:
        self.active = active

    def __enter__(self) -> None:
        self.permute = torch.randperm
        if self.active:
            torch.randperm = lambda n, **_: torch.arange(n)  # type: ignore[assignment]

    def __exit__(self, *_: object) -> None:
        torch.randperm = self.permute


Cells = dict[str, dict[str, dict[str, str]]]


def run_all(loaders: list[str] | None = None, say: Callable[[str], object] = lambda text: None) -> Cells:
    """Every cell, by loader, student and teacher."""
    cells: Cells = {}
    gc.collect()
    gc.freeze()  # the collections of accelerate after each training look at the cell's own objects alone
    with tempfile.TemporaryDirectory(dir=MEMORY) as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in loaders or LOADERS:
            cells[name] = {
                student: {teacher: run_cell(name, student, teacher, Path(place) / "run") for teacher in TEACHERS}
                for student in STUDENTS
            }
            every = [text for row in cells[name].values() for text in row.values()]
            say(f"{name}: {sum(not text for text in every)} of {len(every)} train as by hand")
            for text in sorted({text for text in every if text}):
                say(f"   {every.count(text)} x {text[:300]}")
    gc.unfreeze()
    return cells


def table(cells: Cells) -> str:
    """The page's table: of the 12 teachers, how many train each student from each loader."""
    students = list(STUDENTS)
    lines = [
        "| | " + " | ".join(str(i + 1) for i in range(len(students))) + " |",
        "| --- |" + " --- |" * len(students),
    ]
    for name, rows in cells.items():
        lines.append(f"| {name} | " + " | ".join(str(sum(not t for t in rows[s].values())) for s in students) + " |")
    numbers = "; ".join(f"{i + 1} {name}" for i, name in enumerate(students))
    return "\n".join([*lines, "", f"Students: {numbers}.", "", f"Teachers: {', '.join(TEACHERS)}."])


def write(found: Cells) -> None:
    """Add cells to the results, and write the page's table when all are there."""
    known: Cells = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    known = {name: (known | found)[name] for name in LOADERS if name in known | found}
    RESULTS.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if len(known) == len(LOADERS):
        head, _, rest = PAGE.read_text(encoding="utf-8").partition("<!-- matrix -->\n")
        tail = rest.partition("<!-- end of matrix -->")[2]
        PAGE.write_text(f"{head}<!-- matrix -->\n{table(known)}\n<!-- end of matrix -->{tail}", encoding="utf-8")


if __name__ == "__main__":
    for number in map(int, sys.argv[1:] or range(len(LOADERS))):
        write(run_all([list(LOADERS)[number]], print))
