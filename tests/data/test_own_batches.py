"""What the caller's loaders may yield, and what stops before any training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tutelage
from tutelage.data import IGNORE, Arguments, Batch, LoaderBatches, RankSlice, as_batch
from tutelage.data.own_loaders import as_loader, length_of
from tutelage.errors import DataError
from tutelage.methods import LogitMethod
from tutelage.taps import call_model

X, Y = torch.arange(12.0).view(4, 3), torch.tensor([0, 1, 2, 0])
LENGTHS = torch.tensor([1.0, 2.0, 3.0, 1.0])


def test_a_value_that_is_no_number_is_named_by_row_and_column() -> None:
    x, y = X.clone(), torch.zeros(4, 2)
    x[2, 1] = float("nan")
    with pytest.raises(DataError, match=r"inputs hold NaN .* 1 of 4 samples, rows of the batch \[2\], column \[1\]"):
        Batch(x, Y).check_finite()
    y[3, 0], y[1] = float("inf"), float("nan")
    labels = torch.tensor([0, IGNORE, 0, 0])
    with pytest.raises(DataError, match=r"targets hold NaN .* 1 of 4 samples, rows of the batch \[3\], column \[0\]"):
        Batch(X, labels, task="regression", targets=y).check_finite()
    Batch(X, torch.tensor([0, IGNORE, 0, IGNORE]), task="regression", targets=y).check_finite()


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param((X, Y), id="tuple"),
        pytest.param([X, Y], id="list"),
        pytest.param((X.numpy(), Y.numpy()), id="arrays"),
        pytest.param((X.tolist(), Y.tolist()), id="numbers"),
        pytest.param((X, Y, torch.arange(4)), id="ids"),
    ],
)
def test_a_pair_is_inputs_and_labels(raw: Any) -> None:
    batch = as_batch(raw)
    assert isinstance(batch.inputs, Tensor)
    assert torch.equal(batch.inputs, X)
    assert batch.inputs.dtype == torch.float32
    assert torch.equal(batch.labels, Y)


@pytest.mark.parametrize("raw", [((X, LENGTHS), Y), [[X, LENGTHS], Y]], ids=["tuple", "list"])
def test_nested_inputs_are_positional_arguments_in_every_part_of_a_batch(raw: Any) -> None:
    batch = as_batch(raw)
    for part in (batch, batch.rows(0, 2), batch.take(torch.tensor([3, 1])), batch.to("cpu"), *batch.split(2)):
        assert isinstance(part.inputs, Arguments)
        x, lengths = part.inputs.values()
        assert len(x) == len(lengths) == len(part)


class Two(nn.Module):
    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return x * lengths[:, None]


class Pair(nn.Module):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return pair[0] * pair[1][:, None]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")
@pytest.mark.parametrize("scripted", [False, True])
@pytest.mark.parametrize("make", [Two, Pair])
def test_a_model_gets_positional_arguments_as_its_forward_takes_them(make: Any, scripted: bool) -> None:
    model = torch.jit.script(make()) if scripted else make()
    inputs = as_batch(((X, LENGTHS), Y)).inputs
    assert torch.equal(call_model(model, inputs), X * LENGTHS[:, None])


@pytest.mark.parametrize("raw", [X, (X,), [X], {"x": X}], ids=["tensor", "tuple", "list", "mapping"])
def test_inputs_alone_have_no_labels(raw: Any) -> None:
    batch = as_batch(raw)
    assert batch.labels.tolist() == [IGNORE] * 4


def test_a_mapping_loses_what_is_no_number() -> None:
    batch = as_batch({"x": X, "text": ["a", "b", "c", "d"], "label": Y.tolist()})
    assert isinstance(batch.inputs, dict)
    assert list(batch.inputs) == ["x"]
    assert torch.equal(batch.labels, Y)


@pytest.mark.parametrize(
    ("labels", "task", "targets", "marks"),
    [
        (torch.tensor([1.5, 2.0]), "regression", [[1.5], [2.0]], [0, 0]),
        (torch.tensor([[1.5, 0.0], [2.0, 1.0]]), "regression", [[1.5, 0.0], [2.0, 1.0]], [0, 0]),
        (torch.tensor([1.5, float("nan")]), "regression", [[1.5], [0.0]], [0, IGNORE]),
        (torch.tensor([3, 4]), "regression", [[3.0], [4.0]], [0, 0]),
        (torch.tensor([[1, 0], [-100, -100]]), "multi-label", [[1.0, 0.0], [0.0, 0.0]], [0, IGNORE]),
        (torch.tensor([[True, False], [True, True]]), "multi-label", [[1.0, 0.0], [1.0, 1.0]], [0, 0]),
    ],
)
def test_labels_that_are_numbers(labels: Tensor, task: Any, targets: list[list[float]], marks: list[int]) -> None:
    batch = as_batch((X[:2], labels), task)
    assert batch.task == task
    assert batch.targets is not None
    assert batch.targets.tolist() == targets
    assert batch.labels.tolist() == marks


@pytest.mark.parametrize(
    ("raw", "task", "says"),
    [
        ((X, torch.rand(4)), "classes", "task='regression'"),
        ((X, torch.tensor([[1.0, float("nan")]] * 4)), "regression", "row 0 of a batch has a target for some"),
        ((X, torch.full((4, 2), 2.0)), "multi-label", "row 0 of a batch has a label that is not between 0 and 1"),
        ((X, torch.tensor([1.0, 2.0, float("inf"), 0.0])), "regression", "row 2 of a batch has an infinite target"),
        (([torch.ones(n, 3) for n in (1, 2, 3, 4)], Y), "classes", "pad_sequence"),
        (((X, torch.ones(2)), Y), "classes", "input '1' has 2 rows, but the batch has 4 labels"),
        ((X, X, X, X), "classes", "a batch is tuple of 4"),
        ((["a", "b"], torch.tensor([0, 1])), "classes", "a batch is tuple of 2"),
    ],
)
def test_what_is_ambiguous_is_refused(raw: Any, task: Any, says: str) -> None:
    with pytest.raises(DataError, match=says.replace("(", r"\(")):
        as_batch(raw, task)


class Stream:
    """Batches without a length."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([(X[:2], Y[:2]), (X[2:], Y[2:])])


