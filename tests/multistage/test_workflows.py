"""Generations, and chains of assistants."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from support import python
from tutelage import api
from tutelage.config import build_recipe
from tutelage.data import ImageData, SequentialBatches
from tutelage.errors import ConfigError
from tutelage.evaluation import evaluate
from tutelage.experiment.recipe_source import build_model, load_data
from tutelage.models import load_weights
from tutelage.multistage.assistants import choose_assistants, count_assistants
from tutelage.multistage.born_again import generation_seed
from tutelage.multistage.run import first_stage
from tutelage.progress import Terminal

SMALL = {
    "name": "small", "data": {"source": "digits"}, "student": {"model": "mlp", "options": {"hidden": [8]}},
    "method": {"kind": "logit", "temperature": 2, "alpha": 0.7},
    "train": {"epochs": 2, "batch_size": 64, "optimizer": {"kind": "adamw", "lr": 0.01}}, "seeds": [0, 1],
}  # fmt: skip
TEACHER = {"model": "mlp", "options": {"hidden": [64, 64]}}


def recipe(**more: Any) -> Any:
    return build_recipe(json.loads(json.dumps({**SMALL, **more})))


def silent() -> Terminal:
    return Terminal(speaks=False)


@pytest.fixture(scope="module")
def generations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("born") / "run"
    asked = {"kind": "born-again", "generations": 2}
    return api.run(recipe(workflow=asked), out=out, terminal=silent()).path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(str(next(folder.glob("*.safetensors"))))


def teacher_of(stage: Path) -> Path:
    """The folder of the weights of a stage's teacher, which config.yaml names from its own folder."""
    path = yaml.safe_load((stage / "config.yaml").read_text())["teacher"]["checkpoint"]
    assert path.startswith("$HERE/")
    return (stage / path.removeprefix("$HERE/")).resolve()


def test_each_generation_is_taught_by_the_one_before(generations: Path) -> None:
    summary = json.loads((generations / "summary.json").read_text())
    rows = {row["name"]: row for row in summary["rows"]}
    assert [rows[f"generation {n}"]["taught_by"] for n in (0, 1, 2)] == [None, "generation 0", "generation 1"]
    for seed in (0, 1):
        first, second = (generations / "stages" / f"seed{seed}" / f"generation-{n}" for n in (1, 2))
        assert teacher_of(second) == first / "models" / f"distilled-seed{generation_seed(seed, 1)}"
        told = json.loads((second / "summary.json").read_text())["teacher"]["accuracy"]
        assert told == rows["generation 1"]["best"]["accuracy"]["values"][seed]
    stages = enumerate((first, second), 1)
    alike = [weights(stage / "models" / f"distilled-seed{generation_seed(1, n)}") for n, stage in stages]
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(*alike)


def test_generations_share_the_labels_of_the_student(tmp_path: Path) -> None:
    """With ``labels``, a teacher may have all; generation 0 has those that the student of a plain run has alone."""
    few = {"source": "digits", "labels": 100, "unlabeled": "drop"}
    plain = api.run(recipe(data=few, teacher=TEACHER, seeds=[0]), out=tmp_path / "plain", terminal=silent())
    born_of = api.run(recipe(data=few, workflow={"kind": "born-again", "generations": 1}, seeds=[0]),
                      out=tmp_path / "born", terminal=silent())  # fmt: skip
    alone = plain.summary["students"]["baseline"]["last"]["accuracy"]["values"]
    assert born_of.summary["rows"][0]["last"]["accuracy"]["values"] == alone


def test_generation_0_is_the_student_that_a_plain_run_trains_alone(generations: Path, tmp_path: Path) -> None:
    api.run(recipe(teacher=TEACHER, seeds=[1]), out=tmp_path / "plain", terminal=silent())
    alone = weights(tmp_path / "plain" / "models" / "baseline-seed1")
    first = weights(generations / "stages" / "seed1" / "generation-0" / "models" / "distilled-seed1")
    torch.testing.assert_close(first, alone, rtol=0, atol=0)


