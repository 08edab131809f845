"""What students of DistilBERT's triple loss know beyond masked words: a linear probe on what the lab trained.

    tutelage lab distilbert --out runs/lab-texts
    python benchmarks/triple.py runs/lab-texts TRAIN.parquet HELD-OUT.parquet

The probe is logistic regression on the mean of a student's last hidden states; it learns 23 sections from 6,000 texts
and is read on the held-out ones. Beside it the loss of held-out masked words. Puts the figures into
``results/triple.json`` and ``results/triple.md``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from sklearn.linear_model import LogisticRegression
from transformers import AutoModel, AutoTokenizer

from tutelage.evaluation.statistics import paired_difference

RESULTS = Path("results")
ARMS = {
    "triple": "all three losses, every other layer",
    "no-mlm": "without the masked words' own loss",
    "no-kd": "without soft labels",
    "no-cosine": "without hidden states",
    "first-layers": "all three, the first layers",
    "random-weights": "all three, random weights",
}
PROBED = 6000


def states(folder: str, texts: list[str]) -> np.ndarray:
    """Means of the last hidden states ``[N, D]``."""
    model, cutter = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for start in range(0, len(texts), 64):
            batch = cutter(
                texts[start : start + 64], return_tensors="pt", padding=True, truncation=True, max_length=64
            )
            weight = batch["attention_mask"].unsqueeze(-1)
            found.append(((model(**batch).last_hidden_state * weight).sum(1) / weight.sum(1)).float())
    return torch.cat(found).numpy()


def probed(folder: str, train: dict[str, list[str]], test: dict[str, list[str]]) -> float:
    """Accuracy of a linear probe on the held-out texts."""
    seen = states(folder, train["text"])
    mean, deviation = seen.mean(0), seen.std(0) + 1e-6
    probe = LogisticRegression(max_iter=300, C=0.3).fit((seen - mean) / deviation, train["label"])
    return float(probe.score((states(folder, test["text"]) - mean) / deviation, test["label"]))


def main() -> None:
    """Probe every student, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lab", type=Path)
    parser.add_argument("files", nargs=2, help="descriptions to train on, and to hold out")
    parser.add_argument("--teacher", type=Path, help="its folder, where the lab was given one with weights")
    args = parser.parse_args()
    train, test = (pq.read_table(f, columns=["text", "label"]) for f in args.files)
    picked = np.random.default_rng(0).permutation(train.num_rows)[:PROBED]
    sets = [t.to_pydict() for t in (train.take(picked), test)]
    rows: dict[str, dict[str, Any]] = {}
    for name, text in ARMS.items():
        folder = args.lab / "arms" / name
        summary = json.loads((folder / "summary.json").read_text())
        for arm, found in summary["students"].items():
            rows[name if arm == "distilled" else "baseline"] = {
                "text": text if arm == "distilled" else "masked words alone, every other layer",
                "loss": found["last"]["loss"]["values"],
                "accuracy": found["last"]["accuracy"]["values"],
                "probe": [probed(str(folder / "models" / f"{arm}-seed{s}"), *sets) for s in summary["seeds"]],
            }
        print(name, rows[name], flush=True)
    folder = args.lab / "arms" / "triple"
    teacher = json.loads((folder / "summary.json").read_text())["teacher"]
    rows["teacher"] = {
        "text": "teacher", "loss": [teacher["loss"]], "accuracy": [teacher["accuracy"]],
        "probe": [probed(str(args.teacher or folder / "models" / "teacher"), *sets)],
    }  # fmt: skip
    (RESULTS / "triple.json").write_text(json.dumps(rows, indent=1) + "\n")

    def against(row: dict[str, Any], key: str) -> str:
        whole = rows["triple"]
        if row is whole or len(row[key]) != len(whole[key]):
            return ""
        found = paired_difference(row[key], whole[key])
        held = "" if found["low"] is None else f", {found['low']:+.3f} to {found['high']:+.3f}"
        return f" ({found['mean']:+.3f}{held})"

    lines = [
        "# The triple loss, part by part",
        "",
        f"all-MiniLM-L6-v2, 6 layers to 3; {len(rows['triple']['loss'])} seeds, means, and the paired difference "
        "from the first row with its interval. `tutelage lab distilbert`, `python benchmarks/triple.py`",
        "",
        "| student | loss of held-out masked words (nats) | of them right | probe of sections |",
        "| --- | --- | --- | --- |",
    ]
    for row in rows.values():
        shown = [f"{np.mean(row[k]):.3f}{against(row, k)}" for k in ("loss", "accuracy", "probe")]
        lines.append(f"| {row['text']} | {' | '.join(shown)} |")
    (RESULTS / "triple.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
