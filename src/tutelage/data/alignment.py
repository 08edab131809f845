"""Which tokens of two tokenizers stand for the same stretch of a text, and which entries their vocabularies share.

A token's end is a place in the text: a number of bytes from where the text, or an answer of a conversation, begins.
Where tokens of both end at the same place, what each model says there is about the same text so far. What templates
and tokenizers put around the text (BOS, roles, line breaks) has no place, so it may differ as it likes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tutelage.data.batch import IGNORE
from tutelage.data.chat import Conversation, Learn, encode_learned, find_answer_spans, render_conversation
from tutelage.errors import DataError

Ends = npt.NDArray[np.int64]

NOWHERE = -1
"""The end of a token that stands for nothing of the text."""
PART = 1 << 32
"""Ends of the answers of a conversation are this far apart."""


# Where tokens end -------------------------------------------------------------------------------------


class TokenEnds:
    """Finds where the tokens of a tokenizer end.

    Args:
        tokenizer: of transformers, fast.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        known = token_bytes(tokenizer)
        self.sizes = np.array([-1 if b is None else len(b) for b in known], np.int64)

    def __call__(self, text: str | Conversation, learn: Learn = "answers") -> tuple[list[int], list[bool], Ends]:
        """Token ids, whether each is learned (:func:`tutelage.data.chat.encode_learned`), and where each ends.

        The token that closes a text or an answer ends one byte behind it, whatever it is. Of a conversation its
        answers alone have places.

        Raises:
            DataError: as ``encoded``, or a chat template under which the tokens' places cannot be found.
        """
        ids, learned = encode_learned(text, self.tokenizer, learn)
        plain = isinstance(text, str)
        whole = text if isinstance(text, str) else render_conversation(text, self.tokenizer)
        cut = self.tokenizer(whole, add_special_tokens=plain, return_offsets_mapping=True, verbose=False)
        offsets = np.array(cut["offset_mapping"], np.int64).reshape(-1, 2)
        if list(cut["input_ids"]) != ids[: len(offsets)] or len(ids) - len(offsets) > plain:
            raise DataError(
                "the chat template's tokens are not those of the text that it renders, so their places are unknown",
                where="tokenizer.chat_template",
                remedy="use teacher and student of one tokenizer, or another template",
            )
        if isinstance(text, str):
            behind = np.arange(len(offsets)) > np.max(np.flatnonzero(offsets[:, 1] > offsets[:, 0]), initial=-1)
            offsets[behind] = len(text), len(text) + 1  # what the tokenizer adds at the end
            added = np.tile([len(text), len(text) + 1], (len(ids) - len(offsets), 1))
            regions = [(0, len(text), len(text) + 1)]
            return ids, learned, self._ends(np.array(ids), np.concatenate([offsets, added]), text, regions)
        regions = list(self._answers(text, whole, learned, offsets))
        return ids, learned, self._ends(np.array(ids), offsets, whole, regions)

    def _answers(
        self, text: Conversation, whole: str, learned: Sequence[bool], offsets: Ends
    ) -> Iterator[tuple[int, int, int]]:
        """Of each answer where in ``whole`` its words begin and end, and where what closes it ends."""
        said = [str(m["content"]).strip() for m in text if m["role"] == "assistant"]
        template = self.tokenizer.chat_template
        if "{% generation" in template or "{%- generation" in template:  # which marks its answers itself
            marks = np.diff(np.concatenate([[0], np.array(learned, np.int8), [0]]))
            runs = zip(np.flatnonzero(marks == 1), np.flatnonzero(marks == -1), strict=True)
            spans = [(int(offsets[a, 0]), int(offsets[b - 1, 1])) for a, b in runs]
        else:
            spans = find_answer_spans(text, self.tokenizer, whole)
        for (start, stop), words in zip(spans, said, strict=len(spans) == len(said)):
            at = whole.find(words, start, stop)
            if at < 0:
                raise DataError(
                    f"the chat template does not give an answer as it is: {words[:60]!r}",
                    where="tokenizer.chat_template",
                    remedy="clean the answers of what the template takes out, such as thoughts",
                )
            yield at, at + len(words), stop

    def _ends(self, ids: Ends, offsets: Ends, whole: str, regions: Sequence[tuple[int, int, int]]) -> Ends:
        """Places from characters; of characters that are cut apart, from the bytes of the tokens."""
        sizes = np.array([len(c.encode("utf-8", "surrogatepass")) for c in whole], np.int64)
        bytes_to = np.concatenate([[0], np.cumsum(sizes)])
        starts, stops = offsets[:, 0], offsets[:, 1]
        ends = np.full(len(ids), NOWHERE, np.int64)
        for number, (begin, finish, closed) in enumerate(regions):
            inside = (stops > begin) & (starts < finish) & (stops > starts)
            base = number * PART - bytes_to[begin]
            ends[inside] = base + bytes_to[np.minimum(stops[inside], finish)]
            closing = (starts >= finish) & (starts < closed) & (stops > starts)
            closing |= inside & (stops > finish)  # a token that has the last words and what closes them
            ends[closing] = base + bytes_to[finish] + 1
        # Tokens that end with the same character: all but the last end some bytes before it.
        same = np.flatnonzero((ends[:-1] == ends[1:]) & (ends[:-1] != NOWHERE) & (stops[:-1] == stops[1:]))
        length = self.sizes[ids]
        for i in same[::-1]:
            before = ends[i + 1] - length[i + 1]
            if length[i + 1] > 0 and before > ends[i] - sizes[stops[i] - 1]:
                ends[i] = before
        return ends


