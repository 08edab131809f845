"""What eight bits cost a student, rounded after its training or trained rounded: accuracy, and latency as a ratio.

    python benchmarks/quantised.py                              # the digits recipe, some minutes on two cores
    python benchmarks/quantised.py --recipe recipes/fashion-mnist.yaml train.epochs=5

Two runs of one recipe, which share the teacher: students as they are, and students with ``student.qat: int8``. Of
each seed's student of both an int8 export is made and measured on the test split. Writes ``quantised.json`` and
``quantised.md``.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tutelage import api
from tutelage.config import load_recipe
from tutelage.evaluation.statistics import paired_difference, spread
from tutelage.experiment.export_student import CALIBRATION, export_student
from tutelage.experiment.run_artifacts import find, rows_of
from tutelage.export.timing import Cell, prepare_runner, summarise_times, time_interleaved
from tutelage.files import write_text
from tutelage.progress import Terminal

BATCHES, ROUNDS = (1, 64), 200


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("overrides", nargs="*", help="keys of the recipe to override")
    parser.add_argument("--recipe", default="recipes/digits.yaml")
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--work", type=Path, help="folder of the runs; default: a temporary one")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        found = measure(given.recipe, given.overrides, given.work or Path(temporary))
    write_text(given.out / "quantised.json", json.dumps(found, indent=1) + "\n")
    write_text(given.out / "quantised.md", page(found))
    print(page(found))


def measure(recipe: str, overrides: list[str], work: Path) -> dict[str, Any]:
    """All figures, of two runs in ``work``."""
    terminal = Terminal(speaks=False)
    shared = [*overrides, "baseline=false"]
    whole = api.run(load_recipe(recipe, shared), out=work / "whole", resume=(work / "whole").exists(),
                    terminal=terminal)  # fmt: skip
    teacher = ["teacher.train=null", f"teacher.checkpoint={work / 'whole' / 'models' / 'teacher'}"]
    rounded = api.run(
        load_recipe(recipe, [*shared, *teacher, "student.qat=int8"]), out=work / "rounded",
        resume=(work / "rounded").exists(), terminal=terminal,
    )  # fmt: skip
    seeds = whole.summary["seeds"]
    rows: dict[str, list[float]] = {name: [] for name in NAMES}
    alike: dict[str, list[float]] = {"after": [], "during": []}
    how: dict[str, Any] = {}
    for seed in seeds:
        for run, before, after in ((whole, "whole", "after"), (rounded, "unrounded", "during")):
            folder = run.path / "models" / f"distilled-seed{seed}"
            manifest = export_student(folder, "int8", terminal=terminal).manifest
            rows[before].append(manifest["measured"]["source"]["accuracy"])
            rows[after].append(manifest["measured"]["export"]["accuracy"])
            alike[after].append(manifest["check"]["agreement"])
            how = {**manifest["how"], "bytes": manifest["bytes"]}
    return {
        "recipe": recipe,
        "overrides": overrides,
        "seeds": seeds,
        "teacher": whole.summary["teacher"]["accuracy"],
        "parameters": whole.summary["parameters"],
        "test_rows": whole.summary["teacher"]["n"],
        "accuracy": {name: spread(values) for name, values in rows.items()},
        "against_whole": {name: paired_difference(rows[name], rows["whole"]) for name in NAMES if name != "whole"},
        "during_against_after": paired_difference(rows["during"], rows["after"]),
        "alike": {name: spread(values) for name, values in alike.items()},
        "how": how,
        "latency": latency(whole.path, terminal),
        "machine": {"processor": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__},
    }


NAMES = {
    "whole": "fp32",
    "after": "int8, rounded after training",
    "during": "int8, trained rounded",
    "unrounded": "fp32 of the student trained rounded",
}
"""The rows of the table."""


def latency(run: Path, terminal: Terminal) -> dict[str, Any]:
    """How many times as fast as ONNX Runtime in float32 it is in int8, and eager torch, of the exported student."""
    found = find(run, terminal)
    data: Any = found.data()
    bundle = found.bundle
    held = rows_of(data.test, 256, bundle.task)
    names = tuple(held[0])
    calibration = rows_of(data.validation, CALIBRATION, bundle.task)
    joined = {name: torch.cat([inputs[name] for inputs in held]) for name in names}
    cells: dict[Cell, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for column in ("eager", "onnx", "int8"):
            run_it, _ = prepare_runner(column, bundle.model, names, held[0], calibration, Path(folder))
            for size in BATCHES:
                cells["student", column, size] = partial(run_it, {k: v[:size] for k, v in joined.items()})
        times = time_interleaved(cells, ROUNDS)
    return {
        column: {str(size): summarise_times(times["student", column, size], size, times["student", "onnx", size])
                 for size in BATCHES}
        for column in ("eager", "onnx", "int8")
    }  # fmt: skip


def processor() -> str:
    """Of this machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def points(found: dict[str, Any]) -> str:
    """A paired difference of accuracies in points, with its interval."""
    held = "" if found["low"] is None else f" ({100 * found['low']:+.2f} to {100 * found['high']:+.2f})"
    return f"{100 * found['mean']:+.2f}{held}"


def page(found: dict[str, Any]) -> str:
    """The figures in Markdown."""
    lines = [
        "# What eight bits cost a student",
        "",
        f"`python benchmarks/quantised.py --recipe {found['recipe']}"
        + "".join(f" {text}" for text in found["overrides"]) + "`: "
        f"seeds {', '.join(map(str, found['seeds']))}; {found['parameters']['student']:,} parameters of the student, "
        f"{found['parameters']['teacher']:,} of its teacher, which is in fp32 and has {found['teacher']:.2%}; "
        f"{found['test_rows']:,} test samples, read once for each row and seed.",
        "",
        "| student | test accuracy, mean (each seed) | against fp32, points (95 % interval) | answers as unrounded |",
        "| --- | --- | --- | --- |",
    ]  # fmt: skip
    for name, title in NAMES.items():
        row = found["accuracy"][name]
        each = ", ".join(f"{100 * v:.2f}" for v in row["values"])
        less = "" if name == "whole" else points(found["against_whole"][name])
        alike = f"{found['alike'][name]['mean']:.2%}" if name in found["alike"] else ""
        lines.append(f"| {title} | {row['mean']:.2%} ({each}) | {less} | {alike} |")
    lines += [
        "",
        f"Trained rounded against rounded after training, in int8: {points(found['during_against_after'])} points.",
        f"Rounding: {found['how']['rounding']}"
        + (f", ranges from {found['how']['calibration_rows']} validation rows" if "calibration_rows" in found["how"]
           else "")
        + ".",
        "",
        "Latency of the student, each as the median over "
        f"{ROUNDS} rounds of its ratio to ONNX Runtime in fp32 in the same round (above 1: faster), on "
        f"{found['machine']['processor']}, {found['machine']['threads']} threads:",
        "",
        "| run by | " + " | ".join(f"batch of {size}" for size in BATCHES) + " |",
        "| --- |" + " --- |" * len(BATCHES),
    ]  # fmt: skip
    for column, title in (("eager", "torch, eager, fp32"), ("onnx", "ONNX Runtime, fp32"),
                          ("int8", "ONNX Runtime, int8")):  # fmt: skip
        cells = (found["latency"][column][str(size)] for size in BATCHES)
        lines.append(f"| {title} | " + " | ".join(f"{c['faster']:.2f}" for c in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
