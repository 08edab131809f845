"""What is captured is what the module gave, once, of this batch, and nothing is left behind."""

from __future__ import annotations

import copy
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from support.launching import launch
from support.numbered import TAPS, WIDTH, Halves, Numbered, allocated, hooks, numbered, tensors
from support.worlds import WORLDS
from tutelage.config import OptimizerConfig, TrainConfig
from tutelage.data import Batch, LoaderBatches
from tutelage.engine import RunDirectory, Training, fit, make_accelerator
from tutelage.engine.callbacks import Silent
from tutelage.errors import ModelError
from tutelage.methods import DistillationModule, FeatureMethod, Method, Term, prepare_method
from tutelage.models.small import ConvNet
from tutelage.taps import (
    Needs,
    Observation,
    Observer,
    compile_apart,
    find_module,
    logits_of,
    observe,
    output_head,
    parse_tap,
)
from tutelage.teachers import LiveTeacher, Signal

# torch.compile looks at .grad of whatever it meets after a graph break, and hides the warning that this gives.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
COMPILER = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler")


def see(model: nn.Module, x: Any, *taps: str) -> list[Tensor]:
    hidden = observe(model, x, Needs(hidden=taps)).hidden
    return [hidden[tap] for tap in taps]


# What a tap can say -------------------------------------------------------------------------------------


class Attention(nn.Module):
    def forward(self, hidden: Tensor, *, scale: float = 1.0, mask: Tensor | None = None) -> tuple[Any, ...]:
        return None, hidden * scale, {"mask": mask, "deep": [hidden + 1, hidden + 2]}


class Dictionary(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"plus": x + 1, "minus": x - 1}


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.dictionary, self.halves = Attention(), Dictionary(), Halves()
        self.shared, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)
        self.named = nn.ModuleDict({"a:b": nn.Linear(4, 4)})

    def forward(self, x: Tensor) -> Tensor:
        self.attention(x, scale=3.0, mask=x > 0)
        self.attention.forward(x)  # goes round the hooks
        self.dictionary(x=x)
        self.halves(x)
        self.named["a:b"](x)
        for _ in range(3):
            x = self.shared(x)
        return x


def calls(model: Everything, x: Tensor) -> list[Tensor]:
    first = model.shared(x)
    second = model.shared(first)
    return [first, second, model.shared(second)]


FORMS: dict[str, Callable[[Everything, Tensor], Tensor]] = {
    "attention": lambda m, x: 3 * x,  # the first tensor of a tuple
    "attention[1]": lambda m, x: 3 * x,
    "attention[-2]": lambda m, x: 3 * x,
    "attention[2][deep][0]": lambda m, x: x + 1,
    "attention[2][deep][-1]": lambda m, x: x + 2,
    "attention[2][mask]": lambda m, x: x > 0,
    "attention:input": lambda m, x: x,
    "attention:input[0]": lambda m, x: x,
    "attention:input[hidden]": lambda m, x: x,  # by name, passed by position
    "attention:input[mask]": lambda m, x: x > 0,
    "attention@0:output[1]": lambda m, x: 3 * x,
    "dictionary[minus]": lambda m, x: x - 1,
    "dictionary:input": lambda m, x: x,  # by position, passed by name
    "dictionary:input[0]": lambda m, x: x,
    "halves": lambda m, x: x / 2,
    "halves[double]": lambda m, x: x * 2,
    "halves[1]": lambda m, x: x * 2,
    "shared@0": lambda m, x: calls(m, x)[0],
    "shared@1": lambda m, x: calls(m, x)[1],
    "shared@-1": lambda m, x: calls(m, x)[2],
    "shared@-3": lambda m, x: calls(m, x)[0],
    "shared@2:input": lambda m, x: calls(m, x)[1],
    "named.a:b": lambda m, x: m.named["a:b"](x),  # a name that holds a character of the grammar
    ":input": lambda m, x: x,
    "": lambda m, x: calls(m, x)[2],
}


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_each_form_means_that_very_tensor(backend: str | None) -> None:
    model, x = Everything(), torch.randn(3, 4)
    with Observer(model, Needs(hidden=tuple(FORMS))) as observer:
        if backend:
            model.compile(backend=backend, fullgraph=True)
        for _ in range(2):
            seen = observer(x).hidden
            assert list(seen) == list(FORMS)
            for tap, want in FORMS.items():
                torch.testing.assert_close(seen[tap], want(model, x), msg=lambda m, tap=tap: f"{tap}: {m}")
            x = torch.randn(3, 4)
    assert hooks(model) == 0


