"""Dark knowledge in figures: which classes a model finds alike, and how far another one finds the same."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tutelage.reports.panel import ROLES, role_of
from tutelage.reports.read import Run

Matrix: TypeAlias = NDArray[np.float64]


def square(upper: Sequence[float], classes: int) -> Matrix:
    """The symmetric ``[C, C]`` whose upper triangle is given row by row."""
    whole = np.zeros((classes, classes))
    whole[np.triu_indices(classes)] = upper
    return whole + np.triu(whole, 1).T


def shares(sim: Matrix) -> Matrix:
    """``2 sim[i, j] / (E[p_i] + E[p_j])``, from ``sim[i, j] = E[p_i p_j]``; NaN on the diagonal.

    Where the model sees one of two classes, the other gets this share of the probability: the mean of ``p_j``
    weighted by ``p_i`` and of ``p_i`` weighted by ``p_j``. Zero for one-hot answers, ``1 / C`` for level ones. Unlike
    ``sim`` it does not grow with how frequent the classes are.
    """
    mean = sim.sum(axis=1)
    both = mean[:, None] + mean[None, :]
    found: Matrix = np.divide(2 * sim, both, out=np.zeros_like(sim), where=both > 0)
    np.fill_diagonal(found, np.nan)
    return found


def pairs_of(matrix: Matrix) -> Matrix:
    """What is above the diagonal: one value for each pair of classes."""
    return matrix[np.triu_indices(len(matrix), 1)]


def rank_correlation(a: Matrix, b: Matrix) -> float | None:
    """Spearman's; ``None`` where it is not defined: fewer than three values, all alike, or not finite."""
    if len(a) < 3 or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return None
    first, second = _ranks(a), _ranks(b)
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(np.corrcoef(first, second)[0, 1])


def _ranks(values: Matrix) -> Matrix:
    """Ranks from zero; equal values share the mean of theirs."""
    _, which, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count) - 1
    found: Matrix = (last - (count - 1) / 2)[which]
    return found


class Alike:
    """What a run's models find alike at one temperature.

    Attributes:
        mean: shares of each role, averaged over its seeds.
        order: rank correlations with the teacher's shares: of each arm, by training.
    """

    def __init__(self, matrices: Mapping[str, Matrix]) -> None:
        """Shares by training."""
        self.mean: dict[str, Matrix] = {}
        self.order: dict[str, dict[str, float]] = {}
        teacher = pairs_of(matrices["teacher"])
        for role in ROLES:
            mine = {name: m for name, m in matrices.items() if role_of(name) == role}
            if not mine:
                continue
            self.mean[role] = np.mean(list(mine.values()), axis=0)
            if role != "teacher":
                found = {name: rank_correlation(teacher, pairs_of(m)) for name, m in mine.items()}
                self.order[role] = {name: value for name, value in found.items() if value is not None}

    def closest(self, most: int) -> list[tuple[int, int]]:
        """The teacher's most similar pairs, most similar first."""
        values = pairs_of(self.mean["teacher"])
        rows, columns = np.triu_indices(len(self.mean["teacher"]), 1)
        best = np.argsort(-values, kind="stable")[:most]
        return [(int(rows[k]), int(columns[k])) for k in best]

    def nearer(self) -> tuple[int, int]:
        """For how many seeds the distilled student ranks the pairs more as the teacher does, and of how many."""
        alone, distilled = (
            {name.partition("-")[2]: value for name, value in self.order.get(arm, {}).items()}
            for arm in ("baseline", "distilled")
        )
        seeds = alone.keys() & distilled.keys()
        return sum(distilled[s] > alone[s] for s in seeds), len(seeds)


def alike(run: Run) -> dict[str, Alike]:
    """By temperature, smallest first; empty where the run kept no similarities of its teacher."""
    kept = run.similarity
    if "teacher" not in kept:
        return {}
    classes = kept["teacher"]["classes"]
    same = {name: found["sim"] for name, found in kept.items() if found["classes"] == classes}
    return {
        t: Alike({name: shares(square(sim[t], classes)) for name, sim in same.items() if t in sim})
        for t in sorted(kept["teacher"]["sim"], key=float)
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and sample standard deviation."""
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else None}
