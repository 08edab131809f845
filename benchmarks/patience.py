"""A consistent and patient teacher: the same view for teacher and student, and longer schedules.

    tutelage run recipes/fashion-mnist.yaml          # the teacher
    python benchmarks/patience.py --jobs 2

Students of recipes/fashion-mnist.yaml train on its few labelled images, augmented, for 30, 100 and 300 epochs, each
with a whole schedule of its own. One arm is taught by the teacher's logits of the image as it is, whatever view the
student sees (``fixed``); the other by those of the view that it sees (``same``), from one cache on disk that all
seeds and lengths share; the third by labels (``baseline``). All see the same views, a new one in each epoch. Beyer
et al., "Knowledge distillation: A good teacher is patient and consistent", 2022, is where the two come from.

Accuracy is that of the last epoch on the test split; nothing is selected on it. The augmentation was chosen on the
validation split, with ``--pilot``, which measures there in place of the test split::

    python benchmarks/patience.py --pilot --runs runs/patience-flip --epochs 300 --seeds 2 --arms same \\
        --set 'data.augment=[flip]'        # 85.5 %; with {shift: 1} too 87.1 %, with {shift: 2} 86.0 %

It can be stopped and started again: what is finished is kept. ``--render`` writes the results of what there is.
Writes ``results/patience.json``, ``.md`` and ``.svg``.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from tutelage.config import Recipe, dump_recipe, load_recipe
from tutelage.data import Batch, ImageData, SequentialBatches
from tutelage.engine import build_accelerator
from tutelage.evaluation.statistics import paired_difference, spread
from tutelage.experiment.caching import open_recipe_cache
from tutelage.experiment.fill_cache import fill_cache
from tutelage.experiment.prepare import build_teacher
from tutelage.experiment.recipe_source import load_data, recipe_spec
from tutelage.experiment.run import open_run_directory
from tutelage.experiment.spec import ExperimentSpec, RunContext
from tutelage.experiment.teacher_setup import ReferenceOutputs, build_live_teacher
from tutelage.experiment.trainer import TrainingTeacher, train_student
from tutelage.progress import Terminal
from tutelage.taps import Needs
from tutelage.teachers import LiveTeacher, MemoryTeacher, Signal, Teacher

RECIPE = "recipes/fashion-mnist.yaml"
AUGMENT = '["flip", {"shift": 1}]'
ARMS = {"fixed": "logits of the image as it is", "same": "logits of the view", "baseline": "labels only"}
SILENT = Terminal(speaks=False)


class FixedLogits:
    """The inconsistent teacher of the paper: what it says of an image as it is, for every view of it."""

    provides = frozenset({"logits"})

    def __init__(self, memory: MemoryTeacher) -> None:
        self.memory = memory

    def signal(self, batch: Batch, needs: Needs) -> Signal:
        """The logits of the unaugmented images."""
        return self.memory.signal(replace(batch, views=None), needs)


def recipe_of(args: argparse.Namespace, epochs: int) -> Recipe:
    """The recipe of all arms that train for so long."""
    return load_recipe(
        RECIPE,
        [
            f"data.augment={AUGMENT}", f"data.views={max(args.epochs)}", "data.workers=0",
            f"teacher.checkpoint={args.teacher}", "teacher.train=null", f"teacher.cache={args.runs}/cache",
            f"train.epochs={epochs}", *args.set,
        ],
    )  # fmt: skip


@functools.cache
def prepared(text: str, pilot: bool) -> tuple[ImageData, ExperimentSpec, LiveTeacher, ReferenceOutputs, RunContext]:
    """What the trainings of a process share, of a recipe written out."""
    import yaml

    from tutelage.config import build_recipe
    from tutelage.engine import RunDirectory

    recipe = build_recipe(yaml.safe_load(text))
    data = load_data(recipe, SILENT)
    c = recipe_spec(recipe, data)
    evaluation = c.evaluation
    test = evaluation.validation if pilot and evaluation.validation is not None else evaluation.test
    c = replace(c, evaluation=replace(evaluation, validation=None, test=test))
    accelerator = build_accelerator(recipe.train.precision, [])
    model = build_teacher(c)
    assert model is not None
    teacher = build_live_teacher(c, model, accelerator.device)
    assert isinstance(teacher, LiveTeacher)
    ctx = RunContext(accelerator, RunDirectory("."), SILENT)
    return data, c, teacher, ReferenceOutputs(teacher, test, ctx), ctx


def train(args: argparse.Namespace, arm: str, epochs: int, seed: int) -> dict[str, Any]:
    """Train one student, or go on with it."""
    torch.set_num_threads(1)
    recipe = recipe_of(args, epochs)
    data, c, teacher, references, ctx = prepared(dump_recipe(recipe), args.pilot)
    out = folder(args, arm, epochs, seed)
    text = dump_recipe(recipe) + f"arm: {arm}\nstudent_seed: {seed}\npilot: {args.pilot}\n"
    with open_run_directory(out, text, resume=(out / "config.yaml").exists(), main=True) as run:
        ctx, classes = replace(ctx, run=run), len(data.classes)
        if arm == "baseline":
            return train_student(c, ctx, "baseline", seed, TrainingTeacher(teacher, teacher, references), classes)
        asked: Teacher = (
            open_recipe_cache(recipe, data, teacher, classes, c.source.build_method(), ctx.accelerator)
            if arm == "same"
            else FixedLogits(MemoryTeacher(teacher, SequentialBatches(data.train), ctx.device))
        )
        return train_student(c, ctx, "distilled", seed, TrainingTeacher(teacher, asked, references), classes)


def folder(args: argparse.Namespace, arm: str, epochs: int, seed: int) -> Path:
    """Of one training."""
    return Path(args.runs) / f"{arm}-{epochs}-seed{seed}"


def result(args: argparse.Namespace, arm: str, epochs: int, seed: int) -> dict[str, Any] | None:
    """What a finished training found."""
    name = f"{'baseline' if arm == 'baseline' else 'distilled'}-seed{seed}"
    path = folder(args, arm, epochs, seed) / "models" / name / "result.json"
    return json.loads(path.read_text()) if path.exists() else None


def jobs(args: argparse.Namespace) -> Iterator[tuple[str, int, int]]:
    """Every training: seed by seed, short ones first, so that a part is a smaller experiment and not a broken one."""
    for seed in range(args.seeds):
        for epochs in args.epochs:
            for arm in args.arms:
                yield arm, epochs, seed


def main() -> None:
    """Train what is not trained, and write what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="runs/fashion-mnist/models/teacher", help="its checkpoint")
    parser.add_argument("--runs", default="runs/patience")
    parser.add_argument("--epochs", type=int, nargs="+", default=[30, 100, 300])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--pilot", action="store_true", help="measure on validation, and write no results")
    parser.add_argument("--render", action="store_true", help="train nothing")
    parser.add_argument("--results", default="results")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of the recipe")
    args = parser.parse_args()
    todo = [] if args.render else [job for job in jobs(args) if result(args, *job) is None]
    if todo:
        torch.set_num_threads(args.jobs)
        if "same" in args.arms:
            filled = fill_cache(recipe_of(args, args.epochs[0]))
            print(f"cache: {filled.rows:,} rows, {filled.computed:,} computed in {filled.seconds:.0f} s", flush=True)
        with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
            waiting = {pool.submit(train, args, *job): job for job in todo}
            for i, done in enumerate(as_completed(waiting), 1):
                arm, epochs, seed = waiting[done]
                found = done.result()
                print(
                    f"{i} of {len(todo)}: {arm}, {epochs} epochs, seed {seed}: "
                    f"{100 * found['last']['accuracy']:.2f} %, {found['seconds']:.0f} s",
                    flush=True,
                )
    if args.pilot:
        for arm, epochs in ((arm, epochs) for epochs in args.epochs for arm in args.arms):
            values = [result(args, arm, epochs, seed) for seed in range(args.seeds)]
            mean = statistics.fmean(r["last"]["accuracy"] for r in values if r is not None)
            print(f"{arm}, {epochs} epochs: {100 * mean:.2f} % on validation")
        return
    write(args)