def test_two_compiled_models_of_a_class_keep_their_taps_apart() -> None:
    first, second = (ConvNet(classes=3, channels=1, widths=(4, 8), depth=1).eval() for _ in range(2))
    x = torch.randn(2, 1, 8, 8)
    with Observer(first, Needs()) as observer:
        compile_apart(first, backend="eager")
        torch.testing.assert_close(observer(x).logits, first._call_impl(x))
    with Observer(second, Needs(hidden=("stages.0",))) as observer:  # whose graph must not be the first one's
        compile_apart(second, backend="eager")
        torch.testing.assert_close(observer(x).hidden["stages.0"], second.stages[0](x))


def test_find_knows_the_grammar() -> None:
    model = Everything()
    assert find_module(model, "shared@0:input[x]") is model.shared
    assert find_module(model, "named.a:b") is model.named["a:b"]
    assert find_module(model, "[logits]") is find_module(model, "") is model
    tap = parse_tap("layer.1@-2:input[states][0]")
    assert (tap.path, tap.call, tap.side, tap.items) == ("layer.1", -2, "input", ("states", "0"))


@pytest.mark.parametrize(
    ("tap", "says"),
    [
        ("layer[", "square brackets"),
        ("layer[]", "square brackets"),
        ("layer@", "number of a call"),
        ("layer@first", "number of a call"),
        ("layer:gradient", "not 'gradient'"),
        ("layer:input@0", "another order"),
        ("layer[0]@1", "another order"),
        ("layer[0]x", "another order"),
    ],
)
def test_what_is_no_tap_says_why_and_what_one_is(tap: str, says: str) -> None:
    with pytest.raises(ModelError, match=says) as error:
        observe(Everything(), torch.zeros(1, 4), Needs(hidden=(tap,)))
    assert repr(tap) in str(error.value)
    assert "layer.1:input[hidden_states]" in str(error.value)


@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize(
    ("tap", "says"),
    [
        ("shared", ["ran 3 times", "shared@0 is the first, shared@2 the last"]),
        ("shared:input", ["ran 3 times", "shared@2:input the last"]),
        ("shared@3", ["ran 3 times", "no call 3", "shared@0 to shared@2"]),
        ("shared@-4", ["ran 3 times", "no call -4"]),
        ("unused", ["gave nothing"]),
        ("dictionary", ["is a dict, not a tensor", "dictionary[plus], dictionary[minus]"]),
        ("dictionary[plsu]", ["no item 'plsu'", "plus, minus"]),
        ("dictionary[0]", ["no item '0'", "plus, minus"]),
        ("halves[2]", ["no item '2'", "half, double"]),
        ("halves[half][0]", ["no item '0'", "Tensor"]),
        ("attention[0]", ["NoneType, not a tensor"]),
        ("attention[2]", ["attention[2][mask], attention[2][deep]"]),
        ("attention:input[scale]", ["float, not a tensor"]),
        ("attention:input[x]", ["is not passed", "hidden", "mask"]),
        ("attention:input[3]", ["is not passed"]),
    ],
)
def test_a_tap_without_one_tensor_is_an_error_and_not_another_feature(
    tap: str, says: list[str], backend: str | None
) -> None:
    model = Everything()
    if backend:
        model.compile(backend=backend)
    with pytest.raises(ModelError) as error, Observer(model, Needs(hidden=("halves", tap))) as observer:
        observer(torch.zeros(1, 4))
    assert "\n  -> " in str(error.value)
    assert [part for part in [tap, *says] if part not in str(error.value)] == []
    assert hooks(model) == 0


