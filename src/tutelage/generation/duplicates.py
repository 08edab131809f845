"""Texts that are nearly the same as one before, found exactly and without comparing all with all.

ROUGE-L of two texts of m and n words is ``2 LCS / (m + n)``, which is rapidfuzz's normalised Indel similarity of the
two sequences of words. For it to reach t, the texts must share ``t (m + n) / 2`` words, so at least one among the
rarest few of each (prefix filtering, as in Bayardo et al., 2007): only texts that share one of those are compared.
"""

from __future__ import annotations

import math
import re
from array import array
from collections import Counter, defaultdict

import numpy as np

WORD = re.compile(r"\w+")
SLACK = 1e-9
LOOSE = 1e-4
"""What rapidfuzz is asked for less: next to its own cutoff it rounds, and drops what is just as near as that."""

FIRST_CODE = 0x10000
"""Words are characters to rapidfuzz, which is fastest on strings; from here on none has a meaning of its own."""


def words(text: str) -> list[str]:
    """The words of a text, in lower case, as ROUGE counts them."""
    return WORD.findall(text.lower())


class NearDuplicateIndex:
    """Texts that were kept, asked for one that is near to another.

    Args:
        threshold: ROUGE-L from which two texts are near; 1 means the same words in the same order.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.texts: list[str] = []
        self._codes: dict[str, int] = {}
        self._counts: Counter[str] = Counter()
        self._rank: dict[str, int] = {}
        self._posts: dict[tuple[str, int], array[int]] = defaultdict(lambda: array("i"))
        self._sizes = array("i")
        self._ranked = 0

    def like(self, text: str) -> int | None:
        """The number of the first kept text that is near to this one; ``None`` where there is none."""
        return self._like(self._coded(text))

    def same(self, number: int, text: str) -> bool:
        """Whether a text has just the words of the kept one of that number."""
        return self.texts[number] == self._coded(text)

    def _coded(self, text: str) -> str:
        codes = self._codes
        return "".join(chr(codes.setdefault(w, FIRST_CODE + len(codes) % 0x100000)) for w in words(text))

    def _like(self, coded: str) -> int | None:
        from rapidfuzz import process
        from rapidfuzz.distance import Indel

        if not coded:
            return next((i for i, kept in enumerate(self.texts) if not kept), None)
        posts = [found for word in self._prefix(coded) if (found := self._posts.get(word)) is not None]
        if not posts:
            return None
        numbers = np.unique(np.concatenate([np.frombuffer(post, dtype=np.int32) for post in posts]))
        sizes, size = np.frombuffer(self._sizes, dtype=np.int32)[numbers], len(coded)
        # of texts so different in length, the shorter could lie in the longer and they would still not be near
        numbers = numbers[2 * np.minimum(sizes, size) >= (self.threshold - SLACK) * (sizes + size)]
        if len(numbers) == 0:
            return None
        chosen = [self.texts[i] for i in numbers]
        near = process.cdist(
            [coded], chosen, scorer=Indel.normalized_similarity, score_cutoff=self.threshold - LOOSE, dtype=np.float64
        )[0]
        first = np.flatnonzero(near >= self.threshold - SLACK)
        return int(numbers[first[0]]) if len(first) else None

    def add(self, text: str) -> None:
        """Keep a text."""
        self._add(self._coded(text))

    def add_if_new(self, text: str) -> int | None:
        """Keep a text unless one is near, whose number it gives."""
        coded = self._coded(text)
        found = self._like(coded)
        if found is None:
            self._add(coded)
        return found

    def _add(self, coded: str) -> None:
        self.texts.append(coded)
        self._sizes.append(len(coded))
        self._counts.update(set(coded))
        if len(self.texts) >= 2 * self._ranked + 64:
            self._rank_again()
        else:
            self._post(len(self.texts) - 1)

    def _rank_again(self) -> None:
        """Order words by how rare they are by now; any order is right, and this one leaves least to compare."""
        self._rank = dict(self._counts)
        self._ranked = len(self.texts)
        self._posts.clear()
        for number in range(len(self.texts)):
            self._post(number)

    def _post(self, number: int) -> None:
        for word in self._prefix(self.texts[number]):
            self._posts[word].append(number)

    def _prefix(self, coded: str) -> list[tuple[str, int]]:
        """The rarest words of a text, as many as a near one cannot all lack."""
        seen: Counter[str] = Counter()
        marked = []
        for word in coded:
            marked.append((word, seen[word]))
            seen[word] += 1
        rank = self._rank
        marked.sort(key=lambda pair: (rank.get(pair[0], 0), pair))
        t, size = self.threshold - SLACK, len(coded)
        shared = math.ceil(size * t / (2 - t) - SLACK)  # with the shortest text that could be near
        return marked[: size - shared + 1]
