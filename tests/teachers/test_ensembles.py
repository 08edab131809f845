"""Several teachers say one thing, each of them only what it was asked, and every label means the same to all."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.ensemble_cases import QUIET, batch, logits, network, recipe
from tutelage import api
from tutelage.config import build_recipe
from tutelage.data import Batch, SequentialBatches, load_images
from tutelage.errors import CacheError, CapabilityError, DataError, ModelError
from tutelage.methods import FeatureMethod, SimkdMethod, prepare_method
from tutelage.taps import Needs
from tutelage.teachers import (
    CachedTeacher,
    Ensemble,
    EnsembleTeacher,
    Layout,
    LiveTeacher,
    MemoryTeacher,
    fit_ensemble_weights,
)


def teachers(count: int = 3) -> list[LiveTeacher]:
    return [LiveTeacher(network(seed)) for seed in range(count)]


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 5.0], [0.0, 1.0, 1.0]])
def test_the_mean_is_of_what_it_says(weights: list[float] | None) -> None:
    members, given = teachers(), batch()
    each = logits(members, given)
    w = torch.tensor(weights or [1.0, 1.0, 1.0]).view(-1, 1, 1)
    w = w / w.sum()
    said = EnsembleTeacher(members, weights=weights).signal(given, Needs()).dense()
    torch.testing.assert_close(said.exp(), (w * each.softmax(-1)).sum(0))
    torch.testing.assert_close(said.softmax(-1), (w * each.softmax(-1)).sum(0))
    said = EnsembleTeacher(members, combine="logits", weights=weights).signal(given, Needs()).dense()
    torch.testing.assert_close(said, (w * each).sum(0))


def test_softened_it_is_the_mean_of_the_softened_only_where_it_is_averaged_there() -> None:
    members, given, t = teachers(), batch(), 4.0
    mean = (logits(members, given) / t).softmax(-1).mean(0)
    at_one, at_t = (EnsembleTeacher(members, temperature=x).signal(given, Needs()).dense() for x in (1.0, t))
    torch.testing.assert_close((at_t / t).softmax(-1), mean)
    assert not torch.allclose((at_one / t).softmax(-1), mean, atol=1e-3)


def test_one_member_several_times_is_that_member_and_order_does_not_matter() -> None:
    members, given = teachers(), batch()
    alone = members[0].signal(given, Needs()).dense()
    for combine in ("probabilities", "logits"):
        same = EnsembleTeacher([members[0]] * 3, combine=combine).signal(given, Needs()).dense()
        torch.testing.assert_close(same.softmax(-1), alone.softmax(-1))
        a, b = (EnsembleTeacher(m, combine=combine) for m in (members, members[::-1]))
        torch.testing.assert_close(a.signal(given, Needs()).dense(), b.signal(given, Needs()).dense())


def test_the_module_and_the_teacher_say_the_same() -> None:
    members, given = teachers(), batch()
    for combine, t in (("probabilities", 1.0), ("probabilities", 3.0), ("logits", 1.0)):
        teacher = EnsembleTeacher(members, combine=combine, weights=[1, 0, 3], temperature=t)
        torch.testing.assert_close(teacher.model(given.inputs), teacher.signal(given, Needs()).dense())
    assert not any(p.requires_grad for p in teacher.model.parameters())


def test_confident_members_overflow_nothing() -> None:
    class Sure(nn.Module):
        def __init__(self, label: int) -> None:
            super().__init__()
            self.label = nn.Parameter(torch.tensor(float(label)))

        def forward(self, x: Tensor) -> Tensor:
            return 1e4 * F.one_hot(self.label.long(), 10).float().expand(len(x), -1)

    said = EnsembleTeacher([LiveTeacher(Sure(1)), LiveTeacher(Sure(2))]).signal(batch(), Needs()).dense()
    assert bool(torch.isfinite(said).all())
    torch.testing.assert_close(said.softmax(-1)[:, 1:3], torch.full((6, 2), 0.5))


def test_live_and_remembered_members_mix() -> None:
    data = load_images("digits", limit=60)
    members = teachers()
    mixed = [members[0], MemoryTeacher(members[1], SequentialBatches(data.train, 16)), members[2]]
    given = data.train.fetch(torch.tensor([41, 3, 17]))
    expected = EnsembleTeacher(members).signal(given, Needs()).dense()
    torch.testing.assert_close(EnsembleTeacher(mixed).signal(given, Needs()).dense(), expected)
    with pytest.raises(CapabilityError, match="no model in this process"):
        EnsembleTeacher(mixed).model  # noqa: B018
    memory = MemoryTeacher(EnsembleTeacher(mixed), SequentialBatches(data.train, 16))
    torch.testing.assert_close(memory.signal(given, Needs()).dense(), expected)


def test_a_member_may_be_cached_on_disk(tmp_path: Path) -> None:
    data = load_images("digits", limit=60)
    members = teachers(2)
    with CachedTeacher(tmp_path / "cache", Layout(classes=10, dtype="fp32"), {"teacher": 1}, members[0]) as cached:
        for given in SequentialBatches(data.train, 16):
            cached.fill(given)
    with CachedTeacher(tmp_path / "cache", Layout(classes=10, dtype="fp32"), {"teacher": 1}) as cached:
        given = data.train.fetch(torch.tensor([41, 3, 17]))
        said = EnsembleTeacher([cached, members[1]]).signal(given, Needs(temperature=4.0)).dense()
        torch.testing.assert_close(said, EnsembleTeacher(members).signal(given, Needs()).dense())


def test_an_ensemble_s_word_is_cached_and_another_ensemble_refused(tmp_path: Path) -> None:
    given = recipe()
    given["teacher"] = {"members": [{"model": "mlp", "options": {"hidden": [24]}, "train": {"steps": 40}}] * 2,
                        "cache": str(tmp_path / "cache")}  # fmt: skip
    plain = {**given, "teacher": {k: v for k, v in given["teacher"].items() if k != "cache"}}
    a, b = (api.run(build_recipe(copy.deepcopy(g)), out=tmp_path / n, terminal=QUIET)
            for g, n in ((given, "cached"), (plain, "plain")))  # fmt: skip
    for run in (a, b):
        assert run.summary["teacher"]["ensemble"]["members"]
    losses = [r.summary["students"]["distilled"]["last"]["loss"]["mean"] for r in (a, b)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-2)
    for change in ({"combine": "logits"}, {"weights": [1.0, 2.0]}, {"inference": {"dtype": "bf16"}}):
        other = copy.deepcopy(given)
        other["teacher"] |= change
        with pytest.raises(CacheError, match="teacher"):
            api.run(build_recipe(other), out=tmp_path / f"other-{next(iter(change))}", terminal=QUIET)


def test_hidden_states_are_of_the_member_whose_number_they_have() -> None:
    members, given = teachers(), batch()
    teacher, needs = EnsembleTeacher(members), Needs(hidden=("0.stages.1", "2.stages.0", "2.head:input"))
    said = teacher.signal(given, needs)
    assert list(said.hidden) == list(needs.hidden)
    for tap in needs.hidden:
        number, _, own = tap.partition(".")
        expected = members[int(number)].signal(given, Needs(hidden=(own,))).hidden[own]
        assert torch.equal(said.hidden[tap], expected)
    only = teacher.signal(given, Needs(logits=False, hidden=("1.stages.0",)))
    assert only.logits is None
    for tap in ("stages.1", "3.stages.1", "head"):
        with pytest.raises(ModelError, match=r"0\.") as error:
            teacher.signal(given, Needs(hidden=(tap,)))
        assert "put the member's number first" in str(error.value)
    with pytest.raises(CapabilityError, match="no output head"):
        teacher.signal(given, Needs(head=True))


def test_a_method_on_features_must_say_which_member_it_means() -> None:
    ensemble = Ensemble([network(0), network(1)])
    student = network(2)
    with pytest.raises(ModelError, match="which of an ensemble's models"):
        prepare_method(FeatureMethod(), student, ensemble, batch(), 0)
    with pytest.raises(ModelError, match="a method without the teacher's classifier"):
        SimkdMethod().adapt_student(student, ensemble, batch())
    prepare_method(
        FeatureMethod(pairs=[{"student": "stages.1", "teacher": "1.stages.1"}]), student, ensemble, batch(), 0
    )


class Asked:
    """A teacher that notes which samples it was asked for."""

    provides = frozenset({"logits", "hidden"})

    def __init__(self, teacher: LiveTeacher) -> None:
        self.teacher, self.ids = teacher, list[int]()

    def signal(self, given: Batch, needs: Needs) -> Any:
        assert given.ids is not None
        self.ids += given.ids.tolist()
        return self.teacher.signal(given, needs)


@pytest.mark.parametrize("combine", ["probabilities", "logits"])
def test_each_sample_is_taught_by_its_own_members_and_no_other_is_asked(combine: Any) -> None:
    members = teachers()
    asked = [Asked(m) for m in members]
    teacher = EnsembleTeacher(asked, combine=combine, weights=[1, 3, 1], route=[[0], [2], [0, 1]])
    given = batch(7, [1, 0, 2, 1, 0, 1, 2])
    said = teacher.signal(given, Needs()).dense()
    assert [m.ids for m in asked] == [[1, 2, 4, 6], [2, 6], [0, 3, 5]]
    each = logits(members, given)
    both = EnsembleTeacher(members[:2], combine=combine, weights=[1, 3]).signal(given, Needs()).dense()
    for i, route in enumerate(given.route.tolist()):
        expected = both[i] if route == 2 else each[{0: 0, 1: 2}[route], i]
        torch.testing.assert_close(said[i].log_softmax(-1), expected.log_softmax(-1))
    part = teacher.signal(given.rows(0, 1), Needs()).dense()  # a batch that some members teach nothing of
    torch.testing.assert_close(part, said[:1])


def test_the_route_survives_whatever_cuts_a_batch() -> None:
    given = batch(7, [1, 0, 2, 1, 0, 1, 2])
    assert given.rows(2, 5).route.tolist() == [2, 1, 0]
    assert torch.cat([part.route for part in given.split(3)]).equal(given.route)
    assert given.to("cpu").route is given.route
    assert given.take(torch.tensor([6, 0])).route.tolist() == [2, 1]
    assert given.take(torch.tensor([6, 0])).ids.tolist() == [6, 0]
    assert given.rows(0, 0).route.tolist() == [1]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda m: EnsembleTeacher([]), "has no members"),
        (lambda m: EnsembleTeacher(m, combine="votes"), "allowed: probabilities, logits"),
        (lambda m: EnsembleTeacher(m, weights=[1, 2]), "2 weights for 3 members"),
        (lambda m: EnsembleTeacher(m, weights=[1, -2, 2]), "negative"),
        (lambda m: EnsembleTeacher(m, weights=[0, 0, 0]), "not all 0"),
        (lambda m: EnsembleTeacher(m, weights=[1, float("nan"), 0]), "negative"),
        (lambda m: EnsembleTeacher(m, temperature=0), "above 0"),
        (lambda m: EnsembleTeacher(m, route=[[0], [3]]), "the ensemble has 3"),
        (lambda m: EnsembleTeacher(m, route=[[0], []]), "no member teaches"),
        (lambda m: EnsembleTeacher(m, weights=[0, 1, 1], route=[[0], [1]]), "no member teaches"),
        (lambda m: EnsembleTeacher(m, route=[[0], [1]]).signal(batch(), Needs()), "data.route"),
        (lambda m: EnsembleTeacher(m, route=[[0]]).signal(batch(2, [0, 1]), Needs()), "has 0 to 0"),
        (
            lambda m: EnsembleTeacher(m, route=[[0]]).signal(batch(1, [0]), Needs(hidden=("0.head",))),
            "no hidden states",
        ),
        (
            lambda m: EnsembleTeacher([*m, LiveTeacher(network(0, classes=7))]).signal(batch(), Needs()),
            "member 3 gives logits (7,)",
        ),
    ],
)
def test_what_does_not_fit_is_said(make: Any, says: str) -> None:
    with pytest.raises(CapabilityError) as error:
        make(teachers())
    assert says in str(error.value)
    assert error.value.remedy


class Fixed:
    """A teacher that says what it was given."""

    provides = frozenset({"logits"})

    def __init__(self, said: Tensor) -> None:
        self.said = said

    def signal(self, given: Batch, needs: Needs) -> Any:
        from tutelage.teachers import Signal

        assert given.ids is not None
        return Signal(self.said[given.ids])


@pytest.mark.parametrize(("combine", "t"), [("probabilities", 1.0), ("probabilities", 3.0), ("logits", 1.0)])
def test_learned_weights_are_the_best_there_are(combine: Any, t: float) -> None:
    draw = torch.Generator().manual_seed(3)
    labels = torch.randint(5, (600,), generator=draw)
    clue = 3 * F.one_hot(labels, 5).float()
    members = [Fixed(strength * clue + 2 * torch.randn(600, 5, generator=draw)) for strength in (1.0, 0.7, 0.4)]
    given = [
        Batch(torch.zeros(100, 1), labels[i : i + 100], ids=torch.arange(i, i + 100)) for i in range(0, 600, 100)
    ]
    found = fit_ensemble_weights(members, given, combine=combine, temperature=t)
    assert found == fit_ensemble_weights(members, given, combine=combine, temperature=t)
    assert sum(found) == pytest.approx(1)

    def loss(weights: Any) -> float:
        teacher = EnsembleTeacher(members, combine=combine, weights=list(weights), temperature=t)
        said = torch.cat([teacher.signal(b, Needs()).dense() for b in given])
        return float(F.cross_entropy(said.double(), labels))

    best = loss(found)
    assert best < loss([1, 1, 1]) - 1e-3
    for move in np.random.default_rng(0).normal(0, 0.05, (40, 3)):
        assert best <= loss(np.abs(np.array(found) + move)) + 1e-6


def test_weights_cannot_be_learned_of_nothing() -> None:
    unlabelled = Batch(torch.zeros(4, 1), torch.full((4,), -100), ids=torch.arange(4))
    with pytest.raises(DataError, match="no sample of the validation data has a label"):
        fit_ensemble_weights([Fixed(torch.zeros(4, 3))] * 2, [unlabelled])