def test_unknown_paths_name_the_three_nearest() -> None:
    model = ConvNet(classes=3, channels=1, widths=(4, 8, 8), depth=1)
    for tap in ("stage.1", "stage.1@0:input[x]"):
        with pytest.raises(ModelError, match=r"no module 'stage\.1'\n  -> nearest: stages\.1, [^,]+, [^,]+$"):
            find_module(model, tap)
    with pytest.raises(ModelError, match=r"nearest: stages, stages\.0, stages\.0\.0"):
        observe(model, torch.zeros(1, 1, 8, 8), Needs(hidden=("%%%",)))
    with pytest.raises(ModelError, match="no modules inside"):
        find_module(nn.ReLU(), "x")


def test_hidden_states_are_those_of_the_named_modules() -> None:
    model = ConvNet(classes=3, channels=1, widths=(4, 8), depth=1).eval()
    x = torch.randn(2, 1, 8, 8)
    seen = observe(model, x, Needs(hidden=("stages.0", "stages.1")))
    torch.testing.assert_close(seen.hidden["stages.0"], model.stages[0](x))
    torch.testing.assert_close(seen.hidden["stages.1"], model.stages(x))
    torch.testing.assert_close(seen.logits, model(x))
    assert hooks(model) == 0


def test_taps_read_a_hugging_face_model_by_item_and_by_keyword() -> None:
    world = WORLDS["llama"]()
    model, inputs = world.make(8).eval(), world.to_batch(world.train[0]).inputs
    block, last, logits, into = see(
        model, inputs, "model.layers.0", "model[last_hidden_state]", "[logits]",
        "model.layers.0.self_attn:input[hidden_states]",
    )  # fmt: skip
    torch.testing.assert_close(last, model.model.norm(block))
    torch.testing.assert_close(logits, model.lm_head(last))
    ids = inputs["input_ids"]
    torch.testing.assert_close(into, model.model.layers[0].input_layernorm(model.model.embed_tokens(ids)))


# Traps ------------------------------------------------------------------------------------------------------


def test_what_the_model_does_in_place_afterwards_does_not_reach_the_feature() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.relu, self.two = nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.one(x)
            y += 1
            return self.two(self.relu(y))

    model, x = InPlace(), torch.randn(8, 4)
    before, rectified, logits = see(model, x, "one", "relu", "")
    torch.testing.assert_close(before, model.one(x))
    torch.testing.assert_close(rectified, (model.one(x) + 1).relu())
    torch.testing.assert_close(logits, model.two((model.one(x) + 1).relu()))
    gradient = torch.autograd.grad(before.square().sum() + logits.sum(), model.one.weight)[0]
    y = model.one(x)
    want = torch.autograd.grad(y.square().sum() + model.two((y + 1).relu()).sum(), model.one.weight)[0]
    torch.testing.assert_close(gradient, want)
    kept = before.clone()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    torch.testing.assert_close(before, kept)


def test_hooks_are_gone_after_an_error_too() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises(RuntimeError):
        observe(model, torch.zeros(1, 2), Needs(logits=False, hidden=("0",), head=True))
    with pytest.raises(ModelError):
        observe(model, torch.zeros(1, 2), Needs(hidden=("0", "3")))
    assert hooks(model) == 0
    assert "forward" not in model[2].__dict__


def test_hooks_are_gone_with_the_observer() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    observer = Observer(model, Needs(hidden=("0",), head=True))
    assert hooks(model) == 2
    del observer
    assert hooks(model) == 0
    observer = Observer(model, Needs(hidden=("0",)))
    observer.close()
    with pytest.raises(ModelError, match="closed"):
        observer(torch.zeros(1, 2))


def test_a_module_that_did_not_run_is_an_error_and_not_the_feature_of_the_batch_before() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x)) if x.sum() > 0 else self.two(x)

    model = Sometimes()
    with Observer(model, Needs(hidden=("one",))) as observer:
        assert observer(torch.ones(1, 2)).hidden["one"].shape == (1, 2)
        model(torch.ones(1, 2))
        with pytest.raises(ModelError, match="'one' gave nothing"):
            observer(torch.zeros(1, 2))


def test_a_failed_run_leaves_nothing_to_the_next() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.fail = nn.Linear(2, 2), True

        def forward(self, x: Tensor) -> Tensor:
            y = self.one(x)
            if self.fail:
                raise RuntimeError("no")
            return y

    model = Fails()
    with Observer(model, Needs(hidden=("one",))) as observer:
        with pytest.raises(RuntimeError):
            observer(torch.ones(1, 2))
        model.fail = False
        torch.testing.assert_close(observer(torch.zeros(1, 2)).hidden["one"], model.one(torch.zeros(1, 2)))


