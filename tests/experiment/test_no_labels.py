"""Data whose labels are all -100: nothing is measured or trained by them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tutelage
from tutelage.errors import DataError
from tutelage.methods import LogitMethod

Loader = list[tuple[torch.Tensor, torch.Tensor]]


def loader(labelled: bool) -> Loader:
    g = torch.Generator().manual_seed(0)
    y = torch.arange(32) % 4
    x = torch.randn(32, 8, generator=g)
    x[torch.arange(32), y] += 5
    return list(zip(x.split(8), (y if labelled else torch.full_like(y, -100)).split(8), strict=True))


def teacher() -> nn.Module:
    model = nn.Linear(8, 4, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.eye(4, 8))
    return model


def run(path: Path, train: bool, test: bool, validation: bool | None = None, **more: Any) -> Any:
    return tutelage.distill(
        teacher(), nn.Linear(8, 4), loader(train), eval_data=loader(test), epochs=1, out=path / "run", verbose=False,
        validation=None if validation is None else loader(validation), **more,
    )  # fmt: skip


def test_an_evaluation_without_labels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the evaluation data has no labels: every label is -100"):
        run(tmp_path, True, False)
    with pytest.raises(DataError, match="the validation data has no labels"):
        run(tmp_path, True, True, False)


def test_a_training_without_labels_has_no_baseline(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"every label of train_loader is -100.*'ce'"):
        run(tmp_path, False, True)
    result = run(tmp_path, False, True, method=LogitMethod(alpha=1.0))
    assert "gain" not in result.summary
    assert "baseline" not in result.summary["students"]


def test_training_batches_unlike_those_of_the_evaluation_are_refused(tmp_path: Path) -> None:
    good, column = loader(True), [(x, y[:, None]) for x, y in loader(True)]
    with pytest.raises(DataError, match=r"labels of train_loader are \(8, 1\)"):
        tutelage.distill(teacher(), nn.Linear(8, 4), column, eval_data=good, out=tmp_path / "run", verbose=False)
    extra = [{"input": x, "extra": x, "labels": y} for x, y in good]
    plain = [{"input": x, "labels": y} for x, y in good]
    with pytest.raises(DataError, match="yields the inputs extra, input, and eval_data input"):
        tutelage.distill(teacher(), nn.Linear(8, 4), extra, eval_data=plain, out=tmp_path / "run", verbose=False)
