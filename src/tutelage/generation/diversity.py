"""How varied instructions are: the verbs that they begin with, and the objects of these verbs.

Self-Instruct parses sentences for the root verb and its object. Here a list of verbs and a list of words that end a
noun phrase are enough: instructions are mostly imperatives, and no model is needed.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


VERBS = _set(
    """
    add analyse analyze annotate answer argue arrange assess assign build calculate categorise categorize
    change check choose cite clarify classify clean combine comment compare compile complete compose compute
    condense connect consider construct contrast convert correct count create criticise criticize debug decide
    decode define deliver demonstrate derive describe design detect determine develop devise differentiate
    discuss distinguish divide draft draw edit elaborate eliminate encode estimate evaluate examine expand
    explain explore express extract fill filter find fix forecast form format formulate gather generate give
    group guess highlight hypothesise identify illustrate imagine implement improve include infer insert
    interpret invent justify label link list locate make mark match measure modify name narrate order organise
    organize outline paraphrase parse pick plan point predict prepare present produce proofread propose prove
    provide rank rate read reason recall recommend reduce reformulate rename reorder rephrase replace report
    respond restate retrieve return reverse review revise rewrite role-play round say search select shorten
    show simplify simulate sketch solve sort specify spell split state structure suggest summarise summarize
    support tell test think transform translate turn unscramble use verify visualise visualize weigh write
    """
)
"""Verbs that instructions begin with."""

SKIPPED = _set(
    """
    a an the this that these those my your his her its our their me us him them it some any each every all
    both one two three four five six seven eight nine ten several few many more most other another such no
    following given
    """
)
"""Words between a verb and its object."""

ENDS = _set(
    """
    of for to in on at by with from into about between among as that which who whose where when while if so
    and or but is are was were has have had can could will would should may might must using based than then
    because without under over before after during through against per via like not
    """
)
"""Words that end a noun phrase."""

TOKEN = re.compile(r"[A-Za-z][A-Za-z'’-]*|[^\sA-Za-z]")


def verb_noun(text: str) -> tuple[str, str] | None:
    """The first verb of an instruction, and the head of the noun phrase after it; ``None`` if there is no verb."""
    tokens = [token.lower() for token in TOKEN.findall(text[:400])]
    for i, token in enumerate(tokens[:25]):
        if token in VERBS:
            return token, _head(tokens[i + 1 :])
    return None


def _head(tokens: list[str]) -> str:
    phrase: list[str] = []
    for token in tokens:
        if token in SKIPPED and not phrase:
            continue
        if not token[0].isalpha():
            if phrase or token not in "\"'“‘(0123456789":
                break
            continue
        if token in ENDS or (phrase and token in SKIPPED):
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
            {"verb": verb, "count": count, "nouns": dict(_most(nouns[verb], 4))} for verb, count in _most(verbs, top)
        ],
    }


def _most(counts: Counter[str], top: int) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:top]
