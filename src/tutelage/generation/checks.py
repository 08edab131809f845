"""What is kept of what was generated, and why the rest is not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from tutelage.config import DecontaminateConfig, QualityConfig
from tutelage.errors import require
from tutelage.generation.conversations import Conversation, RejectedConversation
from tutelage.generation.duplicates import NearDuplicateIndex, words
from tutelage.generation.prompts import rows_of

REFUSAL = re.compile(
    r"""^\W*(?:
        (?:i['’]?m|i\ am|we['’]?re)\ (?:very\ |really\ |so\ )?(?:sorry|afraid|unable|not\ able)\b
      | (?:sorry|apologies|unfortunately|regrettably)\b[^.]{0,40}\b(?:i|we)\b[^.]{0,20}\b(?:can|could|am|are)
      | (?:i|we)\ (?:cannot|can['’]?t|can\ not|won['’]?t|will\ not|am\ unable|do\ not\ have|don['’]?t\ have)\b
        [^.]{0,40}\b(?:assist|help|provide|fulfil|answer|comply|access|do\ that|create|write|generate)
      | as\ an?\ (?:ai|artificial|language|large\ language|virtual)\b
      | (?:my\ )?apologies,?\ but
    )""",
    re.IGNORECASE | re.VERBOSE,
)
"""How answers begin that do not do what was asked."""

Check = Callable[[Conversation], str | None]
"""Says what is wrong with an item, in detail; ``None`` where nothing is."""


def _within(text: str, limits: Sequence[int]) -> bool:
    return limits[0] <= len(words(text)) <= limits[1]


class QualityChecks:
    """The checks of a recipe, in order; duplicates come last, so that only what is kept has any.

    Args:
        settings: the recipe's ``quality``.
    """

    def __init__(self, settings: QualityConfig) -> None:
        self.settings = settings
        self.banned = [re.compile(pattern, re.IGNORECASE) for pattern in settings.banned]
        self.near = NearDuplicateIndex(settings.dedup_threshold if settings.dedup_threshold is not None else 1.0)
        self.names: list[str] = []
        self.verdicts: dict[str, tuple[str, str] | None] = {}
        self.answers: set[tuple[str, ...]] = set()
        self.grams = None if settings.decontaminate is None else NgramIndex(settings.decontaminate)
        self.language = None if settings.language is None else LanguageCheck(settings.language)
        self.each: dict[str, Check] = {
            "truncated": self._truncated,
            "length of the instruction": self._instruction_length,
            "length of the answer": self._answer_length,
            "refusal": self._refusal,
            "banned": self._banned,
            "language": self._language,
            "contaminated": self._contaminated,
        }

    def reason(self, item: Conversation) -> tuple[str, str] | None:
        """Why an item is not kept, in a word and in detail."""
        for reason, check in self.each.items():
            detail = check(item)
            if detail is not None:
                return reason, detail
        return self._duplicate(item)

    def instruction(self, text: str) -> tuple[str, str] | None:
        """Why an instruction is not worth an answer."""
        if not _within(text, self.settings.instruction_words):
            return "length of the instruction", f"{len(words(text))} words"
        found = self._holds_banned(text)
        if found is not None:
            return "banned", found
        if self.language is not None and (other := self.language.other(text)) is not None:
            return "language", other
        if self.grams is not None and (shared := self.grams.shared([text])) is not None:
            return "contaminated", shared
        return None

    def _truncated(self, item: Conversation) -> str | None:
        cut = not self.settings.truncated and "length" in item.finishes
        return "the answer ran into max_tokens" if cut else None

    def _instruction_length(self, item: Conversation) -> str | None:
        fits = _within(item.instruction, self.settings.instruction_words)
        return None if fits else f"{len(words(item.instruction))} words"

    def _answer_length(self, item: Conversation) -> str | None:
        for text in item.answers:
            if not _within(text, self.settings.answer_words):
                return f"{len(words(text))} words"
        return None

    def _refusal(self, item: Conversation) -> str | None:
        for text in [] if self.settings.refusals else item.answers:
            if found := REFUSAL.search(text):
                return found.group()[:80]
        return None

    def _banned(self, item: Conversation) -> str | None:
        for text in (item.instruction, *item.answers):
            if (found := self._holds_banned(text)) is not None:
                return found
        return None

    def _holds_banned(self, text: str) -> str | None:
        for pattern in self.banned:
            if found := pattern.search(text):
                return f"{pattern.pattern}: {found.group()[:80]}"
        return None

    def _language(self, item: Conversation) -> str | None:
        if self.language is None:
            return None
        for text in (item.instruction, *item.answers):
            if (other := self.language.other(text)) is not None:
                return other
        return None

    def _contaminated(self, item: Conversation) -> str | None:
        return None if self.grams is None else self.grams.shared((item.instruction, *item.answers))

    def _duplicate(self, item: Conversation) -> tuple[str, str] | None:
        """Prompts are compared with those of other items; answers to one prompt with each other."""
        if item.prompt not in self.verdicts:
            found = self.near.add_if_new(item.instruction)
            self.verdicts[item.prompt] = None
            if found is None:
                self.names.append(item.prompt)
            else:
                same = self.near.same(found, item.instruction)
                kind = "duplicate" if same else "near duplicate"
                self.verdicts[item.prompt] = (kind, f"of {self.names[found]}")
        verdict = self.verdicts[item.prompt]
        if verdict is None:
            said = (item.prompt, *item.answers)
            if said in self.answers:
                return "duplicate", "the same answer to the same prompt"
            self.answers.add(said)
        return verdict


def sifted(
    items: Iterable[Conversation], settings: QualityConfig
) -> tuple[list[Conversation], list[RejectedConversation]]:
    """The items that are kept, and the others with their reasons."""
    checks = QualityChecks(settings)
    kept, rejected = [], []
    for item in items:
        reason = checks.reason(item)
        if reason is None:
            kept.append(item)
        else:
            rejected.append(RejectedConversation(item.name, *reason, item.messages, item.keys))
    return kept, rejected


class NgramIndex:
    """Runs of words of texts to evaluate on.

    Args:
        settings: which texts, and how long a run counts.
    """

    def __init__(self, settings: DecontaminateConfig) -> None:
        self.size = settings.words
        self.runs: set[tuple[str, ...]] = set()
        self.short: dict[int, set[tuple[str, ...]]] = {}
        for row in rows_of(settings.path, "texts"):
            for value in row.values():
                self._take(value)

    def _take(self, value: object) -> None:
        if isinstance(value, list | tuple):
            for part in value:
                self._take(part)
        elif isinstance(value, dict):
            for part in value.values():
                self._take(part)
        elif isinstance(value, str):
            found = words(value)
            if len(found) >= self.size:
                self.runs.update(_runs(found, self.size))
            elif len(found) > 3:  # an answer of a word or two stands in many texts
                self.short.setdefault(len(found), set()).add(tuple(found))

    def shared(self, texts: Iterable[str]) -> str | None:
        """The first run of words that the texts share with those to evaluate on."""
        for text in texts:
            found = words(text)
            for size, runs in ((self.size, self.runs), *self.short.items()):
                for run in _runs(found, size):
                    if run in runs:
                        return " ".join(run)
        return None


def _runs(found: Sequence[str], size: int) -> Iterable[tuple[str, ...]]:
    return zip(*(found[i:] for i in range(size)), strict=False)


class LanguageCheck:
    """Knows texts of one language.

    Args:
        wanted: its two letters.
    """

    def __init__(self, wanted: str) -> None:
        require("py3langid", "generate", "telling languages apart")
        import py3langid

        self.wanted = wanted
        self._classify = py3langid.classify

    def other(self, text: str) -> str | None:
        """The language that a text is in, where it is another; short texts are not judged."""
        if len(words(text)) < 5:
            return None
        found = str(self._classify(text)[0])
        return None if found == self.wanted else found
