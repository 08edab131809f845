"""Every method against plain distillation: one teacher, one student, one budget, the same seeds.

    tutelage run recipes/fashion-mnist.yaml --out runs/fashion-mnist seed=0 baseline=false   # the teacher
    python benchmarks/methods.py --jobs 2
    python benchmarks/methods.py --cost
    python benchmarks/methods.py --recipe benchmarks/pictures.yaml --name pictures --runs runs/methods-pictures \\
        --set teacher.checkpoint=runs/pictures/models/teacher teacher.train=null train.epochs=12 --only kd DIST ...

The first trains what is not trained yet and can be stopped and started again; the second measures seconds per step
and memory with a live teacher, every method in a process of its own. Both write ``results/methods/``. Accuracy is
that of the last epoch on the test split; nothing is selected on it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

METHODS = Path(__file__).with_name("methods.yaml")
HARD = {"alpha": 0.0, "hard": 1.0}


def methods() -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and method of every row."""
    for group, found in yaml.safe_load(METHODS.read_text()).items():
        for name, method in found.items():
            if group == "features":
                yield name, {**method, **HARD}
                soft = {"alpha": 0.9, "hard": 0.1} if method["kind"] == "simkd" else {}
                yield f"{name} + kd", {**method, **soft}
            else:
                yield name, method


