"""Class similarities ("dark knowledge"): which classes a model confuses, and how well students learn this.

The measure is ``sim(i, j) = E[p_i p_j]`` over the test split, with ``p = softmax(logits / T)``. That soft labels
contain such similarities is an observation of Hinton, Vinyals and Dean (2015).
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tutelage.reports.formatting import ABSENT, count, percent
from tutelage.reports.plotting import ROLES, Control, Figure, plot_text, role_of, short
from tutelage.reports.results import model_names
from tutelage.reports.run_files import RunRecord
from tutelage.reports.sample_explorer import class_names, recipe_temperature

PAIRS = 10
"""Pairs in the table."""

FEW_CLASSES = 12
"""Up to this number, the cells of a heatmap show their values."""

LABELS = 25
"""Most labels on an axis of a heatmap."""

PAPER_WIDTH = 320
"""Of a heatmap in print, in pixels: two side by side."""

Matrix: TypeAlias = NDArray[np.float64]


def square(upper: Sequence[float], classes: int) -> Matrix:
    """The symmetric ``[C, C]`` matrix with this upper triangle, given row by row."""
    matrix = np.zeros((classes, classes))
    matrix[np.triu_indices(classes)] = upper
    return matrix + np.triu(matrix, 1).T


def shares(sim: Matrix) -> Matrix:
    """``2 sim[i, j] / (E[p_i] + E[p_j])``, from ``sim[i, j] = E[p_i p_j]``; NaN on the diagonal.

    Where the model predicts one of the two classes, the other class gets this share of the probability: the mean of
    ``p_j`` weighted by ``p_i`` and of ``p_i`` weighted by ``p_j``. It is zero for one-hot outputs and ``1 / C`` for
    uniform ones. Unlike ``sim``, it does not grow with the frequency of the classes.
    """
    mean = sim.sum(axis=1)
    both = mean[:, None] + mean[None, :]
    matrix: Matrix = np.divide(2 * sim, both, out=np.zeros_like(sim), where=both > 0)
    np.fill_diagonal(matrix, np.nan)
    return matrix


def pairs_of(matrix: Matrix) -> Matrix:
    """The values above the diagonal: one for each pair of classes."""
    return matrix[np.triu_indices(len(matrix), 1)]


def _pairs_by_value(matrix: Matrix) -> list[tuple[int, int]]:
    """All pairs of classes, the most similar pair first."""
    rows, columns = np.triu_indices(len(matrix), 1)
    order = np.argsort(-matrix[rows, columns], kind="stable")
    return list(zip(rows[order].tolist(), columns[order].tolist(), strict=True))


def rank_correlation(a: Matrix, b: Matrix) -> float | None:
    """Spearman's; ``None`` where it is undefined: fewer than three values, a constant, or not finite."""
    if len(a) < 3 or not (np.isfinite(a).all() and np.isfinite(b).all()) or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic)


class ClassSimilarity:
    """Class similarities of the models of a run at one temperature.

    Args:
        matrices: shares by training, as in ``baseline-seed0``.

    Attributes:
        mean: shares by role, averaged over seeds.
        correlations: rank correlations with the teacher's shares, by arm and training.
    """

    def __init__(self, matrices: Mapping[str, Matrix]) -> None:
        self.mean: dict[str, Matrix] = {}
        self.correlations: dict[str, dict[str, float]] = {}
        teacher = pairs_of(matrices["teacher"])
        for role in ROLES:
            of_role = {name: matrix for name, matrix in matrices.items() if role_of(name) == role}
            if of_role:
                self.mean[role] = np.mean(list(of_role.values()), axis=0)
            if of_role and role != "teacher":
                values = {name: rank_correlation(teacher, pairs_of(matrix)) for name, matrix in of_role.items()}
                self.correlations[role] = {name: value for name, value in values.items() if value is not None}

    def closest(self, most: int) -> list[tuple[int, int]]:
        """The teacher's most similar pairs, the most similar pair first."""
        return _pairs_by_value(self.mean["teacher"])[:most]

    def closer_seeds(self) -> tuple[int, int]:
        """The number of seeds in which the distilled student is closer to the teacher, and of all seeds."""
        baseline, distilled = (
            {name.partition("-")[2]: value for name, value in self.correlations.get(arm, {}).items()}
            for arm in ("baseline", "distilled")
        )
        seeds = baseline.keys() & distilled.keys()
        return sum(distilled[s] > baseline[s] for s in seeds), len(seeds)


