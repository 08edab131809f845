"""Conversations that a generation makes: the answers to them, and the choice among several samples."""

import re
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from tutelage.config import BestConfig, Generations
from tutelage.generation.duplicates import words
from tutelage.generation.prompts import PromptTemplate, PromptTemplates
from tutelage.generation.requests import (
    NOT_SENT,
    ChatAnswer,
    FailedRequest,
    Message,
    Outcome,
    Request,
    RequestParameters,
)
from tutelage.generation.scheduler import RequestBatch

T = TypeVar("T")
RequestPlan = Generator[RequestBatch, list[Outcome], T]
"""Yields request batches, receives their outcomes, and returns a result. It uses no server and no journal."""


@dataclass
class Conversation:
    """A conversation that may go into the data.

    Attributes:
        prompt: name of the prompt that it answers; several answers share one.
        instruction: the request without the template around it.
        keys: of its answers in the journal.
        finishes: the ``finish_reason`` of each of the assistant's messages.
    """

    name: str
    prompt: str
    instruction: str
    messages: list[Message]
    keys: list[str]
    finishes: list[str | None]
    source: str = ""
    score: float | None = None

    @property
    def answers(self) -> list[str]:
        """The assistant's messages."""
        return [message["content"] for message in self.messages if message["role"] == "assistant"]


class RejectedConversation(NamedTuple):
    """A conversation or instruction that does not go into the data, and why."""

    name: str
    reason: str
    detail: str
    messages: Sequence[Message]
    keys: Sequence[str]


@dataclass
class GenerationOutput:
    """The result of a strategy; ``not_sent`` counts the requests that were not sent before the run ended."""

    conversations: list[Conversation] = field(default_factory=list)
    rejected: list[RejectedConversation] = field(default_factory=list)
    not_sent: int = 0

    def add_failure(self, name: str, failure: FailedRequest, messages: Sequence[Message]) -> None:
        """Add a conversation without an answer."""
        if failure.reason == NOT_SENT:
            self.not_sent += 1
        else:
            self.reject(name, (failure.reason, failure.detail), messages, failure.key)

    def reject(self, name: str, reason: tuple[str, str], messages: Sequence[Message], key: str) -> None:
        """Add a conversation that is rejected; the reason is a short category and a detail."""
        self.rejected.append(RejectedConversation(name, *reason, messages, [key]))


class SelectedAnswer(NamedTuple):
    """An answer that is used, and its score if the answers are scored."""

    answer: ChatAnswer
    score: float | None = None


Selection = list[SelectedAnswer] | FailedRequest
"""The answers to one conversation, or the reason why it has none."""


@dataclass
class GenerationContext:
    """What all strategies use: the recipe's section, its templates, and the parameters of teacher and judge."""

    settings: Generations
    templates: PromptTemplates
    parameters: RequestParameters
    judge: RequestParameters | None
    judge_template: PromptTemplate | None
    system: PromptTemplate | None
    user: PromptTemplate

    def first_messages(self, values: dict[str, Any], what: str) -> list[Message]:
        """The system and user message of a conversation; ``what`` names the values in error messages."""
        system = [] if self.system is None else [{"role": "system", "content": self.system(values, what)}]
        return [*system, {"role": "user", "content": self.user(values, what)}]


def request_answers(
    context: GenerationContext, threads: Sequence[Sequence[Message]], name: str = "answers"
) -> RequestPlan[list[Selection]]:
    """The answers to conversations that end with a user message: for each all samples, or the best one."""
    samples, best = context.settings.samples, context.settings.best
    requests = [Request(context.parameters, thread, sample) for thread in threads for sample in range(samples)]
    outcomes = yield RequestBatch(name, requests)
    candidates: list[list[ChatAnswer] | FailedRequest] = []
    for i in range(0, len(outcomes), samples):
        group = outcomes[i : i + samples]
        valid = [outcome for outcome in group if isinstance(outcome, ChatAnswer)]
        candidates.append(valid or next(outcome for outcome in group if isinstance(outcome, FailedRequest)))
    if best is not None and best.by == "judge":
        return (yield from _select_by_judge(context, best, threads, candidates))
    return [c if isinstance(c, FailedRequest) else _select(c, best) for c in candidates]


def _select_by_judge(
    context: GenerationContext, best: BestConfig, threads: Sequence[Sequence[Message]],
    candidates: Sequence[list[ChatAnswer] | FailedRequest],
) -> RequestPlan[list[Selection]]:  # fmt: skip
    """The answer with the judge's highest score; the first one if scores are equal."""
    assert context.judge is not None
    assert context.judge_template is not None
    requests = []
    for number, (thread, group) in enumerate(zip(threads, candidates, strict=True)):
        for answer in [] if isinstance(group, FailedRequest) else group:
            values = {"prompt": thread[-1]["content"], "answer": answer.text}
            text = context.judge_template(values, f"the judge's prompt of item {number}")
            requests.append(Request(context.judge, [{"role": "user", "content": text}]))
    outcomes = iter((yield RequestBatch("judging", requests)))
    selections: list[Selection] = []
    for group in candidates:
        if isinstance(group, FailedRequest):
            selections.append(group)
            continue
        scored, unscored = [], []
        for answer in group:
            score = _score(next(outcomes), re.compile(best.score))
            scored += [] if isinstance(score, FailedRequest) else [SelectedAnswer(answer, score)]
            unscored += [score] if isinstance(score, FailedRequest) else []
        selections.append([max(scored, key=lambda one: one.score or 0.0)] if scored else unscored[0])
    return selections


def _score(outcome: Outcome, pattern: re.Pattern[str]) -> float | FailedRequest:
    if isinstance(outcome, FailedRequest):
        return outcome
    match = pattern.search(outcome.text)
    if match is None:
        return FailedRequest(outcome.key, "no score", outcome.text[:100])
    try:
        return float(match.group(1))
    except ValueError:
        return 0.0


def _select(group: Sequence[ChatAnswer], best: BestConfig | None) -> Selection:
    """All answers, the first one with the most frequent result (self-consistency, Wang et al., 2023), or the one with
    the highest mean ROUGE-L to all answers."""
    if best is None:
        return [SelectedAnswer(answer) for answer in group]
    if best.extract is None:
        from rapidfuzz import process
        from rapidfuzz.distance import Indel

        texts = [words(answer.text) for answer in group]
        similarity = process.cdist(texts, texts, scorer=Indel.normalized_similarity)
        return [SelectedAnswer(group[int(similarity.mean(axis=1).argmax())])]
    matches = [list(re.finditer(best.extract, answer.text)) for answer in group]
    results = [of_one[-1].group(1).strip().lower() if of_one else None for of_one in matches]
    counts = Counter(result for result in results if result is not None)
    if not counts:
        return FailedRequest(group[0].key, "no result", f"none of the {len(group)} answers matches best.extract")
    result, votes = counts.most_common(1)[0]
    return [SelectedAnswer(group[results.index(result)], votes / len(group))]
