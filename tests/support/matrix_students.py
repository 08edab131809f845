"""Students of many kinds."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from support.matrix_loaders import (
    WIDTH,
    front,
)


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
        out: Tensor = self.body(front(x, lengths))
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