def slug(name: str) -> str:
    """A row's directory."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("+", "and")).strip("-")


def train(args: argparse.Namespace, name: str, method: dict[str, Any]) -> str:
    """Run one row to its end, or go on with it; its last words where it fails."""
    out = Path(args.runs) / slug(name)
    if (out / "summary.json").exists():
        return f"{name}: done"
    resume = ["--resume"] if (out / "config.yaml").exists() else []
    command = [
        sys.executable, "-m", "tutelage", "run", args.recipe, f"method={json.dumps(method)}",
        *args.set, f"seeds={list(range(args.seeds))}", f"baseline={str(name == 'kd').lower()}",
        "--out", str(out), *resume,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return f"{name}: " + ("done" if done.returncode == 0 else (done.stdout + done.stderr)[-600:])


def measure(recipe: str, method: dict[str, Any] | None, steps: int) -> dict[str, float]:
    """Milliseconds of a step with a live teacher, and the most memory the process ever had."""
    import torch

    from tutelage.config import load_recipe
    from tutelage.data import RankSlice
    from tutelage.engine.optim import build_optimizer
    from tutelage.experiment.prepare import build_teacher, prepare_student_and_method
    from tutelage.experiment.recipe_source import load_data, recipe_spec
    from tutelage.methods import DistillationModule, SupervisedMethod
    from tutelage.progress import Terminal
    from tutelage.teachers import LiveTeacher

    overrides = [] if method is None else [f"method={json.dumps(method)}"]
    loaded = load_recipe(recipe, overrides)
    c = recipe_spec(loaded, load_data(loaded, Terminal(speaks=False)))
    teacher = LiveTeacher(build_teacher(c))
    student, taught = c.source.build_student(0), SupervisedMethod()
    if method is not None:
        student, taught = prepare_student_and_method(c, student, teacher.model, 0)  # type: ignore[assignment]
    module = DistillationModule(student, taught).train()
    optimizer = build_optimizer(module, loaded.train.optimizer)
    times: list[float] = []
    torch.manual_seed(0)
    for micros in c.source.training_batches("distilled", 0).epoch(0, RankSlice()):
        start = time.perf_counter()
        (batch,) = micros
        signal = teacher.signal(batch, taught.needs) if taught.needs is not None else None
        terms = module(batch, signal)
        torch.stack([taught.weights[k] * t.sum / t.count.clamp(min=1) for k, t in terms.items()]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        taught.after_step()
        times.append(1000 * (time.perf_counter() - start))
        if len(times) == steps:
            break
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"milliseconds": statistics.median(times[5:]), "megabytes": megabytes}


def cost(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Every row measured ``rounds`` times in turn; medians."""
    rows: list[tuple[str, dict[str, Any] | None]] = [("baseline", None), *methods()]
    found: dict[str, list[dict[str, float]]] = {name: [] for name, _ in rows}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(args.rounds):
        for name, method in rows:
            command = [sys.executable, __file__, "--recipe", args.recipe, "--measure", json.dumps(method)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    return {
        name: {key: statistics.median(f[key] for f in several) for key in ("milliseconds", "megabytes")}
        for name, several in found.items()
    }


def collect(args: argparse.Namespace) -> dict[str, Any]:
    """What the finished rows found."""
    from tutelage.evaluation.statistics import paired_difference, spread

    rows: dict[str, Any] = {}
    for name, method in methods():
        path = Path(args.runs) / slug(name)
        if not (path / "summary.json").exists():
            continue
        summary = json.loads((path / "summary.json").read_text())
        arms = {"baseline": "baseline", name: "distilled"} if name == "kd" else {name: "distilled"}
        for row, arm in arms.items():
            results = [
                json.loads((path / "models" / f"{arm}-seed{seed}" / "result.json").read_text())
                for seed in summary["seeds"]
            ]
            rows[row] = {
                "method": method if arm == "distilled" else None,
                "formula": summary["formula"] if arm == "distilled" else "ce",
                "parameters": summary["parameters"]["student"],
                "projectors": summary["projectors"] if arm == "distilled" else 0,
                "seeds": summary["seeds"],
                "test": [r["last"]["accuracy"] for r in results],
                "test_best_on_validation": [r["best"]["accuracy"] for r in results],
                "agreement": [r["last"]["agreement"] for r in results],
                "validation": [r["validation"]["accuracy"] for r in results],
            }
            rows[row]["mean"] = spread(rows[row]["test"])
            rows[row]["teacher"] = summary["teacher"]["accuracy"]
    for row in rows.values():
        if "kd" in rows and len(row["test"]) == len(rows["kd"]["test"]):
            row["over_kd"] = paired_difference(row["test"], rows["kd"]["test"])
    return rows


def write(args: argparse.Namespace, rows: dict[str, Any], costs: dict[str, Any]) -> None:
    """The figures as JSON, and as a table, the best first."""
    folder = Path(args.results)
    folder.mkdir(parents=True, exist_ok=True)
    stem = args.name
    (folder / f"{stem}.json").write_text(json.dumps({"rows": rows, "cost": costs}, indent=1) + "\n")
    if not rows:
        return
    teacher = next(iter(rows.values()))["teacher"]
    lines = [
        f"Teacher: {100 * teacher:.2f} %. Test accuracy of the last epoch, mean and standard deviation over seeds "
        f"{next(iter(rows.values()))['seeds']}; against plain `kd` paired by seed, with 95 % interval.",
        "",
        "| method | loss | test % | over kd | agreement with the teacher % "
        "| further learned parameters | ms a step | peak MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    base = costs.get("baseline")
    for name, r in sorted(rows.items(), key=lambda item: -item[1]["mean"]["mean"]):
        gain = r.get("over_kd")
        over = "" if gain is None or name == "kd" else (
            f"{100 * gain['mean']:+.2f} ({100 * gain['low']:+.2f} to {100 * gain['high']:+.2f})"
        )  # fmt: skip
        spent = costs.get(name)
        shown = ["", ""]
        if spent and base:
            shown = [
                f"{spent['milliseconds']:.1f} ({spent['milliseconds'] / base['milliseconds']:.2f}x alone)",
                f"{spent['megabytes']:.0f}",
            ]
        lines.append(
            f"| {name} | `{r['formula']}` | {100 * r['mean']['mean']:.2f} ± {100 * r['mean']['std']:.2f} | {over} | "
            f"{100 * statistics.mean(r['agreement']):.1f} | {r['projectors']:,} | {shown[0]} | {shown[1]} |"
        )
    (folder / f"{stem}.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Train, or measure, what is asked for, and write what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default=str(Path(__file__).with_name("fashion_methods.yaml")))
    parser.add_argument("--name", default="fashion-mnist")
    parser.add_argument("--runs", default="runs/methods")
    parser.add_argument("--results", default="results/methods")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--set", nargs="*", default=[], help="overrides of the recipe")
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        print(json.dumps(measure(args.recipe, json.loads(args.measure), args.steps)))
        return
    stored = Path(args.results) / f"{args.name}.json"
    costs = json.loads(stored.read_text())["cost"] if stored.exists() else {}
    if args.cost:
        costs = cost(args)
    else:
        chosen = [(n, m) for n, m in methods() if not args.only or n in args.only]
        with ThreadPoolExecutor(args.jobs) as pool:
            for said in pool.map(lambda row: train(args, *row), chosen):
                print(said, flush=True)
    write(args, collect(args), costs)


if __name__ == "__main__":
    main()
