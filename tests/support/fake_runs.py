"""Run directories as a run would leave them, made without training anything."""

from __future__ import annotations

import json
import math
import random
import statistics
from pathlib import Path
from typing import Any

CLASSES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]

CONFIG = """\
name: digits
seeds: [0, 1, 2]
data: {kind: digits, batch_size: 64}
method: {kind: logit, temperature: 4.0, alpha: 0.9}
"""


def spread(values: list[float]) -> dict[str, Any]:
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": std, "values": values}


def reliability(rng: random.Random, accuracy: float, over: float) -> dict[str, list[float]]:
    """Bins whose accuracy lies ``over`` below their confidence."""
    weights = [math.exp(0.35 * i) * rng.uniform(0.7, 1.3) for i in range(15)]
    count = [0.0 if i < 3 else float(round(900 * w / sum(weights))) for i, w in enumerate(weights)]
    confidence = [(i + 0.5) / 15 if n else 0.0 for i, n in enumerate(count)]
    right = [min(1.0, max(0.0, c - over * (1.2 - c) + rng.uniform(-0.04, 0.04))) if c else 0.0 for c in confidence]
    return {"count": count, "confidence": confidence, "accuracy": [r * (0.98 + 0.02 * accuracy) for r in right]}


def student(rng: random.Random, accuracy: float, seeds: int, classes: int) -> dict[str, Any]:
    values = [accuracy + 0.003 * (i % 3 - 1) + rng.uniform(-0.001, 0.001) for i in range(seeds)]

    def figures(shift: float) -> dict[str, Any]:
        return {
            "accuracy": spread([v - shift for v in values]),
            "loss": spread([1.3 * (1 - v) + 0.12 for v in values]),
            "agreement": spread([v + 0.02 for v in values]),
            "kl": spread([1.1 - v for v in values]),
            "ece": spread([0.4 * (1 - v) for v in values]),
        }

    return {
        "best": figures(0.0),
        "last": figures(0.002),
        "reliability": reliability(rng, accuracy, 0.1),
        "per_class": [min(1.0, accuracy + rng.uniform(-0.07, 0.06)) for _ in range(classes)],
        "seconds": spread([41.0 + i for i in range(seeds)]),
    }


def make_summary(
    *,
    distilled: float = 0.913,
    baseline: float | None = 0.899,
    seeds: int = 3,
    low: float = 0.009,
    high: float = 0.019,
    classes: list[str] | None = None,
    name: str = "digits",
) -> dict[str, Any]:
    """``summary.json`` of a run with these accuracies and this interval of the gain."""
    rng = random.Random(7)
    names = CLASSES if classes is None else classes
    summary: dict[str, Any] = {
        "name": name,
        "formula": "0.9 * kd(T=4) + 0.1 * ce",
        "classes": names,
        "seeds": list(range(seeds)),
        "parameters": {"teacher": 637_450, "student": 52_298},
        "capacity_ratio": 52_298 / 637_450,
        "latency": {
            "teacher": {"p50_ms": 1.39, "p95_ms": 1.71, "batch": 1},
            "student": {"p50_ms": 0.412, "p95_ms": 0.55, "batch": 1},
        },
        "teacher": {
            "n": 900,
            "accuracy": 0.932,
            "loss": 0.241,
            "ece": 0.021,
            "reliability": reliability(rng, 0.932, 0.04),
            "per_class": [min(1.0, 0.932 + rng.uniform(-0.05, 0.05)) for _ in names],
            "validation": {"accuracy": 0.936, "loss": 0.23, "ece": 0.02},
        },
        "students": {"distilled": student(rng, distilled, seeds, len(names))},
        "device": "cpu",
        "processes": 1,
        "exported": "distilled-seed0",
    }
    if baseline is not None:
        summary["students"] = {"baseline": student(rng, baseline, seeds, len(names)), **summary["students"]}
        several = seeds > 1
        pair = {
            "mean": distilled - baseline,
            "low": low if several else None,
            "high": high if several else None,
            "level": 0.95,
            "n": seeds,
            "values": [distilled - baseline] * seeds,
        }
        summary["gain"] = {"best": pair, "last": pair}
    return summary


def make_metrics(summary: dict[str, Any], *, epochs: int = 30, logs: int = 4) -> list[dict[str, Any]]:
    """``metrics.jsonl`` that leads to the summary."""
    rng = random.Random(3)
    trainings = [("teacher", summary["teacher"]["accuracy"], 0.25)]
    for seed in summary["seeds"]:
        trainings += [
            (f"{a}-seed{seed}", r["best"]["accuracy"]["values"][seed], 0.16) for a, r in summary["students"].items()
        ]
    lines: list[dict[str, Any]] = []
    for training, end, speed in trainings:
        for i in range(1, epochs * logs + 1):
            epoch, step = i / logs, 5 * i
            fall = math.exp(-speed * epoch)
            ce = 0.1 + 2.2 * fall + rng.uniform(0, 0.08)
            kd = 0.4 + 6.0 * fall + rng.uniform(0, 0.3)
            terms = {"kd": {"raw": kd, "weighted": 0.9 * kd}, "ce": {"raw": ce, "weighted": 0.1 * ce}}
            if not training.startswith("distilled"):
                terms = {"ce": {"raw": ce, "weighted": ce}}
            loss = sum(t["weighted"] for t in terms.values())
            at = {"training": training, "step": step, "epoch": epoch}
            lines.append({**at, "lr": 0.001, "loss": loss, "terms": terms})
            if i % logs == 0:
                accuracy = end - 0.8 * math.exp(-speed * 1.6 * epoch) + rng.uniform(-0.004, 0.004)
                lines.append({**at, "validation": {"accuracy": accuracy, "loss": ce, "ece": 0.03}})
    return lines


PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAAAAADhZOFXAAAAO0lEQVR42mNgYDh/f/97BwYg+B8Q8D8AxDhfABFgWP9f"
    "AUwrnJ+fAGY0BAi8BzMCGgT+gxkC8/83ACkA7y0SkesKpt4AAAAASUVORK5CYII="
)
"""A picture of 8 by 8 pixels."""

TEMPERATURES = ("1", "2", "4", "8", "20")


def similarity_file(classes: int, seed: int, n: int = 40) -> dict[str, Any]:
    """``similarity/NAME.json`` of random logits."""
    rng = random.Random(seed)
    logits = [[rng.gauss(0, 2) for _ in range(classes)] for _ in range(n)]
    sim = {}
    for t in TEMPERATURES:
        p = []
        for row in logits:
            weights = [math.exp(z / float(t)) for z in row]
            p.append([w / sum(weights) for w in weights])
        sim[t] = [math.fsum(q[i] * q[j] for q in p) / n for i in range(classes) for j in range(i, classes)]
    return {"classes": classes, "n": n, "sim": sim}


def make_similarities(path: Path, summary: dict[str, Any]) -> None:
    """The files of the teacher and of every student; all distilled ones find alike what the teacher does."""
    folder = path / "similarity"
    folder.mkdir()
    classes = len(summary["classes"] or CLASSES)
    names = ["teacher", *(f"{arm}-seed{s}" for arm in summary["students"] for s in summary["seeds"])]
    for i, name in enumerate(names):
        found = similarity_file(classes, i + 1 if name.startswith("baseline") else 0)
        (folder / f"{name}.json").write_text(json.dumps(found), encoding="utf-8")


def make_samples(path: Path, summary: dict[str, Any], *, texts: bool = False, count: int = 12) -> None:
    """``samples/test.json``: the first half disagree."""
    rng = random.Random(11)
    names = summary["classes"] or CLASSES
    many = len(names)
    models = ["teacher", *summary["students"]]
    samples = []
    for row in range(count):
        logits = {name: [round(rng.gauss(0, 2), 3) for _ in range(many)] for name in models}
        top = logits["teacher"].index(max(logits["teacher"]))
        logits["distilled"][(top + (row < count // 2)) % many] = 9.0
        shown = {"text": f"text {row} of {names[0]}"} if texts else {"image": PIXEL}
        samples.append({"row": row, "label": top, **shown, "logits": logits})
    found = {
        "exported": "distilled-seed0", "n": 900, "reference": "teacher", "student": "distilled", "labelled": 900,
        "agree": {name: 800 + i for i, name in enumerate(models[1:])},
        "right": {"both": 790, "reference": 60, "student": 20, "neither": 30},
        "by_class": {"n": [90] * many, **{name: [60 + i for i in range(many)] for name in models[1:]}},
        "pairs": [[i, (i + 1) % many, 9 - i] for i in range(min(5, many))], "samples": samples,
    }  # fmt: skip
    (path / "samples").mkdir(exist_ok=True)
    (path / "samples" / "test.json").write_text(json.dumps(found), encoding="utf-8")


def make_written(path: Path, said: str = "It is 3.") -> None:
    """``samples/written.json``."""
    models = ["teacher", "baseline", "distilled"]
    texts = [
        {
            "prompt": f"What is {i} and 2?",
            "data": f"It is {i + 2}.",
            **{name: f"{said} ({name}, {i})" for name in models},
        }
        for i in range(10)
    ]
    found = {"exported": "distilled-seed0", "tokens": 48, "models": models, "texts": texts}
    (path / "samples").mkdir(exist_ok=True)
    (path / "samples" / "written.json").write_text(json.dumps(found), encoding="utf-8")


def make_judged(file: Path, said: str = "It is 3.") -> None:
    """``judged.json``: the student after its training against before, and against its teacher."""
    roles = {"before": "baseline", "after": "distilled", "teacher": "teacher"}
    verdicts = [["loss", "loss"], ["loss", "tie"], ["win", "loss"], [None, "tie"]]
    samples = [
        {
            "messages": [{"role": "user", "content": f"What is {i}? {said}"}],
            "answers": {name: f"{said} says {name}, {i}" for name in roles},
            "verdicts": {"before / after": verdicts[i % 4], "after / teacher": ["tie", "tie"]},
        }
        for i in range(11)
    ]
    pair = {"prompts": 100, "judged": 98, "wins": 12, "ties": 30, "losses": 56, "rate": 0.27, "low": 0.2,
            "high": 0.34, "opposed": 7, "first_place": 0.55, "without_verdict": 3}  # fmt: skip
    even = {**pair, "wins": 0, "ties": 98, "losses": 0, "rate": 0.5, "low": None, "high": None, "first_place": None}
    found = {
        "name": "alpaca", "judge": "gpt-nobody", "prompts": 100, "roles": roles,
        "held_out_loss": {"before": 10.8, "after": 3.21},
        "pairs": [{"pair": ["before", "after"], **pair}, {"pair": ["after", "teacher"], **even}], "samples": samples,
    }  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found), encoding="utf-8")


def make_run(path: Path, summary: dict[str, Any] | None = None, *, config: str = CONFIG, **metrics: int) -> Path:
    """A finished run directory at ``path``; its last line of metrics is cut short, as a killed process leaves it."""
    summary = summary or make_summary()
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(config, encoding="utf-8")
    (path / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    lines = "".join(json.dumps(line) + "\n" for line in make_metrics(summary, **metrics))
    make_similarities(path, summary)
    (path / "metrics.jsonl").write_text(lines + '{"training": "distilled-se', encoding="utf-8")
    return path
