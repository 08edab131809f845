"""How small a student may be, and what it keeps: several runs of one teacher, as a table and a frontier.

    set -- student.vocabulary=corpus data.max_length=48 train.epochs=1 baseline=false
    tutelage run recipes/classify-text.yaml "$@" teacher.train.epochs=2 --out runs/half
    set -- "$@" "method={kind: supervised}" teacher.train=null
    tutelage run recipes/classify-text.yaml "$@" --out runs/alone
    tutelage run recipes/classify-text.yaml "$@" teacher.checkpoint=runs/half/models/teacher --out runs/labels
    python benchmarks/smaller.py "3 layers, trimmed vocabulary=runs/half,runs/alone,runs/labels" ...

Reads what the runs wrote: accuracy of the test split for the weights chosen on validation. Retention is the student's
accuracy over the teacher's, seed by seed, with Student's 95 % interval where there are several. After commas, and if
they are there, two runs of the same student for as many steps on the labels: one from the layers of the pretrained
model, which never saw the teacher, and one from the teacher's own layers. Puts the figures into
``results/smaller.json`` and ``.md``, and the frontier into ``results/smaller.svg``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tutelage.evaluation.statistics import paired_difference

RESULTS = Path("results")


CONTROLS = ("without a teacher", "the teacher's layers, labels alone")


def student(run: Path, *controls: Path) -> dict[str, Any]:
    """Parameters, accuracy by seed and retention of a run's student, and what it gained over each control."""
    summary = json.loads((run / "summary.json").read_text())
    scores, teacher = distilled(summary), summary["teacher"]["accuracy"]
    sizes = summary["parameters"]
    gains = {}
    for name, control in zip(CONTROLS, controls, strict=False):
        other = json.loads((control / "summary.json").read_text())
        assert other["seeds"] == summary["seeds"]
        assert other["parameters"]["student"] == sizes["student"]
        gains[name] = {**paired_difference(scores, distilled(other)), "accuracy": distilled(other)}
    return {
        "parameters": sizes["student"], "smaller": 1 - sizes["student"] / sizes["teacher"], "accuracy": scores,
        "retention": paired_difference([score / teacher for score in scores], [0.0] * len(scores)), "gains": gains,
        "teacher": {"parameters": sizes["teacher"], "accuracy": teacher},
    }  # fmt: skip


def distilled(summary: dict[str, Any]) -> list[float]:
    """Accuracy of a run's students by seed."""
    scores: list[float] = summary["students"]["distilled"]["best"]["accuracy"]["values"]
    return scores


def within(figure: dict[str, Any], unit: float = 100, signed: str = "") -> str:
    """A mean with its interval."""
    held = (
        ""
        if figure["low"] is None
        else f" ({unit * figure['low']:{signed}.1f} to {unit * figure['high']:{signed}.1f})"
    )
    return f"{unit * figure['mean']:{signed}.1f}{held}"


def table(rows: dict[str, dict[str, Any]], command: str) -> str:
    """The figures as Markdown."""
    teacher = next(iter(rows.values()))["teacher"]
    lines = [
        "# How small a student may be", "",
        f"Sections of Debian's packages; teacher of {teacher['parameters']:,} parameters, accuracy "
        f"{100 * teacher['accuracy']:.1f} % of the held-out file. `{command}`", "",
        "| student | parameters | fewer | seeds | accuracy, % | keeps, % (95 %) "
        + "".join(f"| over {name}, points (95 %) " for name in CONTROLS) + "|",
        "| --- " * (6 + len(CONTROLS)) + "|",
    ]  # fmt: skip
    for name, row in rows.items():
        mean = sum(row["accuracy"]) / len(row["accuracy"])
        gains = [within(row["gains"][name], signed="+") if name in row["gains"] else "" for name in CONTROLS]
        lines.append(
            f"| {name} | {row['parameters']:,} | {100 * row['smaller']:.1f} % | {len(row['accuracy'])} "
            f"| {100 * mean:.1f} | {within(row['retention'])} | {' | '.join(gains)} |"
        )
    return "\n".join([*lines, "", "![Accuracy kept against parameters](smaller.svg)", ""])


def plot(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """What is kept against parameters; the line joins what nothing smaller is better than."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "smaller", "svg.fonttype": "none", "font.size": 11})
    from matplotlib import pyplot

    teacher = next(iter(rows.values()))["teacher"]
    points = [(row["parameters"] / 1e6, 100 * row["retention"]["mean"], name) for name, row in rows.items()]
    points.append((teacher["parameters"] / 1e6, 100.0, "teacher"))
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    best, frontier = float("-inf"), []
    for size, kept, name in sorted(points):
        axes.plot(size, kept, "o", color="#1f5fa8")
        axes.annotate(
            name, (size, kept), xytext=(-6, -14), textcoords="offset points", ha="right" if size > 14 else "left"
        )
        if kept > best:
            best = kept
            frontier.append((size, kept))
    axes.plot(*zip(*frontier, strict=True), color="#1f5fa8", alpha=0.4)
    axes.axhline(97, color="#6b6b6b", linestyle="--", linewidth=1)
    axes.set_xlabel("parameters, millions")
    axes.set_ylabel("of the teacher's accuracy, %")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    """Read the runs, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN[,ALONE[,LABELS]]")
    args = parser.parse_args()
    rows = {}
    for given in args.runs:
        name, _, runs = given.partition("=")
        rows[name] = student(*(Path(run) for run in runs.split(",")))
    command = "python benchmarks/smaller.py " + " ".join(f'"{given}"' for given in args.runs)
    (RESULTS / "smaller.json").write_text(json.dumps({"command": command, "students": rows}, indent=1) + "\n")
    text = table(rows, command)
    (RESULTS / "smaller.md").write_text(text)
    print(text)
    plot(rows, RESULTS / "smaller.svg")


if __name__ == "__main__":
    main()
