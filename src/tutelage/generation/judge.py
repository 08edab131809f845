"""``tutelage judge``: a model compares the answers of several models, each pair in both orders."""

import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from tutelage.config import GIVEN, EndpointRecipe, JudgeConfig, dump_recipe, load_endpoint_recipe
from tutelage.errors import BudgetSpent, DataError, RunDirectoryError, require
from tutelage.evaluation.statistics import paired_difference
from tutelage.files import write_text
from tutelage.generation.answers import RequestPlan
from tutelage.generation.output import render
from tutelage.generation.prompts import PromptRow, PromptTemplate, PromptTemplates, read_rows
from tutelage.generation.request_loop import open_journal, run_plan, usage_summary
from tutelage.generation.requests import ChatAnswer, Message, Outcome, Request, RequestParameters
from tutelage.generation.scheduler import RequestBatch
from tutelage.progress import Terminal

EXAMPLES = 12
"""Prompts whose answers ``README.md`` shows side by side."""

EXAMPLES_ON_PAGE = 40
"""Prompts whose answers the page of a run shows side by side."""

POINTS = {"win": 1.0, "tie": 0.5, "loss": 0.0}

PairVerdicts = dict[tuple[str, str], list[list[str | None]]]
"""Verdicts on the first model of each pair, for each prompt and both orders: ``win``, ``loss``, ``tie``, or ``None``
if the judge's answer contains no verdict."""


class JudgementResult(NamedTuple):
    """The result of a judgement.

    Args:
        path: its folder: ``answers.jsonl``, ``README.md``, ``journal.sqlite``, ``summary.json``, ``judged.json``.
        summary: the content of ``summary.json``.
        runs: the runs whose students were judged; each has a copy of ``judged.json``, for its page.
    """

    path: Path
    summary: dict[str, Any]
    runs: list[Path]


class JudgePrompt(NamedTuple):
    """A prompt: the messages before the answer, and the answer in the file, if any."""

    thread: list[Message]
    answer: str | None


