"""One self-contained HTML page of one or several runs, or of a search.

The page asks nothing of the network, and its content security policy lets no script run but the two that are
written here: text from the data stays text.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tutelage.files import write_text
from tutelage.reports import answers
from tutelage.reports.cost import costs
from tutelage.reports.dark import dark_knowledge
from tutelage.reports.explore import EXPLORE
from tutelage.reports.explorer import samples
from tutelage.reports.figures import FIGURES, seed_by_seed
from tutelage.reports.found import Search, is_search, read_search
from tutelage.reports.metric import judged_by
from tutelage.reports.panel import Panel
from tutelage.reports.parts import comparison, configs, figure, final, headline
from tutelage.reports.read import Judgement, Run, Series, read_runs
from tutelage.reports.script import SCRIPT
from tutelage.reports.search import search_body
from tutelage.reports.series import told
from tutelage.reports.style import STYLE
from tutelage.reports.tasks import by_tasks
from tutelage.reports.wording import escaped


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Write one HTML page about one run, workflow, search or judgement, or several side by side.

    Beside others, a search stands for the runs in it that read the test split: the recipe as it was, and the chosen.

    Args:
        runs: folders of finished runs, workflows, searches and judgements.
        out: the page; replaced whole if it is there.

    Returns:
        ``out``.

    Raises:
        RunDirectoryError: a run is not there or not finished, or ``out`` cannot be written.
        DataError: a run's file is broken.
    """
    out, paths = Path(out), [Path(run) for run in runs]
    if len(paths) == 1 and is_search(paths[0]):
        write_text(out, search_page(read_search(paths[0])))
        return out
    each = [run for path in paths for run in (read_search(path).runs if is_search(path) else [path])]
    write_text(out, page(read_runs(each)))
    return out


def page(found: Sequence[Run | Series | Judgement]) -> str:
    """The page's HTML."""
    runs = [run for run in found if isinstance(run, Run)]
    series = [one for one in found if isinstance(one, Series)]
    drawn: list[Panel] = []
    explored: list[dict[str, Any]] = []
    parts = []
    if runs:
        parts = [headline(runs), comparison(runs), final(runs), by_tasks(runs), costs(runs), answers.judged(runs)]
        parts += [answers.written(runs), _figures(runs, drawn), samples(runs, explored)]
        parts += [dark_knowledge(runs, lambda panel: _number(panel, drawn))]
    for one in series:
        parts.append(told(one, lambda panel: _number(panel, drawn), alone=len(found) == 1))
    for judgement in (one for one in found if isinstance(one, Judgement)):
        parts.append(answers.judgement(judgement.found, judgement.label, heading="h1" if len(found) == 1 else "h2"))
    title = " and ".join(one.label for one in found) if len(found) < 4 else f"{len(found)} runs"
    return document(f"{title} – distillation report", "\n".join([*parts, configs(found)]), drawn, explored=explored)


def search_page(search: Search) -> str:
    """The HTML of the page of a search."""
    drawn: list[Panel] = []
    body = search_body(search, lambda panel: _number(panel, drawn))
    return document(f"{search.label} – search", body, drawn)


def document(
    title: str,
    body: str,
    drawn: Sequence[Panel],
    command: str = "tutelage report",
    explored: Sequence[Mapping[str, Any]] = (),
) -> str:
    """A complete page in itself.

    Args:
        title: of the window; text.
        body: HTML.
        drawn: the figures that the body has places for, in the order of their numbers.
        command: what wrote it.
        explored: the samples that the body has explorers of, in the order of their numbers.
    """
    from plotly.offline import get_plotlyjs

    library, script = (_normal(code) for code in (get_plotlyjs(), SCRIPT + (EXPLORE if explored else "")))
    data = f'<script type="application/json" id="samples">{as_json(list(explored))}</script>\n' if explored else ""
    policy = "; ".join(
        [
            "default-src 'none'",
            f"script-src {_digest(library)} {_digest(script)}",
            "style-src 'unsafe-inline'",
            "img-src data: blob:",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escaped(title)}</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<main>
{body}
<footer>Written by <code>{escaped(command)}</code>. This page is complete in itself and needs no network.</footer>
</main>
<script type="application/json" id="figures">{as_json([p.plotted() for p in drawn])}</script>
{data}<script>{library}</script>
<script>{script}</script>
</body>
</html>
"""


def _figures(runs: Sequence[Run], drawn: list[Panel]) -> str:
    def placed(panel: Panel, **more: Any) -> str:
        return figure(panel, _number(panel, drawn), **more)

    metric = judged_by(run.summary for run in runs)
    parts = [placed(seed_by_seed(runs), heading=f"Test {metric}, seed by seed")]
    by_heading = {
        heading.format(metric=metric): [p for run in runs if (p := draw(run))] for heading, draw in FIGURES.items()
    }
    if len(runs) == 1:
        figures = "".join(placed(panels[0], heading=heading) for heading, panels in by_heading.items() if panels)
        return "\n".join([*parts, f"<div class='panels'>{figures}</div>"])
    for heading, panels in by_heading.items():
        if panels:
            _level(panels)
            grid = "".join(placed(panel, subheading=panel.label) for panel in panels)
            note = f"<p class='note'>{escaped(panels[0].note)}</p>"
            parts.append(f"<section><h2>{escaped(heading)}</h2>{note}<div class='panels side'>{grid}</div></section>")
    return "\n".join(parts)


def _number(panel: Panel, drawn: list[Panel]) -> int:
    drawn.append(panel)
    return len(drawn) - 1


def _level(panels: Sequence[Panel]) -> None:
    """Give axes with a range the same one, so that figures side by side compare."""
    ranges = [panel.layout["yaxis"].get("range") for panel in panels]
    if all(r is not None and r[0] < r[1] for r in ranges):
        for panel in panels:
            panel.layout["yaxis"]["range"] = [min(r[0] for r in ranges), max(r[1] for r in ranges)]


def as_json(value: Any) -> str:
    """JSON that can stand inside a script element: no character of it is markup; what is not finite is null."""
    text = json.dumps(_finite(value), separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _normal(code: str) -> str:
    """The code as a browser reads it from the page, so that its digest is the browser's."""
    return code.replace("\r\n", "\n").replace("\r", "\n")


def _digest(code: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'"