def test_the_ensemble_is_the_mean_of_the_generations_probabilities(generations: Path) -> None:
    asked = recipe(workflow="born-again")
    data: ImageData = load_data(asked, silent())
    folders = [
        generations / f"stages/seed0/generation-{n}/models/distilled-seed{generation_seed(0, n)}" for n in (0, 1, 2)
    ]
    models = [build_model(asked.student, data, 0) for _ in folders]
    for model, folder in zip(models, folders, strict=True):
        load_weights(model.eval(), folder)
    right = total = 0
    for batch in SequentialBatches(data.test):
        with torch.no_grad():
            mean = torch.stack([model(batch.inputs).softmax(-1) for model in models]).mean(0)
        right, total = right + int((mean.argmax(-1) == batch.labels).sum()), total + len(batch.labels)
    rows = {row["name"]: row for row in json.loads((generations / "summary.json").read_text())["rows"]}
    assert rows["ensemble of 0 to 2"]["best"]["accuracy"]["values"][0] == pytest.approx(right / total, abs=1e-9)


def test_the_student_is_the_last_generation_that_validation_prefers(generations: Path) -> None:
    summary = json.loads((generations / "summary.json").read_text())
    last = summary["rows"][2]
    chosen_seed = max((0, 1), key=lambda s: last["validation"]["values"][s])
    asked = recipe(workflow="born-again")
    data = load_data(asked, silent())
    model = build_model(asked.student, data, 0)
    load_weights(model, generations / "student")
    found = evaluate(model, SequentialBatches(data.test), torch.device("cpu"))["accuracy"]
    assert found == last["best"]["accuracy"]["values"][chosen_seed]


def test_a_page_shows_generations_beside_a_run(generations: Path, tmp_path: Path) -> None:
    run = generations / "stages" / "seed0" / "generation-1"
    page = api.write_report([generations, run], tmp_path / "page.html").read_text()
    for text in ("ensemble of 0 to 2", "Generation 1 ", "Differences, paired by seed", "distilled student"):
        assert text in page


def test_a_chain_goes_through_its_assistants(tmp_path: Path) -> None:
    done = api.run(
        recipe(teacher=TEACHER, student={"model": "mlp", "options": {"hidden": [2]}}, workflow="assistant-chain"),
        out=tmp_path / "run", terminal=silent(),
    )  # fmt: skip
    rows = {row["name"]: row for row in done.summary["rows"]}
    assert list(rows) == [
        "teacher",
        "assistant 1",
        "baseline student",
        "distilled directly",
        "distilled through assistants",
    ]
    sizes = [rows[name]["parameters"] for name in ("teacher", "assistant 1", "distilled through assistants")]
    assert sizes[0] > sizes[1] > sizes[2]
    stage = tmp_path / "run" / "stages" / "seed1" / "student"
    assert teacher_of(stage) == tmp_path / "run" / "stages" / "seed1" / "assistant-1" / "models" / "distilled-seed1"
    teacher = json.loads((stage / "summary.json").read_text())["teacher"]["accuracy"]
    assert teacher == rows["assistant 1"]["best"]["accuracy"]["values"][1]
    assert len(list((tmp_path / "run").glob("stages/**/models/teacher"))) == 1, "the teacher is trained once"
    assert "distilled directly" in rows["distilled through assistants"]["against"]


@pytest.mark.parametrize(
    ("ratio", "least", "many"), [(0.5, 0.1, 0), (0.1, 0.1, 0), (0.099, 0.1, 1), (0.01, 0.1, 1), (0.009, 0.1, 2)]
)
def test_how_many_assistants_a_ratio_needs(ratio: float, least: float, many: int) -> None:
    assert count_assistants(ratio, least) == many
    assert many == 0 or ratio ** (1 / (many + 1)) >= least > ratio ** (1 / many)


@pytest.mark.parametrize(("family", "option"), [("width", "widths"), ("depth", "blocks")])
def test_sizes_between_follow_the_family(family: str, option: str) -> None:
    asked = recipe(
        teacher={"model": "resnet", "options": {"widths": [64, 128, 256], "blocks": 9}},
        student={"model": "resnet", "options": {"widths": [16, 32, 64], "blocks": 1}},
        workflow={"kind": "assistant-chain", "family": family, "ratio": 0.3},
    )
    models = choose_assistants(asked, asked.workflow, load_data(asked, silent()), lambda text: None)
    assert models
    base = asked.student.options
    for model in models:
        assert {k: v for k, v in model.options.items() if k != option} == {
            k: v for k, v in base.items() if k != option
        }
        assert model.options[option] > base[option]


