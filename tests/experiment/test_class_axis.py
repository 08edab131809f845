"""Scores whose classes are not on the last axis: the numbers of a loop with torch's ``cross_entropy``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tutelage
from tutelage.errors import CapabilityError
from tutelage.integrations import Distiller
from tutelage.methods import LogitMethod

Loader = list[tuple[torch.Tensor, torch.Tensor]]


def sequences(classes: int = 4, length: int = 4) -> Loader:
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, classes, (24, length), generator=g)
    x = F.one_hot(y, classes).movedim(-1, 1).float() * 9 + torch.randn(24, classes, length, generator=g)
    return list(zip(x.split(8), y.split(8), strict=True))


def images(classes: int = 5, size: int = 5) -> Loader:
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, classes, (8, size, size), generator=g)
    x = F.one_hot(y, classes).movedim(-1, 1).float() * 9 + torch.randn(8, classes, size, size, generator=g)
    return list(zip(x.split(4), y.split(4), strict=True))


class Same(nn.Module):
    """A perfect teacher."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def conv(n: int, dimensions: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Conv1d(n, n, 1) if dimensions == 1 else nn.Conv2d(n, n, 1)


@pytest.mark.parametrize(
    ("loader", "student"),
    [(sequences(), conv(4, 1)), (images(), conv(5, 2))],
    ids=["conv1d", "segmentation"],
)
def test_shapes_that_fit_both_readings_stop(loader: Loader, student: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(CapabilityError, match=r"axis 1 or on the last\n.*class_axis=1"):
        tutelage.distill(Same(), student, loader, eval_data=loader, epochs=1, out=tmp_path / "run", verbose=False)
    with pytest.raises(CapabilityError, match="class_axis=1"):
        Distiller(student, Same(), example=loader[0])
    run = tutelage.distill(
        Same(), student, loader, eval_data=loader, epochs=1, class_axis=1, out=tmp_path / "run", verbose=False
    )
    assert run.summary["teacher"]["accuracy"] == 1.0
    assert run.student(loader[0][0]).shape == loader[0][0].shape


@pytest.mark.parametrize("given", [None, 1])
def test_the_loss_is_that_of_a_loop_by_hand(given: int | None, tmp_path: Path) -> None:
    loader, lr, t, alpha = images(5, 7), 0.1, 4.0, 0.9
    run = tutelage.distill(
        Same(), conv(5, 2), loader, eval_data=loader, epochs=2, optimizer="sgd", lr=lr, schedule="constant",
        class_axis=given, baseline=False, out=tmp_path / "run", verbose=False,
    )  # fmt: skip
    student = conv(5, 2)
    optimizer = torch.optim.SGD(student.parameters(), lr=lr)
    for _ in range(2):
        for x, y in loader:
            scores = student(x)
            soft = F.kl_div(F.log_softmax(scores / t, 1), F.log_softmax(x / t, 1), reduction="none", log_target=True)
            loss = alpha * t**2 * soft.sum(1).mean() + (1 - alpha) * F.cross_entropy(scores, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for own, theirs in zip(student.parameters(), run.student.parameters(), strict=True):
        assert torch.allclose(own, theirs, atol=1e-6)
    accuracy = torch.cat([(student(x).argmax(1) == y).flatten() for x, y in loader]).float().mean()
    assert run.summary["students"]["distilled"]["best"]["accuracy"]["mean"] == pytest.approx(
        float(accuracy), abs=1e-6
    )


def test_the_distiller_finds_the_axis() -> None:
    loader, student = images(5, 7), conv(5, 2)
    distiller = Distiller(student, Same(), LogitMethod(alpha=0.0), example=loader[0])
    (loss,) = distiller.losses(loader[0])
    with torch.no_grad():
        expected = F.cross_entropy(student(loader[0][0]), loader[0][1])
    assert float(loss.detach()) == pytest.approx(float(expected), abs=1e-6)


def test_a_function_that_makes_the_student(tmp_path: Path) -> None:
    loader = images(5, 7)
    run = tutelage.distill(
        Same(), lambda: conv(5, 2), loader, eval_data=loader, epochs=1, seeds=(0, 1), out=tmp_path / "run",
        verbose=False,
    )  # fmt: skip
    assert run.summary["teacher"]["accuracy"] == 1.0
