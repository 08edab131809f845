"""What can be asked for: each mode gives waves of requests, is sent their outcomes, and ends with what it made.

A mode knows no server, no journal and no clock: the same outcomes make the same items, whatever order they came in.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

from tutelage.config import AnswerConfig, ConversationConfig, EvolveConfig, SelfInstructConfig
from tutelage.generation.answers import GenerationContext, RequestPlan, SelectedAnswer, answers
from tutelage.generation.checks import QualityChecks
from tutelage.generation.conversations import Conversation, GenerationOutput, RejectedConversation
from tutelage.generation.duplicates import NearDuplicateIndex
from tutelage.generation.prompts import PromptRow, named, rows_of, tasks_of
from tutelage.generation.requests import (
    UNASKED,
    ChatAnswer,
    FailedRequest,
    Message,
    Request,
    RequestParameters,
    canonical,
)
from tutelage.generation.scheduler import RequestBatch

NO_YIELD = 5
"""Rounds without a new instruction after which there will be none."""


def _add(
    made: GenerationOutput, name: str, instruction: str, thread: Sequence[Message],
    found: list[SelectedAnswer] | FailedRequest,
    keys: Sequence[str] = (), source: str = "",
) -> None:  # fmt: skip
    """Note an answered instruction, one item for each of its answers."""
    if isinstance(found, FailedRequest):
        made.without_answer(name, found, thread)
        return
    for number, choice in enumerate(found):
        made.items.append(
            Conversation(
                name if len(found) == 1 else f"{name}/{number}", name, instruction,
                [*thread, {"role": "assistant", "content": choice.answer.text}], [*keys, choice.answer.key],
                [choice.answer.finish], source, choice.score,
            )
        )  # fmt: skip


# Given prompts -------------------------------------------------------------------------------------------------


def _opened(kit: GenerationContext, given: str) -> tuple[list[str], list[str], list[list[Message]]]:
    """Names, instructions and first messages of a file of prompts."""
    rows = rows_of(given, "prompts")
    names = named(rows, given)
    threads = [kit.opening(row, f"{given}, row {i}") for i, row in enumerate(rows, 1)]
    return names, [_instruction(row, thread) for row, thread in zip(rows, threads, strict=True)], threads


def _instruction(row: PromptRow, thread: Sequence[Message]) -> str:
    for column in ("instruction", "prompt"):
        if isinstance(row.get(column), str):
            return str(row[column])
    return thread[-1]["content"]


def answer(kit: GenerationContext) -> RequestPlan[GenerationOutput]:
    """Answers to given prompts."""
    assert isinstance(kit.settings, AnswerConfig)
    made = GenerationOutput()
    names, instructions, threads = _opened(kit, kit.settings.prompts)
    found = yield from answers(kit, threads)
    for name, instruction, thread, choices in zip(names, instructions, threads, found, strict=True):
        _add(made, name, instruction, thread, choices, source=kit.settings.prompts)
    return made


# Self-instruct -------------------------------------------------------------------------------------------------

LISTED = re.compile(r"^\s*(?:\**\s*)?(?:task\s*)?\d+\s*[.):]\s*\**\s*(.*)$", re.IGNORECASE)
BULLET = re.compile(r"^\s*[-*•]\s+(.*)$")


def listed(text: str, *, cut: bool) -> list[str]:
    """The tasks of a numbered list, or the lines of one without numbers; without the last where the text was cut."""
    tasks: list[str] = []
    numbered = any(LISTED.match(line) for line in text.splitlines())
    for line in text.splitlines():
        match = LISTED.match(line) or (None if numbered else BULLET.match(line))
        if match:
            tasks.append(match.group(1).strip())
        elif numbered and tasks and line.strip():
            tasks[-1] += "\n" + line.strip()
        elif not numbered and line.strip():
            tasks.append(line.strip())
    if cut and tasks:
        tasks.pop()
    return [task.strip(' *"“”') for task in tasks if task.strip(' *"“”')]


def self_instruct(kit: GenerationContext) -> RequestPlan[GenerationOutput]:
    """New instructions in the manner of a few examples, round by round, and answers to them."""
    settings = kit.settings
    assert isinstance(settings, SelfInstructConfig)
    seeds = tasks_of(settings.seeds)
    template = kit.templates.add(("generate", "instruct"), settings.instruct, ("examples", "number"))
    manner = RequestParameters(settings.endpoint, settings.instruct_sampling)
    version = _version(manner, settings.instruct, seeds, settings.examples, settings.number, settings.seed)
    made, checks, near = (
        GenerationOutput(),
        QualityChecks(settings.quality),
        NearDuplicateIndex(settings.quality.dedup_threshold or 1.0),
    )
    for seed in seeds:
        near.add(seed)
    kept: list[tuple[str, str, str]] = []  # name, task, key
    idle = 0
    for number in range(settings.rounds):
        wanted = -(-2 * (settings.count - len(kept)) // settings.number)  # about half of what comes is new
        wave = []
        for i in range(min(settings.each_round, wanted)):
            examples = _examples(settings, seeds, [task for _, task, _ in kept], f"{settings.seed}/{number}/{i}")
            text = template({"examples": examples, "number": settings.number}, f"round {number}")
            wave.append(Request(manner, [{"role": "user", "content": text}], i, slot=f"tasks/{version}/{number}/{i}"))
        outcomes = yield RequestBatch(f"round {number + 1}, {len(kept)} of {settings.count} tasks", wave)
        before, ended = len(kept), False
        for i, outcome in enumerate(outcomes):
            name = f"{number}-{i}"
            if isinstance(outcome, FailedRequest):
                made.without_answer(name, outcome, wave[i].messages)
                ended = ended or outcome.reason == UNASKED
                continue
            for j, task in enumerate(listed(outcome.text, cut=outcome.finish == "length")):
                if len(kept) >= settings.count:
                    break
                reason = checks.instruction(task) or _known(near, task, seeds, kept)
                if reason is None:
                    kept.append((f"{name}-{j}", task, outcome.key))
                else:
                    said = [{"role": "user", "content": task}]
                    made.rejected.append(RejectedConversation(f"{name}-{j}", *reason, said, [outcome.key]))
        idle = 0 if len(kept) > before else idle + 1
        if len(kept) >= settings.count or ended or idle >= NO_YIELD:
            break
    threads = [kit.opening({"prompt": task, "instruction": task}, name) for name, task, _ in kept]
    found = yield from answers(kit, threads)
    for (name, task, key), thread, choices in zip(kept, threads, found, strict=True):
        _add(made, name, task, thread, choices, [key], "self-instruct")
    return made


def _version(*parts: Any) -> str:
    """A hash of what a round's requests are made of, but for what was kept before."""
    return hashlib.sha256(
        canonical([part.body if isinstance(part, RequestParameters) else part for part in parts])
    ).hexdigest()[:12]


