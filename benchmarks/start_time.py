"""Seconds from the call of a run to its first training step: this checkout and another commit, in interleaved pairs.

    git clone . /path/BASE && git -C /path/BASE checkout COMMIT
    python benchmarks/start_time.py /path/BASE                                # recipes/digits.yaml
    python benchmarks/start_time.py /path/BASE --model hf:FOLDER              # a student cut from SmolLM2

Each start is a process of its own that imports everything first; the two commits take turns. Writes the times to
``results/start-time.json`` and prints the medians. Use an idle machine.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

CHILD = """
import json, sys, time
from pathlib import Path
from tutelage import api
from tutelage.config import build_recipe, load_recipe
from tutelage.engine import loop
try:
    from tutelage.progress import Terminal
except ModuleNotFoundError:  # commits before the redesign
    from tutelage.workflows.progress import Terminal
import torch, transformers

recipe = json.loads(sys.argv[1])
recipe = load_recipe(recipe) if isinstance(recipe, str) else build_recipe(recipe)

def stop(*arguments):
    print("RESULT", time.perf_counter() - start, flush=True)
    raise SystemExit(0)

loop._train = stop
start = time.perf_counter()
api.run(recipe, out="out", terminal=Terminal(speaks=False))
"""


def seconds_to_start(source: Path, recipe: Any) -> float:
    """Seconds until the first training of a run begins, in a new process."""
    environment = {**os.environ, "PYTHONPATH": str(source / "src"), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        texts = ({"text": f"The number {i} comes before the number {i + 1}."} for i in range(300))
        (Path(folder) / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts), encoding="utf-8")
        command = [sys.executable, "-c", CHILD, json.dumps(recipe)]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    if not lines:
        raise SystemExit(done.stderr[-2000:])
    return float(lines[0].split()[1])


def main() -> None:
    """Time the starts, and write the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path, help="a checkout of the other commit")
    parser.add_argument("--model", help="a causal teacher, as recipes name it, whose student is half as deep")
    parser.add_argument("--pairs", type=int, default=7)
    arguments = parser.parse_args()
    recipe: Any = str(ROOT / "recipes" / "digits.yaml")
    if arguments.model:
        recipe = {
            "name": "start", "data": {"source": "table", "path": "texts.jsonl", "task": "causal", "max_length": 64},
            "teacher": {"model": arguments.model}, "student": {"model": "teacher", "layers": 15},
            "method": "token", "train": {"steps": 10, "batch_size": 4}, "baseline": False,
        }  # fmt: skip
    times: dict[str, list[float]] = {"here": [], "base": []}
    for _ in range(arguments.pairs):
        for name, source in (("here", ROOT), ("base", arguments.base)):
            times[name].append(seconds_to_start(source, recipe))
            print(f"{name} {times[name][-1]:.2f} s", flush=True)
    here, base = (statistics.median(times[name]) for name in ("here", "base"))
    allowed = max(1.0, 0.05 * base)
    print(f"here {here:.2f} s, base {base:.2f} s, longer by {here - base:.2f} s; allowed {allowed:.2f} s")
    file = ROOT / "results" / "start-time.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    known[arguments.model or "digits"] = {"seconds": times, "median": {"here": here, "base": base}}
    file.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