def similarities_of(run: RunRecord) -> dict[str, ClassSimilarity]:
    """By temperature, lowest first; empty where the run has no similarities of its teacher."""
    if "teacher" not in run.similarity:
        return {}
    classes = run.similarity["teacher"]["classes"]
    same = {name: file["sim"] for name, file in run.similarity.items() if file["classes"] == classes}
    return {
        t: ClassSimilarity({name: shares(square(sim[t], classes)) for name, sim in same.items() if t in sim})
        for t in sorted(run.similarity["teacher"]["sim"], key=float)
    }


def similarity_panel(run: RunRecord) -> dict[str, Any] | None:
    """The variables of a run's panel; ``None`` where it has no similarities, or one class.

    Its ``heatmaps`` are missing where there are too many classes to store them. Its ``views`` have text and table of
    each temperature: for each pair of classes, share and rank by model.
    """
    teacher = run.similarity.get("teacher")
    if teacher is None or teacher["classes"] < 2:
        return None
    similarities = similarities_of(run)
    if not similarities:
        note = f"This run has {count(teacher['classes'])} classes, too many to store their similarities."
        return {"label": run.label, "note": note, "heatmaps": []}
    classes, names = class_names(run, teacher["classes"]), model_names(run.summary)
    temperature = recipe_temperature(run)
    preset = min(similarities, key=lambda t: abs(math.log(float(t) / temperature)))
    choices = {f"T = {t}{' (of the recipe)' if float(t) == temperature else ''}": t for t in similarities}
    seeds = max(len(values) for at in similarities.values() for values in [*at.correlations.values(), {}])
    note = f"1/C is {percent(1 / len(classes), 2)} here."
    note += f" Students: mean over {seeds} seeds." if seeds > 1 else ""
    return {
        "label": run.label,
        "note": note,
        "controls": [
            Control("T", choices, preset, radios=True),
            Control("colours", {"one colour scale for all": "one", "one for each": "own"}),
        ],
        "heatmaps": [
            _heatmap(role, names[role], similarities, classes, preset) for role in similarities[preset].mean
        ],
        "views": [
            {"temperature": t, "is_preset": t == preset, "text": similarity_text(at, t, classes, names)}
            | _pair_table(at, classes)
            for t, at in similarities.items()
        ],
    }


def _heatmap(
    role: str, name: str, similarities: Mapping[str, ClassSimilarity], classes: Sequence[str], preset: str
) -> Figure:
    of_role = {t: at for t, at in similarities.items() if role in at.mean}
    at = of_role[preset]
    pairs = [f"{classes[i]} and {classes[j]}, {percent(at.mean[role][i, j], 2)}" for i, j in at.closest(3)]
    step = math.ceil(len(classes) / LABELS)
    labels = [plot_text(c, 12) for c in classes][::step]
    axis = {"tickvals": _distinct([plot_text(c, 40) for c in classes])[::step], "ticktext": labels}
    layout = {
        "style": "heatmap", "height": 380, "yaxis": axis,
        "xaxis": {**axis, "tickangle": 0 if max(map(len, labels)) <= 2 else -90},
    }  # fmt: skip
    description = f"Heatmap of class similarity for the {name}. At T = {preset}: {'; '.join(pairs)}."
    data = [_trace(role, name, t, at, classes) for t, at in of_role.items()]
    return Figure("", description, data, layout, legend={role: name}, is_square=True, paper_width=PAPER_WIDTH)