def test_no_family_is_said_with_what_there_is() -> None:
    asked = recipe(teacher={"model": "mlp", "options": {"hidden": [512, 512]}},
                   student={"model": "mlp", "options": {"hidden": [2]}},
                   workflow={"kind": "assistant-chain", "family": "depth"})  # fmt: skip
    with pytest.raises(ConfigError, match="list the assistants; known: depth of convnet, depth of resnet"):
        choose_assistants(asked, asked.workflow, load_data(asked, silent()), lambda text: None)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"workflow": "born-agin", "teacher": None}, "unknown workflow 'born-agin' (did you mean 'born-again'?)"),
        ({"workflow": "born-again", "teacher": TEACHER}, "each generation teaches the next"),
        ({"workflow": "assistant-chain", "teacher": None}, "starts from a teacher"),
        ({"workflow": {"kind": "born-again", "generation": 2}}, "unknown key 'workflow.generation' (did you mean"),
        ({"workflow": {"kind": "assistant-chain", "assistants": [{"model": "mpl"}]}, "teacher": TEACHER}, "'mlp'"),
        ({"workflow": "assistant-chain", "teacher": TEACHER, "method": {"kind": "simkd"}}, "use another method"),
    ],
)
def test_a_mistake_is_named(more: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        recipe(**more)
    assert said in str(error.value)


def test_doctor_and_taps_look_at_the_first_stage() -> None:
    first = first_stage(recipe(workflow="born-again"))
    assert first.workflow is None
    assert first.method.kind == "supervised"
    assert first_stage(first) is first


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["born-again", "assistant-chain"])
def test_killed_at_random_it_finds_the_same(kind: str, tmp_path: Path) -> None:
    """Killed again and again, then finished: the summary of the uninterrupted workflow, but for times and paths."""
    import yaml

    plain = json.loads(
        json.dumps(
            {
                **SMALL,
                "workflow": kind,
                "train": {**SMALL["train"], "epochs": 6, "checkpoint_every": 5, "log_every": 5},
            }
        )
    )
    if kind == "assistant-chain":
        plain |= {"teacher": TEACHER, "student": {"model": "mlp", "options": {"hidden": [2]}}}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(plain))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = ["-m", "tutelage", "run", str(file), "--out"]
    whole = python.run([*command, "whole"], cwd=tmp_path, env=environment)
    assert whole.returncode == 0, whole.stderr
    rng, kills = random.Random(5), 0
    for _ in range(6):
        resume = ["--resume"] if (tmp_path / "killed" / "config.yaml").exists() else []
        job = python.Popen(
            [*command, "killed", *resume], cwd=tmp_path, env=environment, stdout=python.DEVNULL, stderr=python.DEVNULL
        )
        goal = lines(tmp_path / "killed") + rng.randint(1, 15)
        while job.poll() is None and lines(tmp_path / "killed") < goal:
            time.sleep(0.005)
        if job.poll() is not None:
            break
        job.send_signal(signal.SIGKILL)
        job.wait()
        kills += 1
    resume = ["--resume"] if (tmp_path / "killed" / "config.yaml").exists() else []
    last = python.run([*command, "killed", *resume], cwd=tmp_path, env=environment)
    assert last.returncode == 0, last.stderr
    found, wanted = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("killed", "whole"))
    assert kills >= 3
    assert found == wanted


def lines(run: Path) -> int:
    """Lines of metrics of all stages."""
    return sum(file.read_bytes().count(b"\n") for file in run.glob("stages/*/*/metrics.jsonl"))


def test_each_teacher_of_a_chain_has_a_cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = api.run(
        recipe(
            teacher={**TEACHER, "cache": {"path": "word"}}, student={"model": "mlp", "options": {"hidden": [2]}},
            workflow={"kind": "assistant-chain", "direct": False}, seeds=[0],
        ),
        out="run", terminal=silent(),
    )  # fmt: skip
    assert [row["name"] for row in done.summary["rows"]] == ["teacher", "assistant 1", "distilled through assistants"]
    assert (tmp_path / "word" / "manifest.json").exists()
    assert len(list((tmp_path / "runs" / "cache").iterdir())) == 1
