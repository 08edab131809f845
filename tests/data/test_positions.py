"""Tuples whose positions have names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import tutelage
from tutelage.data import IndexedDataset, as_batch
from tutelage.data.positions import name_positions
from tutelage.errors import CapabilityError, ConfigError, DataError
from tutelage.integrations import Distiller


class Padded(nn.Module):
    """Scores the mean of the first ``length`` positions."""

    def forward(self, x: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        inside = torch.arange(x.shape[1]) < length[:, None]
        return (x * inside[..., None]).sum(1) / length[:, None]


class Renamed(Padded):
    def forward(self, values: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        return super().forward(values, sizes)


class Mean(nn.Module):
    """Reads no lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(x.sum(1))
        return out


class Scaled(Padded):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        return super().forward(x, length) * self.scale


def data(n: int = 48) -> TensorDataset:
    g = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 4
    length = torch.randint(1, 4, (n,), generator=g)
    x = 0.1 * torch.randn(n, 4, 4, generator=g)
    x[torch.arange(n), 0, y] += 9
    return TensorDataset(x, length, y)


def test_three_tensors_are_read_by_their_names(tmp_path: Path) -> None:
    loader = DataLoader(data(), batch_size=16)
    result = tutelage.distill(
        Padded(), Mean, loader, eval_data=loader, batch=("x", "length", "y"), epochs=1, out=tmp_path / "run",
        verbose=False,
    )  # fmt: skip
    assert result.summary["teacher"]["accuracy"] == 1.0


def test_three_tensors_without_names_are_refused_before_training(tmp_path: Path) -> None:
    loader = DataLoader(data(), batch_size=16)
    with pytest.raises(DataError, match=r"third tensor.*\n.*batch=\('x', 'length', 'y'\)"):
        tutelage.distill(Mean(), Mean, loader, eval_data=loader, epochs=1, out=tmp_path / "run", verbose=False)
    with pytest.raises(DataError, match="third tensor"):
        Distiller(Mean(), Mean(), example=next(iter(loader)))


@pytest.mark.filterwarnings("ignore:batch. the student takes x; length is not passed to it")
@pytest.mark.parametrize("student", [Scaled, Mean])
def test_the_distiller_reads_names_too(student: type[nn.Module]) -> None:
    raw = next(iter(DataLoader(data(), batch_size=16)))
    distiller = Distiller(student(), Renamed(), example=raw, batch=("x", "length", "y"))
    batch = distiller.batch(raw)
    assert torch.equal(batch.labels, raw[2])
    assert distiller.signal(batch).dense().argmax(-1).equal(raw[2])  # type: ignore[union-attr]


def test_ids_are_read_by_name_and_an_indexed_data_set_still_without(tmp_path: Path) -> None:
    read = name_positions(("ids", "y", "_", "x"), as_batch, nn.Linear(4, 4))
    x, y, ids = torch.randn(3, 4), torch.tensor([0, 1, 0]), torch.tensor([5, 5, 7])
    batch = read((ids, y, "text", x))
    assert torch.equal(batch.ids, ids)  # type: ignore[arg-type]
    assert torch.equal(batch.inputs, x)  # type: ignore[arg-type]
    assert torch.equal(batch.labels, y)
    indexed = IndexedDataset(TensorDataset(x, y))
    assert torch.equal(as_batch(next(iter(DataLoader(indexed, batch_size=3)))).ids, torch.arange(3))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("names", "error", "says"),
    [
        ("xy", ConfigError, r"batch='xy'"),
        (("x", "x", "y"), ConfigError, r"name each position"),
        (("x", "y", "labels"), ConfigError, r"both y and labels are labels"),
        (("_", "_", "y"), ConfigError, r"names no input"),
        (("length", "steps", "y"), CapabilityError, r"takes x, length, but batch= names length, steps"),
        (("x", "y"), CapabilityError, r"takes x, length, but batch= names x"),
        (("x", "length", "y", "_"), DataError, r"names 4 positions, but the loader yields a list of 3"),
    ],
)
def test_wrong_names_are_refused(names: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        name_positions(names, as_batch, Padded())([torch.ones(2, 4, 4), torch.ones(2), torch.tensor([0, 1])])


def test_an_input_that_a_model_does_not_take_is_named() -> None:
    read = name_positions(("x", "length", "y"), as_batch, Mean(), [Padded()])
    assert read.notes() == ["batch: the student takes x; length is not passed to it"]
