"""The parts of the page, as HTML. Every string from a run goes through ``escaped``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from tutelage.reports.metric import judged_by, metric_of, named
from tutelage.reports.panel import Panel
from tutelage.reports.read import Judgement, Run, Series
from tutelage.reports.wording import (
    ABSENT,
    BASELINE,
    DISTILLED,
    OF_TEACHER,
    TEACHER,
    UNTAUGHT,
    called,
    count,
    escaped,
    final_table,
    interval,
    milliseconds,
    percent,
    percent_spread,
    points,
    verdict,
    wins,
)

COLUMNS = {
    "accuracy": "Accuracy, best on validation",
    "last": "Accuracy, last epoch",
    "agreement": "Agreement with teacher",
    "kl": "KL to teacher, nats",
    "ece": "ECE",
    "loss": "Loss, nats",
    "parameters": "Parameters",
    "latency": "Latency, p50",
    "seconds": "Training time",
}
ROLE = {TEACHER: "teacher", BASELINE: "baseline", DISTILLED: "distilled", UNTAUGHT: "distilled"}
"""The colour of each model by what it is called."""

NOTE = (
    "All figures are of the test split. “Best on validation”: the weights with the best validation score. "
    "± is the standard deviation over seeds. ECE: expected calibration error, 15 bins. Latency: one sample, models "
    "taking turns."
)
NOTE_TEACHER = (
    " Agreement: share of samples on which student and teacher predict the "
    "same class. KL: mean divergence of the student's distribution from the teacher's."
)
NOTE_OTHERS = (
    " What is below the student with the method was trained along with it; its best weights are those of the step at "
    "which the student was best."
)


def headline(runs: Sequence[Run]) -> str:
    """What was found, first."""
    if len(runs) > 1:
        found = "".join(
            f"<li><b>{escaped(run.label)}</b> {escaped(verdict(run.summary))}{_formula(run, 'div')}</li>"
            for run in runs
        )
        return f"<header><h1>{len(runs)} distillation runs, compared</h1><ul class='verdicts'>{found}</ul></header>"
    run = runs[0]
    name = run.summary["name"]
    title = name if name == run.label else f"{name} ({run.label})"
    return (
        f"<header><h1>{escaped(title)}</h1><p class='verdict'>{escaped(verdict(run.summary))}</p>"
        f"{_formula(run, 'p')}<p class='note'>{escaped(_facts(run.summary))}</p>{_tiles(run)}</header>"
    )


def _formula(run: Run, tag: str) -> str:
    formula = run.summary.get("formula")
    return f"<{tag} class='note'>Loss of the student: <code>{escaped(formula)}</code></{tag}>" if formula else ""


def _facts(summary: Mapping[str, Any]) -> str:
    seeds = summary["seeds"]
    facts = [f"{'Seed' if len(seeds) == 1 else 'Seeds'} {', '.join(map(str, seeds))}"]
    if n := _samples(summary):
        facts.append(f"{count(n)} test samples")
    if summary.get("device"):
        processes = summary.get("processes") or 1
        facts.append(f"trained on {summary['device']}" + (f", {processes} processes" if processes > 1 else ""))
    if summary.get("exported"):
        facts.append(f"exported student: {summary['exported']}")
    return "; ".join(facts) + "."


def _samples(summary: Mapping[str, Any]) -> int:
    """Samples of the test split, as the teacher or a student was measured on them; 0 where nothing says."""
    teacher = summary.get("teacher")
    if teacher is not None:
        return teacher.get("n") or 0
    bins = summary["students"]["distilled"].get("reliability") or {}
    return int(sum(bins.get("count", [])))


def _tiles(run: Run) -> str:
    summary = run.summary
    tiles: list[tuple[str, str, str]] = [tile for found in run.judged for tile in wins(found)]
    gain = (summary.get("gain") or {}).get("best")
    if gain:
        tiles.append(("Gain over the baseline student", f"{points(gain['mean'])} points", interval(gain)))
    teacher = (summary.get("teacher") or {}).get("accuracy")
    distilled = summary["students"]["distilled"]["best"]["accuracy"]["mean"]
    if teacher:
        ofs = f"{percent(distilled)} of {percent(teacher)}"
        tiles.append((f"Of the teacher's {named(summary)}", percent(distilled / teacher), ofs))
    sizes = summary["parameters"]
    if summary.get("teacher") is not None:
        ofs = f"{count(sizes['student'])} of {count(sizes['teacher'])}"
        tiles.append(("Of the teacher's parameters", percent(summary["capacity_ratio"]), ofs))
    else:
        tiles.append((f"Test {named(summary)}", percent(distilled), called(summary)["distilled"]))
        tiles.append(("Parameters", count(sizes["student"]), "of the student; there is no teacher"))
    if speed := speed_up(summary):
        slow, fast = (milliseconds(summary["latency"][who]) for who in ("teacher", "student"))
        tiles.append(("Latency of one sample, p50", speed, f"{fast} against {slow}"))
    cells = "".join(
        f"<div><dt>{escaped(what)}</dt><dd class='big'>{escaped(big)}</dd><dd class='note'>{escaped(how)}</dd></div>"
        for what, big, how in tiles
    )
    return f"<dl class='tiles'>{cells}</dl>"


def speed_up(summary: Mapping[str, Any]) -> str:
    """``3.1 times faster``; empty where latency was not measured."""
    speed = summary.get("latency") or {}
    if "teacher" not in speed or "student" not in speed:
        return ""
    teacher, student = (speed[who]["p50_ms"] for who in ("teacher", "student"))
    if min(teacher, student) <= 0:
        return ""
    ratio = teacher / student
    if 0.95 < ratio < 1.05:
        return "as fast"
    return f"{ratio:.1f} times faster" if ratio > 1 else f"{1 / ratio:.1f} times slower"


# Tables ------------------------------------------------------------------------------------------


def table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table in its own scrolling container; cells are HTML, each row's first is its header."""
    head = "".join(f"<th scope='col'>{escaped(c)}</th>" for c in columns)
    body = "".join(
        f"<tr><th scope='row'>{row[0]}</th>{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>" for row in rows
    )
    return (
        f"<div class='scroll {kind}' tabindex='0' role='region' aria-label='{escaped(caption)}'><table>"
        f"<caption>{escaped(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def final(runs: Sequence[Run]) -> str:
    """The final table of each run."""
    tables = []
    for run in runs:
        columns = {k: v for k, v in COLUMNS.items() if k not in OF_TEACHER or run.summary.get("teacher")}
        rows = [[role(row["name"]), *(escaped(row[key]) for key in columns)] for row in final_table(run.summary)]
        caption = "Results" + ("" if len(runs) == 1 else f" of {run.label}")
        if metric_of(run.summary) != "accuracy":
            columns |= {k: v.replace("Accuracy", named(run.summary)) for k, v in columns.items()}
        tables.append(table(caption, ["Model", *columns.values()], rows))
    note = NOTE + (NOTE_TEACHER if any(run.summary.get("teacher") for run in runs) else "")
    other = {named(run.summary) for run in runs if metric_of(run.summary) != "accuracy"}
    note += f" {' and '.join(sorted(other))}: times 100." if other else ""
    note += NOTE_OTHERS if any(run.summary["students"]["distilled"].get("others") for run in runs) else ""
    return f"<section class='results'>{''.join(tables)}<p class='note'>{escaped(note)}</p></section>"


def role(name: str) -> str:
    """The name of a model with the mark of its colour."""
    colour = ROLE.get(name, "teacher" if name.startswith(TEACHER) else "other")
    return f"<span class='role'><span class='swatch {colour}'></span>{escaped(name)}</span>"


def comparison(runs: Sequence[Run]) -> str:
    """Several runs in one table, and the settings in which they differ."""
    if len(runs) == 1:
        return ""
    columns = ["Run", "Teacher", "Baseline", "Distilled", "Gain, points", "Interval", "Agreement with teacher"]
    columns += ["Of the teacher's parameters", "Latency, p50"]
    rows = []
    for run in runs:
        s = run.summary
        students, gain = s["students"], (s.get("gain") or {}).get("best")
        cells = [
            run.label,
            percent((s.get("teacher") or {}).get("accuracy")),
            percent_spread(students["baseline"]["best"]["accuracy"]) if "baseline" in students else ABSENT,
            percent_spread(students["distilled"]["best"]["accuracy"]),
            points(gain["mean"]) if gain else ABSENT,
            interval(gain) if gain else ABSENT,
            percent_spread(students["distilled"]["best"].get("agreement")),
            percent(s.get("capacity_ratio")),
            speed_up(s) or ABSENT,
        ]
        rows.append([escaped(c) for c in cells])
    return table(f"Runs, test {judged_by(run.summary for run in runs)}", columns, rows) + _differences(runs)


def _differences(runs: Sequence[Run]) -> str:
    try:
        settings = [_flat(yaml.safe_load(run.config)) for run in runs]
    except (yaml.YAMLError, ValueError, RecursionError):  # shown as it is below; only this table needs it parsed
        return ""
    keys = sorted({key for s in settings for key in s})
    rows = [
        [escaped(key).replace(".", ".<wbr>"), *(escaped(s.get(key, ABSENT)) for s in settings)]
        for key in keys
        if len({s.get(key, ABSENT) for s in settings}) > 1
    ]
    if not rows:
        return "<p class='note'>The runs' settings do not differ.</p>"
    shown = table("Settings that differ", ["Setting", *(run.label for run in runs)], rows, "words")
    if len(rows) <= 10:
        return shown
    return f"<details><summary>{len(rows)} settings differ</summary>{shown}</details>"


def _flat(value: Any, key: str = "") -> dict[str, str]:
    if isinstance(value, Mapping) and value:
        return {k: v for name, inner in value.items() for k, v in _flat(inner, f"{key}.{name}".strip(".")).items()}
    return {key: yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()}


def configs(runs: Sequence[Run | Series | Judgement]) -> str:
    """The resolved config of each run, as it is."""
    return (
        "<section><h2>Config</h2>"
        + "".join(
            f"<details><summary>{escaped('config.yaml' if len(runs) == 1 else f'{run.label}: config.yaml')}</summary>"
            f"<pre tabindex='0'><code>{escaped(run.config, breaking=True)}</code></pre></details>"
            for run in runs
        )
        + "</section>"
    )


# Figures -----------------------------------------------------------------------------------------


def figure(panel: Panel, number: int, heading: str = "", subheading: str = "") -> str:
    """A place for a figure, with its controls; under a heading of its own it says how to read it."""
    title = f"<h2>{escaped(heading)}</h2>" if heading else f"<h3>{escaped(subheading)}</h3>"
    note = f"<p class='note'>{escaped(panel.note)}</p>" if panel.note and heading else ""
    key = "".join(
        f"<span class='role'><span class='swatch {role}'></span>{escaped(name)}</span>"
        for role, name in panel.key.items()
    )
    note += f"<p class='key'>{key}</p>" if key else ""
    controls = "".join(control(name, choices) for name, choices in panel.controls.items())
    form = f"<form class='controls'>{controls}</form>" if controls else ""
    plot = (
        f"<div class='plot' data-figure='{number}' role='img' aria-label='{escaped(panel.says)}' "
        f"style='height:{int(panel.layout['height'])}px'></div>"
    )
    if panel.tall:
        plot = (
            f"<div class='tall' tabindex='0' role='region' aria-label='{escaped(heading or subheading)}'>{plot}</div>"
        )
    return f"<figure class='panel'><figcaption>{title}{note}</figcaption>{form}{plot}</figure>"


def control(name: str, choices: Mapping[str, str], *, chosen: str | None = None, radios: bool = False) -> str:
    """A control of a figure: label to value; the first is preset unless ``chosen``. Few choices are all in view."""
    preset = next(iter(choices.values())) if chosen is None else chosen
    if len(choices) > 2 and not radios:
        options = "".join(
            f"<option value='{escaped(v)}'{' selected' if v == preset else ''}>{escaped(label)}</option>"
            for label, v in choices.items()
        )
        return f"<label>{escaped(name.capitalize())} <select name='{escaped(name)}'>{options}</select></label>"
    buttons = "".join(
        f"<label><input type='radio' name='{escaped(name)}' value='{escaped(v)}'{' checked' if v == preset else ''}>"
        f"{escaped(label)}</label>"
        for label, v in choices.items()
    )
    return f"<fieldset><legend>{escaped(name)}</legend>{buttons}</fieldset>"
