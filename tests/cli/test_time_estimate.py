"""Doctor's time has all parts of a run: writing answers, evaluation, samples, phases and the teacher's training."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from support.language_worlds import llama
from support.text_worlds import sentences, table
from tutelage.cli import doctor_checks
from tutelage.config import build_recipe
from tutelage.methods.on_policy import OnPolicyMethod
from tutelage.progress import Terminal


def parts_of(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Seconds by part, as doctor estimates them."""
    results: list[dict[str, float]] = []
    estimate = doctor_checks.estimate_seconds

    def record(*arguments: Any) -> dict[str, float]:
        results.append(estimate(*arguments))
        return results[-1]

    monkeypatch.setattr(doctor_checks, "estimate_seconds", record)
    findings = doctor_checks.examine(build_recipe({"name": "t", **recipe}), Terminal(speaks=False))
    assert [f.text for f in findings if f.level == "bad"] == []
    return results[0]


def test_answers_of_the_student_are_in_the_time_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama(tmp_path / "llama", layers=2)
    table(tmp_path / "d.jsonl", sentences(60))
    calls: Counter[str] = Counter()
    prepare = OnPolicyMethod.prepare_batch

    def counting(self: OnPolicyMethod, *arguments: Any) -> Any:
        calls["prepare_batch"] += 1
        return prepare(self, *arguments)

    monkeypatch.setattr(OnPolicyMethod, "prepare_batch", counting)
    recipe = {
        "data": {"source": "table", "path": str(tmp_path / "d.jsonl"), "task": "causal", "max_length": 24},
        "teacher": {"model": f"hf:{tmp_path / 'llama'}"}, "student": {"model": "teacher", "layers": 1},
        "method": {"kind": "on-policy", "max_new_tokens": 4}, "train": {"steps": 6, "batch_size": 4},
        "samples": {"generations": 2, "max_new_tokens": 4}, "baseline": False,
    }  # fmt: skip
    parts = parts_of(recipe, monkeypatch)
    assert calls["prepare_batch"] >= 3
    assert parts.keys() >= {"training", "evaluation", "samples", "evaluation of the teacher"}


def test_phases_and_the_training_of_the_teacher_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = {
        "data": {"source": "digits", "limit": 200},
        "teacher": {"model": "convnet", "options": {"widths": [8, 8]}, "train": {"epochs": 1}},
        "student": {"model": "convnet", "options": {"widths": [4, 4]}},
        "method": {"kind": "feature", "stage1_fraction": 0.3}, "train": {"epochs": 1},
    }  # fmt: skip
    assert parts_of(recipe, monkeypatch).keys() >= {"training", "training of the teacher"}
