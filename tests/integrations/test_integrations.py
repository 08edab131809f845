"""One epoch by our engine, by Hugging Face's Trainer, by Lightning and by hand: the same losses and weights."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from support.launching import launch
from support.worlds import WORLDS, World, teacher_for
from tutelage import losses as loss_functions
from tutelage.config import OptimizerConfig, ScheduleConfig, TrainConfig
from tutelage.data import LoaderBatches
from tutelage.engine import RunDirectory, Training, build_accelerator, fit
from tutelage.errors import CapabilityError, CheckpointError
from tutelage.integrations import Distiller
from tutelage.methods import (
    FeatureMethod,
    LogitMethod,
    Method,
    MutualMethod,
    SimkdMethod,
    TokenMethod,
    prepare_method,
    prepare_student,
)
from tutelage.teachers import LiveTeacher

pytest.importorskip("transformers", reason="needs the extra text")

RATE = {"lr": 0.05, "momentum": 0.9}


def hint() -> Method:
    return FeatureMethod(pairs=[{"student": "stages.1", "teacher": "stages.1", "loss": "hint", "weight": 2.0}])


CASES: dict[str, tuple[str, Callable[[], Method], int]] = {
    "cnn-kd": ("cnn", lambda: LogitMethod(temperature=3.0, alpha=0.7), 1),
    "cnn-hint": ("cnn", hint, 1),
    "bert-kd": ("bert", lambda: LogitMethod(temperature=2.0, alpha=0.6), 4),
    "llama-token": ("llama", lambda: TokenMethod(temperature=1.0, alpha=0.8), 4),
}


class Case:
    """A world whose rows lack some labels, a teacher, and a student without randomness."""

    def __init__(self, name: str) -> None:
        kind, self.make_method, self.accumulate = CASES[name]
        self.world: World = WORLDS[kind]()
        for raw in self.world.train:
            labels = raw["labels"] if isinstance(raw, dict) else raw[1]
            labels[: len(labels) // 3] = -100  # so that counts differ from micro-batch to micro-batch
        self.teacher = teacher_for(self.world, steps=10)

    def student(self) -> nn.Module:
        torch.manual_seed(11)
        model = self.world.make(8)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(getattr(module, "attention_dropout", None), float):
                module.attention_dropout = 0.0
        return model

    def distiller(self) -> Distiller:
        return Distiller(
            self.student(),
            self.teacher,
            self.make_method(),
            example=self.world.train[0],
            to_batch=self.world.to_batch,
        )


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


Found = tuple[list[float], dict[str, torch.Tensor]]


def weights_of(student: nn.Module, method: nn.Module) -> dict[str, torch.Tensor]:
    return {**student.state_dict(), **{f"method.{k}": v for k, v in method.state_dict().items()}}


def by_engine(case: Case, out: Path) -> Found:
    example = case.world.to_batch(case.world.train[0]).rows(0, 2)
    student, method = case.student(), case.make_method()
    student = prepare_student(method, student, case.teacher, example, 0)
    prepare_method(method, student, case.teacher, example, 0)
    config = TrainConfig(
        epochs=1, accumulate=case.accumulate, log_every=1, optimizer=OptimizerConfig(kind="sgd", **RATE),
        schedule=ScheduleConfig(kind="constant"),
    )  # fmt: skip
    batches = LoaderBatches(case.world.train, 0, case.world.to_batch)
    fit(
        Training("t", student, method, batches, config, RunDirectory(out), LiveTeacher(case.teacher)),
        build_accelerator(None, []),
    )
    lines = [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line], weights_of(student, method)


def by_hand(case: Case, out: Path) -> Found:
    distiller = case.distiller()
    optimizer = torch.optim.SGD(distiller.parameters(), **RATE)
    distiller.begin(total=len(case.world.train))
    found = []
    for raw in case.world.train:
        step = 0.0
        for loss in distiller.losses(*case.world.to_batch(raw).split(case.accumulate)):
            loss.backward()
            step += float(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        distiller.after_step()
        found.append(step)
    return found, weights_of(distiller.student, distiller.method)


def rows(case: Case) -> list[Any]:
    """The world's samples one by one."""
    found: list[Any] = []
    for raw in case.world.train:
        if isinstance(raw, dict):
            found += [dict(zip(raw, values, strict=True)) for values in zip(*raw.values(), strict=True)]
        else:
            found += list(zip(*raw, strict=True))
    return found