def _examples(settings: SelfInstructConfig, seeds: Sequence[str], kept: Sequence[str], draw: str) -> list[str]:
    """Tasks to show, drawn by a name: one in four of those that were kept, the rest seeds."""
    dice = random.Random(draw)
    ours = dice.sample(kept, min(settings.examples // 4, len(kept)))
    shown = [*ours, *dice.sample(seeds, min(settings.examples - len(ours), len(seeds)))]
    dice.shuffle(shown)
    return shown


def _known(
    near: NearDuplicateIndex, task: str, seeds: Sequence[str], kept: Sequence[tuple[str, str, str]]
) -> tuple[str, str] | None:
    """Whether a task is near to a seed or to one that was kept; else it is kept from now on."""
    found = near.add_if_new(task)
    if found is None:
        return None
    kind = "duplicate" if near.same(found, task) else "near duplicate"
    return kind, f"of seed {found}" if found < len(seeds) else f"of {kept[found - len(seeds)][0]}"


# Evolution -----------------------------------------------------------------------------------------------------

ECHO = re.compile(r"\b(?:re-?written|given|original|new|evolved)\s+(?:task|prompt|instruction)\b", re.IGNORECASE)
LABEL = re.compile(r"^\s*\**(?:re-?written|new|evolved)?\s*(?:task|prompt|instruction)\**\s*:\**\s*", re.IGNORECASE)


def evolve(kit: GenerationContext) -> RequestPlan[GenerationOutput]:
    """Instructions that get harder or branch off, round by round, and answers to all of them."""
    settings = kit.settings
    assert isinstance(settings, EvolveConfig)
    tasks = tasks_of(settings.prompts)
    rules = {
        name: kit.templates.add(("generate", "operations", name), text, ("instruction",))
        for name, text in settings.operations.items()
    }
    manner = RequestParameters(settings.endpoint, settings.evolve_sampling)
    version = _version(manner, settings.operations, tasks, settings.seed)
    made, checks = GenerationOutput(), QualityChecks(settings.quality)
    all_tasks = [(str(i), task, "", "given") for i, task in enumerate(tasks)]  # name, task, key, source
    stands = [(task, str(i)) for i, task in enumerate(tasks)]
    for number in range(settings.rounds):
        wave, drawn = [], []
        for i, (task, _) in enumerate(stands):
            operation = random.Random(f"{settings.seed}/{number}/{i}").choice(list(rules))
            text = rules[operation]({"instruction": task}, f"task {i}")
            slot = f"evolved/{version}/{number}/{i}"
            wave.append(Request(manner, [{"role": "user", "content": text}], number, slot=slot))
            drawn.append(operation)
        outcomes = yield RequestBatch(f"evolving, round {number + 1} of {settings.rounds}", wave)
        for i, outcome in enumerate(outcomes):
            name = f"{i}-{number + 1}"
            if isinstance(outcome, FailedRequest):
                made.without_answer(name, outcome, wave[i].messages)
                continue
            task = LABEL.sub("", outcome.text.strip()).strip().strip('"“”').strip()
            reason = _failed(task, stands[i][0], outcome, checks)
            if reason is not None:  # the task stands, and is tried again
                said = [{"role": "user", "content": task}]
                made.rejected.append(RejectedConversation(name, *reason, said, [outcome.key]))
                continue
            all_tasks.append((name, task, outcome.key, f"{drawn[i]} of {stands[i][1]}"))
            stands[i] = (task, name)
    threads = [kit.opening({"prompt": task, "instruction": task}, name) for name, task, _, _ in all_tasks]
    found = yield from answers(kit, threads)
    for (name, task, key, source), thread, choices in zip(all_tasks, threads, found, strict=True):
        _add(made, name, task, thread, choices, [key] if key else [], source)
    return made


def _failed(task: str, before: str, outcome: ChatAnswer, checks: QualityChecks) -> tuple[str, str] | None:
    """Why an evolution is none."""
    if outcome.finish == "length":
        return "truncated", "the task ran into max_tokens"
    if found := ECHO.search(task):
        return "failed evolution", f"it speaks of the {found.group().lower()}"
    again = NearDuplicateIndex(0.95)
    again.add(before)
    if again.like(task) is not None:
        return "failed evolution", "it is what it was"
    return checks.instruction(task)


# Conversations -------------------------------------------------------------------------------------------------

SPEAKER = re.compile(r"^\s*\**user\**\s*:\**\s*", re.IGNORECASE)


def conversation(kit: GenerationContext) -> RequestPlan[GenerationOutput]:
    """Conversations in which the teacher also speaks for the user."""
    settings = kit.settings
    assert isinstance(settings, ConversationConfig)
    template = kit.templates.add(("generate", "follow_up"), settings.follow_up, ("messages",))
    manner = RequestParameters(settings.endpoint, settings.follow_up_sampling)
    made = GenerationOutput()
    names, instructions, threads = _opened(kit, settings.prompts)
    items = [
        Conversation(name, name, instruction, list(thread), [], [], settings.prompts)
        for name, instruction, thread in zip(names, instructions, threads, strict=True)
    ]
    going = items
    for turn in range(settings.turns):
        found = yield from answers(kit, [item.messages for item in going], f"turn {turn + 1} of {settings.turns}")
        answered = []
        for item, choices in zip(going, found, strict=True):
            if isinstance(choices, FailedRequest):
                made.without_answer(item.name, choices, item.messages)
                continue
            item.messages.append({"role": "assistant", "content": choices[0].answer.text})
            item.keys.append(choices[0].answer.key)
            item.finishes.append(choices[0].answer.finish)
            item.score = choices[0].score
            answered.append(item)
        if turn == settings.turns - 1:
            made.items = answered
            break
        wave = []
        for item in answered:
            said = [message for message in item.messages if message["role"] != "system"]
            text = template({"messages": said}, item.name)
            wave.append(Request(manner, [{"role": "user", "content": text}]))
        outcomes = yield RequestBatch(f"what users say next, {turn + 1} of {settings.turns - 1}", wave)
        going = []
        for item, outcome in zip(answered, outcomes, strict=True):
            if isinstance(outcome, FailedRequest):
                made.without_answer(item.name, outcome, item.messages)
                continue
            item.messages.append({"role": "user", "content": SPEAKER.sub("", outcome.text).strip()})
            item.keys.append(outcome.key)
            going.append(item)
    return made


STRATEGIES: dict[str, Callable[[GenerationContext], RequestPlan[GenerationOutput]]] = {
    "answer": answer,
    "conversation": conversation,
    "evolve": evolve,
    "self-instruct": self_instruct,
}
"""Every mode, by the ``kind`` of the recipe's section."""
