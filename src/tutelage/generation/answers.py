"""Answers to conversations so far, and which of several samples is kept."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from tutelage.config import Generations
from tutelage.generation.duplicates import words
from tutelage.generation.requests import ChatAnswer, FailedRequest, Message, Outcome, Request, RequestParameters
from tutelage.generation.scheduler import RequestBatch
from tutelage.generation.templates import PromptTemplate, PromptTemplates

T = TypeVar("T")
RequestPlan = Generator[RequestBatch, list[Outcome], T]
"""Waves of requests, each sent its outcomes, and a result: what a mode is, without any server."""


class SelectedAnswer(NamedTuple):
    """An answer that is kept, and its score where a judge gave one."""

    answer: ChatAnswer
    score: float | None = None


@dataclass
class GenerationContext:
    """What all modes use.

    Args:
        settings: the recipe's section.
        templates: those of the recipe.
        manner: how the teacher answers.
        judge: how answers are judged, where they are.
        judged: what the judge is asked.
        system: the system message, where there is one.
        user: the user's message.
    """

    settings: Generations
    templates: PromptTemplates
    manner: RequestParameters
    judge: RequestParameters | None
    judged: PromptTemplate | None
    system: PromptTemplate | None
    user: PromptTemplate

    def opening(self, values: dict[str, Any], what: str) -> list[Message]:
        """The first messages of a conversation."""
        first = [] if self.system is None else [{"role": "system", "content": self.system(values, what)}]
        return [*first, {"role": "user", "content": self.user(values, what)}]


def answers(
    kit: GenerationContext, threads: Sequence[Sequence[Message]], name: str = "answers"
) -> RequestPlan[list[list[SelectedAnswer] | FailedRequest]]:
    """For each conversation its answers, those that ``best`` chooses, or why there is none."""
    samples = kit.settings.samples
    wave = [Request(kit.manner, thread, sample) for thread in threads for sample in range(samples)]
    outcomes = yield RequestBatch(name, wave)
    groups = [outcomes[i : i + samples] for i in range(0, len(outcomes), samples)]
    given: list[list[ChatAnswer] | FailedRequest] = []
    for group in groups:
        found = [outcome for outcome in group if isinstance(outcome, ChatAnswer)]
        given.append(found or next(outcome for outcome in group if isinstance(outcome, FailedRequest)))
    best = kit.settings.best
    if best is None:
        return [
            found if isinstance(found, FailedRequest) else [SelectedAnswer(answer) for answer in found]
            for found in given
        ]
    chosen = yield from BEST[best.by](kit, threads, given)
    return chosen


def _by_judge(
    kit: GenerationContext, threads: Sequence[Sequence[Message]], given: Sequence[list[ChatAnswer] | FailedRequest]
) -> RequestPlan[list[list[SelectedAnswer] | FailedRequest]]:
    """The answer with the judge's highest score, the first of equals."""
    assert kit.judge is not None
    assert kit.judged is not None
    assert kit.settings.best is not None
    pattern = re.compile(kit.settings.best.score)
    wave, of = [], []
    for number, (thread, found) in enumerate(zip(threads, given, strict=True)):
        for answer in [] if isinstance(found, FailedRequest) else found:
            values = {"prompt": thread[-1]["content"], "answer": answer.text}
            text = kit.judged(values, f"the judge's prompt of item {number}")
            wave.append(Request(kit.judge, [{"role": "user", "content": text}]))
            of.append(number)
    outcomes = yield RequestBatch("judging", wave)
    scores: dict[int, list[float | FailedRequest]] = {}
    for number, outcome in zip(of, outcomes, strict=True):
        match = pattern.search(outcome.text) if isinstance(outcome, ChatAnswer) else None
        unscored = (
            outcome
            if isinstance(outcome, FailedRequest)
            else FailedRequest(outcome.key, "no score", outcome.text[:100])
        )
        scores.setdefault(number, []).append(_number(match.group(1)) if match else unscored)
    chosen: list[list[SelectedAnswer] | FailedRequest] = []
    for number, found in enumerate(given):
        if isinstance(found, FailedRequest):
            chosen.append(found)
            continue
        pairs = [(s, -i, a) for i, (s, a) in enumerate(zip(scores[number], found, strict=True))]
        known = [(s, i, a) for s, i, a in pairs if not isinstance(s, FailedRequest)]
        if known:
            score, _, answer = max(known, key=lambda pair: pair[:2])
            chosen.append([SelectedAnswer(answer, score)])
        else:
            chosen.append(next(s for s, _, _ in pairs if isinstance(s, FailedRequest)))
    return chosen


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def _by_consistency(
    kit: GenerationContext, threads: Sequence[Sequence[Message]], given: Sequence[list[ChatAnswer] | FailedRequest]
) -> RequestPlan[list[list[SelectedAnswer] | FailedRequest]]:
    """The first answer with the most frequent result, or that is most like the others."""
    assert kit.settings.best is not None
    extract = kit.settings.best.extract
    yield from ()  # a generator like the others, though it asks nothing
    chosen: list[list[SelectedAnswer] | FailedRequest] = []
    for found in given:
        if isinstance(found, FailedRequest):
            chosen.append(found)
        elif extract is None:
            chosen.append([SelectedAnswer(found[_central([answer.text for answer in found])])])
        else:
            chosen.append(_most_frequent(found, re.compile(extract)))
    return chosen


def _most_frequent(found: Sequence[ChatAnswer], pattern: re.Pattern[str]) -> list[SelectedAnswer] | FailedRequest:
    results = [matches[-1].group(1).strip().lower() if (matches := list(pattern.finditer(a.text))) else None
               for a in found]  # fmt: skip
    counts = Counter(result for result in results if result is not None)
    if not counts:
        return FailedRequest(found[0].key, "no result", f"nothing in {len(found)} answers matches best.extract")
    result, votes = counts.most_common(1)[0]
    return [SelectedAnswer(found[results.index(result)], votes / len(found))]


def _central(texts: Sequence[str]) -> int:
    """The text with the highest mean ROUGE-L to all."""
    from rapidfuzz import process
    from rapidfuzz.distance import Indel

    split = [words(text) for text in texts]
    near = process.cdist(split, split, scorer=Indel.normalized_similarity)
    return int(near.mean(axis=1).argmax())


Chooser = Callable[
    [GenerationContext, Sequence[Sequence[Message]], Sequence[list[ChatAnswer] | FailedRequest]],
    RequestPlan[list[list[SelectedAnswer] | FailedRequest]],
]
BEST: dict[str, Chooser] = {"consistency": _by_consistency, "judge": _by_judge}
"""How one of several samples is chosen."""
