"""Columns of the teacher alone, rows without labels, several optimizers and other precisions in other loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tutelage
from tutelage.integrations import Distiller
from tutelage.methods import LogitMethod

torch.manual_seed(1)
X, EXTRA = torch.randn(16, 4), torch.randn(16, 4)
METHOD = LogitMethod(temperature=2.0, alpha=0.5)


class Teacher(nn.Module):
    """Takes a column that the student does not take."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, extra: Tensor) -> Tensor:
        out: Tensor = self.head(torch.cat([x, extra], 1))
        return out


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x)
        return out


TEACHER = Teacher().requires_grad_(False)
Y = TEACHER(X, EXTRA).argmax(1)
ROWS = [{"x": x, "extra": e, "labels": int(y)} for x, e, y in zip(X, EXTRA, Y, strict=True)]


def batch(rows: slice) -> dict[str, Tensor]:
    return {"x": X[rows], "extra": EXTRA[rows], "labels": Y[rows]}


def by_hand(student: Student, rows: slice) -> Tensor:
    z, t = student(X[rows]), TEACHER(X[rows], EXTRA[rows])
    soft = F.kl_div((z / 2).log_softmax(1), (t / 2).softmax(1), reduction="batchmean") * 4
    return 0.5 * soft + 0.5 * F.cross_entropy(z, Y[rows])


def test_each_model_gets_the_inputs_that_it_takes(tmp_path: Path) -> None:
    student, rows = Student(), slice(0, 8)
    (loss,) = Distiller(student, TEACHER, METHOD, example=batch(rows)).losses(batch(rows))
    torch.testing.assert_close(loss, by_hand(student, rows))
    loader = [batch(rows), batch(slice(8, 16))]
    done = tutelage.distill(
        TEACHER, student, loader, eval_data=loader, method=METHOD, epochs=1, lr=0.1, optimizer="sgd",
        schedule="constant", baseline=False, out=tmp_path / "run", verbose=False,
    )  # fmt: skip
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for rows in (slice(0, 8), slice(8, 16)):
        by_hand(student, rows).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(done.student.head.weight, student.head.weight, rtol=0, atol=1e-6)


def test_trainer_keeps_columns_of_the_teacher_and_predicts_rows_without_labels(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs the extra text")
    from transformers import TrainingArguments

    from tutelage.integrations.hf import DistillationTrainer

    student = Student()
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=16, report_to=[], use_cpu=True, save_strategy="no",
        disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    expected = float(by_hand(student, slice(0, 16)).detach())
    trainer = DistillationTrainer(student, TEACHER, METHOD, args=arguments, train_dataset=ROWS)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-4)
    bare = [{"x": row["x"]} for row in ROWS]
    predicted = trainer.predict(bare)
    assert predicted.label_ids is None
    torch.testing.assert_close(torch.from_numpy(predicted.predictions), student(X).detach())


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_lightning_with_two_optimizers_tests_and_predicts(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", reason="needs the extra lightning")
    from tutelage.integrations.lightning import LightningDistillationModule

    def two(parameters: Any) -> list[Any]:
        weight, bias = parameters
        return [torch.optim.SGD([weight], lr=0.1), torch.optim.SGD([bias], lr=0.2)]

    torch.manual_seed(0)
    student = Student()
    weight, bias = student.head.weight.detach().clone(), student.head.bias.detach().clone()
    by_hand(student, slice(0, 16)).backward()
    step = weight - 0.1 * student.head.weight.grad, bias - 0.2 * student.head.bias.grad  # type: ignore[operator]
    student.zero_grad(set_to_none=True)
    module = LightningDistillationModule(student, TEACHER, METHOD, example=batch(slice(0, 2)), optimizer=two)
    trainer = lightning.Trainer(
        max_steps=2, max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(ROWS, batch_size=16)  # type: ignore[arg-type]
    trainer.fit(module, loader)
    torch.testing.assert_close(student.head.weight.detach(), step[0])
    torch.testing.assert_close(student.head.bias.detach(), step[1])
    (figures,) = trainer.test(module, loader, verbose=False)
    assert figures["test_accuracy"] == pytest.approx(float((student(X).argmax(1) == Y).float().mean()))
    unlabelled = torch.utils.data.DataLoader([{"x": x} for x in X], batch_size=16)  # type: ignore[arg-type]
    (logits,) = trainer.predict(module, unlabelled)
    torch.testing.assert_close(logits, student(X).detach())


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_lightning_in_bf16_true_leaves_the_teacher_in_its_own_type(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", reason="needs the extra lightning")
    from tutelage.integrations.lightning import LightningDistillationModule

    module = LightningDistillationModule(Student(), TEACHER, METHOD, example=batch(slice(0, 2)))
    trainer = lightning.Trainer(
        max_steps=1, accelerator="cpu", precision="bf16-true", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(ROWS, batch_size=16))  # type: ignore[arg-type]
    assert module.student.head.weight.dtype == torch.bfloat16  # type: ignore[union-attr]
    assert TEACHER.head.weight.dtype == torch.float32