def test_late_hooks_on_a_compiled_model_are_not_ignored_in_silence() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model.compile(backend="eager")
    x = torch.randn(3, 2)
    observe(model, x, Needs())
    try:
        seen = observe(model, x, Needs(hidden=("0",)))
    except ModelError as error:
        assert "compiled" in str(error)  # noqa: PT017 - either outcome is right; an empty feature is not
    else:
        torch.testing.assert_close(seen.hidden["0"], model[0](x))


@pytest.mark.parametrize("wrapped", [False, True])
def test_one_observer_after_another_on_a_compiled_model_sees_its_own_batch(wrapped: bool) -> None:
    inner = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    model = torch.compile(inner, backend="eager") if wrapped else inner
    if not wrapped:
        inner.compile(backend="eager")
    assert find_module(model, "0") is inner[0]  # also through the wrapper
    for i in range(4):
        x = torch.full((3, 2), float(i))
        torch.testing.assert_close(see(model, x, "0")[0], inner[0](x))


def test_head_is_still_skipped_in_a_compiled_model_and_only_while_it_is_observed() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5))
    with Observer(model, Needs(logits=False, head=True)) as observer:
        model.compile(backend="aot_eager")
        for _ in range(3):
            x = torch.randn(2, 4)
            seen = observer(x)
            assert seen.logits is None
            torch.testing.assert_close(seen.head.inputs, model[0](x))
            assert model(x).shape == (2, 5)


def test_a_tap_inside_a_reentrant_checkpoint_is_an_error_and_not_a_feature_without_gradient() -> None:
    class Checkpointed(nn.Module):
        def __init__(self, reentrant: bool) -> None:
            super().__init__()
            self.block, self.head, self.reentrant = nn.Linear(4, 4), nn.Linear(4, 2), reentrant

        def forward(self, x: Tensor) -> Tensor:
            return self.head(checkpoint(self.block, x, use_reentrant=self.reentrant))

    x = torch.randn(3, 4, requires_grad=True)
    for backend in (None, "aot_eager"):
        model = Checkpointed(True)
        with Observer(model, Needs(hidden=("block",))) as observer:
            if backend:
                model.compile(backend=backend)
            with pytest.raises(ModelError, match="re-entrant") as error:
                observer(x)
            assert "use_reentrant=False" in str(error.value)
            with torch.no_grad():
                observer(x)  # nothing is learned here
            model.requires_grad_(False)
            observer(x)  # nor here
    assert see(Checkpointed(False), x, "block")[0].requires_grad
    assert see(Checkpointed(True), x, "head:input")[0].requires_grad


def test_a_frozen_part_may_be_tapped() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.trunk(x)
            return self.head(x)

    model, x = Frozen(), torch.randn(3, 4)
    assert not see(model, x, "trunk")[0].requires_grad
    plain = nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 2))
    assert not see(plain, x, "0")[0].requires_grad


def test_logits_and_head_are_found_or_missed_aloud() -> None:
    with pytest.raises(ModelError, match="without logits"):
        logits_of({"x": torch.zeros(1)})
    with pytest.raises(ModelError, match="no linear output"):
        output_head(nn.ReLU())
    assert observe(nn.Linear(2, 2), torch.zeros(1, 3), None) == Observation()  # is not even run


# A thousand steps ---------------------------------------------------------------------------------------------


def test_the_meter_of_memory_sees_one_feature() -> None:
    before = allocated()
    kept = torch.zeros(64, WIDTH)
    assert allocated() - before >= kept.nbytes


def train_numbered(model: Numbered, steps: int = 1000, taps: tuple[str, ...] = TAPS) -> None:
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


def test_a_thousand_steps_with_evaluations_in_between() -> None:
    train_numbered(Numbered())


def test_a_thousand_compiled_steps_with_evaluations_in_between() -> None:
    model = Numbered()
    model.compile(backend="aot_eager", fullgraph=True)
    train_numbered(model)


