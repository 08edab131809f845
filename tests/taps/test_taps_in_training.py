"""Taps over many steps, in compiled models, with checkpointing, under the engine and in several processes."""

from __future__ import annotations

import copy
import shutil
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.launching import launch
from support.numbered import TAPS, WIDTH, Numbered, allocated, hooks, numbered, tensors
from support.worlds import WORLDS, World
from tutelage.config import OptimizerConfig, TrainConfig
from tutelage.data import Batch, LoaderBatches
from tutelage.engine import RunDirectory, Training, build_accelerator, fit
from tutelage.engine.loop import NullCallback
from tutelage.methods import DistillationModule, FeatureMethod, Method, Term, prepare_method
from tutelage.models.small import ConvNet
from tutelage.taps import (
    Needs,
    Observation,
    Observer,
)
from tutelage.teachers import LiveTeacher, Signal

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
COMPILER = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler")


def test_the_meter_of_memory_sees_one_feature() -> None:
    before = allocated()
    kept = torch.zeros(64, WIDTH)
    assert allocated() - before >= kept.nbytes


def train_numbered(model: Numbered, steps: int = 300, taps: tuple[str, ...] = TAPS) -> None:
    """Train with evaluations in between; each feature is that of its own batch, and memory is flat."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    feature = 64 * WIDTH * 4
    at: dict[int, tuple[int, int]] = {}
    released: list[weakref.ref[Tensor]] = []
    with Observer(model, Needs(hidden=taps)) as observer:
        for step in range(steps):
            if step % 7 == 3:  # an evaluation, of other batches, in between
                model.eval()
                with torch.no_grad():
                    model(numbered(-step))
                model.train()
            x = numbered(step)
            seen = observer(x)
            with torch.no_grad():
                want = model.expected(x)
            for tap in taps:
                torch.testing.assert_close(seen.hidden[tap], want[tap], rtol=1e-4, atol=1e-5)
            loss = seen.logits.square().mean() + sum(h.square().mean() for h in seen.hidden.values())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % 7 == 4:  # between backward and the next forward
                with torch.no_grad():
                    model(numbered(-step))
            released = [weakref.ref(h) for h in seen.hidden.values()]
            del seen, loss, want, x
            assert not any(ref() is not None for ref in released), f"step {step} leaves its features behind"
            if step in (steps // 5, steps - 1):
                at[step] = tensors(), allocated()
    (tensors_before, bytes_before), (tensors_after, bytes_after) = at.values()
    assert tensors_after == tensors_before
    assert bytes_after - bytes_before < 2 * feature, (
        f"{bytes_after - bytes_before} bytes more, a feature has {feature}"
    )
    assert hooks(model) == 0


def test_many_steps_with_evaluations_in_between() -> None:
    train_numbered(Numbered())


def test_many_compiled_steps_with_evaluations_in_between() -> None:
    model = Numbered()
    model.compile(backend="aot_eager", fullgraph=True)
    train_numbered(model)


@COMPILER
@pytest.mark.slow
def test_a_thousand_steps_through_inductor() -> None:
    model = Numbered()
    model.compile()
    train_numbered(model, 1000)


def test_many_checkpointed_steps() -> None:
    train_numbered(Numbered(checkpointed=True))


def test_compiled_checkpointed_steps() -> None:
    model = Numbered(checkpointed=True)
    model.compile(backend="aot_eager")
    train_numbered(model, 100)


def test_checkpointing_gives_the_gradient_that_there_is_without() -> None:
    plain, checkpointed = Numbered(), Numbered(checkpointed=True)
    checkpointed.load_state_dict(plain.state_dict())
    gradients = []
    for model in (plain, checkpointed):
        with Observer(model, Needs(hidden=TAPS)) as observer:
            seen = observer(numbered(1))
            (seen.logits.sum() + sum(h.square().sum() for h in seen.hidden.values())).backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("compiled", [False, True])
def test_under_autocast_a_feature_has_the_models_precision_and_its_gradient(compiled: bool) -> None:
    model = Numbered()
    reference = copy.deepcopy(model)
    with Observer(model, Needs(hidden=TAPS)) as observer:
        if compiled:
            model.compile(backend="aot_eager")
        with torch.autocast("cpu", torch.bfloat16):
            seen = observer(numbered(1))
            want = reference.expected(numbered(1))
            logits = reference(numbered(1))
    for tap in TAPS:
        assert seen.hidden[tap].dtype == torch.bfloat16
        torch.testing.assert_close(seen.hidden[tap], want[tap])
    for m, out, hidden in ((model, seen.logits, seen.hidden), (reference, logits, want)):
        (out.float().sum() + sum(h.float().square().mean() for h in hidden.values())).backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in m.parameters())
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0.02, atol=0.02)


class Watching(Method):
    """Learns from a tap, and checks that it has the batch at hand."""

    needs = None
    student_needs = Needs(hidden=(":input", "stages.0"))

    def __init__(self) -> None:
        super().__init__()
        self.weights = {"norm": 1.0}
        self.seen: list[int] = []

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"norm": torch.tensor(len(batch.labels))}

    def forward(self, student: Observation, batch: Batch, signal: Signal) -> dict[str, Term]:
        assert torch.equal(student.hidden[":input"], batch.inputs)
        self.seen.append(len(batch.labels))
        return {"norm": Term(student.hidden["stages.0"].square().mean((1, 2, 3)).sum(), self.counts(batch)["norm"])}


def short() -> World:
    """Two batches to train on and one to evaluate on, none of a size that another has: each size is compiled anew."""
    world = WORLDS["cnn"]()
    return replace(world, train=world.train[2:], held=world.held[1:])


@pytest.fixture
def compiles_lightly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``Module.compile`` without a C++ compiler."""
    whole = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: whole(self, backend="aot_eager"))
    return


