"""Align the tokens of two tokenizers, and find the entries that their vocabularies share.

The end of a token is the number of bytes from the start of the text or, in a conversation, of the answer. Where
tokens of both tokenizers end at the same byte, both models have read the same text. Tokens outside of the text (BOS,
roles, line breaks of a template) have no end, so they may differ.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tutelage.data.batch import IGNORE
from tutelage.data.chat import Conversation, Learn, encode_learned, find_answer_spans, render_conversation
from tutelage.errors import DataError, shorten

Ends = npt.NDArray[np.int64]

NOWHERE = -1
"""The end of a token outside of the text."""
ANSWER_OFFSET = 1 << 32
"""Offset between the ends of one answer of a conversation and the next."""


class TokenEnds:
    """Computes the ends of tokens.

    Args:
        tokenizer: a fast tokenizer of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        known = token_bytes(tokenizer)
        self.sizes = np.array([-1 if b is None else len(b) for b in known], np.int64)

    def __call__(self, text: str | Conversation, learn: Learn = "answers") -> tuple[list[int], list[bool], Ends]:
        """Token ids, whether each token is learned (:func:`tutelage.data.chat.encode_learned`), and its end.

        The token that closes a text or an answer ends one byte after it. In a conversation only answers have ends.

        Raises:
            DataError: as ``encode_learned``; or the tokens' ends cannot be computed with this chat template.
        """
        ids, learned = encode_learned(text, self.tokenizer, learn)
        plain = isinstance(text, str)
        whole = text if isinstance(text, str) else render_conversation(text, self.tokenizer)
        cut = self.tokenizer(whole, add_special_tokens=plain, return_offsets_mapping=True, verbose=False)
        offsets = np.array(cut["offset_mapping"], np.int64).reshape(-1, 2)
        if list(cut["input_ids"]) != ids[: len(offsets)] or len(ids) - len(offsets) > plain:
            raise DataError(
                "the tokens of the chat template differ from those of the rendered text, so their ends are unknown",
                where="tokenizer.chat_template",
                remedy="use a teacher and a student with the same tokenizer, or another template",
            )
        if isinstance(text, str):
            behind = np.arange(len(offsets)) > np.max(np.flatnonzero(offsets[:, 1] > offsets[:, 0]), initial=-1)
            offsets[behind] = len(text), len(text) + 1
            added = np.tile([len(text), len(text) + 1], (len(ids) - len(offsets), 1))
            regions = [(0, len(text), len(text) + 1)]
            return ids, learned, self._ends(np.array(ids), np.concatenate([offsets, added]), text, regions)
        regions = list(self._answers(text, whole, learned, offsets))
        return ids, learned, self._ends(np.array(ids), offsets, whole, regions)

    def _answers(
        self, text: Conversation, whole: str, learned: Sequence[bool], offsets: Ends
    ) -> Iterator[tuple[int, int, int]]:
        """For each answer: start and end of its text in ``whole``, and the end of its closing token."""
        answers = [str(m["content"]).strip() for m in text if m["role"] == "assistant"]
        template = self.tokenizer.chat_template
        if "{% generation" in template or "{%- generation" in template:  # the template marks the answers
            marks = np.diff(np.concatenate([[0], np.array(learned, np.int8), [0]]))
            runs = zip(np.flatnonzero(marks == 1), np.flatnonzero(marks == -1), strict=True)
            spans = [(int(offsets[a, 0]), int(offsets[b - 1, 1])) for a, b in runs]
        else:
            spans = find_answer_spans(text, self.tokenizer, whole)
        for (start, stop), words in zip(spans, answers, strict=len(spans) == len(answers)):
            at = whole.find(words, start, stop)
            if at < 0:
                raise DataError(
                    f"the chat template changes an answer: {shorten(words)}",
                    where="tokenizer.chat_template",
                    remedy="remove the parts that the template removes, such as thoughts, from the answers",
                )
            yield at, at + len(words), stop

    def _ends(self, ids: Ends, offsets: Ends, whole: str, regions: Sequence[tuple[int, int, int]]) -> Ends:
        """Ends in bytes from character offsets; tokens within a character use their byte lengths."""
        sizes = np.array([len(c.encode("utf-8", "surrogatepass")) for c in whole], np.int64)
        bytes_to = np.concatenate([[0], np.cumsum(sizes)])
        starts, stops = offsets[:, 0], offsets[:, 1]
        ends = np.full(len(ids), NOWHERE, np.int64)
        for number, (begin, finish, closed) in enumerate(regions):
            inside = (stops > begin) & (starts < finish) & (stops > starts)
            base = number * ANSWER_OFFSET - bytes_to[begin]
            ends[inside] = base + bytes_to[np.minimum(stops[inside], finish)]
            closing = (starts >= finish) & (starts < closed) & (stops > starts)
            closing |= inside & (stops > finish)  # a token with both the last words and the closing
            ends[closing] = base + bytes_to[finish] + 1
        # If several tokens share a character, all but the last end before the end of the character.
        same = np.flatnonzero((ends[:-1] == ends[1:]) & (ends[:-1] != NOWHERE) & (stops[:-1] == stops[1:]))
        length = self.sizes[ids]
        for i in same[::-1]:
            before = ends[i + 1] - length[i + 1]
            if length[i + 1] > 0 and before > ends[i] - sizes[stops[i] - 1]:
                ends[i] = before
        return ends


