"""Modules of the caller as students: lazy, with weight norm, with named outputs, with one score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tutelage
from tutelage.data import as_batch
from tutelage.errors import ModelError
from tutelage.integrations import Distiller
from tutelage.methods import LogitMethod
from tutelage.students import prepare_outputs
from tutelage.taps import copy_model, scores_of

torch.manual_seed(5)
X = torch.randn(24, 4)
TEACHER = nn.Linear(4, 3, bias=False).requires_grad_(False)
TWO = nn.Linear(4, 2, bias=False).requires_grad_(False)
Y, Y2 = TEACHER(X).argmax(1), TWO(X).argmax(1)
METHOD = LogitMethod(temperature=2.0, alpha=0.5)


def batches(labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(X[i : i + 8], labels[i : i + 8]) for i in (0, 8, 16)]


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"features": x, "scores": self.head(x)}


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.body(x)))
        return out


def weight_norm() -> nn.Module:
    return nn.utils.weight_norm(nn.Linear(4, 3))


def parametrised() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))


def run(student: Any, out: Path, labels: Tensor = Y, teacher: Any = TEACHER, **options: Any) -> Any:
    loader = batches(labels)
    return tutelage.distill(
        teacher, student, loader, eval_data=loader, method=METHOD, epochs=1, lr=0.1, optimizer="sgd",
        schedule="constant", baseline=False, out=out, verbose=False, **options,
    )  # fmt: skip


def by_hand(student: nn.Module, labels: Tensor, scores: Any, teacher: nn.Module = TEACHER) -> nn.Module:
    """The loop that a user would write, for temperature 2 and alpha 0.5."""
    student.train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for x, y in batches(labels):
        z, t = scores(student, x), teacher(x)
        soft = F.kl_div((z / 2).log_softmax(1), (t / 2).softmax(1), reduction="batchmean") * 4
        (0.5 * soft + 0.5 * F.cross_entropy(z, y)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return student


def same(a: nn.Module, b: nn.Module) -> None:
    own, other = a.state_dict(), b.state_dict()
    assert list(own) == list(other)
    for name in own:
        torch.testing.assert_close(own[name], other[name], rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*(weight_norm|Lazy).*")
@pytest.mark.parametrize("factory", [False, True])
@pytest.mark.parametrize("make", [Lazy, weight_norm, parametrised])
def test_lazy_modules_and_weight_norm_train_as_by_hand(make: Any, factory: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    mine = make().eval()
    with torch.no_grad():
        mine(X[:2])
    if factory:
        student = make
    else:
        torch.manual_seed(0)
        student = make()
    done = run(student, tmp_path / "run")
    if not (make is Lazy and not factory):  # a lazy module draws its weights in its first run
        same(done.student, by_hand(mine, Y, lambda model, x: model(x)))
    if not factory and make is Lazy:
        assert any(nn.parameter.is_lazy(p) for p in student.parameters())  # the caller's own is not changed


def test_scores_of_another_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    student = Named()
    with pytest.raises(ModelError, match=r"it has 'features, scores'\n.*outputs='features'"):
        run(student, tmp_path / "refused")
    done = run(student, tmp_path / "run", outputs="scores")
    same(done.student, by_hand(student, Y, lambda model, x: model(x)["scores"]))


class One(nn.Module):
    """One score, as a column or not."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.head, self.flat = nn.Linear(4, 1), flat

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x)
        return out[:, 0] if self.flat else out


@pytest.mark.parametrize("flat", [False, True])
def test_one_score_for_two_classes_is_that_of_the_second(flat: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    student = One(flat)

    def two(model: nn.Module, x: Tensor) -> Tensor:
        score = model(x).view(-1, 1)
        return torch.cat([torch.zeros_like(score), score], 1)

    done = run(student, tmp_path / "run", Y2, TWO)
    own = two(done.student, X)
    accuracy = done.summary["students"]["distilled"]["last"]["accuracy"]["mean"]
    assert accuracy == pytest.approx(float((own.argmax(1) == Y2).double().mean()))
    score, label = student(X).view(-1), Y2.float()
    binary = F.binary_cross_entropy_with_logits(score, label)  # what such a student is trained by elsewhere
    torch.testing.assert_close(F.cross_entropy(two(student, X), Y2), binary)
    same(done.student, by_hand(student, Y2, two, TWO))


def test_a_teacher_may_give_one_score_too(tmp_path: Path) -> None:
    def one(x: Tensor) -> Tensor:
        scores: Tensor = TWO(x)
        return scores[:, 1] - scores[:, 0]

    done = run(nn.Linear(4, 2), tmp_path / "run", Y2, one)
    assert done.summary["teacher"]["accuracy"] == 1.0


def test_one_number_for_each_row_is_a_column_of_targets() -> None:
    batch = as_batch((X, X[:, 0]), "regression")
    model = prepare_outputs(One(flat=True), batch)
    assert scores_of(model, X).shape == (24, 1)
    assert scores_of(copy_model(model), X).shape == (24, 1)


def test_other_loops_read_outputs_the_same_way() -> None:
    torch.manual_seed(0)
    student = Named()
    distiller = Distiller(student, TEACHER, METHOD, example=batches(Y)[0], outputs="scores")
    (loss,) = distiller.losses(batches(Y)[0])
    x, y = batches(Y)[0]
    z = student.head(x)
    soft = F.kl_div((z / 2).log_softmax(1), (TEACHER(x) / 2).softmax(1), reduction="batchmean") * 4
    torch.testing.assert_close(loss, 0.5 * soft + 0.5 * F.cross_entropy(z, y))


def test_a_lazy_module_that_does_not_take_the_data_is_said() -> None:
    with pytest.raises(ModelError, match="the lazy Lazy does not take the data"):
        prepare_outputs(Lazy(), as_batch(({"pixels": X}, Y)))


def test_a_module_that_cannot_be_copied_is_said() -> None:
    student = nn.Linear(4, 3)
    student.lock = __import__("threading").Lock()  # type: ignore[assignment]
    with pytest.raises(ModelError, match=r"a Linear cannot be copied.*\n.*lambda: Net"):
        copy_model(student)
