"""Strategies of generation: each yields request batches, receives their outcomes, and returns conversations.

A strategy uses no server, no journal and no clock: the same outcomes give the same conversations, and the order in
which they arrive does not matter.
"""

import hashlib
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

from tutelage.config import AnswerConfig, ConversationConfig, EvolveConfig, SelfInstructConfig
from tutelage.generation.answers import (
    Conversation,
    GenerationContext,
    GenerationOutput,
    RequestPlan,
    Selection,
    request_answers,
)
from tutelage.generation.checks import QualityChecks
from tutelage.generation.duplicates import NearDuplicateIndex
from tutelage.generation.prompts import read_rows, read_tasks, row_names
from tutelage.generation.requests import (
    NOT_SENT,
    ChatAnswer,
    FailedRequest,
    Message,
    Request,
    RequestParameters,
    canonical_json,
)
from tutelage.generation.scheduler import RequestBatch

MAX_IDLE_ROUNDS = 5
"""Rounds without a new instruction after which self-instruct ends."""


def _user(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def _add(
    output: GenerationOutput, name: str, instruction: str, thread: Sequence[Message], selection: Selection,
    keys: Sequence[str] = (), source: str = "",
) -> None:  # fmt: skip
    if isinstance(selection, FailedRequest):
        output.add_failure(name, selection, thread)
        return
    for number, (answer, score) in enumerate(selection):
        output.conversations.append(
            Conversation(
                name if len(selection) == 1 else f"{name}/{number}", name, instruction,
                [*thread, {"role": "assistant", "content": answer.text}], [*keys, answer.key], [answer.finish],
                source, score,
            )
        )  # fmt: skip


def _read_prompts(context: GenerationContext, path: str) -> list[tuple[str, str, list[Message]]]:
    """Name, instruction and first messages of each prompt of a file."""
    rows = read_rows(path, "prompts")
    names = row_names(rows, path)
    threads = [context.first_messages(row, f"{path}, row {i}") for i, row in enumerate(rows, 1)]
    prompts = []
    for name, row, thread in zip(names, rows, threads, strict=True):
        columns = (row.get("instruction"), row.get("prompt"))
        instruction = next((text for text in columns if isinstance(text, str)), thread[-1]["content"])
        prompts.append((name, instruction, thread))
    return prompts


def answer(context: GenerationContext) -> RequestPlan[GenerationOutput]:
    """Answers to given prompts."""
    assert isinstance(context.settings, AnswerConfig)
    output, path = GenerationOutput(), context.settings.prompts
    prompts = _read_prompts(context, path)
    selections = yield from request_answers(context, [thread for *_, thread in prompts])
    for (name, instruction, thread), selection in zip(prompts, selections, strict=True):
        _add(output, name, instruction, thread, selection, source=path)
    return output


NUMBERED = re.compile(r"^\s*(?:\**\s*)?(?:task\s*)?\d+\s*[.):]\s*\**\s*(.*)$", re.IGNORECASE)
BULLET = re.compile(r"^\s*[-*•]\s+(.*)$")


def parse_list(text: str, *, is_cut: bool) -> list[str]:
    """The items of a numbered list, else the lines of a text; without the last one if the text was cut."""
    tasks: list[str] = []
    is_numbered = any(NUMBERED.match(line) for line in text.splitlines())
    for line in text.splitlines():
        match = NUMBERED.match(line) or (None if is_numbered else BULLET.match(line))
        if match:
            tasks.append(match.group(1).strip())
        elif is_numbered and tasks and line.strip():
            tasks[-1] += "\n" + line.strip()
        elif not is_numbered and line.strip():
            tasks.append(line.strip())
    if is_cut and tasks:
        tasks.pop()
    return [stripped for task in tasks if (stripped := task.strip(' *"“”'))]


def self_instruct(context: GenerationContext) -> RequestPlan[GenerationOutput]:
    """New instructions that resemble a few examples, round by round, and answers to them (Wang et al., 2023)."""
    settings = context.settings
    assert isinstance(settings, SelfInstructConfig)
    seeds = read_tasks(settings.seeds)
    template = context.templates.add(("generate", "instruct"), settings.instruct, ("examples", "number"))
    parameters = RequestParameters(settings.endpoint, settings.instruct_sampling)
    version = _version(parameters, settings.instruct, seeds, settings.examples, settings.number, settings.seed)
    output, checks = GenerationOutput(), QualityChecks(settings.quality)
    index = NearDuplicateIndex(settings.quality.dedup_threshold or 1.0)
    for seed in seeds:
        index.add(seed)
    tasks: list[tuple[str, str, str]] = []  # name, task, key
    idle = 0
    for number in range(settings.rounds):
        useful = -(-2 * (settings.count - len(tasks)) // settings.number)  # about half of the tasks are new
        requests = []
        for i in range(min(settings.each_round, useful)):
            examples = _draw_examples(
                settings, seeds, [task for _, task, _ in tasks], f"{settings.seed}/{number}/{i}"
            )
            text = template({"examples": examples, "number": settings.number}, f"round {number}")
            requests.append(Request(parameters, _user(text), i, slot=f"tasks/{version}/{number}/{i}"))
        outcomes = yield RequestBatch(f"round {number + 1}, {len(tasks)} of {settings.count} tasks", requests)
        before, is_ended = len(tasks), False
        for i, outcome in enumerate(outcomes):
            name = f"{number}-{i}"
            if isinstance(outcome, FailedRequest):
                output.add_failure(name, outcome, requests[i].messages)
                is_ended = is_ended or outcome.reason == NOT_SENT
                continue
            for j, task in enumerate(parse_list(outcome.text, is_cut=outcome.finish == "length")):
                if len(tasks) >= settings.count:
                    break
                reason = checks.check_instruction(task) or _check_new(index, task, seeds, tasks)
                if reason is None:
                    tasks.append((f"{name}-{j}", task, outcome.key))
                else:
                    output.reject(f"{name}-{j}", reason, _user(task), outcome.key)
        idle = 0 if len(tasks) > before else idle + 1
        if len(tasks) >= settings.count or is_ended or idle >= MAX_IDLE_ROUNDS:
            break
    sources = [(name, task, [key], "self-instruct") for name, task, key in tasks]
    yield from _answer_tasks(context, output, sources)
    return output


def _answer_tasks(
    context: GenerationContext, output: GenerationOutput, tasks: Sequence[tuple[str, str, list[str], str]]
) -> RequestPlan[None]:
    """Add answers to tasks, each with its name, text, keys and source."""
    threads = [context.first_messages({"prompt": task, "instruction": task}, name) for name, task, *_ in tasks]
    selections = yield from request_answers(context, threads)
    for (name, task, keys, source), thread, selection in zip(tasks, threads, selections, strict=True):
        _add(output, name, task, thread, selection, keys, source)


def _version(*parts: Any) -> str:
    """A hash of all that determines a round's requests, except the tasks of earlier rounds."""
    values = [part.body if isinstance(part, RequestParameters) else part for part in parts]
    return hashlib.sha256(canonical_json(values)).hexdigest()[:12]


def _draw_examples(
    settings: SelfInstructConfig, seeds: Sequence[str], tasks: Sequence[str], random_seed: str
) -> list[str]:
    """Example tasks: one in four from the new tasks, the others from the seeds."""
    generator = random.Random(random_seed)
    new = generator.sample(tasks, min(settings.examples // 4, len(tasks)))
    examples = [*new, *generator.sample(seeds, min(settings.examples - len(new), len(seeds)))]
    generator.shuffle(examples)
    return examples


def _check_new(
    index: NearDuplicateIndex, task: str, seeds: Sequence[str], tasks: Sequence[tuple[str, str, str]]
) -> tuple[str, str] | None:
    """Why a task is a duplicate of a seed or of an earlier task; a new one is added to the index."""
    number = index.add_if_new(task)
    if number is None:
        return None
    kind = "duplicate" if index.is_same(number, task) else "near duplicate"
    return kind, f"of seed {number}" if number < len(seeds) else f"of {tasks[number - len(seeds)][0]}"


ECHO = re.compile(r"\b(?:re-?written|given|original|new|evolved)\s+(?:task|prompt|instruction)\b", re.IGNORECASE)
LABEL = re.compile(r"^\s*\**(?:re-?written|new|evolved)?\s*(?:task|prompt|instruction)\**\s*:\**\s*", re.IGNORECASE)


def evolve(context: GenerationContext) -> RequestPlan[GenerationOutput]:
    """Instructions that get harder or change the topic, round by round, with answers to all (Xu et al., 2024)."""
    settings = context.settings
    assert isinstance(settings, EvolveConfig)
    seeds = read_tasks(settings.prompts)
    operations = {
        name: context.templates.add(("generate", "operations", name), text, ("instruction",))
        for name, text in settings.operations.items()
    }
    parameters = RequestParameters(settings.endpoint, settings.evolve_sampling)
    version = _version(parameters, settings.operations, seeds, settings.seed)
    output, checks = GenerationOutput(), QualityChecks(settings.quality)
    tasks: list[tuple[str, str, list[str], str]] = [(str(i), task, [], "given") for i, task in enumerate(seeds)]
    latest = [(task, str(i)) for i, task in enumerate(seeds)]
    for number in range(settings.rounds):
        requests, chosen = [], []
        for i, (task, _) in enumerate(latest):
            operation = random.Random(f"{settings.seed}/{number}/{i}").choice(list(operations))
            text = operations[operation]({"instruction": task}, f"task {i}")
            requests.append(Request(parameters, _user(text), number, slot=f"evolved/{version}/{number}/{i}"))
            chosen.append(operation)
        outcomes = yield RequestBatch(f"evolving, round {number + 1} of {settings.rounds}", requests)
        for i, outcome in enumerate(outcomes):
            name = f"{i}-{number + 1}"
            if isinstance(outcome, FailedRequest):
                output.add_failure(name, outcome, requests[i].messages)
                continue
            task = LABEL.sub("", outcome.text.strip()).strip().strip('"“”').strip()
            before, source = latest[i]
            reason = _check_evolved(task, before, outcome, checks)
            if reason is not None:  # the task stays, and the next round evolves it again
                output.reject(name, reason, _user(task), outcome.key)
                continue
            tasks.append((name, task, [outcome.key], f"{chosen[i]} of {source}"))
            latest[i] = (task, name)
    yield from _answer_tasks(context, output, tasks)
    return output


def _check_evolved(task: str, before: str, outcome: ChatAnswer, checks: QualityChecks) -> tuple[str, str] | None:
    if outcome.finish == "length":
        return "truncated", "the task was cut at max_tokens"
    if echo := ECHO.search(task):
        return "failed evolution", f"it mentions the {echo.group().lower()}"
    index = NearDuplicateIndex(0.95)
    index.add(before)
    if index.add_if_new(task) is not None:
        return "failed evolution", "the task did not change"
    return checks.check_instruction(task)


SPEAKER = re.compile(r"^\s*\**user\**\s*:\**\s*", re.IGNORECASE)


def conversation(context: GenerationContext) -> RequestPlan[GenerationOutput]:
    """Conversations of several turns, in which the teacher also writes the user's messages."""
    settings = context.settings
    assert isinstance(settings, ConversationConfig)
    template = context.templates.add(("generate", "follow_up"), settings.follow_up, ("messages",))
    parameters = RequestParameters(settings.endpoint, settings.follow_up_sampling)
    output = GenerationOutput()
    active = [
        Conversation(name, name, instruction, list(thread), [], [], settings.prompts)
        for name, instruction, thread in _read_prompts(context, settings.prompts)
    ]
    for turn in range(settings.turns):
        threads = [one.messages for one in active]
        selections = yield from request_answers(context, threads, f"turn {turn + 1} of {settings.turns}")
        answered = []
        for one, selection in zip(active, selections, strict=True):
            if isinstance(selection, FailedRequest):
                output.add_failure(one.name, selection, one.messages)
                continue
            reply, one.score = selection[0]
            one.messages.append({"role": "assistant", "content": reply.text})
            one.keys.append(reply.key)
            one.finishes.append(reply.finish)
            answered.append(one)
        if turn == settings.turns - 1:
            output.conversations = answered
            break
        requests = []
        for one in answered:
            dialogue = [message for message in one.messages if message["role"] != "system"]
            requests.append(Request(parameters, _user(template({"messages": dialogue}, one.name))))
        outcomes = yield RequestBatch(f"user messages, {turn + 1} of {settings.turns - 1}", requests)
        active = []
        for one, outcome in zip(answered, outcomes, strict=True):
            if isinstance(outcome, FailedRequest):
                output.add_failure(one.name, outcome, one.messages)
                continue
            one.messages.append({"role": "user", "content": SPEAKER.sub("", outcome.text).strip()})
            one.keys.append(outcome.key)
            active.append(one)
    return output


STRATEGIES: dict[str, Callable[[GenerationContext], RequestPlan[GenerationOutput]]] = {
    "answer": answer,
    "conversation": conversation,
    "evolve": evolve,
    "self-instruct": self_instruct,
}
"""Strategies by the ``kind`` of the recipe's section."""
