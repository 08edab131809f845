"""Methods that ask no teacher: controls beside one, and runs without any."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tutelage
from support.worlds import images
from tutelage import api, losses
from tutelage.cli.doctor_checks import examine
from tutelage.cli.run import _show
from tutelage.cli.taps_survey import survey_recipe
from tutelage.config import METHOD_KINDS, build_recipe, load_recipe
from tutelage.data import Batch
from tutelage.errors import CapabilityError, ConfigError
from tutelage.experiment.fill_cache import fill_cache
from tutelage.methods import METHODS, LogitMethod, SupervisedMethod, TeacherFreeMethod
from tutelage.progress import Terminal
from tutelage.reports import final_table, verdict, write_report
from tutelage.taps import Observation

RECIPE: dict[str, Any] = {
    "name": "controls",
    "data": {"source": "digits", "labels": 100},
    "teacher": {"model": "mlp", "options": {"hidden": [32]}, "train": {"steps": 60}},
    "student": {"model": "mlp", "options": {"hidden": [8]}},
    "train": {"steps": 12, "batch_size": 32, "optimizer": {"lr": 0.01}},
}
SILENT = Terminal(speaks=False)


def recipe(method: Any, **changes: Any) -> Any:
    return build_recipe({**json.loads(json.dumps(RECIPE)), "method": method, **changes})


def weights(out: Path, training: str) -> dict[str, torch.Tensor]:
    return load_file(str(out / "models" / training / "model.safetensors"))


def test_a_supervised_method_is_the_student_alone_to_the_last_bit(tmp_path: Path) -> None:
    """Same images, order, budget and loss, although most images have no label and a method with a teacher has all."""
    found = api.run(recipe("supervised"), out=tmp_path / "run", terminal=SILENT)
    alone, control = (weights(found.path, f"{arm}-seed0") for arm in ("baseline", "distilled"))
    assert all(torch.equal(v, control[k]) for k, v in alone.items())
    assert found.summary["gain"]["best"]["mean"] == 0
    assert found.summary["formula"] == "1 * ce"
    assert "agreement" in found.summary["students"]["distilled"]["best"], "it is still compared with the teacher"
    smooth = api.run(recipe({"kind": "supervised", "label_smoothing": 0.2}), out=tmp_path / "smooth", terminal=SILENT)
    assert not torch.equal(weights(smooth.path, "distilled-seed0")["head.weight"], control["head.weight"])


@pytest.mark.parametrize(
    "method",
    [
        SupervisedMethod(label_smoothing=0.3),
        TeacherFreeMethod(alpha=0.4, temperature=5.0, correct=0.8),
        TeacherFreeMethod(variant="paper"),
    ],
    ids=repr,
)
def test_terms_are_those_of_the_objectives_and_leave_out_rows_without_a_label(method: Any) -> None:
    logits = torch.randn(4, 5, requires_grad=True)
    batch = Batch(torch.zeros(4, 2), torch.tensor([1, -100, 4, 0]), mask=torch.tensor([True, True, True, False]))
    terms = method(Observation(logits), batch, None)
    assert {name: int(term.count) for name, term in terms.items()} == dict.fromkeys(method.weights, 2)
    assert {name: int(n) for name, n in method.counts(batch).items()} == dict.fromkeys(method.weights, 2)
    rows, labels = logits[[0, 2]], torch.tensor([1, 4])
    smoothing = getattr(method.options, "label_smoothing", 0.0)
    expected = {"ce": losses.cross_entropy(rows, labels, label_smoothing=smoothing, reduction="sum")}
    if isinstance(method, TeacherFreeMethod):
        expected["teacher_free"] = losses.teacher_free(
            rows, labels, **method.options.model_dump(exclude={"kind", "alpha"}),
            reduction="sum",
        )  # fmt: skip
    for name, value in expected.items():
        torch.testing.assert_close(terms[name].sum, value)


CACHED = {**RECIPE["teacher"], "cache": True}
OTHERS = {
    "cached": {"teacher": CACHED},
    "ahead": {"teacher": {**RECIPE["teacher"], "inference": {"overlap": True}}},
    "mixed": {"data": {"source": "digits", "augment": ["mixup"]}},
    "ensemble": {"teacher": {"members": ["mlp", "mlp"], "train": {"steps": 20}}},
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.filterwarnings("ignore")
def test_a_control_runs_with_any_recipe(other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = recipe("teacher-free", **OTHERS[other], baseline=False)
    found = api.run(asked, out=tmp_path / "run", terminal=SILENT)
    assert "kl" in found.summary["students"]["distilled"]["best"]
    lines = [json.loads(text) for text in (found.path / "metrics.jsonl").read_text().splitlines()]
    terms = [line["terms"] for line in lines if line["training"] == "distilled-seed0" and "terms" in line]
    assert all(t["ce"]["raw"] > 0 for t in terms), "mixed images have no label and must not be all that it sees"


def test_a_cache_for_a_method_that_asks_nothing_is_refused(tmp_path: Path) -> None:
    teacher = {"model": "mlp", "trained": True, "options": {"hidden": [32]}}
    with pytest.raises(CapabilityError, match="does not use teacher outputs"):
        fill_cache(recipe("supervised", teacher=teacher), out=tmp_path / "cache", terminal=SILENT)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: SupervisedMethod(label_smoothing=1.0), "label_smoothing is 1.0"),
        (lambda: TeacherFreeMethod(correct=1.0), "correct is 1.0"),
        (lambda: TeacherFreeMethod(alpha=1.1), "alpha is 1.1"),
        (lambda: TeacherFreeMethod(temperature=0.0), "temperature is 0.0"),
        (lambda: TeacherFreeMethod(variant="mine"), "variant is 'mine'"),
        (lambda: recipe({"kind": "supervised", "label_smoothing": 1.0}), "label_smoothing"),
        (lambda: recipe({"kind": "supervised", "temperature": 4}), "unknown key 'method.temperature'"),
    ],
)
def test_values_out_of_range_are_refused(make: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make()


def test_a_virtual_teacher_that_does_not_know_the_label_is_refused_before_the_student_trains(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"correct=0.1 of 10 classes"):
        api.run(recipe({"kind": "teacher-free", "correct": 0.1}), out=tmp_path / "run", terminal=SILENT)
    assert not (tmp_path / "run" / "models" / "distilled-seed0").exists()


def test_doctor_says_that_nobody_is_asked() -> None:
    texts = {finding.topic: finding.text for finding in examine(recipe("teacher-free"), SILENT)}
    assert texts["capabilities"] == "the method needs no teacher"
    assert texts["method"] == "loss = 0.1 * teacher_free(T=20, correct=0.99, authors) + 0.9 * ce"


def test_options_of_a_recipe_are_those_of_the_method() -> None:
    for kind in ("supervised", "teacher-free"):
        options = METHOD_KINDS[kind]()
        method = METHODS[kind](options)
        assert method.options is options
        assert method.needs is None


# No teacher at all ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def untaught(tmp_path_factory: pytest.TempPathFactory) -> api.RunResult:
    out = tmp_path_factory.mktemp("runs") / "untaught"
    return api.run(
        recipe({"kind": "supervised", "label_smoothing": 0.1}, teacher=None, seeds=[0, 1]), out=out, terminal=SILENT
    )


def test_without_a_teacher_nothing_is_said_of_one(untaught: api.RunResult) -> None:
    summary = untaught.summary
    assert {"teacher", "capacity_ratio"} & set(summary) == set()
    assert summary["parameters"] == {"student": 8 * 65 + 90}
    assert set(summary["latency"]) == {"student"}
    assert set(summary["students"]["distilled"]["best"]) == {"accuracy", "f1", "matthews", "loss", "ece"}
    assert summary["gain"]["best"]["n"] == 2
    assert "teacher" not in load_recipe(untaught.path / "config.yaml").model_dump(exclude_none=True)
    said = verdict(summary)
    assert said.startswith("With the method ")
    assert "teacher" not in said
    rows = final_table(summary)
    assert [row["name"] for row in rows] == ["baseline student", "student with the method"]
    page = (untaught.path / "report.html").read_text(encoding="utf-8")
    body = re.sub(r"<(script|style)[^>]*>.*?</\1>|<pre.*?</pre>", "", page, flags=re.S)
    assert "student with the method" in body
    for word in ("Agreement", "KL to teacher", "distilled<", "Dark knowledge", "Of the teacher"):
        assert word not in body, word


def test_the_terminals_table_has_no_empty_columns(
    untaught: api.RunResult, capsys: pytest.CaptureFixture[str]
) -> None:
    _show(untaught.summary, untaught.path)
    shown = capsys.readouterr().out
    assert "accuracy" in shown
    assert "agreement" not in shown
    assert "KL" not in shown


def test_runs_with_and_without_a_teacher_stand_side_by_side(untaught: api.RunResult, tmp_path: Path) -> None:
    taught = api.run(recipe("logit"), out=tmp_path / "taught", terminal=SILENT)
    out = write_report([untaught.path, taught.path], tmp_path / "both.html")
    assert "with the method or distilled" in out.read_text(encoding="utf-8")


def test_without_a_teacher_a_run_resumes_to_the_same_bits(untaught: api.RunResult, tmp_path: Path) -> None:
    shutil.copytree(untaught.path, tmp_path / "again")
    for name in ("summary.json", "models/distilled-seed1", "checkpoints/distilled-seed1"):
        path = tmp_path / "again" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    asked = load_recipe(untaught.path / "config.yaml")
    again = api.run(asked, out=tmp_path / "again", resume=True, terminal=SILENT)
    first, second = (weights(path, "distilled-seed1") for path in (untaught.path, again.path))
    assert all(torch.equal(v, second[k]) for k, v in first.items())


@pytest.mark.parametrize("teacher", [{"teacher": None}, {}], ids=["null", "left out"])
@pytest.mark.parametrize("method", ["logit", "simkd", {"kind": "feature", "loss": "hint"}])
def test_a_method_that_needs_a_teacher_says_so_at_once(teacher: dict[str, None], method: Any) -> None:
    raw = {k: v for k, v in RECIPE.items() if k != "teacher"} | teacher
    with pytest.raises(
        ConfigError, match=r"needs a teacher(.|\n)*-> add 'teacher', or .*: .*supervised, teacher-free"
    ):
        build_recipe({**json.loads(json.dumps(raw)), "method": method})


def test_whether_a_method_needs_a_teacher_is_the_same_in_recipes_and_in_code() -> None:
    assert {k for k, c in METHOD_KINDS.items() if c.needs_teacher} == {
        k for k, m in METHODS.items() if m.needs is not None
    }


def test_doctor_taps_and_cache_without_a_teacher(tmp_path: Path) -> None:
    asked = recipe("supervised", teacher=None)
    found = examine(asked, SILENT)
    assert not [f for f in found if f.level == "bad"]
    assert "the recipe has no teacher, and the method needs none" in [f.text for f in found if f.topic == "teacher"]
    assert "teacher" not in " ".join(f.text for f in found if f.topic in ("time", "memory", "capacity"))
    assert [s.title for s in survey_recipe(asked, ("student", "teacher"), SILENT)] == ["student: mlp"]
    with pytest.raises(ConfigError, match="has no teacher"):
        survey_recipe(asked, ("teacher",), SILENT)
    with pytest.raises(ConfigError, match="has no teacher"):
        fill_cache(asked, out=tmp_path / "cache", terminal=SILENT)


def test_distill_without_a_teacher(tmp_path: Path) -> None:
    world = images()
    options: dict[str, Any] = {"eval_data": world.held, "epochs": 1, "out": tmp_path / "run", "verbose": False}
    run = tutelage.distill(None, world.make(4), world.train, method=SupervisedMethod(label_smoothing=0.1), **options)
    assert "teacher" not in run.summary
    assert type(run.student) is type(world.make(4))
    for method, more in ((None, {}), (LogitMethod(), {}), (SupervisedMethod(), {"inference": {"dtype": "bf16"}})):
        with pytest.raises(ConfigError, match="teacher=None"):
            tutelage.distill(
                None, world.make(4), world.train, method=method, **{**options, "out": tmp_path / "no"}, **more
            )
    assert not (tmp_path / "no").exists()