def test_a_loader_without_length_is_read_again_until_all_steps_are_done() -> None:
    batches = LoaderBatches(Stream(), 0, steps=5)
    steps = [batch.labels.tolist() for (batch,) in batches.epoch(0, RankSlice())]
    assert steps == [[0, 1], [2, 0], [0, 1], [2, 0], [0, 1]]
    assert [b.labels.tolist() for (b,) in batches.epoch(0, RankSlice(), skip=3)] == steps[3:]


def test_a_stream_that_ends_for_good_is_an_error() -> None:
    with pytest.raises(DataError, match="no more batches after 2 of 5 steps"):
        list(LoaderBatches(iter(Stream()), 0, steps=5).epoch(0, RankSlice()))


class Rows(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return X[index], Y[index]


class RowStream(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(zip(X, Y, strict=True))


def test_data_sets_are_read_in_batches() -> None:
    hub = pytest.importorskip("datasets").Dataset.from_dict({"x": X.tolist(), "label": Y.tolist()})
    for data in (Rows(), RowStream(), hub):
        loader, note = as_loader(data, "train_loader", 3, shuffle=False)
        batches = [as_batch(raw) for raw in loader]
        assert [len(b) for b in batches] == [3, 1]
        assert torch.cat([b.labels for b in batches]).tolist() == Y.tolist()
        assert note is not None
        assert "batches of 3" in note
    assert length_of(as_loader(RowStream(), "train_loader", 3, shuffle=True)[0]) is None


def test_splits_are_no_data_set() -> None:
    datasets = pytest.importorskip("datasets")
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"x": [1]})})
    with pytest.raises(DataError, match="train_loader=data\\['train'\\]"):
        as_loader(splits, "train_loader", 3, shuffle=False)


def test_a_teacher_alone_teaches_from_inputs_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    teacher, loader = nn.Linear(3, 3), [(X,), (X + 1,)]
    method, options = (
        LogitMethod(alpha=1.0, temperature=2.0),
        {"eval_data": [(X, teacher(X).argmax(1))], "lr": 0.1, "optimizer": "sgd"},
    )
    done = tutelage.distill(
        teacher, nn.Linear(3, 3), loader, method=method, epochs=3, out=tmp_path / "run", verbose=False, **options
    )
    assert "baseline" not in done.summary["students"]
    assert done.summary["students"]["distilled"]["last"]["kl"]["mean"] < 10.0


def test_a_sample_that_pads_in_no_batch_is_said(tmp_path: Path) -> None:
    ragged = [(torch.ones(n, 3), 0) for n in (1, 2)]

    class Ragged(Rows):
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> Any:
            return ragged[index]

    with pytest.raises(DataError, match="samples of eval_data cannot be put into one batch"):
        tutelage.distill(nn.Linear(3, 3), nn.Linear(3, 3), Ragged(), eval_data=Ragged(), out=tmp_path, verbose=False)


def test_numbers_of_numpy_keep_their_type() -> None:
    batch = as_batch((np.ones((2, 3), dtype=np.float64), np.array([0, 1])))
    assert isinstance(batch.inputs, Tensor)
    assert batch.inputs.dtype == torch.float64
