"""Quality checks: which generated conversations go into the data, and why the others do not."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from tutelage.config import DecontaminateConfig, QualityConfig
from tutelage.errors import require
from tutelage.generation.answers import Conversation, RejectedConversation
from tutelage.generation.duplicates import NearDuplicateIndex, words
from tutelage.generation.prompts import read_rows

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
"""Matches the beginning of an answer that refuses."""

MIN_WORDS_FOR_LANGUAGE = 5
MIN_WORDS_OF_EVALUATION_TEXT = 4
"""Shorter evaluation texts are ignored: an answer of one or two words occurs in many texts."""

Reason = tuple[str, str]
"""A short category, and a detail."""

Check = Callable[[str], str | None]
"""What is wrong with a text, or ``None``."""


class QualityChecks:
    """The checks of a recipe. Duplicates are the last one, so that a rejected conversation has no duplicates."""

    def __init__(self, settings: QualityConfig) -> None:
        self.settings = settings
        self.banned = [re.compile(pattern, re.IGNORECASE) for pattern in settings.banned]
        self.index = NearDuplicateIndex(settings.dedup_threshold if settings.dedup_threshold is not None else 1.0)
        self.prompts: list[str] = []
        self.reasons: dict[str, Reason | None] = {}
        self.answers: set[tuple[str, ...]] = set()
        self.checks: dict[str, Check] = {"banned": self._find_banned}
        if settings.language is not None:
            self.checks["language"] = _build_language_check(settings.language)
        if settings.decontaminate is not None:
            self.checks["contaminated"] = _build_ngram_check(settings.decontaminate)

    def check(self, item: Conversation) -> Reason | None:
        """Why a conversation is rejected. An accepted one (``None``) is compared with all later ones."""
        settings = self.settings
        if not settings.truncated and "length" in item.finishes:
            return "truncated", "the answer was cut at max_tokens"
        if reason := _check_length(item.instruction, settings.instruction_words, "instruction"):
            return reason
        for text in item.answers:
            if reason := _check_length(text, settings.answer_words, "answer"):
                return reason
        for text in [] if settings.refusals else item.answers:
            if match := REFUSAL.search(text):
                return "refusal", match.group()[:80]
        return self._check_texts([item.instruction, *item.answers]) or self._check_duplicate(item)

    def check_instruction(self, text: str) -> Reason | None:
        """Why an instruction is rejected before it is answered."""
        return _check_length(text, self.settings.instruction_words, "instruction") or self._check_texts([text])

    def _check_texts(self, texts: Sequence[str]) -> Reason | None:
        for reason, check in self.checks.items():
            for text in texts:
                if (detail := check(text)) is not None:
                    return reason, detail
        return None

    def _find_banned(self, text: str) -> str | None:
        for pattern in self.banned:
            if match := pattern.search(text):
                return f"{pattern.pattern}: {match.group()[:80]}"
        return None

    def _check_duplicate(self, item: Conversation) -> Reason | None:
        """Compare a prompt with those of other conversations, and answers to one prompt with each other."""
        if item.prompt not in self.reasons:
            number = self.index.add_if_new(item.instruction)
            self.reasons[item.prompt] = None
            if number is None:
                self.prompts.append(item.prompt)
            else:
                kind = "duplicate" if self.index.is_same(number, item.instruction) else "near duplicate"
                self.reasons[item.prompt] = (kind, f"of {self.prompts[number]}")
        reason = self.reasons[item.prompt]
        if reason is None:
            answers = (item.prompt, *item.answers)
            if answers in self.answers:
                return "duplicate", "the same answer to the same prompt"
            self.answers.add(answers)
        return reason


def _check_length(text: str, limits: Sequence[int], what: str) -> Reason | None:
    count = len(words(text))
    return None if limits[0] <= count <= limits[1] else (f"length of the {what}", f"{count} words")


def filter_conversations(
    items: Iterable[Conversation], settings: QualityConfig
) -> tuple[list[Conversation], list[RejectedConversation]]:
    """The accepted conversations, and the rejected ones with their reasons."""
    checks = QualityChecks(settings)
    accepted, rejected = [], []
    for item in items:
        reason = checks.check(item)
        if reason is None:
            accepted.append(item)
        else:
            rejected.append(RejectedConversation(item.name, *reason, item.messages, item.keys))
    return accepted, rejected


def _build_ngram_check(settings: DecontaminateConfig) -> Check:
    """Finds the first n-gram of words that a text shares with the evaluation texts; a shorter one is one n-gram."""
    ngrams: dict[int, set[tuple[str, ...]]] = {settings.words: set()}
    for row in read_rows(settings.path, "texts"):
        for reference in _strings(list(row.values())):
            tokens = words(reference)
            if len(tokens) >= settings.words:
                ngrams[settings.words].update(_ngrams(tokens, settings.words))
            elif len(tokens) >= MIN_WORDS_OF_EVALUATION_TEXT:
                ngrams.setdefault(len(tokens), set()).add(tuple(tokens))

    def check(text: str) -> str | None:
        tokens = words(text)
        shared = (ngram for size, known in ngrams.items() for ngram in _ngrams(tokens, size) if ngram in known)
        ngram = next(shared, None)
        return None if ngram is None else " ".join(ngram)

    return check


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def _ngrams(tokens: Sequence[str], size: int) -> Iterable[tuple[str, ...]]:
    return zip(*(tokens[i:] for i in range(size)), strict=False)


def _build_language_check(expected: str) -> Check:
    """Finds the language of a text if it is not the expected one; short texts are not checked."""
    require("py3langid", "generate", "language identification")
    import py3langid

    def check(text: str) -> str | None:
        if len(words(text)) < MIN_WORDS_FOR_LANGUAGE:
            return None
        language = str(py3langid.classify(text)[0])
        return None if language == expected else language

    return check