# Results ---------------------------------------------------------------------------------------------------


def write(args: argparse.Namespace) -> None:
    """The figures, the table and the plot of the seeds that every arm and length has."""
    done = [
        seed
        for seed in range(args.seeds)
        if all(result(args, arm, epochs, seed) is not None for arm in args.arms for epochs in args.epochs)
    ]
    if len(done) < 2:
        print(f"{len(done)} of {args.seeds} seeds are finished; results need two")
        return

    def column(arm: str, epochs: int, key: str) -> list[float]:
        found = [result(args, arm, epochs, seed) for seed in done]
        return [r["last"][key] for r in found if r is not None]

    teacher = Path(args.teacher) / "result.json"
    recipe = recipe_of(args, args.epochs[0])
    figures: dict[str, Any] = {
        "seeds": done,
        "images": recipe.data.labels,
        "augment": recipe.data.augment,
        "views": recipe.data.views,
        "method": recipe.method.model_dump(),
        "overrides": args.set,
        "teacher": json.loads(teacher.read_text())["last"]["accuracy"] if teacher.exists() else None,
        "accuracy": {},
        "agreement": {},
        "same_over_fixed": {},
        "longest_over_shortest": {},
    }
    for arm in args.arms:
        figures["accuracy"][arm] = {str(e): interval(column(arm, e, "accuracy")) for e in args.epochs}
        figures["agreement"][arm] = {str(e): spread(column(arm, e, "agreement")) for e in args.epochs}
        ends = [column(arm, e, "accuracy") for e in (max(args.epochs), min(args.epochs))]
        figures["longest_over_shortest"][arm] = paired_difference(*ends)
    if {"same", "fixed"} <= set(args.arms):
        for e in args.epochs:
            pair = (column("same", e, "accuracy"), column("fixed", e, "accuracy"))
            figures["same_over_fixed"][str(e)] = paired_difference(*pair)
    out = Path(args.results)
    out.mkdir(parents=True, exist_ok=True)
    (out / "patience.json").write_text(json.dumps(figures, indent=1) + "\n")
    (out / "patience.md").write_text(table(args, figures))
    plot(args, figures, out / "patience.svg")
    print(table(args, figures))