@COMPILER
@pytest.mark.slow
def test_a_thousand_steps_through_inductor() -> None:
    model = Numbered()
    model.compile()
    train_numbered(model)


def test_a_thousand_checkpointed_steps() -> None:
    train_numbered(Numbered(checkpointed=True))


def test_compiled_checkpointed_steps() -> None:
    model = Numbered(checkpointed=True)
    model.compile(backend="aot_eager")
    train_numbered(model, 200)


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


# In a training ----------------------------------------------------------------------------------------------


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

    def forward(self, student: Observation, batch: Batch, signal: Signal | None) -> dict[str, Term]:
        assert torch.equal(student.hidden[":input"], batch.inputs)
        self.seen.append(len(batch.labels))
        return {"norm": Term(student.hidden["stages.0"].square().mean((1, 2, 3)).sum(), self.counts(batch)["norm"])}


@pytest.fixture
def compiles_lightly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``Module.compile`` without a C++ compiler."""
    whole = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: whole(self, backend="aot_eager"))
    return


@pytest.mark.parametrize("compiled", [False, True])
def test_fit_trains_on_taps_and_leaves_no_hook(tmp_path: Path, compiled: bool, compiles_lightly: None) -> None:
    world = WORLDS["cnn"]()
    student, method = world.make(4), Watching()
    batches = LoaderBatches(world.train, 0, world.to_batch)
    config = TrainConfig(steps=9, compile=compiled, evaluate_every=2, optimizer=OptimizerConfig(lr=1e-2))
    training = Training("t", student, method, batches, config, RunDirectory(tmp_path),
                        validation=[world.to_batch(b) for b in world.held])  # fmt: skip
    fit(training, make_accelerator())
    assert len(method.seen) == 9
    assert hooks(student) == 0


def test_a_compiled_student_that_runs_before_its_first_step_is_tapped_all_the_same(
    tmp_path: Path, compiles_lightly: None
) -> None:
    class Looks(Silent):
        def started(self, name: str, step: int, total: int) -> None:
            student.train()(world.to_batch(world.train[0]).inputs)

    world = WORLDS["cnn"]()
    student, method = world.make(4), Watching()
    training = Training("t", student, method, LoaderBatches(world.train, 0, world.to_batch),
                        TrainConfig(steps=2, compile=True), RunDirectory(tmp_path), watcher=Looks())  # fmt: skip
    fit(training, make_accelerator())
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
        fit(training, make_accelerator())
    assert error.traceback
    assert hooks(student) == 0


def test_the_feature_method_compiled_learns_what_it_learns_without(tmp_path: Path, compiles_lightly: None) -> None:
    world = WORLDS["cnn"]()
    ends = []
    for compiled in (False, True):
        torch.manual_seed(1)
        student, teacher = world.make(4), world.make(8)
        example = world.to_batch(world.train[0])
        method = prepare_method(FeatureMethod("auto"), student, teacher, example, seed=0)
        config = TrainConfig(steps=6, compile=compiled, evaluate_every=2, optimizer=OptimizerConfig(lr=1e-2))
        training = Training("t", student, method, LoaderBatches(world.train, 0, world.to_batch), config,
                            RunDirectory(tmp_path / str(compiled)), teacher=LiveTeacher(teacher),
                            validation=[world.to_batch(b) for b in world.held])  # fmt: skip
        fit(training, make_accelerator())
        ends.append(dict(student.named_parameters()))
        del training
        assert hooks(student) == hooks(teacher) == 0
    for name in ends[0]:
        torch.testing.assert_close(ends[0][name], ends[1][name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_method_that_needs_nothing_of_the_student_does_not_run_it() -> None:
    class Alone(Watching):
        student_needs = None

        def forward(self, student: Observation, batch: Batch, signal: Signal | None) -> dict[str, Term]:
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


# Several processes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "steps"),
    [
        ("ddp", 1000),
        ("ddp-compiled", 50),
        ("fsdp", 50),
        pytest.param("ddp-compiled", 1000, marks=pytest.mark.slow),
        pytest.param("fsdp", 1000, marks=pytest.mark.slow),
    ],
)
def test_two_processes_see_their_own_batches_and_keep_none(kind: str, steps: int) -> None:
    launch(2, "-m", "support.taps_job", kind, str(steps))
