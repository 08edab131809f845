"""Ensembles in recipes and in distill: members trained once, routed by a column, classes matched by name."""

from __future__ import annotations

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
from support.ensemble_cases import QUIET, batch, network, recipe
from tutelage import api
from tutelage.cli.doctor_checks import examine
from tutelage.config import build_recipe, dump_recipe
from tutelage.data import load_images
from tutelage.errors import CapabilityError, ConfigError, DataError, ModelError
from tutelage.methods import LogitMethod


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
    member = {"model": f"{__name__}:linear"}
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
    with pytest.raises(DataError, match=r"bar/0\.png: is directly in the folder of its class"):
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
        out=tmp_path / "out", method=LogitMethod(temperature=4.0), verbose=False,
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
    with pytest.raises(ConfigError, match="several teachers"):
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
        with pytest.raises(CapabilityError, match="class 0 is 'class 0' in teacher-0 and 'class 1' in teacher-1"):
            tutelage.distill(
                [Labelled(names), Labelled(swapped)], network(3), loader(), eval_data=loader(), classes=classes,
                epochs=1, verbose=False,
            )  # fmt: skip