def _trace(role: str, name: str, t: str, at: ClassSimilarity, classes: Sequence[str]) -> dict[str, Any]:
    ticks = _distinct([plot_text(c, 40) for c in classes])
    ranges = {"one": _range(list(at.mean.values())), "own": _range([at.mean[role]])}
    gap = 1 if len(classes) <= LABELS else 0
    trace: dict[str, Any] = {
        "type": "heatmap", "style": "heatmap", "name": name, "x": ticks, "y": ticks, "xgap": gap, "ygap": gap,
        "z": [[short(100 * v) for v in row] for row in at.mean[role].tolist()],
        "show": {"T": t},
        "by": {"colours": {scale: {"zmin": low, "zmax": high} for scale, (low, high) in ranges.items()}},
    }  # fmt: skip
    if len(classes) <= FEW_CLASSES:
        narrowest = min(high - low for low, high in (_range([matrix]) for matrix in at.mean.values()))
        trace["texttemplate"] = f"%{{z:.{1 if narrowest > 4 else 2}f}}"
    return trace


def _range(matrices: Sequence[Matrix]) -> tuple[float, float]:
    """The lowest and the highest share in per cent, always apart."""
    values = 100 * np.concatenate([pairs_of(matrix) for matrix in matrices])
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    low, high = short(float(values.min())), short(float(values.max()))
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def _distinct(texts: Sequence[str]) -> list[str]:
    """The texts, repeated ones with a number: plotly merges equal categories."""
    distinct: dict[str, None] = {}
    for text in texts:
        name, i = text, 1
        while name in distinct:
            name, i = f"{text} ({i + 1})", i + 1
        distinct[name] = None
    return list(distinct)


def _pair_table(at: ClassSimilarity, classes: Sequence[str]) -> dict[str, Any]:
    ranks = {
        role: {pair: rank for rank, pair in enumerate(_pairs_by_value(matrix), 1)} for role, matrix in at.mean.items()
    }

    def cell(role: str, pair: tuple[int, int]) -> tuple[str, int | None]:
        share = percent(at.mean[role][pair], 2)
        return share, None if role == "teacher" or share == ABSENT else ranks[role][pair]

    pairs = [
        (f"{classes[pair[0]]} – {classes[pair[1]]}", [cell(role, pair) for role in at.mean])
        for pair in at.closest(PAIRS)
    ]
    columns = ["Pair", *(role.capitalize() + ("" if role == "teacher" else ", rank") for role in at.mean)]
    return {"columns": columns, "pairs": pairs}


def similarity_text(
    at: ClassSimilarity, t: str, classes: Sequence[str], names: Mapping[str, str] | None = None
) -> str:
    """The teacher's closest pairs, and how well students keep its order; claims no more than the figures show."""
    names = names or model_names({})
    closest = [f"{classes[i]} and {classes[j]}" for i, j in at.closest(3)]
    pairs = f"{', '.join(closest[:-1])}, and {closest[-1]}" if len(closest) > 1 else closest[0]
    text = f"At T = {t} the most similar classes for the teacher are: {pairs}."
    correlations = [
        f"{names[arm]} {_spread(list(of_arm.values()))}" for arm, of_arm in at.correlations.items() if of_arm
    ]
    if not correlations:
        return text
    total = count(len(pairs_of(at.mean["teacher"])))
    text += (
        f" Do students rank the {total} pairs of classes as the teacher does? Spearman's rank correlation (1: the "
        f"same order, 0: no relation): {', '.join(correlations)}."
    )
    closer, seeds = at.closer_seeds()
    student = names["distilled"]
    if not seeds:
        return text
    if seeds == 1:
        student = student if closer else names["baseline"]
        return (
            f"{text} The {student} is closer to the teacher's order in this one seed, which cannot rule out chance."
        )
    where = f"each of {seeds} seeds" if closer == seeds else f"{closer} of {seeds} seeds, not in all"
    return (
        f"{text} The {student} is closer to the teacher's order in {where if closer else f'none of {seeds} seeds'}."
    )


def _spread(values: Sequence[float]) -> str:
    """Mean and standard deviation: ``0.93 ± 0.02``."""
    text = f"{statistics.fmean(values):.2f}"
    text += f"\u00a0±\u00a0{statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return text.replace("-", "−")