def align_spans(mine: Ends, theirs: Ends) -> tuple[Ends, Ends]:
    """Numbers of the spans that tokens belong to, the same on both sides.

    A span goes from one place where tokens of both sides end to the next; it holds one token of each side or more.

    Args:
        mine: ``[B, L]`` ends of tokens, in ascending order but for those that have none.
        theirs: ``[B, L']`` of the other side.

    Returns:
        ``[B, L]`` and ``[B, L']``; -1 for tokens of no span.
    """
    rows = np.arange(len(mine), dtype=np.int64)[:, None] << 48
    keys = [np.where(ends == NOWHERE, NOWHERE, rows + ends) for ends in (mine, theirs)]
    both = np.intersect1d(keys[0], keys[1])
    both = both[both != NOWHERE]
    found = []
    for key in keys:
        at = np.searchsorted(both, key)  # the first place of both sides that is not before the token's end
        closes = both[np.minimum(at, len(both) - 1)] if len(both) else key
        inside = (key != NOWHERE) & (at < len(both)) & (closes >> 32 == key >> 32)
        found.append(np.where(inside, at, NOWHERE))
    return found[0], found[1]


def align_predicted(mine: Ends, theirs: Ends, labels: Tensor, their_labels: Tensor) -> dict[str, Tensor]:
    """The spans of :func:`align_spans` all of whose tokens are predicted, at the positions that predict them.

    Args:
        mine: ``[B, L]`` ends of the student's tokens.
        theirs: ``[B, L']`` of the teacher's.
        labels: ``[B, L]`` of the student, -100 where nothing is predicted.
        their_labels: ``[B, L']``.

    Returns:
        ``student`` ``[B, L]`` and ``teacher`` ``[B, L']``: numbers of spans, or -1.
    """
    sides, told = align_spans(mine, theirs), (labels.numpy(), their_labels.numpy())
    shifted, lost = [], [np.empty(0, np.int64)]
    for spans, given in zip(sides, told, strict=True):
        lost.append(spans[:, 0])  # nothing predicts the first token
        moved = np.full_like(spans, NOWHERE)
        moved[:, :-1] = spans[:, 1:]
        lost.append(moved[given == IGNORE])
        shifted.append(moved)
    gone = np.unique(np.concatenate(lost))
    kept = [torch.from_numpy(np.where(np.isin(spans, gone), NOWHERE, spans)) for spans in shifted]
    return {"student": kept[0], "teacher": kept[1]}


# What vocabularies share ----------------------------------------------------------------------------------


def find_shared_tokens(mine: Any, theirs: Any) -> tuple[Tensor, Tensor]:
    """The ids of the entries that two tokenizers both have, ``[S]`` each, in the same order.

    Entries are the same if they stand for the same bytes; of tokenizers that write their entries the same way, if
    they are written the same. Special tokens go by their names, and those that end a text go together.
    """
    alike = _kind(mine) == _kind(theirs)
    first, second = (_entries(tokenizer, by_name=alike) for tokenizer in (mine, theirs))
    pairs = {i: second[key] for key, i in first.items() if key in second}
    ends = (_closing(mine), _closing(theirs))
    if None not in ends and ends[0] not in pairs and ends[1] not in pairs.values():
        pairs[ends[0]] = ends[1]  # type: ignore[index, assignment]
    ids = sorted(pairs)
    return torch.tensor(ids, dtype=torch.int64), torch.tensor([pairs[i] for i in ids], dtype=torch.int64)


def token_bytes(tokenizer: Any) -> list[bytes | None]:
    """What each token id stands for; ``None`` for special tokens, and for ids without a token."""
    kind = _kind(tokenizer)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    vocabulary = tokenizer.get_vocab()
    out: list[bytes | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
    added = tokenizer.added_tokens_decoder
    for token, i in vocabulary.items():
        if i not in special:
            out[i] = token.encode() if i in added else _WRITTEN[kind](token)
    return out


def _entries(tokenizer: Any, by_name: bool) -> dict[Any, int]:
    found: dict[Any, int] = {}
    known = token_bytes(tokenizer)
    for token, i in sorted(tokenizer.get_vocab().items(), key=lambda x: (x[0].startswith("<0x"), x[1])):
        key = token if by_name else ("special", token) if known[i] is None else known[i]
        found.setdefault(key, i)
    return found


def _closing(tokenizer: Any) -> int | None:
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    return None if end is None else int(end)


def _kind(tokenizer: Any) -> str:
    """How a tokenizer writes its entries, by what it does to join them."""
    decoder = json.dumps(json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder"), ensure_ascii=False)
    return next((kind for kind, mark in _MARKS.items() if mark in decoder), "plain")


_MARKS = {"bytes": '"ByteLevel"', "words": '"WordPiece"', "pieces": "▁"}


def _printable() -> dict[str, int]:
    """The byte that each character stands for in byte-level vocabularies."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(rest)}


_BYTE = _printable()


def _of_bytes(token: str) -> bytes:
    return bytes(_BYTE[c] for c in token) if all(c in _BYTE for c in token) else token.encode()


def _of_piece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


def _of_word(token: str) -> bytes:
    """WordPiece drops spaces: a token that goes on has a mark, and a word that has none follows a space."""
    if token.startswith("##"):
        return token[2:].encode()
    return (f" {token}" if token[:1].isalnum() else token).encode()


_WRITTEN: dict[str, Callable[[str], bytes]] = {
    "bytes": _of_bytes, "pieces": _of_piece, "words": _of_word, "plain": str.encode,
}  # fmt: skip
"""From an entry as it is written to its bytes."""
