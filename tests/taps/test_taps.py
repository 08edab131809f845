"""What is captured is what the module gave, once, of this batch, and nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from support.numbered import Halves, hooks
from support.worlds import WORLDS
from tutelage.errors import ModelError
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

# torch.compile looks at .grad of whatever it meets after a graph break, and hides the warning that this gives.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def see(model: nn.Module, x: Any, *taps: str) -> list[Tensor]:
    hidden = observe(model, x, Needs(hidden=taps)).hidden
    return [hidden[tap] for tap in taps]


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
        ("layer:input@0", "wrong order"),
        ("layer[0]@1", "wrong order"),
        ("layer[0]x", "wrong order"),
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
        ("unused", ["has no value"]),
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
        with pytest.raises(ModelError, match="'one' has no value"):
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