def interval(values: list[float]) -> dict[str, Any]:
    """Mean and deviation over seeds, with Student's 95 % interval of the mean."""
    held = paired_difference(values, [0.0] * len(values))
    return {**spread(values), "low": held["low"], "high": held["high"]}


def table(args: argparse.Namespace, figures: dict[str, Any]) -> str:
    """What was found, in Markdown."""

    def over(pair: dict[str, Any]) -> str:
        return f"{100 * pair['mean']:+.2f} ({100 * pair['low']:+.2f} to {100 * pair['high']:+.2f})"

    known = figures["teacher"]
    lines = [
        "# Consistent and patient teaching",
        "",
        f"Fashion-MNIST, {figures['images']:,} labelled images, augmented by {json.dumps(figures['augment'])}; "
        "the student of recipes/fashion-mnist.yaml"
        + (f", whose teacher has {100 * known:.2f} % on the test split" if known is not None else "")
        + f". Test accuracy of the last epoch in %, mean and standard deviation over {len(figures['seeds'])} seeds; "
        "differences paired by seed, with 95 % interval. Every length is a schedule of its own. "
        "Made by `python benchmarks/patience.py`.",
        *([f"Overrides: `{' '.join(args.set)}`."] if args.set else []),
        "",
        "| epochs | " + " | ".join(ARMS[arm] for arm in args.arms) + " | view over fixed |",
        "| --- " * (len(args.arms) + 2) + "|",
    ]
    for e in map(str, args.epochs):
        cells = [figures["accuracy"][arm][e] for arm in args.arms]
        shown = " | ".join(f"{100 * c['mean']:.2f} ± {100 * c['std']:.2f}" for c in cells)
        pair = figures["same_over_fixed"].get(e)
        lines.append(f"| {e} | {shown} | {'' if pair is None else over(pair)} |")
    gains = " | ".join(over(figures["longest_over_shortest"][arm]) for arm in args.arms)
    lines.append(f"| {max(args.epochs)} over {min(args.epochs)} | {gains} | |")
    lines += ["", "![Test accuracy over epochs](patience.svg)", ""]
    return "\n".join(lines)


def plot(args: argparse.Namespace, figures: dict[str, Any], path: Path) -> None:
    """Accuracy over epochs, one curve an arm, with intervals."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "patience", "svg.fonttype": "none", "font.size": 11})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    marks = {"fixed": ("#b2570c", "s"), "same": ("#1f5fa8", "o"), "baseline": ("#6b6b6b", "^")}
    for arm in args.arms:
        cells = [figures["accuracy"][arm][str(e)] for e in args.epochs]
        means = [100 * c["mean"] for c in cells]
        below = [100 * (c["mean"] - c["low"]) for c in cells]
        above = [100 * (c["high"] - c["mean"]) for c in cells]
        colour, mark = marks[arm]
        axes.errorbar(args.epochs, means, [below, above], color=colour, marker=mark, capsize=4, label=ARMS[arm])
    axes.set_xscale("log")
    axes.set_xticks(args.epochs, [str(e) for e in args.epochs])
    axes.minorticks_off()
    axes.set_xlabel("epochs of the schedule")
    axes.set_ylabel("test accuracy, % (95 % interval)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()
