"""HTML pages from Jinja2 templates and static files. A page is one file that loads nothing from the network.

Templates escape every value, and the content security policy of a page allows no script but its own: text from the
data stays text.
"""

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from tutelage.files import write_text
from tutelage.reports import formatting, results
from tutelage.reports.class_similarity import similarity_panel
from tutelage.reports.judgements import generated_prompts, judged_prompts
from tutelage.reports.plotting import Figure
from tutelage.reports.result_figures import FIGURES, seed_by_seed, stage_figure, stage_swatch
from tutelage.reports.results import metric_label, metric_labels, metric_of
from tutelage.reports.run_details import cost_rows, differing_settings, task_rows
from tutelage.reports.run_files import (
    JudgementRecord,
    MultistageRecord,
    Record,
    RunRecord,
    is_search,
    read_records,
    read_search,
)
from tutelage.reports.sample_explorer import class_names, disagreement_text, explorer_of
from tutelage.reports.search import response, search_figures
from tutelage.reports.task_figures import task_figures

FOLDER = Path(__file__).parent


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Write one HTML page about one run, search or judgement, or about several side by side.

    Beside other runs, a search stands for its runs that were measured on the test split: the unchanged recipe and the
    chosen one.

    Args:
        runs: folders of finished runs, multi-stage runs, searches and judgements.
        out: the page; an old one is replaced.

    Returns:
        ``out``.

    Raises:
        RunDirectoryError: a run is missing or not finished, or ``out`` cannot be written.
        DataError: a file of a run is damaged.
    """
    out, paths = Path(out), [Path(run) for run in runs]
    if len(paths) == 1 and is_search(paths[0]):
        record = read_search(paths[0])
        html = render("search.html.jinja", title=f"{record.label} – search", record=record)
    else:
        folders = [folder for path in paths for folder in (read_search(path).runs if is_search(path) else [path])]
        html = report_page(read_records(folders))
    write_text(out, html)
    return out


def report_page(records: Sequence[Record]) -> str:
    """The HTML of the page on runs, multi-stage runs and judgements."""
    runs = [record for record in records if isinstance(record, RunRecord)]
    title = " and ".join(record.label for record in records) if len(records) < 4 else f"{len(records)} runs"
    return render(
        "report.html.jinja",
        title=f"{title} – distillation report",
        records=records,
        runs=runs,
        stages=[record for record in records if isinstance(record, MultistageRecord)],
        judgements=[record for record in records if isinstance(record, JudgementRecord)],
        metric=metric_labels(run.summary for run in runs),
        other_metrics=sorted({metric_label(run.summary) for run in runs if metric_of(run.summary) != "accuracy"}),
        has_teacher=any(run.summary["teacher"] for run in runs),
        has_joint_models=any(run.summary["students"]["distilled"]["others"] for run in runs),
        differences=differing_settings(runs),
        task_figures=[(run.label, figures) for run in runs if (figures := task_figures(run.summary))],
        task_scores=[scores for run in runs if (scores := task_rows(run)).rows],
        costs=[cost_rows(run) for run in runs],
        seed_figure=seed_by_seed(runs) if runs else None,
        figures_by_heading=_figures(runs),
    )


def _figures(runs: Sequence[RunRecord]) -> dict[str, list[Figure]]:
    """The figures of each run by their headings; figures side by side have the same range of values."""
    metric = metric_labels(run.summary for run in runs)
    figures = {
        heading.format(metric=metric): [figure for run in runs if (figure := draw(run))]
        for heading, draw in FIGURES.items()
    }
    for side_by_side in figures.values():
        axes = [figure.layout["yaxis"] for figure in side_by_side]
        ranges = [axis["range"] for axis in axes if "range" in axis and axis["range"][0] < axis["range"][1]]
        if ranges and len(ranges) == len(axes):
            for axis in axes:
                axis["range"] = [min(low for low, _ in ranges), max(high for _, high in ranges)]
    return figures


def render(template: str, **view: Any) -> str:
    """The HTML of a page.

    Args:
        template: a file in ``templates/``. It appends the data of its figures and explorers to
            ``figures`` and ``explorers``.
        view: the variables of the template.
    """
    return _environment().get_template(template).render(figures=[], explorers=[], **view)


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER / "templates"),
        autoescape=lambda name: name is None or not name.endswith(".md.jinja"),
        finalize=_keep_unit_on_line,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    texts = (
        formatting.bounds, formatting.duration, formatting.interval, formatting.milliseconds, formatting.percent,
        formatting.percent_spread, formatting.plain, formatting.points, formatting.seeds_text, formatting.value_text,
        metric_label,
    )  # fmt: skip
    environment.filters |= {text.__name__: text for text in texts}
    environment.filters |= {
        "count_text": formatting.count, "digest": _digest, "json": as_json,
        "extract": lambda key, values: values[key],
    }  # fmt: skip
    views = (
        class_names, disagreement_text, explorer_of, generated_prompts, judged_prompts, response, search_figures,
        similarity_panel, stage_figure, stage_swatch,
    )  # fmt: skip
    environment.globals |= {view.__name__: view for view in views}
    environment.globals |= {"ABSENT": formatting.ABSENT, "plotly": _plotly, "results": results, "static": _static}
    return environment


@jinja2.pass_eval_context
def _keep_unit_on_line(context: jinja2.nodes.EvalContext, value: Any) -> Any:
    """On HTML pages, binds ``%`` to its number by a no-break space, except in text that is marked as safe."""
    is_text = context.autoescape and isinstance(value, str) and not isinstance(value, Markup)
    return value.replace(" %", "\u00a0%") if is_text else value


def _static(name: str) -> Markup:
    return Markup((FOLDER / "static" / name).read_text(encoding="utf-8"))


@cache
def _plotly() -> Markup:
    from plotly.offline import get_plotlyjs

    return Markup(get_plotlyjs().replace("\r\n", "\n").replace("\r", "\n"))  # as a browser normalises it


def _digest(script: str) -> str:
    """The hash of a script for the content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def as_json(value: Any) -> Markup:
    """JSON for a script element: it contains no markup, and null for numbers that are not finite."""
    text = json.dumps(_finite(value), separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
