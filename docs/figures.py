"""Draw the figure at the head of the README from measured results: ``python docs/figures.py``."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
REGIMES = {
    "unlabeled-200": "200 labels + 53,800 unlabelled images",
    "unlabeled-2000": "2,000 labels + 52,000 unlabelled images",
    "labels-200": "200 labels",
    "base": "2,000 labels",
    "labels-10000": "10,000 labels",
    "labels-54000": "54,000 labels (all that the teacher had)",
}
"""Regimes of ``results/fashion-mnist/map.json``, in the order of the figure."""


def draw(out: Path) -> None:
    """Gain in points with its 95 % interval, a row for each regime."""
    data = json.loads((ROOT / "results/fashion-mnist/map.json").read_text(encoding="utf-8"))
    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 11, "svg.hashsalt": "tutelage"})
    figure, axes = plt.subplots(figsize=(9, 3.1))
    for row, (key, name) in enumerate(REGIMES.items()):
        gain = data[key]["gain_last"]
        mean, low, high = (100 * gain[k] for k in ("mean", "low", "high"))
        colour = "#1f6f8b" if low > 0 else "#888888"
        axes.barh(row, mean, color=colour, height=0.62)
        axes.plot([low, high], [row, row], color="#222222", linewidth=1.4)
        axes.annotate(f"{mean:+.1f}", (max(high, 0) + 0.4, row), va="center", color="#222222")
        axes.annotate(name, (-1.6, row), va="center", ha="right", color="#222222", annotation_clip=False)
    axes.axvline(0, color="#222222", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_yticks([])
    axes.set_xlim(-1.2, 23)
    axes.set_xlabel("gain over the same student without a teacher, points of test accuracy (95 % interval, 5 seeds)")
    axes.set_title("Fashion-MNIST, student with 1/65 of the teacher's parameters", loc="left", fontsize=11)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.savefig(out, bbox_inches="tight", facecolor="white", metadata={"Date": None})


if __name__ == "__main__":
    draw(ROOT / "docs/images/gain.svg")
