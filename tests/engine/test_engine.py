"""The engine's parts: evaluation, selection, averages, schedules, precision, trackers."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tutelage import config as settings
from tutelage.config import OptimizerConfig, ScheduleConfig, TrainConfig
from tutelage.data import Batch, LoaderBatches
from tutelage.engine import (
    RunDirectory,
    Training,
    build_accelerator,
    fit,
    is_bf16_slow,
    open_trackers,
    optim,
    resolve_precision,
)
from tutelage.engine.checkpoint import load_checkpoint, newest
from tutelage.engine.ema import EMA
from tutelage.errors import CapabilityError, MissingDependencyError, NumericsError
from tutelage.evaluation.evaluate import evaluate
from tutelage.methods import METHODS, LogitMethod, Method, SupervisedMethod, Term
from tutelage.teachers import LiveTeacher

CPU = torch.device("cpu")


def batches(count: int = 4, rows: int = 16) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    means = 2 * torch.randn(3, 6, generator=generator)
    out = []
    for _ in range(count):
        labels = torch.randint(3, (rows,), generator=generator)
        out.append((means[labels] + torch.randn(rows, 6, generator=generator), labels))
    return out


def held() -> Batch:
    """Rows that are not trained on, a third of them mislabelled: the loss on them soon rises."""
    x, labels = batches(5)[4]
    labels = labels.clone()
    labels[:5] = (labels[:5] + 1) % 3
    return Batch(x, labels)


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def train(out: Path, model: nn.Module | None = None, method: Method | None = None, **options: Any) -> Any:
    fields: dict[str, Any] = {"steps": 12, "optimizer": OptimizerConfig(lr=0.05), **options}
    data = batches()
    training = Training(
        "t", model or network(), method or SupervisedMethod(), LoaderBatches(data, 0), TrainConfig(**fields),
        RunDirectory(out), validation=[held()],
    )  # fmt: skip
    return fit(training, build_accelerator(fields.get("precision"), fields.get("trackers")))


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()]


def test_every_kind_in_the_schema_is_in_its_registry() -> None:
    assert {kind: method.Options for kind, method in METHODS.items()} == settings.METHOD_KINDS
    assert set(settings.OPTIMIZERS) == set(optim.OPTIMIZERS)
    assert set(settings.SCHEDULES) == set(optim.SCHEDULES)
    for name, options in settings.OPTIMIZERS.items():
        assert set(options) <= set(inspect.signature(optim.OPTIMIZERS[name]).parameters), name


@pytest.mark.parametrize("name", list(settings.OPTIMIZERS))
def test_every_optimizer_trains_and_resumes_to_the_same_bits(name: str, tmp_path: Path) -> None:
    optimizer = OptimizerConfig(kind=name, lr=0.01, **({"momentum": 0.9} if name in ("sgd", "rmsprop") else {}))
    whole = train(tmp_path / "a", optimizer=optimizer, checkpoint_every=5)
    train(tmp_path / "b", optimizer=optimizer, checkpoint_every=5, steps=12)
    for done in (tmp_path / "b" / "checkpoints" / "t").glob("step-*12"):
        import shutil

        shutil.rmtree(done)
    resumed = train(tmp_path / "b", optimizer=optimizer, checkpoint_every=5)
    assert all(torch.equal(whole.last[k], resumed.last[k]) for k in whole.last)
    assert any(not torch.equal(v, whole.last[k]) for k, v in network().state_dict().items())
    assert lines(tmp_path / "a") == lines(tmp_path / "b")


@pytest.mark.parametrize("everything", [False, True])
def test_weight_decay_spares_vectors_unless_asked(everything: bool) -> None:
    chosen = OptimizerConfig(kind="sgd", weight_decay=0.1, decay_vectors=everything)
    groups = optim.build_optimizer(network(), chosen).param_groups
    assert {p.ndim for g in groups for p in g["params"] if g["weight_decay"] == 0} == (set() if everything else {1})
    assert sum(len(g["params"]) for g in groups) == 4


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("constant", {}, [1, 1, 1, 1]),
        ("cosine", {}, [1, 0.75, 0.25, 0]),
        ("cosine", {"final": 0.5}, [1, 0.875, 0.625, 0.5]),
        ("linear", {"final": 0.0}, [1, 2 / 3, 1 / 3, 0]),
        ("multistep", {"milestones": [1, 2], "gamma": 0.1}, [1, 1, 0.1, 0.01]),
        ("step", {"every": 1, "gamma": 0.5}, [1, 1, 0.5, 0.25]),
        ("exponential", {"gamma": 0.25}, [1, 0.5, 0.25, 0.125]),
        ("polynomial", {"power": 2.0}, [1, 4 / 9, 1 / 9, 0]),
    ],
)
def test_schedules(kind: str, options: dict[str, Any], expected: list[float]) -> None:
    optimizer = torch.optim.SGD(network().parameters(), lr=2.0)
    per_epoch = {"multistep": [1, 2, 3], "step": [1, 2, 3]}.get(kind, [1, 2, 3])
    schedule = optim.build_schedule(
        optimizer, ScheduleConfig(kind=kind, **options), 3, 2 if kind in ("exponential",) else 1
    )
    seen = [optimizer.param_groups[0]["lr"] / 2.0]
    for _ in per_epoch:
        optimizer.step()
        schedule.step()
        seen.append(optimizer.param_groups[0]["lr"] / 2.0)
    if kind in ("multistep", "step"):
        expected = [expected[0], *expected[2:], expected[3] if kind == "multistep" else expected[3] / 2]
    assert seen == pytest.approx(expected, abs=1e-6)


def test_warmup_rises_to_the_schedule() -> None:
    optimizer = torch.optim.SGD(network().parameters(), lr=1.0)
    schedule = optim.build_schedule(optimizer, ScheduleConfig(kind="constant", warmup=4), 10, 1)
    seen = []
    for _ in range(6):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert seen == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_metrics_agree_with_torchmetrics() -> None:
    from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

    logits = 3 * torch.randn(500, 7)
    labels = (logits + 2 * torch.randn(500, 7)).argmax(-1)
    teacher = logits + torch.randn(500, 7)
    model = nn.Identity()
    parts = [(0, 100), (100, 101), (101, 500)]
    found = evaluate(
        model, [Batch(logits[a:b], labels[a:b]) for a, b in parts], CPU, [teacher[a:b] for a, b in parts]
    )
    assert found["accuracy"] == pytest.approx(float(multiclass_accuracy(logits, labels, 7, average="micro")))
    assert found["ece"] == pytest.approx(float(multiclass_calibration_error(logits, labels, 7, n_bins=15)), abs=1e-5)
    assert found["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-5)
    assert found["agreement"] == pytest.approx(float((logits.argmax(-1) == teacher.argmax(-1)).float().mean()))
    kl = nn.functional.kl_div(logits.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True)
    assert found["kl"] == pytest.approx(float(kl), rel=1e-4)


def test_evaluation_leaves_every_module_in_its_mode() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Linear(6, 3), nn.BatchNorm1d(3))
    model[2].eval()
    evaluate(model, [Batch(*batches()[0])], CPU)
    assert [m.training for m in model] == [True, True, False]


def test_unlabelled_and_masked_rows_count_where_they_should() -> None:
    x, labels = batches(1)[0]
    labels = labels.clone()
    labels[:5] = -100
    mask = torch.ones(16, dtype=torch.bool)
    mask[10:] = False
    method, batch = LogitMethod(temperature=2.0, alpha=0.5), Batch(x, labels, mask=mask)
    assert {k: int(v) for k, v in method.counts(batch).items()} == {"kd": 10, "ce": 5}
    student, teacher = network(), LiveTeacher(network())
    from tutelage.taps import Needs, observe

    terms = method(observe(student, x, Needs()), batch, teacher.signal(batch, Needs()))
    assert float(terms["kd"].sum.detach()) == pytest.approx(0, abs=1e-6)
    expected = nn.functional.cross_entropy(student(x)[5:10], labels[5:10], reduction="sum")
    torch.testing.assert_close(terms["ce"].sum, expected)


def test_the_best_epoch_is_kept_and_training_stops_when_it_grows_stale(tmp_path: Path) -> None:
    outcome = train(tmp_path, steps=400, early_stop=3, optimizer=OptimizerConfig(kind="sgd", lr=0.5))
    at = outcome.progress
    assert at.stopped_early
    assert at.step < 400
    scores = [(line["validation"]["accuracy"], line["step"]) for line in lines(tmp_path) if "validation" in line]
    assert at.best[0] == max(s for s, _ in scores)
    assert at.step - at.best[2] == 3 * 4
    model = network()
    model.load_state_dict(outcome.best)
    assert evaluate(model, [held()], CPU)["accuracy"] == pytest.approx(at.best[0])


def test_ema_is_the_average_and_is_what_is_kept(tmp_path: Path) -> None:
    module = nn.Linear(2, 1, bias=False)
    ema, expected = EMA(module, 0.5), module.weight.detach().clone()
    for step in range(1, 30):
        with torch.no_grad():
            module.weight.add_(1.0)
        ema.update()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * module.weight.detach()
    raw = module.weight.detach().clone()
    with ema.applied():
        torch.testing.assert_close(module.weight.detach(), expected)
    assert torch.equal(module.weight.detach(), raw)
    plain, averaged = train(tmp_path / "a"), train(tmp_path / "b", ema=0.99)
    assert any(not torch.equal(plain.last[k], averaged.last[k]) for k in plain.last)


def test_clipping_bounds_the_step(tmp_path: Path) -> None:
    outcome = train(
        tmp_path, steps=1, clip=0.01, optimizer=OptimizerConfig(kind="sgd", lr=1.0),
        schedule=ScheduleConfig(kind="constant"),
    )  # fmt: skip
    start = network().state_dict()
    norm = torch.sqrt(sum(((outcome.last[k] - v) ** 2).sum() for k, v in start.items()))
    assert float(norm) == pytest.approx(0.01, rel=1e-3)


def test_only_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    train(tmp_path, checkpoint_every=2, keep_checkpoints=3)
    kept = sorted(p.name for p in (tmp_path / "checkpoints" / "t").iterdir())
    assert kept == ["step-000000008", "step-000000010", "step-000000012"]
    last = newest(tmp_path / "checkpoints" / "t")
    assert last is not None
    assert load_checkpoint(last)["progress"]["step"] == 12


def test_bf16_trains_with_the_loss_in_float32(tmp_path: Path) -> None:
    seen: list[torch.dtype] = []

    class Spy(SupervisedMethod):
        def forward(self, *args: Any) -> dict[str, Term]:
            terms = super().forward(*args)
            seen.extend([args[0].logits.dtype, terms["ce"].sum.dtype])
            return terms

    outcome = train(tmp_path, method=Spy(), precision="bf16")
    assert set(seen[::2]) == {torch.bfloat16}
    assert set(seen[1::2]) == {torch.float32}
    assert all(v.dtype == torch.float32 for v in outcome.last.values())
    build_accelerator("no")


def test_a_compiled_student_keeps_its_class_and_names(tmp_path: Path) -> None:
    import shutil

    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    model = network()
    outcome = train(tmp_path, model=model, compile=True, steps=3)
    assert type(model) is nn.Sequential
    assert outcome.last.keys() == network().state_dict().keys()
    plain = train(tmp_path / "plain", steps=3)
    for name in plain.last:
        torch.testing.assert_close(outcome.last[name], plain.last[name], rtol=1e-3, atol=1e-4)


def test_tensorboard_gets_the_metrics(tmp_path: Path) -> None:
    accelerator = build_accelerator(None, ["tensorboard"])
    with open_trackers(accelerator, tmp_path / "trackers", {"a": "b"}):
        fit(
            Training("t", network(), SupervisedMethod(), LoaderBatches(batches(), 0), TrainConfig(steps=4),
                     RunDirectory(tmp_path), validation=[Batch(*batches()[0])]),
            accelerator,
        )  # fmt: skip
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((tmp_path / "trackers").rglob("*tfevents*")).parent))
    events.Reload()
    assert {"t/loss", "t/term/ce", "t/validation/accuracy"} <= set(events.Tags()["scalars"])


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(NumericsError, match="no longer finite"):
        train(tmp_path, steps=200, optimizer=OptimizerConfig(kind="sgd", lr=1e30))


def test_a_parameter_that_no_loss_reaches_does_not_stop_a_resume(tmp_path: Path) -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.pooler = network(), nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x)

    torch.manual_seed(2)
    start = Unused().state_dict()

    def model() -> nn.Module:
        made = Unused()
        made.load_state_dict(start)
        return made

    whole = train(tmp_path / "a", model=model(), checkpoint_every=5)
    train(tmp_path / "b", model=model(), checkpoint_every=5)
    import shutil

    shutil.rmtree(tmp_path / "b" / "checkpoints" / "t" / "step-000000012")
    resumed = train(tmp_path / "b", model=model(), checkpoint_every=5)
    assert all(torch.equal(whole.last[k], resumed.last[k]) for k in whole.last)


@pytest.mark.parametrize(("instructions", "meant"), [("avx512_bf16", "bf16"), ("amx_bf16", "bf16"), ("avx2", "no")])
def test_auto_precision_is_what_the_processor_computes_in(
    instructions: str, meant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = dict.fromkeys(torch.cpu.get_capabilities(), False) | {instructions: True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    assert build_accelerator("auto").mixed_precision == meant
    assert is_bf16_slow(build_accelerator("bf16")) == (meant == "no")
    assert not is_bf16_slow(build_accelerator("auto"))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert [resolve_precision(asked) for asked in ("auto", "no", None)] == [meant, "no", "bf16"]


def test_a_precision_does_not_leak_into_the_next_run() -> None:
    assert build_accelerator("bf16").mixed_precision == "bf16"
    assert build_accelerator(None).mixed_precision == "no"


def test_a_launcher_that_asks_for_deepspeed_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="pip install deepspeed") as refused:
        build_accelerator()
    assert "FSDP" in str(refused.value)


def test_processes_that_do_not_see_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    build_accelerator()  # the state of this process says that it is alone
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    with pytest.raises(CapabilityError, match="started 2 processes, but accelerate sees 1"):
        build_accelerator()


def test_only_our_own_drafts_are_swept_away(tmp_path: Path) -> None:
    from tutelage.files import TEMPORARY_PREFIX

    (tmp_path / ".git").mkdir()
    (tmp_path / ".gitignore").touch()
    (tmp_path / f"{TEMPORARY_PREFIX}x").mkdir()
    RunDirectory(tmp_path).sweep()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".git", ".gitignore"]


def test_terms_counts_and_weights_must_name_the_same(tmp_path: Path) -> None:
    class Misnamed(SupervisedMethod):
        def counts(self, batch: Batch) -> dict[str, torch.Tensor]:
            return {"cross_entropy": batch.labelled().sum()}

        def __init__(self) -> None:
            super().__init__()
            self.weights = {"ce": 1.0, "cross_entropy": 1.0}

    with pytest.raises(CapabilityError, match="have different names in different places"):
        train(tmp_path, method=Misnamed())
