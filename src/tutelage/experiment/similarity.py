"""Class similarity (dark knowledge): which classes a model gives probability together."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from tutelage.engine import RunDirectory
from tutelage.files import write_text

TEMPERATURES = (1, 2, 4, 8, 20)
"""The temperatures at which a run writes class similarities."""

MOST_CLASSES = 200
"""With more classes, a run writes none."""


def class_similarity(logits: Tensor, temperature: float) -> Tensor:
    """``sim[i, j] = E[p_i p_j]`` over examples, with ``p = softmax(logits / temperature)``.

    Symmetric; its entries sum to 1, row ``i`` sums to ``E[p_i]``, and every entry goes to ``1 / C**2`` as the
    temperature grows. For one-hot probabilities only the diagonal is not zero.

    Args:
        logits: ``[N, C]`` with at least one row.
        temperature: > 0.

    Returns:
        ``[C, C]``, float64.
    """
    p = torch.softmax(logits.double() / temperature, dim=-1)
    return p.T @ p / len(p)


class Similarities:
    """:func:`class_similarity` at each of :data:`TEMPERATURES`, accumulated batch by batch."""

    def __init__(self) -> None:
        self.n = self.classes = 0
        self.sums: dict[int, Tensor] = {}

    def add(self, logits: Tensor) -> None:
        """Add examples: logits ``[N, C]``."""
        self.n, self.classes = self.n + len(logits), logits.shape[-1]
        if self.classes > MOST_CLASSES or not len(logits):
            return
        for temperature in TEMPERATURES:
            here = class_similarity(logits, temperature) * len(logits)
            self.sums[temperature] = self.sums[temperature] + here if temperature in self.sums else here

    def means(self) -> dict[int, Tensor]:
        """``[C, C]`` by temperature; empty with too many classes or no example."""
        return {temperature: total / self.n for temperature, total in self.sums.items()}

    def write(self, run: RunDirectory, name: str) -> None:
        """Write the upper triangle of each, row by row, for the model of that name."""
        if not run.writes:
            return
        upper = torch.triu_indices(self.classes, self.classes).unbind()
        sim = {t: [float(f"{v:.6g}") for v in mean.cpu()[upper].tolist()] for t, mean in self.means().items()}
        text = json.dumps({"classes": self.classes, "n": self.n, "sim": sim}, separators=(",", ":"))
        write_text(run.json_file("similarity", name), text + "\n")
