"""``tutelage generate``: from a recipe to data."""

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
    dump_recipe,
    load_endpoint_recipe,
)
from tutelage.errors import BudgetSpent, require
from tutelage.files import write_text
from tutelage.generation.answers import GenerationContext
from tutelage.generation.checks import QualityChecks, filter_conversations
from tutelage.generation.output import write_output
from tutelage.generation.prompts import PromptTemplates, read_rows
from tutelage.generation.request_loop import open_journal, run_plan, usage_summary
from tutelage.generation.requests import RequestParameters
from tutelage.generation.strategies import STRATEGIES
from tutelage.progress import Terminal


class GenerationResult(NamedTuple):
    """The result of a generation.

    Args:
        path: its folder: ``data/``, ``rejected.jsonl``, ``README.md``, ``journal.sqlite``, ``summary.json``.
        summary: the content of ``summary.json``.
    """

    path: Path
    summary: dict[str, Any]


def generate(
    recipe: EndpointRecipe | str | Path,
    overrides: Iterable[str] = (),
    *,
    out: str | Path | None = None,
    terminal: Terminal | None = None,
) -> GenerationResult:
    """Request text from a recipe's endpoint, filter it, and write it as data (`tutelage generate`).

    Answers in the folder's journal are not requested again. So the same call continues an interrupted one, and a call
    with other quality checks costs nothing.

    Args:
        recipe: the path of a YAML file, or a loaded one.
        overrides: ``key=value``, for a path.
        out: the folder. Default: ``runs/NAME-generate``.
        terminal: shows the progress.

    Raises:
        BudgetSpent: the budget ended the run; the conversations so far are written.
        Interrupted: the user asked to stop; every answer is in the journal.
        TutelageError: one of its other subclasses, with the remedy.
    """
    require("httpx2", "generate", "generating text")
    require("rapidfuzz", "generate", "finding near duplicates")
    loaded = recipe
    if not isinstance(loaded, EndpointRecipe):
        loaded = load_endpoint_recipe(loaded, overrides, "generate")
    terminal = terminal or Terminal()
    path = Path(out) if out is not None else Path("runs") / f"{loaded.name}-generate"
    settings, context = loaded.generate, _context(loaded)
    assert settings is not None
    QualityChecks(settings.quality)
    plan = STRATEGIES[settings.kind](context)
    first = next(plan)  # reports a broken file or template before any request is sent
    made_of = {"recipe": loaded.name, "kind": settings.kind, "model": settings.endpoint.model}
    endpoints = {"teacher": settings.endpoint}
    if settings.best is not None and settings.best.by == "judge":
        endpoints["judge"] = settings.best.judge or settings.endpoint
    start = time.monotonic()
    with closing(open_journal(path, made_of)) as journal:
        write_text(path / "config.yaml", dump_recipe(EndpointRecipe(name=loaded.name, generate=settings)))
        output, scheduler = run_plan(plan, first, journal, endpoints, settings.budget, terminal)
        accepted, rejected = filter_conversations(output.conversations, settings.quality)
        rejected = [*output.rejected, *rejected]
        summary = {
            **write_output(path, loaded.name, settings, context.templates.version, accepted, rejected),
            "not_asked": output.not_sent, "spent": usage_summary(journal, settings.budget), "calls": scheduler.calls,
            "calls_failed": scheduler.counts.failed, "seconds": round(time.monotonic() - start, 3),
        }  # fmt: skip
        write_text(path / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    if scheduler.exceeded is not None:
        raise BudgetSpent(
            f"{scheduler.exceeded}; {len(accepted):,} conversations are in {path / 'data'}",
            remedy="raise the budget and run the same command again: answers in the journal are not paid for twice",
        )
    return GenerationResult(path, summary)


def _context(loaded: EndpointRecipe) -> GenerationContext:
    settings = loaded.generate
    assert settings is not None
    templates = PromptTemplates(loaded.where)
    names = ["prompt", "instruction"]
    if isinstance(settings, AnswerConfig | ConversationConfig):
        names = sorted({column for row in read_rows(settings.prompts, "prompts") for column in row})
    system = None if settings.system is None else templates.add(("generate", "system"), settings.system, names)
    user = templates.add(("generate", "user"), settings.user, names)
    judge = judge_template = None
    if settings.best is not None and settings.best.by == "judge":
        judge = RequestParameters(settings.best.judge or settings.endpoint, settings.best.sampling, role="judge")
        key = ("generate", "best", "template")
        judge_template = templates.add(key, settings.best.template, ("prompt", "answer"))
    parameters = RequestParameters(settings.endpoint, settings.sampling)
    return GenerationContext(settings, templates, parameters, judge, judge_template, system, user)
