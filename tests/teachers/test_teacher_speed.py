"""What makes a teacher faster does what it says, changes what is said by no more than rounding, and no module."""

from __future__ import annotations

import copy
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tutelage
from support.worlds import unsettled
from tutelage import api
from tutelage.config import build_recipe
from tutelage.data import Batch
from tutelage.engine import RunDirectory, Training, build_accelerator, fit
from tutelage.errors import CapabilityError, ModelError
from tutelage.methods import FeatureMethod, LogitMethod, SupervisedMethod, prepare_method
from tutelage.models.small import MLP
from tutelage.progress import Terminal
from tutelage.taps import Needs
from tutelage.teachers import EnsembleTeacher, LiveTeacher, PrefetchingTeacher, Signal
from tutelage.teachers.model_copies import Int8Linear, quantise_linear_layers

COMPILER = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler")
TAPS = Needs(hidden=("stages.0", "head:input"))
TOLERANCE = {"bf16": 0.03, "fp16": 0.004, "int8": 0.03}
"""Largest difference of logits, in units of the largest logit."""


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return unsettled()


def batch(n: int = 7) -> Batch:
    x = torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return Batch(x, torch.arange(n) % 10, ids=torch.arange(n))


def same(a: Signal, b: Signal) -> bool:
    hidden = a.hidden.keys() == b.hidden.keys() and all(torch.equal(x, b.hidden[k]) for k, x in a.hidden.items())
    return hidden and torch.equal(a.dense(), b.dense())


