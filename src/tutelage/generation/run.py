"""From a recipe to data: the modes' waves through the desk, then checks, then files."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from tutelage.config import (
    AnswerConfig,
    ConversationConfig,
    EndpointRecipe,
    Generation,
    dump_recipe,
    load_generation,
)
from tutelage.errors import BudgetSpent, require
from tutelage.files import write_text
from tutelage.generation.answers import GenerationContext
from tutelage.generation.checks import QualityChecks, sifted
from tutelage.generation.output import write
from tutelage.generation.prompts import rows_of
from tutelage.generation.request_loop import carry_out, opened, spent_of
from tutelage.generation.requests import RequestParameters
from tutelage.generation.strategies import STRATEGIES
from tutelage.generation.templates import PromptTemplates
from tutelage.progress import Terminal


class GenerationResult(NamedTuple):
    """What a generation left.

    Args:
        path: its folder: ``data/``, ``rejected.jsonl``, ``README.md``, ``journal.jsonl``, ``summary.json``.
        summary: what ``summary.json`` holds.
    """

    path: Path
    summary: dict[str, Any]


def generate(
    recipe: Generation | str | Path,
    overrides: Iterable[str] = (),
    *,
    out: str | Path | None = None,
    terminal: Terminal | None = None,
) -> GenerationResult:
    """Ask a recipe's endpoint for text, keep what is good, and write it as data; what `tutelage generate` does.

    What the folder's journal has is not asked for again, so the same call goes on after an interruption, and one with
    other checks pays for nothing.

    Args:
        recipe: the path of a YAML file, or a loaded one.
        overrides: ``key=value``, for a path.
        out: the folder. Default: ``runs/NAME-generate``.
        terminal: where progress is shown.

    Raises:
        BudgetSpent: the budget does not reach; what there is has been written.
        Interrupted: a person asked to stop; every answer is in the journal.
        TutelageError: one of its other subclasses, with the remedy.
    """
    require("httpx2", "generate", "generating text")
    require("rapidfuzz", "generate", "finding near duplicates")
    loaded = recipe if isinstance(recipe, Generation) else load_generation(recipe, overrides)
    terminal = terminal or Terminal()
    path = Path(out) if out is not None else Path("runs") / f"{loaded.name}-generate"
    settings = loaded.settings
    kit = _kit(loaded)
    QualityChecks(settings.quality)
    steps = STRATEGIES[settings.kind](kit)
    first = next(steps, None)  # a broken file or template is known before anything is made or asked
    made_of = {"recipe": loaded.name, "kind": settings.kind, "model": settings.endpoint.model}
    asked = {"teacher": settings.endpoint}
    if settings.best is not None and settings.best.by == "judge":
        asked["judge"] = settings.best.judge or settings.endpoint
    began = time.monotonic()
    with closing(opened(path, made_of)) as journal:
        write_text(path / "config.yaml", dump_recipe(EndpointRecipe(name=loaded.name, generate=settings)))
        made, desk = carry_out(steps, first, journal, asked, settings.budget, terminal)
        kept, rejected = sifted(made.items, settings.quality)
        found = write(path, loaded.name, settings, kit.templates.version, kept, [*made.rejected, *rejected])
        summary = {
            **found, "not_asked": made.unasked, "spent": spent_of(journal, settings.budget), "calls": desk.asked,
            "calls_failed": desk.meter.failed, "seconds": round(time.monotonic() - began, 3),
        }  # fmt: skip
        write_text(path / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    if desk.refusal is not None:
        raise BudgetSpent(
            f"{desk.refusal}; {len(kept):,} conversations are in {path / 'data'}",
            remedy="raise the budget and run the same command again: what is there is not paid for twice",
        )
    return GenerationResult(path, summary)


def _kit(loaded: Generation) -> GenerationContext:
    settings = loaded.settings
    templates = PromptTemplates(loaded.where)
    given = ["prompt", "instruction"]
    if isinstance(settings, AnswerConfig | ConversationConfig):
        given = sorted({column for row in rows_of(settings.prompts, "prompts") for column in row})
    system = None if settings.system is None else templates.add(("generate", "system"), settings.system, given)
    user = templates.add(("generate", "user"), settings.user, given)
    judge = judged = None
    if settings.best is not None and settings.best.by == "judge":
        judge = RequestParameters(settings.best.judge or settings.endpoint, settings.best.sampling, to="judge")
        judged = templates.add(("generate", "best", "template"), settings.best.template, ("prompt", "answer"))
    return GenerationContext(
        settings, templates, RequestParameters(settings.endpoint, settings.sampling), judge, judged, system, user
    )
