"""A whole run, from the recipe to the page, and the figures in its summary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tutelage
from tutelage import api
from tutelage.cli.doctor_checks import examine
from tutelage.config import build_recipe, dump_recipe, load_recipe
from tutelage.data import load_images
from tutelage.engine import RunDirectory, build_accelerator
from tutelage.errors import CapabilityError, Interrupted
from tutelage.evaluation.statistics import paired_difference
from tutelage.experiment.compare import compare
from tutelage.experiment.measure import class_similarity
from tutelage.experiment.recipe_source import load_data, recipe_spec
from tutelage.experiment.spec import RunContext
from tutelage.models import ModelSpec, build, load_model, save_model
from tutelage.progress import Terminal
from tutelage.teachers import LiveTeacher

RECIPE: dict[str, Any] = {
    "name": "small",
    "data": {"source": "digits", "labels": 100},
    "teacher": {"model": "mlp", "options": {"hidden": [64]}, "train": {"steps": 150}},
    "student": {"model": "mlp", "options": {"hidden": [8]}},
    "method": {"kind": "logit", "temperature": 4.0},
    "train": {"steps": 60, "batch_size": 64, "optimizer": {"lr": 0.01}, "evaluate_every": 20},
    "seeds": [0, 1],
}


def recipe(**changes: Any) -> Any:
    return build_recipe({**json.loads(json.dumps(RECIPE)), **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> api.RunResult:
    out = tmp_path_factory.mktemp("runs") / "small"
    return api.run(recipe(), out=out, terminal=Terminal(speaks=False))


def test_everything_a_run_leaves(finished: api.RunResult) -> None:
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "report.html", "student/model.safetensors"):
        assert (finished.path / name).stat().st_size > 0
    for training in ("teacher", "baseline-seed0", "distilled-seed0", "baseline-seed1", "distilled-seed1"):
        assert (finished.path / "models" / training / "result.json").exists()
        assert list((finished.path / "checkpoints" / training).glob("step-*"))
    assert load_recipe(finished.path / "config.yaml") == recipe()
    metrics = [json.loads(line) for line in (finished.path / "metrics.jsonl").read_text().splitlines()]
    distilled = [m for m in metrics if m["training"] == "distilled-seed0" and "terms" in m]
    for line in distilled:
        assert line["loss"] == pytest.approx(sum(t["weighted"] for t in line["terms"].values()))
        assert line["terms"]["kd"]["weighted"] == pytest.approx(0.9 * line["terms"]["kd"]["raw"])


def test_the_summary_is_what_the_saved_models_score(finished: api.RunResult) -> None:
    data = load_images("digits", labels=100)
    batch = data.test.fetch(torch.arange(len(data.test)))
    teacher = load_model(finished.path / "models" / "teacher")
    with torch.no_grad():
        for seed in (0, 1):
            student = load_model(finished.path / "models" / f"distilled-seed{seed}")
            right = (student(batch.inputs).argmax(1) == batch.labels).float().mean()
            agree = (student(batch.inputs).argmax(1) == teacher(batch.inputs).argmax(1)).float().mean()
            row = finished.summary["students"]["distilled"]["best"]
            assert row["accuracy"]["values"][seed] == pytest.approx(float(right))
            assert row["agreement"]["values"][seed] == pytest.approx(float(agree))
    gain = finished.summary["gain"]["best"]
    arms = finished.summary["students"]
    differences = [
        d - a
        for d, a in zip(
            arms["distilled"]["best"]["accuracy"]["values"],
            arms["baseline"]["best"]["accuracy"]["values"],
            strict=True,
        )
    ]
    assert gain["values"] == pytest.approx(differences)
    assert finished.summary["parameters"] == {"teacher": 64 * 65 + 650, "student": 64 * 8 + 8 + 90}


@pytest.mark.parametrize("name", ["teacher", "baseline-seed1", "distilled-seed0"])
def test_the_similarity_of_classes_is_that_of_the_saved_model(finished: api.RunResult, name: str) -> None:
    data = load_images("digits", labels=100)
    with torch.no_grad():
        logits = load_model(finished.path / "models" / name)(data.test.fetch(torch.arange(len(data.test))).inputs)
    kept = json.loads((finished.path / "similarity" / f"{name}.json").read_text())
    sim = class_similarity(logits, 4)
    assert kept["n"] == len(data.test)
    assert kept["sim"]["4"] == pytest.approx([float(sim[i, j]) for i in range(10) for j in range(i, 10)], rel=1e-4)


def test_both_students_get_the_same_start_and_the_same_budget(finished: api.RunResult, tmp_path: Path) -> None:
    results = [
        json.loads((finished.path / "models" / f"{arm}-seed0" / "result.json").read_text())
        for arm in ("baseline", "distilled")
    ]
    assert results[0]["steps"] == results[1]["steps"] == 60
    # With alpha 0 and every label there, the two arms are the same training: same start, order and budget.
    same = recipe(
        name="same", data="digits", method={"kind": "logit", "alpha": 0.0}, seeds=[3],
        train={"steps": 20, "batch_size": 64},
    )  # fmt: skip
    out = api.run(same, out=tmp_path / "same", terminal=Terminal(speaks=False)).path
    alone, distilled = (
        load_file(str(out / "models" / f"{a}-seed3" / "model.safetensors")) for a in ("baseline", "distilled")
    )
    assert all(torch.equal(alone[k], distilled[k]) for k in alone)


def test_a_run_again_shows_what_it_found_and_a_second_place_is_free(finished: api.RunResult, tmp_path: Path) -> None:
    before = (finished.path / "student" / "model.safetensors").stat().st_mtime_ns
    again = api.run(recipe(), out=finished.path, resume=True, terminal=Terminal(speaks=False))
    assert again.summary == json.loads((finished.path / "summary.json").read_text())
    assert (finished.path / "student" / "model.safetensors").stat().st_mtime_ns == before
    from tutelage.experiment.run import choose_run_directory

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert choose_run_directory(None, "small", resume=False) == Path("runs/small")
        (tmp_path / "runs" / "small").mkdir(parents=True)
        (tmp_path / "runs" / "small" / "config.yaml").touch()
        assert choose_run_directory(None, "small", resume=False) == Path("runs/small-2")
        assert choose_run_directory(None, "small", resume=True) == Path("runs/small")


def test_a_teacher_is_asked_once_for_each_sample_where_nothing_is_augmented(
    finished: api.RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    signal = LiveTeacher.signal
    monkeypatch.setattr(LiveTeacher, "signal", lambda self, b, n: (asked.append(len(b)), signal(self, b, n))[1])
    checkpoint = {
        "model": "mlp",
        "options": {"hidden": [64]},
        "checkpoint": str(finished.path / "models" / "teacher"),
    }
    data = load_images("digits")
    # its own accuracy on both splits and fidelity on test, and two samples to see that the method runs
    overhead = len(data.test) + len(data.validation) + 2
    api.run(
        recipe(name="once", teacher=checkpoint, baseline=False), out=tmp_path / "a", terminal=Terminal(speaks=False)
    )
    assert sum(asked) == len(data.train) + overhead
    asked.clear()
    augmented = {"source": "digits", "augment": [{"shift": 1}]}
    api.run(
        recipe(name="each", teacher=checkpoint, baseline=False, data=augmented, seeds=[0]),
        out=tmp_path / "b", terminal=Terminal(speaks=False),
    )  # fmt: skip
    epochs, left = divmod(60, -(-len(data.train) // 64))
    assert sum(asked) == epochs * len(data.train) + left * 64 + overhead


def test_a_teacher_worse_than_chance_is_found_before_any_student_trains(
    finished: api.RunResult, tmp_path: Path
) -> None:
    weights = load_file(str(finished.path / "models" / "teacher" / "model.safetensors"))
    weights["head.weight"], weights["head.bias"] = -weights["head.weight"], -weights["head.bias"]
    from safetensors.torch import save_file

    save_file(weights, str(tmp_path / "bad.safetensors"))
    bad = {"model": "mlp", "options": {"hidden": [64]}, "checkpoint": str(tmp_path / "bad.safetensors")}
    with pytest.raises(CapabilityError, match="chance is 10"):
        api.run(recipe(teacher=bad), out=tmp_path / "run", terminal=Terminal(speaks=False))
    assert not (tmp_path / "run" / "models").exists()


def test_classes_in_another_order_are_refused_by_name(finished: api.RunResult, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(finished.path / "models" / "teacher", tmp_path / "teacher")
    card = json.loads((tmp_path / "teacher" / "model.json").read_text())
    card["classes"][3], card["classes"][5] = card["classes"][5], card["classes"][3]
    (tmp_path / "teacher" / "model.json").write_text(json.dumps(card))
    other = {"model": "mlp", "options": {"hidden": [64]}, "checkpoint": str(tmp_path / "teacher")}
    with pytest.raises(CapabilityError, match="class 3 is '5' in the teacher and '3' in the data"):
        api.run(recipe(teacher=other), out=tmp_path / "run", terminal=Terminal(speaks=False))


def test_teacher_and_student_must_not_share_weights(tmp_path: Path) -> None:
    body = torch.nn.Linear(4, 4)
    teacher = torch.nn.Sequential(body, torch.nn.Linear(4, 2))
    loader = [(torch.randn(8, 4), torch.randint(2, (8,)))]
    with pytest.raises(CapabilityError, match="share 2 parameters"):
        tutelage.distill(
            teacher, lambda: torch.nn.Sequential(body, torch.nn.Linear(4, 2)), loader,
            eval_data=loader, out=tmp_path / "x", verbose=False,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("teacher", "trains"),
    [
        ({"model": "mlp"}, True),
        ({"model": "mlp", "trained": True}, False),
        ({"model": "hf:some/model"}, False),
        ({"model": "hf:some/model", "train": {"steps": 5}}, True),
        ({"model": "timm:resnet10t", "options": {"pretrained": True}}, False),
        ({"model": "torchvision:resnet18", "options": {"weights": "DEFAULT"}}, False),
        ({"model": "torchvision:resnet18", "options": {"weights": None}}, True),
    ],
)
def test_a_teacher_that_comes_with_weights_is_not_trained_again(teacher: dict[str, Any], trains: bool) -> None:
    loaded = recipe(teacher=teacher)
    assert (loaded.teacher.train is not None) == trains
    import yaml

    assert build_recipe(yaml.safe_load(dump_recipe(loaded))) == loaded


def test_the_interval_is_student_s() -> None:
    found = paired_difference([0.9, 0.8, 0.85], [0.7, 0.75, 0.8])
    assert found["mean"] == pytest.approx(0.1)
    half = 4.302652729911275 * 0.08660254037844387 / 3**0.5
    assert (found["low"], found["high"]) == pytest.approx((0.1 - half, 0.1 + half))
    assert paired_difference([0.9], [0.7])["low"] is None


def test_doctor_says_what_it_looked_at(finished: api.RunResult) -> None:
    checkpoint = {
        "model": "mlp",
        "options": {"hidden": [64]},
        "checkpoint": str(finished.path / "models" / "teacher"),
    }
    found = {f.topic: f for f in examine(recipe(teacher=checkpoint), Terminal(speaks=False))}
    assert {"data", "balance", "batch", "label map", "capacity", "teacher", "one batch", "time", "memory"} <= set(
        found
    )
    assert all(f.level != "bad" for f in found.values())
    assert "0.1" in found["capacity"].text
    tiny = recipe(
        teacher={"model": "mlp", "options": {"hidden": [4000, 4000]}},
        student={"model": "mlp", "options": {"hidden": [1]}},
    )
    capacity = {f.topic: f for f in examine(tiny, Terminal(speaks=False))}["capacity"]
    assert capacity.level == "note"
    assert "assistant" in (capacity.remedy or "")
    odd = recipe(data={"source": "digits", "mean": [0.0], "std": [0.01]})
    assert {f.topic: f for f in examine(odd, Terminal(speaks=False))}["batch"].level == "note"


@pytest.mark.parametrize(
    "spec",
    [
        ModelSpec("mlp", {"hidden": [5]}, 4, 1, 8),
        ModelSpec("convnet", {"widths": [4]}, 4, 1, 8),
        ModelSpec("resnet", {"widths": [4, 8]}, 4, 3, 8),
        ModelSpec("timm:resnet10t", {}, 4, 1, 32),
        ModelSpec("torchvision:squeezenet1_1", {}, 4, 3, 64),
        ModelSpec("torch.nn:LazyLinear", {"out_features": 4}, 4, 3, 8),
    ],
    ids=lambda s: s.model,
)
def test_a_model_by_name_is_saved_and_built_again(spec: ModelSpec, tmp_path: Path) -> None:
    model = build(spec).eval()
    x = torch.randn(2, spec.channels, spec.size, spec.size)
    with torch.no_grad():
        before = model(x)
        if spec.model.startswith("torch.nn"):
            return
        assert before.shape == (2, 4)
        save_model(model, tmp_path / "m", {"spec": spec.to_dict(), "classes": list("abcd")})
        torch.testing.assert_close(load_model(tmp_path / "m")(x), before)


def test_a_hugging_face_image_classifier_by_id(tmp_path: Path) -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        num_channels=3, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic",
        id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1},
    )  # fmt: skip
    ResNetForImageClassification(config).save_pretrained(tmp_path / "hub")
    from tutelage.models import label_names

    spec = ModelSpec(f"hf:{tmp_path / 'hub'}", {}, 2, 3, 32)
    model = build(spec, ["cat", "dog"]).eval()
    assert label_names(model) == ["cat", "dog"]
    assert build(spec, ["a", "b", "c"]).config.num_labels == 3
    save_model(model, tmp_path / "m", {"spec": None, "classes": ["cat", "dog"]})
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path / "m")(x).logits, model(x).logits)


def test_a_dumped_recipe_reads_back_the_same() -> None:
    for path in Path(__file__).parents[2].glob("recipes/*.yaml"):
        loaded = load_recipe(path)
        import yaml

        assert build_recipe(yaml.safe_load(dump_recipe(loaded))) == loaded


def test_a_stop_is_possible_while_teacher_outputs_are_computed(tmp_path: Path) -> None:
    recipe = build_recipe({
        "name": "t", "data": {"source": "digits", "limit": 600}, "teacher": {"model": "mlp", "train": {"epochs": 5}},
        "student": "mlp", "method": "logit", "train": {"epochs": 4, "batch_size": 32},
    })  # fmt: skip
    data = load_data(recipe, Terminal(speaks=False))
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return (tmp_path / "models" / "teacher").exists()

    context = RunContext(build_accelerator(), RunDirectory(tmp_path), Terminal(speaks=False), stop)
    with pytest.raises(Interrupted, match="while teacher outputs were computed"):
        compare(recipe_spec(recipe, data), context)
    assert not (tmp_path / "models" / "baseline-seed0").exists()
    again = RunContext(build_accelerator(), RunDirectory(tmp_path), Terminal(speaks=False))
    summary = compare(recipe_spec(recipe, data), again)
    assert summary["students"]["distilled"]["best"]["accuracy"]["mean"] > 0
