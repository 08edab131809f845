"""Several teachers say one thing, each of them only what it was asked, and every label means the same to all."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F

import tutelage
from tutelage import api
from tutelage.cli.doctor_checks import examine
from tutelage.config import build_recipe, dump_recipe
from tutelage.data import Batch, SequentialBatches, load_images
from tutelage.errors import CacheError, CapabilityError, ConfigError, DataError, ModelError
from tutelage.methods import FeatureMethod, LogitMethod, SimkdMethod, prepare_method
from tutelage.models.small import ConvNet
from tutelage.progress import Terminal
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

QUIET = Terminal(speaks=False)


def network(seed: int = 0, classes: int = 10) -> nn.Module:
    torch.manual_seed(seed)
    model = ConvNet(classes=classes, channels=1, widths=(4, 8), depth=1)
    for parameter in model.parameters():
        parameter.data.mul_(2)  # opinions that differ
    return model


def batch(n: int = 6, route: list[int] | None = None) -> Batch:
    x = torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(n))
    return Batch(x, torch.arange(n) % 10, ids=torch.arange(n), route=None if route is None else torch.tensor(route))


def teachers(count: int = 3) -> list[LiveTeacher]:
    return [LiveTeacher(network(seed)) for seed in range(count)]


def logits(members: list[LiveTeacher], given: Batch) -> Tensor:
    return torch.stack([m.signal(given, Needs()).dense() for m in members])


# The mean --------------------------------------------------------------------------------------------


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
    with pytest.raises(ModelError, match="no output head"):
        SimkdMethod().adapt_student(student, ensemble, batch())
    prepare_method(
        FeatureMethod(pairs=[{"student": "stages.1", "teacher": "1.stages.1"}]), student, ensemble, batch(), 0
    )


# Routes ----------------------------------------------------------------------------------------------


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
        (lambda m: EnsembleTeacher([]), "without members"),
        (lambda m: EnsembleTeacher(m, combine="votes"), "allowed: probabilities, logits"),
        (lambda m: EnsembleTeacher(m, weights=[1, 2]), "2 weights for 3 members"),
        (lambda m: EnsembleTeacher(m, weights=[1, -2, 2]), "negative"),
        (lambda m: EnsembleTeacher(m, weights=[0, 0, 0]), "not all 0"),
        (lambda m: EnsembleTeacher(m, weights=[1, float("nan"), 0]), "negative"),
        (lambda m: EnsembleTeacher(m, temperature=0), "above 0"),
        (lambda m: EnsembleTeacher(m, route=[[0], [3]]), "there are 3"),
        (lambda m: EnsembleTeacher(m, route=[[0], []]), "no member teaches"),
        (lambda m: EnsembleTeacher(m, weights=[0, 1, 1], route=[[0], [1]]), "no member teaches"),
        (lambda m: EnsembleTeacher(m, route=[[0], [1]]).signal(batch(), Needs()), "data.route"),
        (lambda m: EnsembleTeacher(m, route=[[0]]).signal(batch(2, [0, 1]), Needs()), "known are 0 to 0"),
        (lambda m: EnsembleTeacher(m, route=[[0]]).signal(batch(1, [0]), Needs(hidden=("0.head",))), "some samples"),
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


# Learned weights -------------------------------------------------------------------------------------


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


# In a recipe -----------------------------------------------------------------------------------------


def recipe(**change: Any) -> dict[str, Any]:
    member = {"model": "mlp", "options": {"hidden": [24]}}
    return {
        "name": "many",
        "data": {"source": "digits", "limit": 500},
        "teacher": {"members": [dict(member), dict(member), {"model": "convnet", "options": {"widths": [8, 16]}}],
                    "train": {"steps": 40, "optimizer": {"kind": "adam", "lr": 0.01}}},
        "student": {"model": "mlp", "options": {"hidden": [4]}},
        "method": {"kind": "logit"},
        "train": {"steps": 6, "batch_size": 50},
        **change,
    }  # fmt: skip


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> api.RunResult:
    given = recipe()
    given["teacher"]["weights"] = "learned"
    return api.run(build_recipe(given), out=tmp_path_factory.mktemp("ensemble") / "out", terminal=QUIET)


def test_members_are_trained_apart_weighed_and_reported(ran: api.RunResult) -> None:
    found = ran.summary["teacher"]["ensemble"]
    assert [m["name"] for m in found["members"]] == ["teacher-0", "teacher-1", "teacher-2"]
    assert found["weights"] == "learned"
    assert sum(m["weight"] for m in found["members"]) == pytest.approx(1)
    a, b = ((ran.path / "models" / f"teacher-{i}" / "model.safetensors").read_bytes() for i in (0, 1))
    assert a != b, "two members of one kind must start and be shown their data differently"
    for i, member in enumerate(found["members"]):
        own = json.loads((ran.path / "models" / f"teacher-{i}" / "result.json").read_text())
        assert member["test"]["accuracy"] == pytest.approx(own["best"]["accuracy"])
        assert member["validation"]["accuracy"] == pytest.approx(own["validation"]["accuracy"])
    page = (ran.path / "report.html").read_text()
    assert "teacher-2, weight" in page
    assert (
        ran.summary["teacher"]["validation"]["loss"] <= min(m["validation"]["loss"] for m in found["members"]) + 1e-6
    )


def test_a_resumed_run_trains_no_member_again_and_finds_the_same(ran: api.RunResult, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(ran.path, tmp_path / "out")
    for gone in ("models/teacher-1", "models/distilled-seed0", "student"):
        shutil.rmtree(tmp_path / "out" / gone)
    (tmp_path / "out" / "summary.json").unlink()
    kept = (tmp_path / "out" / "models" / "teacher-0" / "result.json").stat().st_mtime_ns
    again = api.run(ran.path / "config.yaml", out=tmp_path / "out", resume=True, terminal=QUIET)
    assert (tmp_path / "out" / "models" / "teacher-0" / "result.json").stat().st_mtime_ns == kept
    for name in ("models/teacher-1", "student"):
        before, after = (p / name / "model.safetensors" for p in (ran.path, tmp_path / "out"))
        assert before.read_bytes() == after.read_bytes()
    assert again.summary["teacher"]["ensemble"] == ran.summary["teacher"]["ensemble"]


def test_what_a_member_leaves_out_comes_from_the_teacher_and_then_from_the_recipe() -> None:
    given = recipe()
    given["teacher"]["members"][1]["train"] = {"epochs": 2, "optimizer": "sgd"}
    built_up = build_recipe(given)
    first, second, _ = (m.train for m in built_up.teacher.each)
    assert (first.steps, first.batch_size, first.optimizer.kind) == (40, 50, "adam")
    assert (second.epochs, second.steps, second.optimizer.kind, second.optimizer.lr) == (2, None, "sgd", 0.01)
    again = build_recipe(yaml.safe_load(dump_recipe(built_up)))
    assert again == built_up


def test_the_doctor_looks_at_each_member() -> None:
    given = recipe()
    given["teacher"]["weights"] = "learned"
    found = examine(build_recipe(given), QUIET)
    assert {"teacher-0", "teacher-1", "teacher-2"} <= {f.topic for f in found}
    assert not [f for f in found if f.level == "bad"]
    given = recipe()
    given["teacher"]["members"][1] = {"model": "mlp", "options": {"hidden": "wide"}}
    with pytest.raises(ModelError, match=r"teacher\.members\.1"):
        examine(build_recipe(given), QUIET)


def streets(root: Path, lights: tuple[str, ...] = ("day", "night")) -> None:
    """Two classes, bright by day and dark by night, told by a bar that by night is the other way round."""
    from PIL import Image

    draw = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 10)):
        for label, name in enumerate(("bar", "beam")):
            for night, light in enumerate(lights):
                folder = root / split / name / light
                folder.mkdir(parents=True)
                for i in range(count):
                    pixels = draw.integers(0, 60, (8, 8, 3)).astype(np.uint8)
                    bright = 200 if (label ^ night) else 90
                    pixels[2:6, 2:6] += np.uint8(bright)
                    Image.fromarray(pixels).save(folder / f"{i}.png")


def test_routed_members_teach_their_own_folder(tmp_path: Path) -> None:
    streets(tmp_path / "x")
    data = load_images("imagefolder", path=str(tmp_path / "x"), size=8, route="folder")
    assert data.route_names == ["day", "night"]
    assert set(data.train.route.tolist()) == {0, 1}
    labels, route = data.train.labels, data.train.route
    for light in (0, 1):  # a member for each light, trained on that alone
        rows = (route == light).nonzero().flatten()
        given = data.train.fetch(rows)
        model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 2))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(model(given.inputs), labels[rows]).backward()
            optimizer.step()
        torch.save(model.state_dict(), tmp_path / f"{light}.pt")
    member = {"model": "test_ensembles:linear"}
    given = {
        "name": "lights",
        "data": {"source": "imagefolder", "path": str(tmp_path / "x"), "size": 8, "route": "folder"},
        "teacher": {"members": [{**member, "checkpoint": str(tmp_path / f"{i}.pt")} for i in (0, 1)],
                    "route": {"day": 0, "night": 1}},
        "student": {"model": "mlp", "options": {"hidden": [8]}},
        "method": "logit", "train": {"steps": 4, "batch_size": 16},
    }  # fmt: skip
    ran = api.run(build_recipe(given), out=tmp_path / "out", terminal=QUIET)
    found = ran.summary["teacher"]
    assert found["accuracy"] == 1.0, "each image is told by the member that knows its light"
    assert [m["test"]["n"] for m in found["ensemble"]["members"]] == [20, 20]
    assert [m["test"]["accuracy"] for m in found["ensemble"]["members"]] == [1.0, 1.0]
    del given["teacher"]["route"], given["data"]["route"]
    with pytest.raises(CapabilityError, match="chance is 50"):  # each is wrong about the other's light
        api.run(build_recipe(given), out=tmp_path / "together", terminal=QUIET)
    given["data"]["route"] = "folder"
    for route, says in (({"day": [0, 1]}, "'night'"), ({"day": 0, "night": 1, "nigth": 1}, "did you mean 'night'")):
        given["teacher"]["route"] = route
        with pytest.raises(ConfigError, match=says):
            api.run(build_recipe(given), out=tmp_path / "no", terminal=QUIET)
    (tmp_path / "x" / "train" / "bar" / "day" / "0.png").rename(tmp_path / "x" / "train" / "bar" / "0.png")
    with pytest.raises(DataError, match=r"bar/0\.png: lies in its class's folder itself"):
        load_images("imagefolder", path=str(tmp_path / "x"), size=8, route="folder")


def linear(classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, classes))


def test_a_column_of_a_data_set_is_the_route(tmp_path: Path) -> None:
    import datasets
    from PIL import Image

    def rows(split: str, count: int) -> datasets.Dataset:
        images = [Image.fromarray(np.full((8, 8), i, dtype=np.uint8)) for i in range(count)]
        place = [("wood", "sea")[i % 2] for i in range(count)]
        features = datasets.Features({
            "image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"]),
            "place": datasets.Value("string"), "camera": datasets.ClassLabel(names=["old", "new"]),
        })  # fmt: skip
        made = {"image": images, "label": [i // 2 % 2 for i in range(count)], "place": place,
                "camera": [i % 2 for i in range(count)]}  # fmt: skip
        return datasets.Dataset.from_dict(made, features=features)

    for split, count in (("train", 24), ("test", 8)):
        rows(split, count).to_parquet(tmp_path / f"{split}.parquet")
    files = {split: str(tmp_path / f"{split}.parquet") for split in ("train", "test")}
    options = {"data_files": files, "cache_dir": str(tmp_path / "cache")}
    data = load_images("hf:parquet", options=options, size=8, route="place")
    assert data.route_names == ["sea", "wood"]
    given = data.test.fetch(torch.arange(8))
    assert [data.route_names[i] for i in given.route] == ["wood", "sea"] * 4
    by_class = load_images("hf:parquet", options=options, size=8, route="camera")
    assert [by_class.route_names[i] for i in by_class.test.route] == ["old", "new"] * 4
    with pytest.raises(
        DataError, match=r"no route column 'plaice'\n  -> set data\.route to one of image, label, place"
    ):
        load_images("hf:parquet", options=options, size=8, route="plaice")


# From Python -----------------------------------------------------------------------------------------


def loader() -> list[tuple[Tensor, Tensor]]:
    given = batch(40)
    return list(zip(given.inputs.split(10), given.labels.split(10), strict=True))


def knowing(seed: int) -> nn.Module:
    model = network(seed)
    given = batch(40)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(model(given.inputs), given.labels).backward()
        optimizer.step()
    return model


def test_distill_takes_a_list_of_teachers(tmp_path: Path) -> None:
    members = [knowing(1), knowing(2)]
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in members]
    run = tutelage.distill(
        members, lambda: network(3), loader(), eval_data=loader(), validation=loader(), epochs=1,
        ensemble={"weights": "learned", "average_temperature": 4.0}, inference={"batch_size": 3},
        out=tmp_path / "out", method=LogitMethod(4.0), verbose=False,
    )  # fmt: skip
    found = run.summary["teacher"]["ensemble"]
    assert (len(found["members"]), found["weights"], found["average_temperature"]) == (2, "learned", 4.0)
    for member, kept in zip(members, before, strict=True):
        assert all(torch.equal(v, kept[k]) for k, v in member.state_dict().items())
    for more, says in (
        ({"ensemble": {"weights": [1.0]}}, "1 weights for 2 members"),
        ({"ensemble": {"weigths": [1.0, 1.0]}}, "weigths"),
        ({"ensemble": {"weights": "learned"}, "validation": None}, "validation="),
        ({"inference": {"dtype": "int4"}}, "inference"),
    ):
        arguments: dict[str, Any] = {"validation": loader(), **more}
        with pytest.raises((ConfigError, CapabilityError), match=says):
            tutelage.distill(
                members, lambda: network(3), loader(), eval_data=loader(), epochs=1, out=tmp_path / "no",
                verbose=False, **arguments,
            )  # fmt: skip
    with pytest.raises(ModelError, match="list of modules"):
        tutelage.distill([members[0], "two"], network(3), loader(), eval_data=loader(), verbose=False)
    with pytest.raises(ConfigError, match="one teacher"):
        tutelage.distill(
            members[0], network(3), loader(), eval_data=loader(), ensemble={"combine": "logits"}, verbose=False
        )


class Labelled(nn.Module):
    """A module that carries class names, as Hugging Face models do."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.inner = knowing(len(names[0]))
        self.config = type("Config", (), {"id2label": dict(enumerate(names))})()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out


def test_members_that_name_a_class_differently_are_refused() -> None:
    names = [f"class {i}" for i in range(10)]
    swapped = [names[1], names[0], *names[2:]]
    for classes in (None, names):
        with pytest.raises(CapabilityError, match="class 0 is 'class 0' to teacher-0 and 'class 1' to teacher-1"):
            tutelage.distill(
                [Labelled(names), Labelled(swapped)], network(3), loader(), eval_data=loader(), classes=classes,
                epochs=1, verbose=False,
            )  # fmt: skip
