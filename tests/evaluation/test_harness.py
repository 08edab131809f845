"""Tasks of lm-evaluation-harness, by name, on what a run has trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tutelage
from support.language_methods import model, recipe
from tutelage.config import EvaluateConfig, build_recipe
from tutelage.errors import ConfigError, MissingDependencyError
from tutelage.evaluation.harness import harness
from tutelage.models import load_model

__all__ = ["recipe"]

TASK = """task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{path}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    place = tmp_path / "tasks"
    place.mkdir()
    rows = [
        {"question": f"{n} and {m}", "choices": [" one", " " + str(n + m), "."], "answer": (n + m) % 3}
        for n in range(1, 4) for m in range(1, 4)
    ]  # fmt: skip
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (place / "sums.yaml").write_text(TASK.format(path=place / "rows.jsonl"), encoding="utf-8")
    return place


def by_hand(of: Any, cutter: Any, place: Path) -> float:
    """The share of questions to which the right answer is the likeliest."""
    right = []
    for line in (place / "rows.jsonl").read_text().splitlines():
        row, scores = json.loads(line), []
        for choice in row["choices"]:
            ids = cutter(row["question"] + choice, add_special_tokens=False, return_tensors="pt")["input_ids"]
            begin = len(cutter(row["question"], add_special_tokens=False)["input_ids"])
            with torch.no_grad():
                log = of(input_ids=ids).logits.log_softmax(-1)[0, begin - 1 : -1]
            scores.append(float(log.gather(-1, ids[0, begin:, None]).sum()))
        right.append(max(range(3), key=scores.__getitem__) == row["answer"])
    return sum(right) / len(right)


@pytest.mark.filterwarnings("ignore")
def test_the_models_of_a_run_are_scored_by_tasks_of_a_folder(
    recipe: dict[str, Any], tasks: Path, cutter: Any, tmp_path: Path
) -> None:
    recipe["evaluate"] = {"tasks": ["sums"], "include": str(tasks)}
    recipe["train"]["steps"] = 2
    found = tutelage.run(build_recipe(recipe), out=tmp_path / "run").summary["tasks"]
    assert set(found) == {"teacher", "baseline", "distilled"}
    start = model(Path(recipe["teacher"]["model"].removeprefix("hf:")))
    student = load_model(tmp_path / "run" / "student")
    for name, of in (("teacher", start), ("distilled", student)):
        assert found[name]["sums"]["acc"] == pytest.approx(by_hand(of.eval(), cutter, tasks))
        assert found[name]["sums"]["acc_stderr"] > 0


@pytest.mark.filterwarnings("ignore")
def test_a_task_that_there_is_not_is_named_before_anything_is_trained(tasks: Path, cutter: Any) -> None:
    with pytest.raises(ConfigError, match=r"has no task 'sum' .did you mean"):
        harness(EvaluateConfig(tasks=["sum"], include=str(tasks)), cutter)


def test_without_the_package_a_recipe_says_what_to_install(monkeypatch: pytest.MonkeyPatch, cutter: Any) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="lm_eval"):
        harness(EvaluateConfig(tasks=["sums"]), cutter)


def test_tasks_are_for_causal_language_models() -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.tasks are for causal language models"):
        build_recipe({
            "name": "x", "data": {"source": "digits"}, "teacher": {"model": "mlp", "train": {"epochs": 1}},
            "student": {"model": "mlp"}, "method": {"kind": "logit"}, "evaluate": {"tasks": ["sums"]},
        })  # fmt: skip