class Noting(nn.Module):
    """Notes what it is run with."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.seen = nn.Linear(4, 3), list[Any]()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((x.dtype, len(x), threading.current_thread().name, os.getpid()))
        out: Tensor = self.inner(x)
        return out

    def __deepcopy__(self, memo: Any) -> Noting:
        made = Noting()
        made.load_state_dict(self.state_dict())
        made.seen = self.seen  # one list, so that a copy that runs is seen
        return made


# In other numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "int8"])
def test_other_numbers_are_near_and_the_module_stays_as_it_was(dtype: Any) -> None:
    model, given = network(), batch()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    kinds = {k: type(m) for k, m in model.named_modules()}
    plain = LiveTeacher(copy.deepcopy(model)).signal(given, TAPS)
    teacher = LiveTeacher(model, dtype=dtype)
    said = teacher.signal(given, TAPS)
    for a, b in ((said.dense(), plain.dense()), *((said.hidden[t], plain.hidden[t]) for t in TAPS.hidden)):
        assert a.dtype == torch.float32
        assert float((a - b).abs().max()) <= TOLERANCE[dtype] * float(b.abs().max())
    assert not torch.equal(said.dense(), plain.dense()), "it must have computed in other numbers"
    model.train()
    assert same(teacher.signal(given, TAPS), said), "a later train() must not reach the copy either"
    assert {k: type(m) for k, m in model.named_modules()} == kinds
    assert all(torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in model.state_dict().items())


def test_the_copy_computes_in_the_numbers_that_were_asked_for() -> None:
    x = Batch(torch.randn(2, 4), torch.zeros(2).long())
    for dtype, expected in (("bf16", torch.bfloat16), ("fp16", torch.float16), (None, torch.float32)):
        model = Noting()
        LiveTeacher(model, dtype=dtype).signal(x, Needs())  # type: ignore[arg-type]
        assert [seen[0] for seen in model.seen] == [expected]
    model = Noting()
    with torch.autocast("cpu", torch.bfloat16):  # the student's precision is not the teacher's
        said = LiveTeacher(model, dtype="fp16").signal(x, Needs())
    assert said.dense().dtype == torch.float32
    torch.testing.assert_close(said.dense(), copy.deepcopy(model).half()(x.inputs.half()).float())


def test_a_head_comes_back_in_float32() -> None:
    head = (
        LiveTeacher(MLP(classes=10, channels=1, size=8), dtype="bf16").signal(batch(), Needs(False, head=True)).head
    )
    assert head is not None
    assert {x.dtype for x in head if isinstance(x, torch.Tensor)} == {torch.float32}


def test_int8_is_what_rounding_to_127_steps_gives() -> None:
    linear, x = nn.Linear(33, 5), torch.randn(2, 3, 33)
    layer = Int8Linear(linear)
    assert layer.quantised.dtype == torch.int8
    steps = x.abs().amax(-1, keepdim=True) / 127
    rounded = (x / steps).round() * steps
    weight, bias = linear.weight.detach(), linear.bias.detach()
    torch.testing.assert_close(layer(x), nn.functional.linear(rounded, layer.weight, bias), rtol=1e-4, atol=1e-5)
    assert float((layer.weight - weight).abs().max()) <= float(weight.abs().max()) / 254 + 1e-7
    assert torch.equal(layer(torch.zeros(1, 33)), bias.unsqueeze(0))
    assert layer(x[:0]).shape == (0, 3, 5)


def test_int8_reaches_every_linear_layer_and_shares_what_was_shared() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.again, self.last = self.first, nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(self.again(self.first(x)))
            return out

    made = quantise_linear_layers(Tied())
    assert made.first is made.again
    assert not any(isinstance(m, nn.Linear) for m in made.modules())
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()  # asks for weights of its layers by name
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        near = quantise_linear_layers(layer)(x)
        torch.testing.assert_close(near, layer(x), atol=0.1, rtol=0.1)
    assert isinstance(quantise_linear_layers(layer).linear1, Int8Linear)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: LiveTeacher(network(), dtype="int4"), "allowed: bf16, fp16, int8"),
        (lambda: LiveTeacher(nn.Conv2d(1, 1, 1), dtype="int8"), "no linear layer"),
        (lambda: LiveTeacher(network(), batch_size=0), "at least 1"),
        (lambda: LiveTeacher(network(), mode="train_bn", batch_size=4), "whole batch"),
        (lambda: LiveTeacher(network(), device="gpu"), "no device 'gpu'"),
        (lambda: LiveTeacher(network(), device="cuda:99"), "no device 'cuda:99'"),
    ],
)
def test_what_cannot_be_is_said(make: Any, says: str) -> None:
    with pytest.raises(CapabilityError) as error:
        make()
    assert says in str(error.value)
    assert error.value.remedy


def test_int8_gives_no_head() -> None:
    assert "head" not in LiveTeacher(network(), dtype="int8").provides


# Compiled ---------------------------------------------------------------------------------------------


@COMPILER
@pytest.mark.parametrize("dtype", [None, "bf16", "int8"])
def test_compiled_it_says_the_same_whatever_is_asked_first(dtype: Any) -> None:
    model, given = network(), batch()
    plain, teacher = LiveTeacher(copy.deepcopy(model), dtype=dtype), LiveTeacher(model, dtype=dtype, compile=True)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype is None else {"rtol": 0.02, "atol": 0.02}
    frames = torch._dynamo.utils.counters["frames"]
    before = frames["ok"]
    for needs in (Needs(), TAPS, Needs(hidden=("stages.1",)), Needs()):  # later taps are not lost
        said, expected = teacher.signal(given, needs), plain.signal(given, needs)
        torch.testing.assert_close(said.dense(), expected.dense(), **tolerance)
        for tap in needs.hidden:
            torch.testing.assert_close(said.hidden[tap], expected.hidden[tap], **tolerance)
    assert frames["ok"] > before, "nothing was compiled"
    assert model._compiled_call_impl is None, "the caller's module must not be"
    before = {k: v.clone() for k, v in model.state_dict().items()}
    teacher.to("cpu").signal(given, Needs())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# In parts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_in_parts_it_says_the_same_of_the_whole(size: int) -> None:
    model, given, needs = network(), batch(), Needs(hidden=("stages.0",), head=True)
    plain, said = LiveTeacher(model).signal(given, needs), LiveTeacher(model, batch_size=size).signal(given, needs)
    torch.testing.assert_close(said.dense(), plain.dense())
    torch.testing.assert_close(said.hidden["stages.0"], plain.hidden["stages.0"])
    assert said.head is not None
    assert plain.head is not None
    torch.testing.assert_close(said.head.inputs, plain.head.inputs)
    noting = Noting()
    LiveTeacher(noting, batch_size=size).signal(Batch(torch.randn(7, 4), torch.zeros(7).long()), Needs())
    assert [seen[1] for seen in noting.seen] == {1: [1] * 7, 3: [3, 3, 1], 7: [7], 100: [7]}[size]


def test_on_a_device_of_its_own_it_answers_where_it_was_asked() -> None:
    teacher = LiveTeacher(network(), device="cpu")
    given = batch()
    teacher.to("meta")  # not moved: it has a device of its own
    assert next(teacher.model.parameters()).device.type == "cpu"
    here = Batch(given.inputs, given.labels)
    assert teacher.signal(here, Needs()).dense().device == here.labels.device


def test_hidden_states_can_be_saved_for_backward() -> None:
    method = prepare_method(
        FeatureMethod(pairs=[{"student": "stages.0", "teacher": "stages.0"}]), network(1), network(), batch(), 0
    )
    student = network(1)
    from tutelage.methods import DistillationModule

    for options in ({}, {"dtype": "bf16"}, {"batch_size": 2}):
        module = DistillationModule(student, method)
        said = LiveTeacher(network(), **options).signal(batch(), method.needs)  # type: ignore[arg-type]
        sum(term.sum for term in module(batch(), said).values()).backward()
    assert all(p.grad is not None for p in student.parameters())


# Asked ahead ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize("process", [False, True])
def test_asked_ahead_it_says_the_same_in_order_and_out_of_it(process: bool) -> None:
    plain, teacher = LiveTeacher(network()), PrefetchingTeacher(LiveTeacher(network()), process=process)
    try:
        given = [batch(n) for n in (3, 5, 7, 2)]
        waits = [teacher.prefetch(b, TAPS) for b in given]
        for i in (0, 2, 1, 3):
            assert same(waits[i](), plain.signal(given[i], TAPS))
        teacher.prefetch(given[0], TAPS)  # never fetched, as when a training is stopped
        assert same(teacher.signal(given[1], Needs()), plain.signal(given[1], Needs()))
        with torch.autocast("cpu", torch.bfloat16):
            wait, expected = teacher.prefetch(given[0], Needs()), plain.signal(given[0], Needs())
        assert same(wait(), expected), "mixed precision goes along"
        assert teacher.provides == plain.provides
    finally:
        teacher.close()
    teacher.close()


def test_it_computes_beside_the_student() -> None:
    model = Noting()
    teacher = PrefetchingTeacher(LiveTeacher(model))
    teacher.signal(Batch(torch.randn(2, 4), torch.zeros(2).long()), Needs())
    teacher.close()
    assert model.seen[0][2].startswith("teacher")


class Slow(nn.Module):
    """Ends its work only once the student has taken its step."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)
        self.has_started, self.student_is_done = threading.Event(), threading.Event()

    def forward(self, x: Tensor) -> Tensor:
        self.has_started.set()
        assert self.student_is_done.wait(60), "the student waits for the teacher"
        out: Tensor = self.inner(x)
        return out