def collate(samples: list[Any]) -> Any:
    if isinstance(samples[0], dict):
        return {key: torch.stack([s[key] for s in samples]) for key in samples[0]}
    return tuple(torch.stack(column) for column in zip(*samples, strict=True))


def trainer_of(case: Case, out: Path, **more: Any) -> Any:
    from transformers import TrainingArguments

    from tutelage.integrations.hf import DistillationTrainer

    class SequentialBatches(DistillationTrainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    arguments: dict[str, Any] = {
        "num_train_epochs": 1, "per_device_train_batch_size": 16 // case.accumulate,
        "gradient_accumulation_steps": case.accumulate, "logging_steps": 1, "lr_scheduler_type": "constant",
        "learning_rate": RATE["lr"], "max_grad_norm": 0.0, "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "save_strategy": "no", "seed": 0, **more.pop("args", {}),
    }  # fmt: skip
    return SequentialBatches(
        case.student(), case.teacher, more.pop("method", case.make_method()),
        args=TrainingArguments(str(out), **arguments), train_dataset=rows(case), data_collator=collate,
        to_batch=case.world.to_batch, optimizer_cls_and_kwargs=(torch.optim.SGD, RATE), **more,
    )  # fmt: skip


def by_trainer(case: Case, out: Path) -> Found:
    trainer = trainer_of(case, out)
    trainer.train()
    found = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return found, weights_of(trainer.distiller.student, trainer.distiller.method)


@pytest.fixture
def quiet_lightning() -> Iterator[None]:
    """Without Lightning's advice on workers and logging, and what it calls that torch has deprecated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        warnings.filterwarnings("ignore", message=r".*LeafSpec.*|.*does not have many workers.*|.*GPU available.*")
        yield


def lightning_fit(module: Any, batches: list[Any], out: Path, **more: Any) -> list[float]:
    from lightning import Callback, Trainer

    class Losses(Callback):
        def __init__(self) -> None:
            self.found: list[float] = []

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            self.found.append(float(outputs["loss"]))

    seen = Losses()
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=out, callbacks=[seen], num_sanity_val_steps=0, **more,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None), more.get("val"))
    return seen.found


def by_lightning(case: Case, out: Path) -> Found:
    pytest.importorskip("lightning", reason="needs the extra lightning")
    from tutelage.integrations.lightning import LightningDistillationModule

    module = LightningDistillationModule(
        case.student(), case.teacher, case.make_method(), example=case.world.train[0], to_batch=case.world.to_batch,
        accumulate=case.accumulate, optimizer=lambda parameters: torch.optim.SGD(parameters, **RATE),
    )  # fmt: skip
    found = lightning_fit(module, case.world.train, out)
    return found, weights_of(module.student, module.distiller.method)


def test_one_epoch_is_the_same_in_every_loop(case: Case, tmp_path: Path, quiet_lightning: None) -> None:
    losses, weights = by_engine(case, tmp_path / "engine")
    assert len(losses) == len(case.world.train)
    assert max(losses) - min(losses) > 1e-3, "losses that do not move would show nothing"
    for loop in (by_hand, by_trainer, by_lightning):
        found, learned = loop(case, tmp_path / loop.__name__)
        assert found == pytest.approx(losses, abs=1e-6), loop.__name__
        assert learned.keys() == weights.keys()
        for name, tensor in weights.items():
            torch.testing.assert_close(learned[name], tensor, rtol=0, atol=1e-6, msg=f"{loop.__name__}: {name}")


def test_by_hand_without_anything_of_ours_but_objectives(tmp_path: Path) -> None:
    case = Case("cnn-kd")
    expected, weights = by_engine(case, tmp_path)
    student, teacher = case.student(), case.teacher.eval()
    optimizer = torch.optim.SGD(student.parameters(), **RATE)
    found = []
    for x, y in case.world.train:
        logits = student(x)
        with torch.no_grad():
            said = teacher(x)
        soft = loss_functions.kd(logits, said, temperature=3.0)
        loss = 0.7 * soft + 0.3 * nn.functional.cross_entropy(logits, y)  # torch ignores -100 as we do
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert found == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(student.state_dict(), weights, rtol=0, atol=1e-6)


def test_how_a_step_is_cut_does_not_change_its_gradient() -> None:
    case = Case("bert-kd")
    gradients = []
    for parts in (1, 3, 8):
        distiller = case.distiller()
        for loss in distiller.losses(*case.world.to_batch(case.world.train[0]).split(parts)):
            loss.backward()
        gradients.append([p.grad for p in distiller.parameters() if p.grad is not None])
    for cut in gradients[1:]:
        torch.testing.assert_close(cut, gradients[0], rtol=1e-5, atol=1e-7)


def test_two_processes_by_hand_are_one(tmp_path: Path) -> None:
    found = []
    for processes in (1, 2):
        launch(processes, "-m", "support.distiller_job", str(tmp_path / f"{processes}.safetensors"))
        found.append(load_file(tmp_path / f"{processes}.safetensors"))
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-6)


def test_the_teacher_is_out_of_reach() -> None:
    case = Case("cnn-hint")
    distiller = case.distiller()
    before = {k: v.clone() for k, v in case.teacher.state_dict().items()}
    own = {id(p) for p in distiller.parameters()}
    assert not own & {id(p) for p in case.teacher.parameters()}
    assert any(name.startswith("method.") for name in distiller.state_dict()), "the projector is trained with it"
    distiller.train()
    for loss in distiller.losses(case.world.train[0]):
        loss.backward()
    torch.testing.assert_close(case.teacher.state_dict(), before)
    assert all(p.grad is None for p in case.teacher.parameters())


def test_what_a_method_needs_first_is_said() -> None:
    case = Case("cnn-kd")
    raw = case.world.train[0]
    with pytest.raises(CapabilityError, match="phase"):
        Distiller(case.student(), case.teacher, FeatureMethod(loss="hint", stage1_fraction=0.3), example=raw)
    with pytest.raises(CapabilityError, match="peers="):
        Distiller(case.student(), None, MutualMethod(peers=1), example=raw)
    with pytest.raises(CapabilityError, match="needs a teacher"):
        Distiller(case.student(), None, LogitMethod(), example=raw)
    torch.manual_seed(5)
    peer = case.world.make(8)
    distiller = Distiller(case.student(), None, MutualMethod(peers=1), example=raw, peers=[peer])
    distiller.begin(total=4)
    assert {id(p) for p in peer.parameters()} < {id(p) for p in distiller.parameters()}
    assert sum(float(loss.detach()) for loss in distiller.losses(raw)) > 0


def test_what_simkd_makes_of_the_student_is_what_is_saved() -> None:
    case = Case("cnn-kd")
    distiller = Distiller(case.student(), case.teacher, SimkdMethod(), example=case.world.train[0])
    assert distiller.student is not None
    assert distiller.student(case.world.train[0][0]).shape == (16, 4)
    assert type(distiller.student) is not type(case.student())


def test_trainer_saves_a_student_that_transformers_loads_and_goes_on_from_it(tmp_path: Path) -> None:
    from transformers import BertForSequenceClassification

    case = Case("bert-kd")
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "num_train_epochs": 3}
    whole = trainer_of(case, tmp_path / "a", args=saving)
    whole.train()
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "a" / "checkpoint-3")
    torch.testing.assert_close(loaded.state_dict(), whole.distiller.student.state_dict())
    again = trainer_of(case, tmp_path / "b", args=saving)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    torch.testing.assert_close(again.distiller.student.state_dict(), loaded.state_dict(), rtol=0, atol=1e-7)


def test_trainer_keeps_what_the_method_has_learned(tmp_path: Path) -> None:
    case = Case("cnn-hint")
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "num_train_epochs": 1}
    whole = trainer_of(case, tmp_path / "a", args=saving)
    whole.train()
    again = trainer_of(case, tmp_path / "b", args=saving)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    learned = whole.distiller.method.state_dict()
    assert learned
    torch.testing.assert_close(again.distiller.method.state_dict(), learned, rtol=0, atol=1e-6)
    (tmp_path / "a" / "checkpoint-2" / "method.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has weights"):
        trainer_of(case, tmp_path / "c", args=saving).train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-2"))


def test_trainer_evaluates_the_student(tmp_path: Path) -> None:
    case = Case("bert-kd")

    def accuracy(found: Any) -> dict[str, float]:
        counted = found.label_ids != -100
        return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids)[counted].mean())}

    trainer = trainer_of(case, tmp_path, compute_metrics=accuracy, eval_dataset=rows(case))
    figures = trainer.evaluate()
    assert 0 <= figures["eval_accuracy"] <= 1
    assert figures["eval_loss"] > 0


def test_trainer_takes_a_data_set_with_columns_that_no_model_reads(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra text")
    from transformers import TrainingArguments

    from tutelage.integrations.hf import DistillationTrainer

    case = Case("bert-kd")
    plain = [{**{k: v.tolist() for k, v in row.items()}, "text": "words"} for row in rows(case)]
    trainer = DistillationTrainer(
        case.student(), case.teacher,
        args=TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
                               save_strategy="no"),
        train_dataset=datasets.Dataset.from_list(plain),
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 1


def test_arguments_that_would_be_ignored_are_refused(tmp_path: Path) -> None:
    case = Case("bert-kd")
    with pytest.raises(CapabilityError, match="takes no model"):
        trainer_of(case, tmp_path, model=case.student())
    with pytest.raises(CapabilityError, match="label_smoothing"):
        trainer_of(case, tmp_path, args={"label_smoothing_factor": 0.1})


def test_lightning_validates_and_refuses_its_own_accumulation(tmp_path: Path, quiet_lightning: None) -> None:
    pytest.importorskip("lightning", reason="needs the extra lightning")
    from lightning import Trainer

    from tutelage.integrations.lightning import LightningDistillationModule

    case = Case("cnn-kd")
    module = LightningDistillationModule(case.student(), case.teacher, example=case.world.train[0])
    with pytest.raises(CapabilityError, match="accumulate_grad_batches=2"):
        lightning_fit(module, case.world.train, tmp_path, accumulate_grad_batches=2)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    (figures,) = trainer.validate(
        module, torch.utils.data.DataLoader(case.world.held, batch_size=None), verbose=False
    )
    assert 0 <= figures["val_accuracy"] <= 1
    assert figures["val_loss"] > 0
    with pytest.raises(CapabilityError, match="gradient_clip_val"):
        LightningDistillationModule(case.student(), case.teacher, example=case.world.train[0], clip=1.0)


def _lightning_lr(accumulate: int, interval: str, quiet: dict[str, Any]) -> list[float]:
    """The learning rate after each of two epochs of four batches."""
    import lightning

    from tutelage.integrations.lightning import LightningDistillationModule

    data = [(torch.randn(8, 4), torch.arange(8) % 3) for _ in range(4)]

    def optimizer(parameters: Any) -> Any:
        sgd = torch.optim.SGD(parameters, lr=0.1)
        schedule = torch.optim.lr_scheduler.StepLR(sgd, 1, gamma=0.5)
        return {"optimizer": sgd, "lr_scheduler": {"scheduler": schedule, "interval": interval}}

    rates: list[float] = []

    class Rates(lightning.Callback):
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

        def on_fit_end(self, trainer: Any, module: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    module = LightningDistillationModule(
        torch.nn.Linear(4, 3), torch.nn.Linear(4, 3), example=data[0], optimizer=optimizer, accumulate=accumulate
    )
    lightning.Trainer(max_epochs=2, callbacks=[Rates()], **quiet).fit(
        module, torch.utils.data.DataLoader(data, batch_size=None)
    )
    return rates


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_lightning_schedules_do_not_depend_on_the_micro_batches(
    interval: str, tmp_path: Path, quiet_lightning: None
) -> None:
    quiet = {
        "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
        "accelerator": "cpu", "default_root_dir": tmp_path,
    }  # fmt: skip
    plain, cut = (_lightning_lr(accumulate, interval, quiet) for accumulate in (1, 2))
    assert cut == pytest.approx(plain)
    assert plain == pytest.approx([0.1, 0.05, 0.025] if interval == "epoch" else [0.1, 0.1 / 2**4, 0.1 / 2**8])
    import lightning

    from tutelage.integrations.lightning import LightningDistillationModule

    raw = (torch.randn(8, 4), torch.arange(8) % 3)
    module = LightningDistillationModule(torch.nn.Linear(4, 3), torch.nn.Linear(4, 3), example=raw, accumulate=2)
    with pytest.raises(CapabilityError, match=r"gradient_clip_val=1.0.*\n.*clip=1.0"):
        lightning.Trainer(max_epochs=1, gradient_clip_val=1.0, **quiet).fit(
            module, torch.utils.data.DataLoader([raw], batch_size=None)
        )
