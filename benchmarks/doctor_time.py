"""Doctor's estimate of the time of a run over the time that the run takes, for each method.

    python benchmarks/doctor_time.py            # all cases; writes results/doctor-time.json
    python benchmarks/doctor_time.py logit on-policy

Images are ``digits``; texts and language models are small models of random weights with texts of few words. Each case
is examined in one process and run in another, and both times exclude imports. The estimate is within a factor
of 1.5 if the ratio is between 0.67 and 1.5. Use an idle machine.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

IMAGES: dict[str, Any] = {
    "data": {"source": "digits", "limit": 600},
    "teacher": {"model": "convnet", "options": {"widths": [16, 16]}, "train": {"epochs": 4, "batch_size": 64}},
    "student": {"model": "convnet", "options": {"widths": [8, 8]}},
    "train": {"epochs": 8, "batch_size": 64},
}
TEXTS: dict[str, Any] = {
    "data": {"source": "table", "path": "texts.jsonl", "label": "label", "max_length": 32},
    "teacher": {"model": "hf:encoder", "train": {"epochs": 4, "batch_size": 16}},
    "student": {"model": "teacher", "layers": 1},
    "train": {"epochs": 4, "batch_size": 16},
}
LANGUAGE: dict[str, Any] = {
    "data": {"source": "table", "path": "texts.jsonl", "task": "causal", "max_length": 32},
    "teacher": {"model": "hf:llama"},
    "student": {"model": "teacher", "layers": 1},
    "train": {"epochs": 2, "batch_size": 16},
}
CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "supervised": ({k: v for k, v in IMAGES.items() if k != "teacher"} | {"baseline": False}, "supervised"),
    "logit": (IMAGES, "logit"),
    "feature": (IMAGES, "feature"),
    "feature with stage 1": (IMAGES, {"kind": "feature", "stage1_fraction": 0.3}),
    "simkd": (IMAGES, "simkd"),
    "mutual": ({k: v for k, v in IMAGES.items() if k != "teacher"}, "mutual"),
    "triple": (TEXTS | {"data": {**TEXTS["data"], "task": "mlm", "label": None}}, "triple"),
    "tinybert": (TEXTS, "tinybert"),
    "minilm": (TEXTS, "minilm"),
    "patient": (TEXTS, "patient"),
    "embedding": (
        TEXTS | {"data": {**TEXTS["data"], "task": "embedding", "label": None}, "teacher": {"model": "hf:encoder"}},
        "embedding",
    ),
    "token": (LANGUAGE, "token"),
    "sequence": (LANGUAGE, "sequence"),
    "on-policy": (LANGUAGE, {"kind": "on-policy", "max_new_tokens": 16}),
}


def one(name: str, runs: bool) -> None:
    """Examine or run a case in the working directory, and print the time as JSON."""
    from support.language_worlds import llama
    from support.text_worlds import encoder, sentences, table
    from tutelage import api
    from tutelage.cli import doctor_checks
    from tutelage.config import build_recipe
    from tutelage.progress import Terminal

    base, method = CASES[name]
    if base["data"]["source"] == "table":
        table(Path("texts.jsonl"), sentences(300))
        encoder(Path("encoder"), layers=4, hidden=64)
        llama(Path("llama"), layers=4)
    recipe = build_recipe({"name": "t", **json.loads(json.dumps(base)), "method": method})
    quiet = Terminal(speaks=False)
    start = time.perf_counter()
    if runs:
        api.run(recipe, out="out", terminal=quiet)
        print("RESULT" + json.dumps({"run": time.perf_counter() - start}))
        return
    estimates: list[dict[str, float]] = []
    estimate = doctor_checks.estimate_seconds

    def record(*arguments: Any) -> dict[str, float]:
        parts = estimate(*arguments)
        estimates.append(parts)  # doctor adds the time of the start
        return parts

    doctor_checks.estimate_seconds = record
    findings = doctor_checks.examine(recipe, quiet)
    text = next((f.text for f in findings if f.topic == "time"), None)
    if text is None:
        raise SystemExit("; ".join(f"{f.topic}: {f.text}" for f in findings if f.level == "bad"))
    total = {"estimate": sum(estimates[0].values()), "parts": estimates[0], "doctor": time.perf_counter() - start}
    print("RESULT" + json.dumps({**total, "text": text}))


def main() -> None:
    """Run the cases, one after the other."""
    results: dict[str, Any] = {}
    for name in sys.argv[1:] or CASES:
        with tempfile.TemporaryDirectory() as folder:
            path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
            environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
            r: dict[str, Any] = {}
            for what in ("estimate", "run"):
                command = [sys.executable, str(Path(__file__).resolve()), "--one", name, what]
                done = subprocess.run(
                    command, cwd=folder, env=environment, capture_output=True, text=True, check=False
                )
                line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT")), None)
                if line is None:
                    print(f"{name:22} failed: {done.stderr.strip().splitlines()[-1:]}")
                    break
                r |= json.loads(line.removeprefix("RESULT"))
        if "run" not in r:
            continue
        results[name] = r
        r["ratio"] = r["estimate"] / r["run"]
        print(f"{name:22} estimate {r['estimate']:6.1f} s, run {r['run']:6.1f} s, ratio {r['ratio']:.2f}", flush=True)
    if not sys.argv[1:]:
        content = {"command": "python benchmarks/doctor_time.py", "machine": platform.machine(), "cases": results}
        (ROOT / "results" / "doctor-time.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    one(sys.argv[2], sys.argv[3] == "run") if sys.argv[1:2] == ["--one"] else main()
