"""Tokenised texts: computed once, stored in an Arrow file, read by memory map."""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tutelage.data.alignment import TokenEnds
from tutelage.data.batch import IGNORE
from tutelage.data.chat import Learn, as_conversation, encode_learned
from tutelage.errors import DataError

FOLDER = Path("runs") / "tokens"
BLOCK = 1_000
"""Texts per call of the tokenizer."""

Progress = Callable[[Sequence[int], str], Iterable[int]]


@dataclass(frozen=True)
class Tokens:
    """Token ids of many texts, concatenated; the other arrays have one entry per token.

    Attributes:
        ids: the token ids.
        special: the tokenizer added the token; for a causal model: the token is not learned.
        types: token type ids; ``None`` if the tokenizer has none.
        words: index of the token's word, or -1; ``None`` unless texts are lists of words.
        offsets: start of each row, and end of the last one.
        pad: id of the padding token.
        side: side of the padding.
        segments: index of the token's text in a packed row; ``None`` if texts of a row may attend to each other.
        ends: ends of the tokens (:mod:`tutelage.data.alignment`); ``None`` unless computed.
    """

    ids: npt.NDArray[np.int32]
    special: npt.NDArray[np.bool_]
    offsets: npt.NDArray[np.int64]
    pad: int
    side: str = "right"
    types: npt.NDArray[np.int8] | None = None
    words: npt.NDArray[np.int32] | None = None
    segments: npt.NDArray[np.int32] | None = None
    ends: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Number of tokens of each row."""
        return np.diff(self.offsets)

    def row(self, values: npt.NDArray[Any], row: int) -> npt.NDArray[Any]:
        """The part of an array that belongs to a row."""
        return values[self.offsets[row] : self.offsets[row + 1]]

    def padded(self, values: npt.NDArray[Any], rows: npt.NDArray[np.int64], fill: Any) -> npt.NDArray[Any]:
        """``[B, L]``, padded to the longest of ``rows``."""
        lengths = self.lengths[rows]
        out = np.full((len(rows), int(lengths.max(initial=1))), fill, dtype=values.dtype)
        for i, row in enumerate(rows):
            mine = self.row(values, row)
            out[i, slice(out.shape[1] - len(mine), None) if self.side == "left" else slice(len(mine))] = mine
        return out

    def inputs(self, rows: npt.NDArray[np.int64], ids: npt.NDArray[np.int32] | None = None) -> dict[str, Tensor]:
        """Model inputs ``[B, L]``: ``input_ids`` (or ``ids`` instead), ``attention_mask`` and token types.

        For packed rows: ``input_ids`` and ``position_ids`` that restart with each text and with the padding; from
        these transformers derives the attention mask.
        """
        ids = self.padded(self.ids, rows, self.pad) if ids is None else ids
        if self.segments is not None:
            number = self.padded(self.segments, rows, -1)
            at = np.arange(ids.shape[1])[None]
            begins = np.ones_like(number, bool)
            begins[:, 1:] = number[:, 1:] != number[:, :-1]
            positions = at - np.maximum.accumulate(np.where(begins, at, 0), axis=1)
            return {
                "input_ids": torch.from_numpy(ids.astype(np.int64)),
                "position_ids": torch.from_numpy(positions.astype(np.int64)),
            }
        place, lengths = np.arange(ids.shape[1])[None], self.lengths[rows][:, None]
        attention = place >= ids.shape[1] - lengths if self.side == "left" else place < lengths
        inputs = {"input_ids": ids, "attention_mask": attention}
        if self.types is not None:
            inputs["token_type_ids"] = self.padded(self.types, rows, 0)
        return {name: torch.from_numpy(x.astype(np.int64)) for name, x in inputs.items()}

    def next_tokens(self, rows: npt.NDArray[np.int64]) -> Tensor:
        """``[B, L]``: the next token, if it belongs to the same text and is learned; else -100."""
        ids = self.padded(self.ids, rows, self.pad).astype(np.int64)
        learned = ~self.padded(self.special, rows, True)
        if self.segments is not None:
            number = self.padded(self.segments, rows, -1)
            learned[:, 1:] &= number[:, 1:] == number[:, :-1]
        labels = np.full_like(ids, IGNORE)
        labels[:, :-1] = np.where(learned[:, 1:], ids[:, 1:], IGNORE)
        return torch.from_numpy(labels)


def tokenize(
    columns: Sequence[Sequence[Any]],
    tokenizer: Any,
    *,
    max_length: int,
    pack: bool = False,
    words: bool = False,
    learn: Learn | None = None,
    ends: bool = False,
    key: str = "",
    progress: Progress = lambda blocks, _: blocks,
    what: str = "texts",
) -> Tokens:
    """Tokenise texts, or read the result of an earlier call from its file.

    Args:
        columns: one list of texts, or two lists for pairs; lists of words with ``words``.
        tokenizer: a fast tokenizer of transformers.
        max_length: maximum tokens of a row, including special ones; longer texts are truncated.
        pack: concatenate the texts and split them into rows of ``max_length``.
        words: texts are lists of words.
        learn: for a causal model: the part of conversations that is learned. Columns are then texts, conversations,
            or prompts and answers; padding is on the right; packed texts do not attend to each other, and only texts
            longer than a row are split.
        ends: compute the ends of tokens; needs ``learn``, excludes ``pack``.
        key: identifies the texts; the file name is a hash of it, the tokenizer and the arguments. Empty: no file.
        progress: wraps the iteration over blocks of texts.
        what: description of the texts, for the progress bar.

    Raises:
        DataError: the tokenizer has no padding token, or the disk is full.
    """
    pad, side = tokenizer.pad_token_id, str(tokenizer.padding_side)
    if learn is not None:  # positions mark the padding, so any token will do
        pad, side = next((i for i in (pad, tokenizer.eos_token_id) if i is not None), 0), "right"
    if pad is None:
        raise DataError(
            f"the tokenizer, a {type(tokenizer).__name__}, has no padding token",
            remedy="set one: tokenizer.pad_token = tokenizer.eos_token, and save it",
        )
    settings = {"max_length": max_length, "pack": pack, "words": words, "columns": len(columns), "learn": learn}
    settings |= {"ends": True} if ends else {}
    text = json.dumps([key, tokenizer_fingerprint(tokenizer), settings], sort_keys=True)
    path = FOLDER / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.arrow" if key else None
    if path is not None and path.exists() and (stored := _read(path, pad, side)) is not None:
        return stored

    measure = TokenEnds(tokenizer) if ends else None

    def block(rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
        if learn is not None:
            return _encode_block(rows, tokenizer, max_length, pack, learn, measure)
        return _tokenize_block(rows, tokenizer, None if pack else max_length, words)

    parts = [
        block([c[start : start + BLOCK] for c in columns])
        for start in progress(range(0, len(columns[0]), BLOCK), f"tokenising {what}")
    ]
    flat = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    lengths = flat.pop("lengths")
    if pack and learn is None:
        flat, lengths = _concatenate_and_split(flat, lengths, tokenizer, max_length)
    elif pack:
        flat, lengths = _pack_best_fit(flat, lengths, max_length)
    tokens = _tokens(flat, lengths, pad, side)
    if path is not None:
        _write(path, flat, lengths)
        tokens = _read(path, pad, side) or tokens
    return tokens


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A digest of everything that determines the tokens of a tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    rest = [tokenizer.pad_token, tokenizer.padding_side, tokenizer.truncation_side, tokenizer.chat_template]
    return hashlib.sha256((_unset(text) + json.dumps(rest)).encode()).hexdigest()[:16]


def _unset(text: str) -> str:
    """The JSON of a tokenizer without truncation and padding, which earlier calls may have set."""
    try:
        loaded = json.loads(text)
    except ValueError:
        return text
    if isinstance(loaded, dict):
        loaded.pop("truncation", None)
        loaded.pop("padding", None)
    return json.dumps(loaded, sort_keys=True)


def _tokenize_block(
    columns: Sequence[Sequence[Any]], tokenizer: Any, max_length: int | None, words: bool
) -> dict[str, Any]:
    cutting = {"truncation": True, "max_length": max_length} if max_length is not None else {"verbose": False}
    encoding = tokenizer(
        *(list(c) for c in columns), return_special_tokens_mask=True, is_split_into_words=words, **cutting
    )
    lengths = np.array([len(row) for row in encoding["input_ids"]], np.int64)
    out = {"lengths": lengths, "ids": _flat(encoding["input_ids"], np.int32)}
    out["special"] = _flat(encoding["special_tokens_mask"], np.bool_)
    if "token_type_ids" in encoding:
        out["types"] = _flat(encoding["token_type_ids"], np.int8)
    if words:
        numbers = [[-1 if w is None else w for w in encoding.word_ids(i)] for i in range(len(lengths))]
        out["words"] = _flat(numbers, np.int32)
    return out


def _flat(rows: Sequence[Sequence[int]], dtype: Any) -> Any:
    return np.fromiter((x for row in rows for x in row), dtype)


def _concatenate_and_split(
    flat: dict[str, Any], lengths: Any, tokenizer: Any, max_length: int
) -> tuple[dict[str, Any], Any]:
    """Rows of the concatenated texts with separators, each row with the special tokens of the tokenizer."""
    first, last = _special_ends(tokenizer)
    stop = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    ends = np.repeat(np.arange(len(lengths)), lengths)
    plain, of = flat["ids"][~flat["special"]], ends[~flat["special"]]
    breaks = np.flatnonzero(np.diff(of)) + 1
    stream = np.insert(plain, breaks, stop) if stop is not None else plain
    special = (
        np.insert(np.zeros(len(plain), np.bool_), breaks, True) if stop is not None else np.zeros_like(plain, bool)
    )
    room = max_length - len(first) - len(last)
    if room < 1:
        raise DataError(
            f"max_length {max_length} leaves no room for text", where="data.max_length", remedy="raise it"
        )
    ids, marks, sizes = [], [], []
    for start in range(0, max(len(stream), 1), room):
        ids += [first, stream[start : start + room], last]
        marks += [np.ones(len(first), bool), special[start : start + room], np.ones(len(last), bool)]
        sizes.append(sum(len(x) for x in ids[-3:]))
    packed = {"ids": np.concatenate(ids).astype(np.int32), "special": np.concatenate(marks)}
    if "types" in flat:
        packed["types"] = np.zeros(len(packed["ids"]), np.int8)
    return packed, np.array(sizes, np.int64)


def _encode_block(
    columns: Sequence[Sequence[Any]],
    tokenizer: Any,
    max_length: int,
    split: bool,
    learn: Learn,
    measure: TokenEnds | None,
) -> dict[str, Any]:
    """Tokens of texts and conversations for a causal model; with ``split`` a long text becomes several rows."""
    ids: list[list[int]] = []
    special: list[list[bool]] = []
    ends: list[npt.NDArray[np.int64]] = []
    for row in zip(*columns, strict=True):
        text = as_conversation(row)
        if measure is None:
            own, learned = encode_learned(text, tokenizer, learn)
        else:
            own, learned, places = measure(text, learn)
            ends.append(places[:max_length])
        stop = len(own) if split and isinstance(text, str) else max_length
        for start in range(0, max(min(stop, len(own)), 1), max_length):
            ids.append(own[start : start + max_length])
            special.append([not x for x in learned[start : start + max_length]])
    lengths = np.array([len(row) for row in ids], np.int64)
    out = {"lengths": lengths, "ids": _flat(ids, np.int32), "special": _flat(special, np.bool_)}
    return out if measure is None else out | {"ends": np.concatenate(ends)}


def _pack_best_fit(flat: dict[str, Any], lengths: Any, room: int) -> tuple[dict[str, Any], Any]:
    """Pack texts into rows of at most ``room`` tokens: longest first, each into the fullest row that fits."""
    rows: list[list[int]] = []
    left: dict[int, list[int]] = {}  # rows by the room that they have left
    sizes: list[int] = []  # those rooms, ascending
    for text in np.argsort(-lengths, kind="stable"):
        need = int(lengths[text])
        at = bisect_left(sizes, need)
        if at == len(sizes):
            row, rest = len(rows), room - need
            rows.append([int(text)])
        else:
            size = sizes[at]
            row, rest = left[size].pop(), size - need
            rows[row].append(int(text))
            if not left[size]:
                del left[size], sizes[at]
        if rest:
            if rest not in left:
                left[rest] = []
                insort(sizes, rest)
            left[rest].append(row)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    order = np.concatenate([np.arange(starts[t], starts[t + 1]) for row in rows for t in row])
    packed = {name: values[order] for name, values in flat.items()}
    packed["segments"] = np.concatenate([np.full(lengths[t], i, np.int32) for row in rows for i, t in enumerate(row)])
    return packed, np.array([int(lengths[row].sum()) for row in rows], np.int64)


def _special_ends(tokenizer: Any) -> tuple[Any, Any]:
    """The special tokens before and after a text."""
    encoding = tokenizer("a", return_special_tokens_mask=True)
    marks = np.array(encoding["special_tokens_mask"], bool)
    ids = np.array(encoding["input_ids"], np.int32)
    inside = np.flatnonzero(~marks)
    return ids[: inside[0]], ids[inside[-1] + 1 :]


def _tokens(flat: dict[str, Any], lengths: Any, pad: int, side: str) -> Tokens:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Tokens(offsets=offsets, pad=pad, side=side, **flat)


def _write(path: Path, flat: dict[str, Any], lengths: Any) -> None:
    import pyarrow as pa

    arrays = {"lengths": pa.array(lengths)} | {
        name: pa.array(x.astype(np.int8) if x.dtype == np.bool_ else x) for name, x in flat.items()
    }
    part = path.with_suffix(f".part-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with pa.OSFile(str(part), "wb") as sink:
            for name, array in arrays.items():  # columns of unequal length: a stream of one-column tables
                table = pa.table({name: array})
                with pa.ipc.new_stream(sink, table.schema) as writer:
                    writer.write_table(table, max_chunksize=len(table) or 1)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise DataError(
            f"tokens cannot be written: {error.strerror or error}", where=str(path), remedy="free some disk space"
        ) from None


def _read(path: Path, pad: int, side: str) -> Tokens | None:
    """The memory-mapped content of the file; ``None`` if it is damaged, so that the texts are tokenised again."""
    import pyarrow as pa

    flat: dict[str, Any] = {}
    try:
        source = pa.memory_map(str(path))
        while source.tell() < source.size():
            with pa.ipc.open_stream(source) as reader:
                table = reader.read_all()
            column = table.column(0).combine_chunks() if table.column(0).num_chunks != 1 else table.column(0).chunk(0)
            flat[table.column_names[0]] = column.to_numpy(zero_copy_only=False)
        lengths = flat.pop("lengths")
        if int(lengths.sum()) != len(flat["ids"]) or any(len(x) != len(flat["ids"]) for x in flat.values()):
            return None
    except (pa.ArrowException, OSError, KeyError):
        return None
    flat["special"] = flat["special"].view(np.bool_)
    return _tokens(flat, lengths, pad, side)
