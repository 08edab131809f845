"""Answers of several models to the same prompts, compared two by two by a judge, each pair in both orders."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from tutelage.config import GIVEN, EndpointRecipe, JudgeConfig, Judgement, dump_recipe, load_judgement
from tutelage.errors import BudgetSpent, DataError, RunDirectoryError, require
from tutelage.evaluation.statistics import paired
from tutelage.files import write_text
from tutelage.generation.answers import RequestPlan
from tutelage.generation.prompts import PromptRow, rows_of
from tutelage.generation.request_loop import carry_out, opened, spent_of
from tutelage.generation.requests import ChatAnswer, Message, Outcome, Request, RequestParameters
from tutelage.generation.scheduler import RequestBatch
from tutelage.generation.templates import PromptTemplate, PromptTemplates
from tutelage.progress import Terminal

SHOWN = 12
"""Prompts whose answers stand side by side on the page."""

ON_PAGE = 40
"""The same on the page of a run whose student was judged."""

WORTH = {"A": 1.0, "B": 0.0}
"""What a verdict gives the first answer; any other is a tie."""


class JudgementResult(NamedTuple):
    """What a judgement left.

    Args:
        path: its folder: ``answers.jsonl``, ``README.md``, ``journal.jsonl``, ``summary.json``, ``judged.json``.
        summary: what ``summary.json`` holds.
        runs: the runs whose students were judged; each has a copy of ``judged.json``, for its page.
    """

    path: Path
    summary: dict[str, Any]
    runs: list[Path]


class JudgePrompt(NamedTuple):
    """A prompt: the messages before the answer, and the answer that the file has."""

    thread: list[Message]
    given: str | None


def judge_answers(
    recipe: Judgement | str | Path,
    overrides: Iterable[str] = (),
    *,
    out: str | Path | None = None,
    terminal: Terminal | None = None,
) -> JudgementResult:
    """Let models answer, and an endpoint say which answers are better; what `tutelage judge` does.

    A pair counts for one side where the judge prefers it in both orders, or in one and ties in the other; else it is
    a tie. The rate of wins counts a tie as half.

    Args:
        recipe: the path of a YAML file, or a loaded one.
        overrides: ``key=value``, for a path.
        out: the folder. Default: ``runs/NAME-judge``.
        terminal: where progress is shown.

    Raises:
        BudgetSpent: the budget does not reach; the same call goes on once it is raised.
        Interrupted: a person asked to stop; every verdict is in the journal.
        TutelageError: one of its other subclasses, with the remedy.
    """
    require("httpx2", "generate", "asking a judge")
    loaded = recipe if isinstance(recipe, Judgement) else load_judgement(recipe, overrides)
    settings, terminal = loaded.settings, terminal or Terminal()
    from tutelage.generation.chat_model import ChatModel  # imports torch, which generating does without

    path = Path(out) if out is not None else Path("runs") / f"{loaded.name}-judge"
    template = PromptTemplates(loaded.where).add(
        ("judge", "template"), settings.template, ("prompt", "first", "second")
    )
    asked = prompts_of(settings)
    began = time.monotonic()
    with closing(opened(path, {"recipe": loaded.name, "judge": settings.endpoint.model})) as journal:
        write_text(path / "config.yaml", dump_recipe(EndpointRecipe(name=loaded.name, judge=settings)))
        threads, given = [one.thread for one in asked], [one.given for one in asked if one.given is not None]
        answers: dict[str, list[str]] = {}
        losses: dict[str, float] = {}
        for name, model in settings.answers.items():
            if model == GIVEN:
                answers[name] = given
                continue
            writer = ChatModel(model)
            answers[name] = writer.answers(threads, settings.max_tokens, terminal)
            if len(given) == len(threads):
                losses[name] = writer.loss(threads, given)
        steps = _verdicts(settings, template, asked, answers)
        first = next(steps)
        verdicts, desk = carry_out(steps, first, journal, {"judge": settings.endpoint}, settings.budget, terminal)
        if desk.refusal is not None:
            raise BudgetSpent(desk.refusal, remedy="raise the budget and run the same command again")
        summary = {
            "prompts": len(asked), "judge": settings.endpoint.model, "held_out_loss": losses,
            "pairs": [figures(pair, found) for pair, found in verdicts.items()],
            "spent": spent_of(journal, settings.budget), "calls": desk.asked,
            "seconds": round(time.monotonic() - began, 3),
        }  # fmt: skip
        samples = [
            {
                "messages": one.thread, "answers": {name: said[i] for name, said in answers.items()},
                "verdicts": {" / ".join(pair): found[i] for pair, found in verdicts.items()},
            }
            for i, one in enumerate(asked)
        ]  # fmt: skip
        lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in samples]
        write_text(path / "answers.jsonl", "".join(lines))
        runs = _for_pages(path, loaded.name, settings, summary, samples, terminal)
        write_text(path / "README.md", page(loaded.name, summary, asked, answers))
        write_text(path / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    return JudgementResult(path, summary, runs)


def _for_pages(
    path: Path,
    name: str,
    settings: JudgeConfig,
    summary: Mapping[str, Any],
    samples: Sequence[Any],
    terminal: Terminal,
) -> list[Path]:
    """Write what a page shows of the judgement, here and in the folders of the runs whose students were judged."""
    from tutelage.engine import RunDirectory  # imports torch, as the models did

    at = {who: run_of(model) for who, model in settings.answers.items()}
    roles = {
        who: "teacher" if model == GIVEN else "baseline" if at[who] is None else "distilled"
        for who, model in settings.answers.items()
    }
    found = {
        "name": name, "roles": roles, **{k: summary[k] for k in ("judge", "prompts", "held_out_loss", "pairs")},
        "samples": samples[:ON_PAGE],
    }  # fmt: skip
    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    write_text(path / "judged.json", text)
    runs = []
    for run in dict.fromkeys(one for one in at.values() if one is not None):
        try:
            write_text(RunDirectory(run).judged(path.resolve().name), text)
        except RunDirectoryError as error:
            terminal.say(f"note: the page of {run} will not show this: {error.what}")
            continue
        runs.append(run)
    return runs


def run_of(model: str) -> Path | None:
    """The run in whose folder a model lies, as in ``hf:runs/mine/student``."""
    folder = Path(model.partition(":")[2])
    if model == GIVEN or not folder.is_dir():
        return None
    near = [folder, *folder.parents][:3]
    return next((p for p in near if (p / "summary.json").exists() and (p / "metrics.jsonl").exists()), None)


def prompts_of(settings: JudgeConfig) -> list[JudgePrompt]:
    """The first prompts of the file.

    Raises:
        DataError: a row has neither messages nor a prompt, or ``given`` is asked for and a row has no answer.
    """
    found = [_opened(row, f"{settings.prompts}, row {i}")
             for i, row in enumerate(rows_of(settings.prompts, "prompts")[: settings.count], 1)]  # fmt: skip
    if GIVEN in settings.answers.values():
        for i, one in enumerate(found, 1):
            if one.given is None:
                raise DataError(
                    "has no answer", where=f"{settings.prompts}, row {i}",
                    remedy="end its messages with the assistant's, or leave 'given' out of judge.answers",
                )  # fmt: skip
    return found


def _opened(row: PromptRow, where: str) -> JudgePrompt:
    messages = row.get("messages")
    if messages is None:
        prompt = row.get("instruction", row.get("prompt"))
        if not isinstance(prompt, str) or not prompt.strip():
            raise DataError(
                "has no prompt", where=where, remedy="give a column 'messages', 'prompt' or 'instruction'"
            )
        answer = row.get("answer")
        return JudgePrompt([{"role": "user", "content": prompt}], answer if isinstance(answer, str) else None)
    thread: list[Message] = [{"role": str(m["role"]), "content": str(m["content"])} for m in messages]
    given = thread.pop()["content"] if thread and thread[-1]["role"] == "assistant" else None
    if not thread or thread[-1]["role"] != "user":
        raise DataError(
            "has no request to answer", where=where, remedy="give messages that a user's ends, or an answer"
        )
    return JudgePrompt(thread, given)


PairVerdicts = dict[tuple[str, str], list[list[str | None]]]
"""For each pair of names and each prompt: what the judge said in this order and in the other, of the first name's
answer: ``win``, ``loss``, ``tie``, or ``None`` where it said nothing of use."""


def _verdicts(
    settings: JudgeConfig,
    template: PromptTemplate,
    asked: Sequence[JudgePrompt],
    answers: Mapping[str, Sequence[str]],
) -> RequestPlan[PairVerdicts]:
    manner = RequestParameters(settings.endpoint, settings.sampling, to="judge")
    pairs = list(combinations(settings.answers, 2))
    wave = []
    for one, other in pairs:
        for i, opened_one in enumerate(asked):
            prompt = "\n\n".join(
                message["content"] if len(opened_one.thread) == 1 else f"{message['role']}: {message['content']}"
                for message in opened_one.thread
            )
            for first, second in ((answers[one][i], answers[other][i]), (answers[other][i], answers[one][i])):
                text = template({"prompt": prompt, "first": first, "second": second}, f"prompt {i + 1}")
                wave.append(Request(manner, [{"role": "user", "content": text}]))
    outcomes = iter((yield RequestBatch("judging", wave)))
    pattern = re.compile(settings.choice)
    return {
        pair: [[_said(next(outcomes), pattern, turned=turned) for turned in (False, True)] for _ in asked]
        for pair in pairs
    }


def _said(outcome: Outcome, pattern: re.Pattern[str], *, turned: bool) -> str | None:
    match = pattern.search(outcome.text) if isinstance(outcome, ChatAnswer) else None
    if match is None:
        return None
    worth = WORTH.get(match.group(1).upper(), 0.5)
    return {1.0: "win", 0.5: "tie", 0.0: "loss"}[1 - worth if turned else worth]


POINTS = {"win": 1.0, "tie": 0.5, "loss": 0.0}


def figures(pair: tuple[str, str], found: Sequence[Sequence[str | None]]) -> dict[str, Any]:
    """Wins, ties and losses of a pair's first, its rate of wins with a 95 % interval, and how the judge judged.

    ``first_place`` is how often the judge preferred the answer that came first, of its verdicts that preferred one:
    half for one that does not look at the order.
    """
    scored = [sum(POINTS[v] for v in both if v) / 2 for both in found if None not in both]
    rate = paired(scored, [0.0] * len(scored)) if scored else {"mean": None, "low": None, "high": None}
    firsts = [(v == "win") != turned for both in found for turned, v in enumerate(both) if v in ("win", "loss")]
    return {
        "pair": list(pair), "prompts": len(found), "judged": len(scored),
        "wins": sum(s > 0.5 for s in scored), "ties": sum(s == 0.5 for s in scored),
        "losses": sum(s < 0.5 for s in scored), "rate": rate["mean"], "low": rate["low"], "high": rate["high"],
        "opposed": sum({"win", "loss"} == set(both) for both in found),
        "first_place": sum(firsts) / len(firsts) if firsts else None,
        "without_verdict": sum(v is None for both in found for v in both),
    }  # fmt: skip


def page(
    name: str, summary: Mapping[str, Any], asked: Sequence[JudgePrompt], answers: Mapping[str, Sequence[str]]
) -> str:
    """What a person reads: the figures, and answers side by side."""
    lines = [
        f"# {name}: answers before a judge", "",
        f"{summary['prompts']:,} prompts, each pair of answers in both orders, judged by {summary['judge']}. "
        "A tie, or two verdicts that contradict each other, counts half; the interval is of 95 %.", "",
        "| first | second | wins | ties | losses | rate of wins | contradicted itself | preferred what came first "
        "| without verdict |", "| --- | --- | ---: | ---: | ---: | --- | ---: | ---: | ---: |",
        *(_row(found) for found in summary["pairs"]), "", *_losses(summary["held_out_loss"]), "## Side by side", "",
    ]  # fmt: skip
    for i, one in enumerate(asked[:SHOWN]):
        lines += [f"**{i + 1}.** {_quoted(one.thread[-1]['content'])}", ""]
        lines += [line for who in answers for line in (f"- *{who}*: {_quoted(answers[who][i]) or '(nothing)'}", "")]
    return "\n".join(lines)


def _losses(found: Mapping[str, float]) -> list[str]:
    if not found:
        return []
    rows = (f"| {name} | {loss:.3f} |" for name, loss in found.items())
    return ["| model | -log p of a token of the answers in the file |", "| --- | ---: |", *rows, ""]


def _row(found: Mapping[str, Any]) -> str:
    first, second = found["pair"]
    rate, place = found["rate"], found["first_place"]
    interval = f" ({found['low']:.1%} to {found['high']:.1%})" if found["low"] is not None else ""
    cells = [
        first, second, found["wins"], found["ties"], found["losses"],
        "–" if rate is None else f"{rate:.1%}{interval}", found["opposed"], "–" if place is None else f"{place:.0%}",
        found["without_verdict"],
    ]  # fmt: skip
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def _quoted(text: str) -> str:
    """A text on one line, with nothing that Markdown or HTML would make something of."""
    flat = " ".join(text.split())[:600]
    return re.sub(r"([\\`*_\[\]<>#|])", r"\\\1", flat)
