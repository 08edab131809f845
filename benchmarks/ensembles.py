"""A student of three teachers against the same student of the best of them.

    python benchmarks/ensembles.py

Trains the three once (``benchmarks/ensembles.yaml``), then students from each way to combine them, from the member
that is best on validation, and alone, over the same seeds, steps and initialisations. It can be stopped and started
again; what is finished is kept. Writes ``results/ensembles.json`` and ``results/ensembles.md``. ``KEY=VALUE``
overrides the recipe, to try it in a minute::

    python benchmarks/ensembles.py --name trial data.limit=600 data.labels=300 train.epochs=1 seeds=[0,1]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tutelage import api
from tutelage.config import build_recipe, dump_recipe, load_recipe
from tutelage.evaluation.statistics import paired_difference
from tutelage.progress import Terminal

RECIPE = Path(__file__).with_suffix(".yaml")

WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "probabilities": ("mean of probabilities", {}),
    "probabilities-at-T": ("mean of probabilities at the method's T", {"average_temperature": 4.0}),
    "logits": ("mean of logits", {"combine": "logits"}),
    "learned": ("mean of probabilities, learned weights", {"weights": "learned"}),
}
"""How the members are combined."""


def run(args: argparse.Namespace, name: str, recipe: dict[str, Any]) -> dict[str, Any]:
    """A run's summary: of a run that is finished, or goes on, or begins."""
    out = Path(args.runs) / args.name / name
    if not (out / "summary.json").exists():
        resume = (out / "config.yaml").exists()
        api.run(build_recipe(recipe), out=out, resume=resume, terminal=Terminal(speaks=not args.quiet))
    found: dict[str, Any] = json.loads((out / "summary.json").read_text())
    print(f"{name}: {100 * found['students']['distilled']['last']['accuracy']['mean']:.2f} %", flush=True)
    return found


def plain(recipe: dict[str, Any], teacher: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The recipe with other teachers."""
    return {**recipe, "teacher": teacher, **more}


def main() -> None:
    """Run what is not finished, and write what there is."""
    import yaml

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--name", default="fashion-mnist")
    parser.add_argument("--runs", default="runs/ensembles")
    parser.add_argument("--results", default="results")
    parser.add_argument("--teacher-steps", type=int, help="in place of the recipe's epochs, to try it")
    parser.add_argument("--quiet", action="store_true")
    args = parser.parse_args()
    recipe: dict[str, Any] = yaml.safe_load(dump_recipe(load_recipe(RECIPE, args.overrides)))
    members = recipe["teacher"]["members"]
    if args.teacher_steps:
        for member in members:
            member["train"] = {**member["train"], "epochs": None, "steps": args.teacher_steps}

    first = run(args, "probabilities", recipe)  # trains the members, and the students alone
    folder = Path(args.runs) / args.name / "probabilities" / "models"
    ready = [
        {"model": m["model"], "options": m["options"], "checkpoint": str(folder / f"teacher-{i}")}
        for i, m in enumerate(members)
    ]
    found = {"probabilities": first}
    for name, (_, options) in WAYS.items():
        if name not in found:
            found[name] = run(args, name, plain(recipe, {"members": ready, **options}, baseline=False))
    each = first["teacher"]["ensemble"]["members"]
    best = max(range(len(each)), key=lambda i: (each[i]["validation"]["accuracy"], -each[i]["validation"]["loss"]))
    found["best"] = run(args, f"best-{best}", plain(recipe, ready[best], baseline=False))
    write(args, found, best, first)


def write(args: argparse.Namespace, found: dict[str, dict[str, Any]], best: int, first: dict[str, Any]) -> None:
    """The table, and all figures behind it."""

    def last(summary: dict[str, Any], arm: str = "distilled") -> dict[str, Any]:
        figures: dict[str, Any] = summary["students"][arm]["last"]
        return figures

    single = last(found["best"])["accuracy"]["values"]
    rows: dict[str, Any] = {}
    names = {name: text for name, (text, _) in WAYS.items()} | {"best": f"best on validation alone: teacher-{best}"}
    for name, text in names.items():
        figures, teacher = last(found[name]), found[name]["teacher"]
        rows[name] = {
            "teachers": text,
            "teacher": {k: teacher[k] for k in ("accuracy", "loss", "ece")},
            "accuracy": figures["accuracy"],
            "agreement": figures["agreement"],
            "over_best": None if name == "best" else paired_difference(figures["accuracy"]["values"], single),
            "weights": [m["weight"] for m in teacher.get("ensemble", {}).get("members", [])],
        }
    alone = last(first, "baseline")["accuracy"]
    data = {
        "seeds": first["seeds"],
        "overrides": args.overrides,
        "members": first["teacher"]["ensemble"]["members"],
        "best": best,
        "baseline": alone,
        "rows": rows,
    }
    stem = "ensembles" if args.name == "fashion-mnist" else f"ensembles-{args.name}"
    folder = Path(args.results)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.json").write_text(json.dumps(data, indent=1) + "\n")

    def percent(spread: dict[str, Any]) -> str:
        deviation = "" if spread["std"] is None else f" ± {100 * spread['std']:.2f}"
        return f"{100 * spread['mean']:.2f}{deviation}"

    def over(pair: dict[str, Any] | None) -> str:
        if pair is None:
            return ""
        held = "" if pair["low"] is None else f" ({100 * pair['low']:+.2f} to {100 * pair['high']:+.2f})"
        return f"{100 * pair['mean']:+.2f}{held}"

    shown = ", ".join(f"{100 * m['test']['accuracy']:.2f}" for m in data["members"])
    lines = [
        f"Three teachers, test accuracy {shown} %. Students: last epoch on the test split, mean and standard "
        f"deviation over seeds {data['seeds']}; against the student of the best single teacher paired by seed, with "
        "95 % interval.",
        *([f"Overrides: `{' '.join(args.overrides)}`."] if args.overrides else []),
        "",
        "| teachers | their test % | their loss | student's test % | over the best single | agreement % | weights |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows.values():
        weights = ", ".join(f"{w:.2f}" for w in row["weights"])
        lines.append(
            f"| {row['teachers']} | {100 * row['teacher']['accuracy']:.2f} | {row['teacher']['loss']:.3f} | "
            f"{percent(row['accuracy'])} | {over(row['over_best'])} | {percent(row['agreement'])} | {weights} |"
        )
    lines.append(f"| none | | | {percent(alone)} | {over(paired_difference(alone['values'], single))} | | |")
    (folder / f"{stem}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