@pytest.mark.parametrize("compiled", [False, True])
def test_fit_trains_on_taps_and_leaves_no_hook(tmp_path: Path, compiled: bool, compiles_lightly: None) -> None:
    world = short()
    student, method = world.make(4), Watching()
    batches = LoaderBatches(world.train, 0, world.to_batch)
    config = TrainConfig(steps=5, compile=compiled, evaluate_every=2, optimizer=OptimizerConfig(lr=1e-2))
    training = Training("t", student, method, batches, config, RunDirectory(tmp_path),
                        validation=[world.to_batch(b) for b in world.held])  # fmt: skip
    fit(training, build_accelerator())
    assert len(method.seen) == 5
    assert hooks(student) == 0


def test_a_compiled_student_that_runs_before_its_first_step_is_tapped_all_the_same(
    tmp_path: Path, compiles_lightly: None
) -> None:
    class Looks(NullCallback):
        def on_start(self, name: str, step: int, total: int) -> None:
            student.train()(world.to_batch(world.train[0]).inputs)

    world = WORLDS["cnn"]()
    student, method = world.make(4), Watching()
    training = Training("t", student, method, LoaderBatches(world.train, 0, world.to_batch),
                        TrainConfig(steps=2, compile=True), RunDirectory(tmp_path), callback=Looks())  # fmt: skip
    fit(training, build_accelerator())
    assert len(method.seen) == 2


def test_fit_leaves_no_hook_after_an_error_either(tmp_path: Path) -> None:
    class Fails(Watching):
        def forward(self, *args: Any) -> dict[str, Term]:
            assert hooks(student)
            raise RuntimeError("in the middle")

    world = WORLDS["cnn"]()
    student = world.make(4)
    training = Training("t", student, Fails(), LoaderBatches(world.train, 0, world.to_batch), TrainConfig(steps=3),
                        RunDirectory(tmp_path))  # fmt: skip
    with pytest.raises(RuntimeError, match="in the middle") as error:
        fit(training, build_accelerator())
    assert error.traceback
    assert hooks(student) == 0


def test_the_feature_method_compiled_learns_what_it_learns_without(tmp_path: Path, compiles_lightly: None) -> None:
    world = short()
    ends = []
    for compiled in (False, True):
        torch.manual_seed(1)
        student, teacher = world.make(4), world.make(8)
        example = world.to_batch(world.train[0])
        method = prepare_method(FeatureMethod(pairs="auto"), student, teacher, example, seed=0)
        config = TrainConfig(steps=4, compile=compiled, evaluate_every=2, optimizer=OptimizerConfig(lr=1e-2))
        training = Training("t", student, method, LoaderBatches(world.train, 0, world.to_batch), config,
                            RunDirectory(tmp_path / str(compiled)), teacher=LiveTeacher(teacher),
                            validation=[world.to_batch(b) for b in world.held])  # fmt: skip
        fit(training, build_accelerator())
        ends.append(dict(student.named_parameters()))
        del training
        assert hooks(student) == hooks(teacher) == 0
    for name in ends[0]:
        torch.testing.assert_close(ends[0][name], ends[1][name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_method_that_needs_nothing_of_the_student_does_not_run_it() -> None:
    class Alone(Watching):
        student_needs = None

        def forward(self, student: Observation, batch: Batch, signal: Signal) -> dict[str, Term]:
            assert student == Observation()
            return {"norm": Term(torch.zeros((), requires_grad=True), self.counts(batch)["norm"])}

    module = DistillationModule(nn.Linear(2, 2), Alone())
    module.open()
    assert module(Batch(torch.zeros(3, 5), torch.zeros(3, dtype=torch.long)), None)["norm"].count == 3


def test_a_trainee_follows_its_method_when_it_needs_something_else() -> None:
    world = WORLDS["cnn"]()
    batch, method = world.to_batch(world.train[0]), Watching()
    module = DistillationModule(world.make(4), method)
    module(batch, None)
    method.student_needs = Needs(hidden=(":input", "stages.0", "stages.1"))
    module(batch, None)
    assert hooks(module.student) == 3
    module.close()
    assert hooks(module.student) == 0


def test_a_teachers_taps_stay_until_it_is_closed_or_gone() -> None:
    model = ConvNet(classes=3, channels=1, widths=(4, 8), depth=1)
    batch = Batch(torch.randn(2, 1, 8, 8), torch.zeros(2, dtype=torch.long))
    teacher = LiveTeacher(model)
    for needs in (Needs(hidden=("stages.0",)), Needs(), Needs(hidden=("stages.1",))) * 2:
        assert set(teacher.signal(batch, needs).hidden) == set(needs.hidden)
    assert hooks(model) == 2
    teacher.close()
    assert hooks(model) == 0
    teacher.signal(batch, Needs(hidden=("stages.0",)))
    del teacher
    assert hooks(model) == 0


@pytest.mark.parametrize(
    ("kind", "steps"),
    [
        ("ddp", 60),
        ("ddp-compiled", 21),
        ("fsdp", 40),
        pytest.param("ddp", 1000, marks=pytest.mark.slow),
        pytest.param("ddp-compiled", 1000, marks=pytest.mark.slow),
        pytest.param("fsdp", 1000, marks=pytest.mark.slow),
    ],
)
def test_two_processes_see_their_own_batches_and_keep_none(kind: str, steps: int) -> None:
    launch(2, "-m", "support.taps_job", kind, str(steps))