def judge_answers(
    recipe: EndpointRecipe | str | Path,
    overrides: Iterable[str] = (),
    *,
    out: str | Path | None = None,
    terminal: Terminal | None = None,
) -> JudgementResult:
    """Generate answers of several models, and compare them with a judge (`tutelage judge`).

    A model wins a pair if the judge prefers its answer in both orders, or in one with a tie in the other; otherwise
    the pair is a tie. The win rate counts a tie as half.

    Args:
        recipe: the path of a YAML file, or a loaded one.
        overrides: ``key=value``, for a path.
        out: the folder. Default: ``runs/NAME-judge``.
        terminal: shows the progress.

    Raises:
        BudgetSpent: the budget is too small; the same call continues once it is raised.
        Interrupted: the user asked to stop; every verdict is in the journal.
        TutelageError: one of its other subclasses, with the remedy.
    """
    require("httpx2", "generate", "comparing answers with a judge")
    loaded = recipe
    if not isinstance(loaded, EndpointRecipe):
        loaded = load_endpoint_recipe(loaded, overrides, "judge")
    settings, terminal = loaded.judge, terminal or Terminal()
    assert settings is not None
    path = Path(out) if out is not None else Path("runs") / f"{loaded.name}-judge"
    template = PromptTemplates(loaded.where).add(
        ("judge", "template"), settings.template, ("prompt", "first", "second")
    )
    prompts = read_prompts(settings)
    start = time.monotonic()
    with closing(open_journal(path, {"recipe": loaded.name, "judge": settings.endpoint.model})) as journal:
        write_text(path / "config.yaml", dump_recipe(EndpointRecipe(name=loaded.name, judge=settings)))
        answers, losses = _generate_answers(settings, prompts, terminal)
        plan = _compare(settings, template, prompts, answers)
        first = next(plan)
        verdicts, scheduler = run_plan(plan, first, journal, {"judge": settings.endpoint}, settings.budget, terminal)
        if scheduler.exceeded is not None:
            raise BudgetSpent(scheduler.exceeded, remedy="raise the budget and run the same command again")
        summary = {
            "prompts": len(prompts), "judge": settings.endpoint.model, "held_out_loss": losses,
            "pairs": [pair_figures(pair, both) for pair, both in verdicts.items()],
            "spent": usage_summary(journal, settings.budget), "calls": scheduler.calls,
            "seconds": round(time.monotonic() - start, 3),
        }  # fmt: skip
        samples = [
            {
                "messages": prompt.thread, "answers": {name: texts[i] for name, texts in answers.items()},
                "verdicts": {" / ".join(pair): both[i] for pair, both in verdicts.items()},
            }
            for i, prompt in enumerate(prompts)
        ]  # fmt: skip
        write_text(path / "answers.jsonl", "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in samples))
        runs = _write_page_data(path, loaded.name, settings, summary, samples, terminal)
        examples = [(one["messages"], one["answers"]) for one in samples[:EXAMPLES]]
        write_text(
            path / "README.md", render("judgement.md.jinja", name=loaded.name, summary=summary, examples=examples)
        )
        write_text(path / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    return JudgementResult(path, summary, runs)


def _generate_answers(
    settings: JudgeConfig, prompts: Sequence[JudgePrompt], terminal: Terminal
) -> tuple[dict[str, list[str]], dict[str, float]]:
    """The answers of each model; if every prompt of the file has an answer, also the model's loss on these."""
    from tutelage.generation.chat_model import ChatModel  # imports torch, which `generate` does not need

    threads, given = [one.thread for one in prompts], [one.answer for one in prompts if one.answer is not None]
    answers: dict[str, list[str]] = {}
    losses: dict[str, float] = {}
    for name, model in settings.answers.items():
        if model == GIVEN:
            answers[name] = given
            continue
        chat_model = ChatModel(model)
        answers[name] = chat_model.generate(threads, settings.max_tokens, terminal)
        if len(given) == len(threads):
            losses[name] = chat_model.loss(threads, given)
    return answers, losses


def _write_page_data(
    path: Path, name: str, settings: JudgeConfig, summary: Mapping[str, Any], samples: Sequence[Any],
    terminal: Terminal,
) -> list[Path]:  # fmt: skip
    """Write ``judged.json`` here and into the runs whose students were judged; returns these runs."""
    from tutelage.engine import RunDirectory  # imports torch, as the models did

    run_of = {model_name: find_run(model) for model_name, model in settings.answers.items()}
    roles = {
        model_name: "teacher" if model == GIVEN else "baseline" if run_of[model_name] is None else "distilled"
        for model_name, model in settings.answers.items()
    }
    data = {
        "name": name, "roles": roles, **{k: summary[k] for k in ("judge", "prompts", "held_out_loss", "pairs")},
        "samples": samples[:EXAMPLES_ON_PAGE],
    }  # fmt: skip
    text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
    write_text(path / "judged.json", text)
    runs = []
    for run in dict.fromkeys(run for run in run_of.values() if run is not None):
        try:
            write_text(RunDirectory(run).json_file("judged", path.resolve().name), text)
        except RunDirectoryError as error:
            terminal.say(f"note: the page of {run} does not show this judgement: {error.what}")
            continue
        runs.append(run)
    return runs


def find_run(model: str) -> Path | None:
    """The run directory that contains a model, as in ``hf:runs/mine/student``."""
    folder = Path(model.partition(":")[2])
    if model == GIVEN or not folder.is_dir():
        return None
    near = [folder, *folder.parents][:3]
    return next((p for p in near if (p / "summary.json").exists() and (p / "metrics.jsonl").exists()), None)


def read_prompts(settings: JudgeConfig) -> list[JudgePrompt]:
    """The first prompts of the file; raises :class:`DataError` for a row without a prompt or a needed answer."""
    prompts = []
    for number, row in enumerate(read_rows(settings.prompts, "prompts")[: settings.count], 1):
        where = f"{settings.prompts}, row {number}"
        prompt = _parse_prompt(row, where)
        if prompt.answer is None and GIVEN in settings.answers.values():
            raise DataError(
                "the row has no answer", where=where,
                remedy="add it as the last message or as column 'answer', or remove 'given' from judge.answers",
            )  # fmt: skip
        prompts.append(prompt)
    return prompts


def _parse_prompt(row: PromptRow, where: str) -> JudgePrompt:
    messages = row.get("messages")
    if messages is None:
        prompt, answer = row.get("instruction", row.get("prompt")), row.get("answer")
        if not isinstance(prompt, str) or not prompt.strip():
            raise DataError(
                "the row has no prompt", where=where, remedy="give a column 'messages', 'prompt' or 'instruction'"
            )
        return JudgePrompt([{"role": "user", "content": prompt}], answer if isinstance(answer, str) else None)
    thread: list[Message] = [{"role": str(m["role"]), "content": str(m["content"])} for m in messages]
    answer = thread.pop()["content"] if thread and thread[-1]["role"] == "assistant" else None
    if not thread or thread[-1]["role"] != "user":
        raise DataError(
            "the messages do not end with a user message and an optional answer of the assistant", where=where,
            remedy="add the user's last message, or remove the row",
        )  # fmt: skip
    return JudgePrompt(thread, answer)


def _compare(
    settings: JudgeConfig, template: PromptTemplate, prompts: Sequence[JudgePrompt],
    answers: Mapping[str, Sequence[str]],
) -> RequestPlan[PairVerdicts]:  # fmt: skip
    parameters = RequestParameters(settings.endpoint, settings.sampling, role="judge")
    pairs = list(combinations(settings.answers, 2))
    requests = []
    for one, other in pairs:
        for i, (thread, _) in enumerate(prompts):
            single = len(thread) == 1
            prompt = "\n\n".join(m["content"] if single else f"{m['role']}: {m['content']}" for m in thread)
            for first, second in ((answers[one][i], answers[other][i]), (answers[other][i], answers[one][i])):
                text = template({"prompt": prompt, "first": first, "second": second}, f"prompt {i + 1}")
                requests.append(Request(parameters, [{"role": "user", "content": text}]))
    outcomes = iter((yield RequestBatch("judging", requests)))
    pattern = re.compile(settings.choice)
    return {
        pair: [[_verdict(next(outcomes), pattern, swapped=swapped) for swapped in (False, True)] for _ in prompts]
        for pair in pairs
    }


def _verdict(outcome: Outcome, pattern: re.Pattern[str], *, swapped: bool) -> str | None:
    match = pattern.search(outcome.text) if isinstance(outcome, ChatAnswer) else None
    if match is None:
        return None
    verdicts = {"A": "loss" if swapped else "win", "B": "win" if swapped else "loss"}
    return verdicts.get(match.group(1).upper(), "tie")


def pair_figures(pair: tuple[str, str], verdicts: Sequence[Sequence[str | None]]) -> dict[str, Any]:
    """Wins, ties, losses and win rate (with a 95 % interval) of a pair's first model, and properties of the judge.

    ``first_place`` is the share of verdicts (without ties) that prefer the first answer of the request. It is about
    0.5 for a judge that ignores the order. ``opposed`` counts prompts with contradictory verdicts.
    """
    scores = [sum(POINTS[v] for v in both if v) / 2 for both in verdicts if None not in both]
    rate = paired_difference(scores, [0.0] * len(scores)) if scores else {"mean": None, "low": None, "high": None}
    first = [(v == "win") != swapped for both in verdicts for swapped, v in enumerate(both) if v in ("win", "loss")]
    return {
        "pair": list(pair), "prompts": len(verdicts), "judged": len(scores),
        "wins": sum(s > 0.5 for s in scores), "ties": sum(s == 0.5 for s in scores),
        "losses": sum(s < 0.5 for s in scores), "rate": rate["mean"], "low": rate["low"], "high": rate["high"],
        "opposed": sum({"win", "loss"} == set(both) for both in verdicts),
        "first_place": sum(first) / len(first) if first else None,
        "without_verdict": sum(v is None for both in verdicts for v in both),
    }  # fmt: skip
