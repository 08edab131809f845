"""The table of errors of regression models, for the terminal and for pages."""

from collections.abc import Mapping
from typing import Any

from tutelage.reports.formatting import plain, plain_spread
from tutelage.reports.results import TEACHER, model_names

COLUMNS = {"rmse": "RMSE", "mae": "MAE", "r2": "R²", "spearman": "Spearman", "pearson": "Pearson"}


def error_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """Rows of model and figures (:data:`COLUMNS`); with several targets also a row for each, of the first seed.

    Errors are in the targets' units. Empty where the run is no regression.
    """
    teacher, names = summary.get("teacher") or {}, model_names(summary)
    models: list[tuple[str, Mapping[str, Any], Any, Mapping[str, Any] | None]] = [
        (names[arm], result["best"], plain_spread, result.get("per_target"))
        for arm in ("baseline", "distilled")
        if (result := summary["students"].get(arm))
    ]
    if teacher:
        models.insert(0, (TEACHER, teacher, plain, teacher.get("per_target")))
    rows = []
    for name, figures, text, targets in models:
        if figures.get("rmse") is None:
            continue
        rows.append([name, *(text(figures.get(key)) for key in COLUMNS)])
        for i, target in enumerate(summary["classes"] if targets else []):
            rows.append([f"{name}, {target}", *(plain(targets[key][i]) for key in COLUMNS)])  # type: ignore[index]
    return rows
