"""Broken arguments of ``tutelage.distill``: one error with the remedy, nothing overwritten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tutelage
from support.bad_input import small
from tutelage.errors import (
    CapabilityError,
    ConfigError,
    DataError,
    MissingDependencyError,
    ModelError,
    NumericsError,
    RunDirectoryError,
    TutelageError,
)


def samples(n: int = 40, classes: int = 10) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 64, generator=generator)
    y = torch.arange(n) % classes
    x[torch.arange(n), y] += 8
    return list(zip(x.split(10), y.split(10), strict=True))


class Known(nn.Module):
    """A perfect teacher of :func:`samples`."""

    def __init__(self, classes: int = 10, sign: float = 1.0) -> None:
        super().__init__()
        self.head = nn.Linear(64, classes, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(sign * torch.eye(classes, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(x)
        return out


def poisoned(row: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    data = samples()
    data[row // 10][0][row % 10, 5] = float("nan")
    return data


SHARED = Known()


class Doubled(nn.Module):
    """A student that holds its teacher's head."""

    def __init__(self) -> None:
        super().__init__()
        self.head = SHARED.head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(x)
        return out


def shuffled() -> Any:
    data = torch.utils.data.TensorDataset(torch.randn(40, 64), torch.arange(40) % 10)
    return torch.utils.data.DataLoader(data, batch_size=10, shuffle=True)


