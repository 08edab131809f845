"""How varied instructions are: the verbs that they begin with, and the objects of these verbs.

Self-Instruct parses sentences for the root verb and its object. Here a list of verbs and a list of words that end a
noun phrase are enough: instructions are mostly imperatives, and no model is needed.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

WORDS = {
    name: frozenset(" ".join(lines).split())
    for name, lines in json.loads(
        Path(__file__).with_name("instruction_words.json").read_text(encoding="utf-8")
    ).items()
}
"""``verbs`` that instructions begin with, words that are ``skipped`` between a verb and its object, and words that
end a noun phrase (``ends``)."""

TOKEN = re.compile(r"[A-Za-z][A-Za-z'’-]*|[^\sA-Za-z]")


def verb_noun(text: str) -> tuple[str, str] | None:
    """The first verb of an instruction, and the head of the noun phrase after it; ``None`` if there is no verb."""
    tokens = [token.lower() for token in TOKEN.findall(text[:400])]
    for i, token in enumerate(tokens[:25]):
        if token in WORDS["verbs"]:
            return token, _head(tokens[i + 1 :])
    return None


def _head(tokens: list[str]) -> str:
    phrase: list[str] = []
    for token in tokens:
        if token in WORDS["skipped"] and not phrase:
            continue
        if not token[0].isalpha():
            if phrase or token not in "\"'“‘(0123456789":
                break
            continue
        if token in WORDS["ends"] or (phrase and token in WORDS["skipped"]):
            break
        phrase.append(token)
    return _singular(phrase[-1]) if phrase else ""


def _singular(word: str) -> str:
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


def diversity(instructions: Iterable[str], top: int = 20) -> dict[str, Any]:
    """Counts of verbs and of the nouns after them.

    Returns:
        ``instructions``, ``with_verb``, ``verbs`` and ``pairs`` (different ones), ``bits`` (entropy of the pairs),
        and ``top``: the most frequent verbs, each with its count and its four most frequent nouns.
    """
    parsed = [verb_noun(text) for text in instructions]
    pairs = Counter(pair for pair in parsed if pair is not None)
    total = pairs.total()
    verbs, nouns = Counter[str](), dict[str, Counter[str]]()
    for (verb, noun), count in pairs.items():
        verbs[verb] += count
        nouns.setdefault(verb, Counter())[noun or "–"] += count
    return {
        "instructions": len(parsed),
        "with_verb": total,
        "verbs": len(verbs),
        "pairs": len(pairs),
        "bits": round(sum(n / total * math.log2(total / n) for n in pairs.values()), 3) if total else 0.0,
        "top": [
            {"verb": verb, "count": count, "nouns": dict(most_frequent(nouns[verb], 4))}
            for verb, count in most_frequent(verbs, top)
        ],
    }


def most_frequent(counts: Counter[str], top: int | None = None) -> list[tuple[str, int]]:
    """The ``top`` names with the largest counts, in the order of counts and names."""
    return sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:top]