def test_waiting_for_the_teacher_and_the_student_s_step_overlap() -> None:
    given = Batch(torch.randn(2, 4), torch.zeros(2).long())
    model = Slow()
    teacher = PrefetchingTeacher(LiveTeacher(model))
    for _ in range(3):
        wait = teacher.prefetch(given, Needs())
        assert model.has_started.wait(60)
        model.student_is_done.set()
        assert wait().dense().shape == (2, 3)
        model.has_started.clear()
        model.student_is_done.clear()
    teacher.close()


class Failing(nn.Module):
    """Fails at what it is given."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner, self.how = nn.Linear(4, 3), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "exit":
            os._exit(7)
        if self.how == "ours":
            raise CapabilityError("no", remedy="yes")
        raise RuntimeError("broken within")


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize(
    ("how", "process", "error", "says"),
    [
        ("any", False, RuntimeError, "broken within"),
        ("any", True, ModelError, "RuntimeError: broken within"),
        ("ours", True, CapabilityError, "-> yes"),
        ("exit", True, ModelError, "exit code 7"),
    ],
)
def test_what_goes_wrong_elsewhere_is_raised_here(how: str, process: bool, error: Any, says: str) -> None:
    teacher = PrefetchingTeacher(LiveTeacher(Failing(how)), process=process)
    try:
        with pytest.raises(error, match=says):
            teacher.signal(Batch(torch.randn(2, 4), torch.zeros(2).long()), Needs())
    finally:
        teacher.close()


def test_a_teacher_that_cannot_be_sent_is_refused() -> None:
    class Local(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(CapabilityError, match="cannot be sent") as error:
        PrefetchingTeacher(LiveTeacher(Local()), process=True)
    assert "define its class in a module" in str(error.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_stream_of_its_own_it_says_the_same() -> None:
    plain = LiveTeacher(network()).to("cuda")
    teacher = PrefetchingTeacher(LiveTeacher(network()).to("cuda"))
    given = [batch(n).to("cuda") for n in (64, 32, 16)]
    for wait, b in zip([teacher.prefetch(b, TAPS) for b in given], given, strict=True):
        torch.testing.assert_close(wait().dense(), plain.signal(b, TAPS).dense())


# In a training ----------------------------------------------------------------------------------------


class Steps:
    """Three steps an epoch, of two micro-batches where asked, and a note of when each is drawn."""

    steps_per_epoch, ids = 3, None

    def __init__(self) -> None:
        self.drawn = 0

    def epoch(self, epoch: int, share: Any, skip: int = 0) -> Any:
        for step in range(skip, 3):
            self.drawn += 1
            x = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(10 * epoch + step))
            whole = Batch(x, torch.arange(8))
            yield [whole.rows(start, stop) for start, stop in share.micro_batches(8)]


def trained(teacher: Any, tmp_path: Path, **config: Any) -> tuple[dict[str, Tensor], int]:
    from tutelage.config import TrainConfig

    torch.manual_seed(0)
    steps = Steps()
    student = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(64, 10))
    training = Training(
        "student", student, LogitMethod(), steps, TrainConfig(**{"steps": 7, **config}), RunDirectory(tmp_path),
        teacher=teacher,
    )  # fmt: skip
    return fit(training, build_accelerator(None, [])).last, steps.drawn


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize("process", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_student_taught_ahead_gets_the_same_bits(tmp_path: Path, process: bool, accumulate: int) -> None:
    plain, drawn = trained(LiveTeacher(network()), tmp_path / "a", accumulate=accumulate)
    ahead = PrefetchingTeacher(LiveTeacher(network()), process=process)
    said, drawn_ahead = trained(ahead, tmp_path / "b", accumulate=accumulate)
    ahead.close()
    assert all(torch.equal(x, said[k]) for k, x in plain.items())
    assert drawn_ahead == drawn == 7, "no batch beyond the last step is drawn"


def test_a_method_without_a_teacher_asks_nobody_ahead(tmp_path: Path) -> None:
    class Never(LiveTeacher):
        def signal(self, batch: Batch, needs: Needs) -> Signal:
            raise AssertionError

    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    from tutelage.config import TrainConfig

    training = Training(
        "student", student, SupervisedMethod(), Steps(), TrainConfig(steps=3), RunDirectory(tmp_path),
        teacher=PrefetchingTeacher(Never(network())),
    )  # fmt: skip
    fit(training, build_accelerator(None, []))


def recipe(**inference: Any) -> dict[str, Any]:
    return {
        "name": "fast",
        "data": {"source": "digits", "limit": 300, "augment": [{"shift": 1}]},
        "teacher": {"model": "mlp", "options": {"hidden": [24]}, **({"inference": inference} if inference else {})},
        "student": {"model": "mlp", "options": {"hidden": [4]}},
        "method": {"kind": "logit"},
        "train": {"steps": 25, "batch_size": 32, "optimizer": {"kind": "adam", "lr": 0.01}},
    }


@pytest.mark.parametrize("inference", [{"overlap": True}, {"process": True}, {"batch_size": 5}, {"dtype": "int8"}])
def test_a_recipe_s_speed_reaches_the_teacher(tmp_path: Path, inference: dict[str, Any]) -> None:
    quiet = Terminal(speaks=False)
    plain = api.run(build_recipe(recipe()), out=tmp_path / "plain", terminal=quiet)
    fast = api.run(build_recipe(recipe(**inference)), out=tmp_path / "fast", terminal=quiet)
    a, b = (p.summary["students"]["distilled"]["last"]["loss"]["mean"] for p in (plain, fast))
    assert a == b if inference.keys() & {"overlap", "process"} else a == pytest.approx(b, abs=0.02)
    loss = fast.summary["teacher"]["loss"]
    if "batch_size" in inference:  # batches of another size are added up in another order on some processors
        loss = pytest.approx(loss, rel=1e-6)
    same = plain.summary["teacher"]["loss"] == loss
    assert same != ("dtype" in inference), "the teacher's figures are of it as it runs"


def test_members_take_their_speed_from_the_teacher_unless_they_have_one(tmp_path: Path) -> None:
    given = recipe()
    member = {"model": "mlp", "options": {"hidden": [24]}}
    given["teacher"] = {"members": [member, {**member, "inference": {"dtype": "bf16"}}],
                        "inference": {"dtype": "int8", "batch_size": 9, "overlap": True}}  # fmt: skip
    from tutelage.experiment.recipe_source import load_data, recipe_spec

    loaded = build_recipe(given)
    teacher = recipe_spec(loaded, load_data(loaded, Terminal(speaks=False))).teacher
    assert teacher is not None
    assert teacher.ensemble is not None
    assert [dict(m.inference) for m in teacher.members] == [
        {"dtype": "int8", "batch_size": 9}, {"dtype": "bf16", "batch_size": 9},
    ]  # fmt: skip
    assert teacher.prefetch == "overlap"


def test_distill_takes_a_speed(tmp_path: Path) -> None:
    model = Noting()
    data = [(torch.randn(6, 4), torch.arange(6) % 3)]
    with torch.no_grad():  # a teacher that knows
        data = [(x, model.inner(x).argmax(-1)) for x, _ in data]
    tutelage.distill(
        model, nn.Linear(4, 3), data, eval_data=data, epochs=1, inference={"dtype": "bf16", "batch_size": 4},
        out=tmp_path / "out", verbose=False,
    )  # fmt: skip
    taught = [seen for seen in model.seen if seen[0] == torch.bfloat16]
    assert {seen[1] for seen in taught} <= {2, 4}
    assert 4 in {seen[1] for seen in taught}


def test_an_ensemble_is_asked_ahead_as_a_whole() -> None:
    members = [LiveTeacher(network(seed)) for seed in range(2)]
    for process in (False, True):
        ahead = PrefetchingTeacher(EnsembleTeacher(members), process=process)
        assert same(ahead.signal(batch(), Needs()), EnsembleTeacher(members).signal(batch(), Needs()))
        ahead.close()