@pytest.mark.parametrize(
    ("change", "error", "stdlib", "says"),
    [
        pytest.param({"train_loader": poisoned(13)}, DataError, ValueError,
                     ["NaN or infinity in 1 of 10", "[3]", "remove or repair"], id="nan-in-training"),
        pytest.param({"eval_data": poisoned(0)}, DataError, ValueError, ["NaN", "[0]", "remove"],
                     id="nan-in-evaluation"),
        pytest.param({"train_loader": [(torch.ones(4, 64),)]}, DataError, ValueError,
                     ["inputs without labels", "the term 'ce'", "alpha=1.0", "to_batch="], id="inputs-alone"),
        pytest.param({"train_loader": [(torch.ones(4, 64),) * 4]}, DataError, ValueError,
                     ["tuple of 4", "neither tensors", "to_batch="], id="batch-of-four"),
        pytest.param({"train_loader": [{"pixels": torch.ones(4, 64)}]}, DataError, ValueError,
                     ["no key 'labels', only pixels", "to_batch="], id="mapping-without-labels"),
        pytest.param({"train_loader": [{"x": torch.ones(2, 64), "labels": ["cat", "dog"]}]}, DataError, ValueError,
                     ["labels are a list", "torch.tensor"], id="labels-are-a-list"),
        pytest.param({"train_loader": [(torch.ones(4, 64), torch.arange(3))]}, DataError, ValueError,
                     ["4 inputs but 3 labels", "one for each"], id="one-label-missing"),
        pytest.param({"train_loader": [(torch.ones(4, 64), torch.ones(4, 10))]}, DataError, ValueError,
                     ["torch.float32, not class indices", "argmax"], id="labels-are-one-hot-floats"),
        pytest.param({"eval_data": [(torch.ones(4, 64), torch.ones(4, 10, dtype=torch.int64))]}, CapabilityError,
                     ValueError, ["(2, 10)", "class indices"], id="labels-are-one-hot-integers"),
        pytest.param({"train_loader": [(torch.ones(2, 64), torch.tensor([3, 12]))]}, DataError, ValueError,
                     ["labels from 3 to 12", "classes 0 to 9", "class indices"], id="label-beyond-classes"),
        pytest.param({"train_loader": [(torch.ones(2, 64), torch.tensor([-1, 2]))]}, DataError, ValueError,
                     ["labels from -1 to 2", "-100 for a sample without a label"], id="label-negative"),
        pytest.param({"train_loader": (b for b in samples())}, DataError, ValueError,
                     ["a generator, has no length", "__len__"], id="loader-without-length"),
        pytest.param({"train_loader": []}, DataError, ValueError, ["yields no batches", "drop_last"],
                     id="no-training"),
        pytest.param({"eval_data": []}, DataError, ValueError, ["yields no batches", "drop_last"],
                     id="no-evaluation"),
        pytest.param({"eval_data": (b for b in samples())}, DataError, ValueError,
                     ["eval_data", "generator", "DataLoader"], id="evaluation-once-only"),
        pytest.param({"eval_data": shuffled()}, DataError, ValueError,
                     ["eval_data", "another order", "shuffle=False"], id="evaluation-shuffled"),
        pytest.param({"teacher": Known(sign=-1.0)}, CapabilityError, ValueError,
                     ["accuracy on the evaluation data is 0.0%, chance is 10.0%", "label order"],
                     id="worse-than-chance"),
        pytest.param({"teacher": SHARED, "student": SHARED}, CapabilityError, ValueError,
                     ["the same module", "copy.deepcopy"], id="same-module"),
        pytest.param({"teacher": SHARED, "student": Doubled}, CapabilityError, ValueError,
                     ["share 1 parameters, head.weight", "copy.deepcopy"], id="shared-weights"),
        pytest.param({"student": small(12)}, CapabilityError, ValueError,
                     ["(2, 12)", "(2, 10)", "same classes"], id="student-scores-more"),
        pytest.param({"student": small(5)}, CapabilityError, ValueError,
                     ["label 9", "the student scores classes 0 to 4", "number of classes"],
                     id="student-scores-fewer"),
        pytest.param({"teacher": Known(5)}, CapabilityError, ValueError,
                     ["label 9", "the teacher scores classes 0 to 4"], id="teacher-scores-fewer"),
        pytest.param({"classes": ["a", "b"]}, CapabilityError, ValueError,
                     ["scores 10 classes, the data has 2"], id="class-names"),
        pytest.param({"student": nn.Sequential(nn.Linear(7, 10))}, CapabilityError, ValueError,
                     ["the student, a Sequential, does not take the data, inputs (2, 64)", "make model and data"],
                     id="width"),
        pytest.param({"student": lambda: None}, ModelError, ValueError, ["returned a NoneType", "nn.Module"],
                     id="no-student"),
        pytest.param({"teacher": "bert-base"}, ModelError, ValueError, ["teacher", "of type str", "nn.Module"],
                     id="name-as-teacher"),
        pytest.param({"student": "bert-base"}, ModelError, ValueError, ["student", "a str", "nn.Module"],
                     id="name-as-student"),
        pytest.param({"method": "logit"}, ConfigError, ValueError, ["method='logit'", "LogitMethod"],
                     id="name-as-method"),
        pytest.param({"epochs": "three"}, ConfigError, ValueError, ["epochs='three'", "keys of train"], id="epochs"),
        pytest.param({"epochs": 0}, ConfigError, ValueError, ["epochs=0", "at least 1"], id="no-epochs"),
        pytest.param({"lr": "fast"}, ConfigError, ValueError, ["lr='fast'", "number"], id="lr"),
        pytest.param({"optimizer": "adamm"}, ConfigError, ValueError, ["unknown optimizer 'adamm'", "'adam'"],
                     id="optimizer"),
        pytest.param({"schedule": "cosin"}, ConfigError, ValueError, ["unknown schedule 'cosin'", "'cosine'"],
                     id="schedule"),
        pytest.param({"train": {"clipp": 1.0}}, ConfigError, ValueError, ["clipp", "clip"], id="train-key"),
        pytest.param({"seeds": ()}, ConfigError, ValueError, ["seeds=()", "(0, 1, 2)"], id="no-seeds"),
        pytest.param({"seeds": 3}, ConfigError, ValueError, ["seeds=3", "(0, 1, 2)"], id="one-seed"),
        pytest.param({"teacher_mode": "train"}, CapabilityError, ValueError, ["'train'", "train_bn"],
                     id="teacher-mode"),
        pytest.param({"out": "taken/file"}, RunDirectoryError, OSError, ["taken/file", "is a file"], id="out"),
    ],
)  # fmt: skip
def test_from_python(
    change: dict[str, Any],
    error: type[TutelageError],
    stdlib: type[Exception],
    says: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    arguments: dict[str, Any] = {
        "teacher": Known(), "student": small(), "train_loader": samples(), "eval_data": samples(),
        "epochs": 1, "out": "out", "verbose": False, **change,
    }  # fmt: skip
    teacher, student, loader = (arguments.pop(k) for k in ("teacher", "student", "train_loader"))
    with pytest.raises(error) as caught:
        tutelage.distill(teacher, student, loader, **arguments)
    assert isinstance(caught.value, TutelageError)
    assert isinstance(caught.value, stdlib)
    message = str(caught.value)
    missing = [part for part in says if part not in message]
    assert not missing, f"{missing} not in:\n{message}"
    assert caught.value.remedy
    assert caught.value.remedy in message
    assert not list(tmp_path.rglob("student"))
    assert (tmp_path / "taken" / "file").read_text() == "mine"


def test_a_teacher_whose_weights_are_nan() -> None:
    teacher = Known()
    with torch.no_grad():
        teacher.head.weight[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="the teacher's logits are NaN") as caught:
        tutelage.distill(teacher, small(), samples(), eval_data=samples(), epochs=1, verbose=False)
    assert isinstance(caught.value, ArithmeticError)
    assert "check its weights" in str(caught.value)


def test_a_learning_rate_that_blows_up(tmp_path: Path) -> None:
    with pytest.raises(NumericsError, match="no longer finite") as caught:
        tutelage.distill(
            Known(), small(), samples(), eval_data=samples(), epochs=20, optimizer="sgd", lr=1e6, schedule="constant",
            out=tmp_path / "out", verbose=False,
        )  # fmt: skip
    assert "lower train.optimizer.lr" in str(caught.value)
    assert "inputs and targets of all batches so far are finite" in str(caught.value)
    assert not (tmp_path / "out" / "student").exists()


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError) as caught:
        tutelage.models.build(tutelage.models.ModelSpec("timm:resnet18", classes=2))
    assert isinstance(caught.value, ImportError)
    assert "pip install 'tutelage[vision]'" in str(caught.value)
