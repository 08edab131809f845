"""Near duplicates: texts that are similar to an earlier one, found exactly and without comparing all pairs.

ROUGE-L of two texts of m and n words is ``2 LCS / (m + n)``: rapidfuzz's normalised Indel similarity of the sequences
of words. To reach a threshold t, the texts must share ``t (m + n) / 2`` words, so at least one among the
rarest few of each (prefix filtering, Bayardo et al., 2007). Only texts that share one of those are compared.
"""

import math
import re
from array import array
from collections import Counter, defaultdict

import numpy as np

WORD = re.compile(r"\w+")
SLACK = 1e-9
CUTOFF_MARGIN = 1e-4
"""Subtracted from rapidfuzz's cutoff: because of rounding, it drops texts whose similarity is equal to the cutoff."""

FIRST_CODE = 0x10000
"""Each word is encoded as one character from here on: rapidfuzz is fastest on strings."""


def words(text: str) -> list[str]:
    """The words of a text, in lower case, as ROUGE counts them."""
    return WORD.findall(text.lower())


class NearDuplicateIndex:
    """Texts, with search for the first one whose ROUGE-L with another text reaches the threshold.

    A threshold of 1 means the same words in the same order.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.texts: list[str] = []
        self._codes: dict[str, int] = {}
        self._counts: Counter[str] = Counter()
        self._rank: dict[str, int] = {}
        self._postings: dict[tuple[str, int], array[int]] = defaultdict(lambda: array("i"))
        self._sizes = array("i")
        self._ranked = 0

    def is_same(self, number: int, text: str) -> bool:
        """Whether a text has the same words as the indexed one of that number."""
        return self.texts[number] == self._encode(text)

    def add(self, text: str) -> None:
        """Add a text."""
        self._add(self._encode(text))

    def add_if_new(self, text: str) -> int | None:
        """Add a text, unless an earlier one is near; then return the number of the earlier one."""
        encoded = self._encode(text)
        number = self._find(encoded)
        if number is None:
            self._add(encoded)
        return number

    def _encode(self, text: str) -> str:
        codes = self._codes
        return "".join(chr(codes.setdefault(w, FIRST_CODE + len(codes) % 0x100000)) for w in words(text))

    def _find(self, encoded: str) -> int | None:
        from rapidfuzz import process
        from rapidfuzz.distance import Indel

        if not encoded:
            return next((i for i, text in enumerate(self.texts) if not text), None)
        postings = [posting for word in self._prefix(encoded) if (posting := self._postings.get(word)) is not None]
        if not postings:
            return None
        numbers = np.unique(np.concatenate([np.frombuffer(posting, dtype=np.int32) for posting in postings]))
        sizes, size = np.frombuffer(self._sizes, dtype=np.int32)[numbers], len(encoded)
        # texts of very different lengths are not near, even if the longer one contains the shorter
        numbers = numbers[2 * np.minimum(sizes, size) >= (self.threshold - SLACK) * (sizes + size)]
        if len(numbers) == 0:
            return None
        similarity = process.cdist(
            [encoded], [self.texts[i] for i in numbers], scorer=Indel.normalized_similarity,
            score_cutoff=self.threshold - CUTOFF_MARGIN, dtype=np.float64,
        )[0]  # fmt: skip
        matches = np.flatnonzero(similarity >= self.threshold - SLACK)
        return int(numbers[matches[0]]) if len(matches) else None

    def _add(self, encoded: str) -> None:
        self.texts.append(encoded)
        self._sizes.append(len(encoded))
        self._counts.update(set(encoded))
        if len(self.texts) >= 2 * self._ranked + 64:
            # order words by how rare they are by now: any order is correct, and this one leaves least to compare
            self._rank, self._ranked = dict(self._counts), len(self.texts)
            self._postings.clear()
            for number in range(len(self.texts)):
                self._post(number)
        else:
            self._post(len(self.texts) - 1)

    def _post(self, number: int) -> None:
        for word in self._prefix(self.texts[number]):
            self._postings[word].append(number)

    def _prefix(self, encoded: str) -> list[tuple[str, int]]:
        """The rarest words of a text: as many as are needed for a near text to share at least one of them."""
        seen: Counter[str] = Counter()
        occurrences = []
        for word in encoded:
            occurrences.append((word, seen[word]))
            seen[word] += 1
        rank = self._rank
        occurrences.sort(key=lambda pair: (rank.get(pair[0], 0), pair))
        t, size = self.threshold - SLACK, len(encoded)
        shared = math.ceil(size * t / (2 - t) - SLACK)  # with the shortest text that could be near
        return occurrences[: size - shared + 1]