def align_spans(mine: Ends, theirs: Ends) -> tuple[Ends, Ends]:
    """The span number of each token; the numbers are the same on both sides.

    A span lies between two neighbouring common ends; it has at least one token on each side.

    Args:
        mine: ``[B, L]`` ends of the student's tokens, ascending except for tokens without end.
        theirs: ``[B, L']`` ends of the teacher's tokens.

    Returns:
        ``[B, L]`` and ``[B, L']``; -1 for tokens without span.
    """
    rows = np.arange(len(mine), dtype=np.int64)[:, None] << 48
    keys = [np.where(ends == NOWHERE, NOWHERE, rows + ends) for ends in (mine, theirs)]
    both = np.intersect1d(keys[0], keys[1])
    both = both[both != NOWHERE]
    numbers = []
    for key in keys:
        at = np.searchsorted(both, key)  # the first common end at or after the token's end
        closes = both[np.minimum(at, len(both) - 1)] if len(both) else key
        inside = (key != NOWHERE) & (at < len(both)) & (closes >> 32 == key >> 32)
        numbers.append(np.where(inside, at, NOWHERE))
    return numbers[0], numbers[1]


def align_predicted(mine: Ends, theirs: Ends, labels: Tensor, their_labels: Tensor) -> dict[str, Tensor]:
    """The spans of :func:`align_spans` in which every token is predicted, at the positions that predict them.

    Args:
        mine: ``[B, L]`` ends of the student's tokens.
        theirs: ``[B, L']`` ends of the teacher's tokens.
        labels: ``[B, L]`` labels of the student, -100 where nothing is predicted.
        their_labels: ``[B, L']`` labels of the teacher.

    Returns:
        ``student`` ``[B, L]`` and ``teacher`` ``[B, L']``: span numbers, or -1.
    """
    sides, both_labels = align_spans(mine, theirs), (labels.numpy(), their_labels.numpy())
    shifted, lost = [], [np.empty(0, np.int64)]
    for spans, own_labels in zip(sides, both_labels, strict=True):
        lost.append(spans[:, 0])  # nothing predicts the first token
        moved = np.full_like(spans, NOWHERE)
        moved[:, :-1] = spans[:, 1:]
        lost.append(moved[own_labels == IGNORE])
        shifted.append(moved)
    gone = np.unique(np.concatenate(lost))
    student, teacher = (torch.from_numpy(np.where(np.isin(spans, gone), NOWHERE, spans)) for spans in shifted)
    return {"student": student, "teacher": teacher}


def find_shared_tokens(mine: Any, theirs: Any) -> tuple[Tensor, Tensor]:
    """The ids of the common entries of two vocabularies, ``[S]`` each, in the same order.

    Entries are equal if they stand for the same bytes, or, for tokenizers of one kind, if they have the same name.
    Special tokens are compared by name; the end-of-sequence tokens always correspond.
    """
    same_kind = _kind(mine) == _kind(theirs)
    first, second = (_entries(tokenizer, by_name=same_kind) for tokenizer in (mine, theirs))
    pairs = {i: second[key] for key, i in first.items() if key in second}
    ends = (_end_token(mine), _end_token(theirs))
    if None not in ends and ends[0] not in pairs and ends[1] not in pairs.values():
        pairs[ends[0]] = ends[1]  # type: ignore[index, assignment]
    ids = sorted(pairs)
    return torch.tensor(ids, dtype=torch.int64), torch.tensor([pairs[i] for i in ids], dtype=torch.int64)


def token_bytes(tokenizer: Any) -> list[bytes | None]:
    """The bytes of each token id; ``None`` for special tokens and unused ids."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    kind, alphabet = _kind(tokenizer), {character: byte for byte, character in bytes_to_unicode().items()}
    added, vocabulary = tokenizer.added_tokens_decoder, tokenizer.get_vocab()
    special = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
    out: list[bytes | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
    for token, i in vocabulary.items():
        if i not in special:
            out[i] = token.encode() if i in added else _entry_bytes(token, kind, alphabet)
    return out


def _entries(tokenizer: Any, by_name: bool) -> dict[Any, int]:
    entries: dict[Any, int] = {}
    known = token_bytes(tokenizer)
    for token, i in sorted(tokenizer.get_vocab().items(), key=lambda x: (x[0].startswith("<0x"), x[1])):
        key = token if by_name else ("special", token) if known[i] is None else known[i]
        entries.setdefault(key, i)
    return entries


def _end_token(tokenizer: Any) -> int | None:
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    return None if end is None else int(end)


def _kind(tokenizer: Any) -> str:
    """The kind of a tokenizer's entries, from its decoder."""
    decoder = json.dumps(json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder"), ensure_ascii=False)
    return next((kind for kind, mark in _MARKS.items() if mark in decoder), "plain")


_MARKS = {"bytes": '"ByteLevel"', "words": '"WordPiece"', "pieces": "▁"}


def _entry_bytes(token: str, kind: str, alphabet: dict[str, int]) -> bytes:
    """Convert the name of an entry to its bytes; ``alphabet`` has the byte of each character of kind ``bytes``."""
    if kind == "bytes" and all(c in alphabet for c in token):
        return bytes(alphabet[c] for c in token)
    if kind == "pieces":
        is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        return bytes([int(token[3:5], 16)]) if is_byte else token.replace("▁", " ").encode()
    if kind == "words":  # WordPiece has no spaces: "##" continues a word, other words follow a space
        return (token[2:] if token.startswith("##") else f" {token}" if token[:1].isalnum() else token).encode()
    return token.encode()
