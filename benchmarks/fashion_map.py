"""Where distillation pays on Fashion-MNIST, and where it does not.

One teacher, trained once; each regime changes one thing of ``recipes/fashion-mnist.yaml`` and compares the
baseline student with the distilled one over the same seeds, steps and initialisations::

    tutelage run recipes/fashion-mnist.yaml --out runs/fashion-mnist
    python benchmarks/fashion_map.py

It can be stopped and started again; finished regimes are kept. Writes ``results/fashion-mnist/``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tutelage import api
from tutelage.progress import Terminal

RECIPE = "recipes/fashion-mnist.yaml"

REGIMES: list[tuple[str, str, list[str]]] = [
    ("base", "2,000 labels, 60 epochs of them", []),
    ("labels-200", "200 labels, same steps", ["data.labels=200", "train.steps=1920"]),
    ("labels-500", "500 labels, same steps", ["data.labels=500", "train.steps=1920"]),
    ("labels-10000", "10,000 labels, 1,920 steps", ["data.labels=10000", "train.steps=1920"]),
    ("labels-54000", "54,000 labels, 5,064 steps", ["data.labels=54000", "train.steps=5064"]),
    ("unlabeled-2000", "2,000 labels and 52,000 images without, 5,064 steps",
     ["data.unlabeled=keep", "train.steps=5064"]),
    ("unlabeled-200", "200 labels and 53,800 images without, 5,064 steps",
     ["data.labels=200", "data.unlabeled=keep", "train.steps=5064"]),
    ("smaller", "a smaller student", ["student.options.widths=[4,6,8,8]"]),
    ("larger", "a larger student", ["student.options.widths=[10,14,18,20]"]),
    ("shallow", "a student of two stages in place of four", ["student.options.widths=[10,18]"]),
    ("epochs-15", "15 epochs", ["train.epochs=15"]),
    ("epochs-240", "240 epochs", ["train.epochs=240"]),
]  # fmt: skip


def main() -> None:
    """Run what is not finished, and write what is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", default="runs/fashion-mnist/models/teacher")
    parser.add_argument("--runs", default="runs/fashion-map")
    parser.add_argument("--only", nargs="*")
    args = parser.parse_args()
    common = [f"teacher.checkpoint={args.teacher}", "teacher.train=null"]
    results: dict[str, Any] = {}
    for name, text, overrides in REGIMES:
        out = Path(args.runs) / name
        if not args.only or name in args.only:
            terminal = Terminal(speaks=False)
            resume = (out / "config.yaml").exists()
            api.run(RECIPE, [*common, *overrides], out=out, resume=resume, terminal=terminal)
        if not (out / "summary.json").exists():
            continue
        summary = json.loads((out / "summary.json").read_text())
        results[name] = {
            "what": text,
            "overrides": overrides,
            "seeds": summary["seeds"],
            "parameters": summary["parameters"],
            "teacher": summary["teacher"]["accuracy"],
            "baseline": summary["students"]["baseline"]["last"]["accuracy"],
            "distilled": summary["students"]["distilled"]["last"]["accuracy"],
            "alone_best": summary["students"]["baseline"]["best"]["accuracy"],
            "distilled_best": summary["students"]["distilled"]["best"]["accuracy"],
            "agreement_alone": summary["students"]["baseline"]["last"]["agreement"],
            "agreement_distilled": summary["students"]["distilled"]["last"]["agreement"],
            "gain_last": summary["gain"]["last"],
            "gain_best": summary["gain"]["best"],
        }
        gain = results[name]["gain_last"]
        print(f"{name}: {100 * gain['mean']:+.2f} [{100 * gain['low']:+.2f}, {100 * gain['high']:+.2f}]", flush=True)
        write(results)


def write(results: dict[str, Any]) -> None:
    """The figures as JSON, and as a table."""
    folder = Path("results/fashion-mnist")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "map.json").write_text(json.dumps(results, indent=1) + "\n")
    lines = [
        "| regime | student | alone | distilled | gain, last epoch (95% interval) | gain, best on validation |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for r in results.values():
        gains = [
            f"{100 * g['mean']:+.2f} ({100 * g['low']:+.2f} to {100 * g['high']:+.2f})"
            for g in (r["gain_last"], r["gain_best"])
        ]
        shown = [f"{100 * r[a]['mean']:.2f} ± {100 * r[a]['std']:.2f}" for a in ("baseline", "distilled")]
        lines.append(f"| {r['what']} | {r['parameters']['student']:,} | {' | '.join(shown)} | {' | '.join(gains)} |")
    (folder / "map.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
