"""Tokenised texts: computed once, stored in a safetensors file, read by memory map."""

import hashlib
import json
import os
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tutelage.data.alignment import TokenEnds
from tutelage.data.batch import IGNORE
from tutelage.data.chat import Learn, as_conversation, encode_learned
from tutelage.errors import DataError
from tutelage.files import wrap_write_errors

FOLDER = Path("runs") / "tokens"
BLOCK = 1_000
"""Texts per call of the tokenizer."""
OVERLAP = 4
"""Windows of a long list of words share a quarter of their tokens with the next one."""

Progress = Callable[[Sequence[int], str], Iterable[int]]


@dataclass(frozen=True)
class Tokens:
    """Token ids of many texts, concatenated. All arrays but ``offsets`` have one entry per token.

    Attributes:
        ids: the token ids.
        special: whether the tokenizer added the token, or another window of the text counts it; for a causal model:
            whether the token is not learned.
        types: token type ids; ``None`` if the tokenizer has none.
        words: index of the token's word, or -1; ``None`` unless texts are lists of words.
        offsets: start of each row, and end of the last row.
        pad: id of the padding token.
        side: side of the padding.
        segments: index of the token's text in a packed row; ``None`` if texts of a row may attend to each other.
        ends: ends of the tokens (:mod:`tutelage.data.alignment`); ``None`` unless computed.
        texts: for lists of words, ``[rows]``, ascending: the text of each row. A long text has several, overlapping
            rows (windows); each of its words counts in the one that has the most words around it.
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
    texts: npt.NDArray[np.int64] | None = None

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
        """The values of ``rows`` as ``[B, L]``, padded to the longest row."""
        lengths = self.lengths[rows]
        out = np.full((len(rows), int(lengths.max(initial=1))), fill, dtype=values.dtype)
        for i, row in enumerate(rows):
            mine = self.row(values, row)
            out[i, slice(out.shape[1] - len(mine), None) if self.side == "left" else slice(len(mine))] = mine
        return out

    def inputs(self, rows: npt.NDArray[np.int64]) -> dict[str, Tensor]:
        """Model inputs ``[B, L]``: ``input_ids``, ``attention_mask`` and token types.

        For packed rows: ``input_ids`` and ``position_ids``. Positions restart at each text and at the padding;
        transformers derives the attention mask from them.
        """
        inputs = {"input_ids": self.padded(self.ids, rows, self.pad)}
        length = inputs["input_ids"].shape[1]
        place = np.arange(length)[None]
        if self.segments is not None:
            begins = np.diff(self.padded(self.segments, rows, -1), axis=1, prepend=-2) != 0
            inputs["position_ids"] = place - np.maximum.accumulate(np.where(begins, place, 0), axis=1)
        else:
            lengths = self.lengths[rows][:, None]
            inputs["attention_mask"] = place >= length - lengths if self.side == "left" else place < lengths
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
    store: bool = False,
    progress: Progress = lambda blocks, _: blocks,
    what: str = "texts",
) -> Tokens:
    """Tokenise texts, or read the result of an earlier call from its file.

    Args:
        columns: one list of texts, or two lists for pairs; lists of words with ``words``.
        tokenizer: a fast tokenizer of transformers.
        max_length: maximum tokens of a row, including special ones; longer texts are truncated, and longer lists of
            words become several rows.
        pack: concatenate the texts and split them into rows of ``max_length``.
        words: texts are lists of words.
        learn: for a causal model: the part of conversations that is learned. Columns are then texts, conversations,
            or prompts and answers; padding is on the right; packed texts do not attend to each other, and only texts
            longer than a row are split.
        ends: compute the ends of tokens; needs ``learn``, excludes ``pack``.
        store: keep the tokens in a file; its name is a hash of texts, tokenizer and arguments. A tokenizer without a
            backend has none.
        progress: wraps the iteration over blocks of texts.
        what: description of the texts, for the progress bar.

    Raises:
        DataError: the tokenizer has no padding token, or ``max_length`` is too small.
        RunDirectoryError: the file cannot be written.
    """
    pad, side = tokenizer.pad_token_id, str(tokenizer.padding_side)
    if learn is not None:  # labels and positions mark the padding, so any token works
        pad, side = next((i for i in (pad, tokenizer.eos_token_id) if i is not None), 0), "right"
    if pad is None:
        raise DataError(
            f"the tokenizer, a {type(tokenizer).__name__}, has no padding token",
            remedy="set one: tokenizer.pad_token = tokenizer.eos_token, and save it",
        )
    settings = [max_length, pack, f"windows overlap by 1/{OVERLAP}" if words else False, len(columns), learn, ends]
    path = None
    if store and getattr(tokenizer, "backend_tokenizer", None) is not None:
        path = FOLDER / f"{_digest(columns, [tokenizer_fingerprint(tokenizer), *settings])}.safetensors"
    if path is not None and (stored := _read(path)) is not None:
        return Tokens(pad=pad, side=side, **stored)

    measure = TokenEnds(tokenizer) if ends else None

    def block(rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
        if learn is not None:
            return _encode_block(rows, tokenizer, max_length, pack, learn, measure)
        if words:
            return _windows_of_block(_tokenize_block(rows, tokenizer, None, words), max_length)
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
    if words:
        flat["texts"] = np.repeat(np.arange(len(flat["windows"])), flat.pop("windows"))
    flat["offsets"] = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    if path is not None:
        _write(path, flat)
        flat = _read(path) or flat
    return Tokens(pad=pad, side=side, **flat)


def _digest(columns: Sequence[Sequence[Any]], settings: Sequence[Any]) -> str:
    """The first 16 hex digits of a hash of texts (or lists of words, or conversations) and settings."""
    versions = [version(name) for name in ("tokenizers", "transformers")]
    digest = hashlib.sha256(json.dumps([versions, settings]).encode())
    for value in (value for column in columns for value in column):
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        content = text.encode("utf-8", "surrogatepass")
        digest.update(f"{type(value).__name__} {len(content)} ".encode() + content)
    return digest.hexdigest()[:16]


def tokenizer_fingerprint(tokenizer: Any, *, ids_only: bool = False) -> str:
    """A digest of everything that determines what a tokenizer makes of a text.

    With ``ids_only`` without the padding and the names of the inputs: tokenizers with one digest cut texts into the
    same tokens.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content: Any = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    else:  # earlier calls may have set truncation and padding
        content = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("truncation", "padding")}
    special = {k: str(v) for k, v in tokenizer.special_tokens_map.items() if not (ids_only and k == "pad_token")}
    names = ["truncation_side", "chat_template", "split_special_tokens"]
    names += [] if ids_only else ["padding_side", "model_input_names"]
    rest = [special, {name: getattr(tokenizer, name, None) for name in names}]
    return hashlib.sha256(json.dumps([content, rest], sort_keys=True).encode()).hexdigest()[:16]


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


def _windows_of_block(block: dict[str, Any], max_length: int) -> dict[str, Any]:
    """The rows of lists of words, each cut into windows of at most ``max_length`` tokens."""
    lengths = block.pop("lengths")
    starts = np.concatenate([[0], np.cumsum(lengths)])
    parts: list[Any] = []
    counted: list[Any] = []
    sizes, windows = [], []
    for start, stop in pairwise(starts):
        cut = _windows(block["special"][start:stop], block["words"][start:stop], max_length)
        parts += [start + places for places, _ in cut]
        counted += [counts for _, counts in cut]
        sizes += [len(places) for places, _ in cut]
        windows.append(len(cut))
    places = np.concatenate(parts)
    out = {name: values[places] for name, values in block.items()}
    out["special"] |= ~np.concatenate(counted)
    return out | {"lengths": np.array(sizes, np.int64), "windows": np.array(windows, np.int64)}


def _windows(special: Any, words: Any, max_length: int) -> list[tuple[Any, Any]]:
    """Places of the tokens of each window of a text, and which of them count there.

    The special tokens before and after the text are in each window.
    """
    content = np.flatnonzero(~special)
    if not len(content) or len(special) <= max_length:
        return [(np.arange(len(special)), np.ones(len(special), bool))]
    first, stop = int(content[0]), int(content[-1]) + 1
    before, after = np.arange(first), np.arange(stop, len(special))
    room = max_length - len(before) - len(after)
    if room < OVERLAP:
        raise DataError(
            f"max_length {max_length} leaves no room for words next to {len(before) + len(after)} special tokens",
            where="data.max_length",
            remedy="raise it",
        )
    step, total = room - room // OVERLAP, stop - first
    begins = np.arange(0, max(total - room, 0) + step, step)
    place, ends = np.arange(total)[None], (begins + room)[:, None]
    left = np.where(begins[:, None] == 0, total, place - begins[:, None])  # a text's own edge cuts nothing off
    right = np.where(ends >= total, total, ends - 1 - place)
    inside = (place >= begins[:, None]) & (place < ends)
    owner = np.where(inside, np.minimum(left, right), -1).argmax(0)
    text = words[first:stop]
    opening = np.maximum.accumulate(np.where(np.diff(text, prepend=-2) != 0, place[0], 0))
    owner = owner[opening]  # a word counts where its first token does
    cut = []
    for number, begin in enumerate(begins.tolist()):
        mine = np.arange(begin, min(begin + room, total))
        places = np.concatenate([before, first + mine, after])
        counts = np.concatenate([np.ones(len(before), bool), owner[mine] == number, np.ones(len(after), bool)])
        cut.append((places, counts))
    return cut


def _flat(rows: Sequence[Sequence[int]], dtype: Any) -> Any:
    return np.fromiter((x for row in rows for x in row), dtype)


def _concatenate_and_split(
    flat: dict[str, Any], lengths: Any, tokenizer: Any, max_length: int
) -> tuple[dict[str, Any], Any]:
    """Concatenate the texts with separators, and split them into rows with the tokenizer's special tokens."""
    example = tokenizer("a", return_special_tokens_mask=True)
    own = np.flatnonzero(~np.array(example["special_tokens_mask"], bool))
    example_ids = np.array(example["input_ids"], np.int32)
    first, last = example_ids[: own[0]], example_ids[own[-1] + 1 :]
    room = max_length - len(first) - len(last)
    if room < 1:
        raise DataError(
            f"max_length {max_length} leaves no room for text next to {len(first) + len(last)} special tokens",
            where="data.max_length",
            remedy="raise it",
        )
    text_of = np.repeat(np.arange(len(lengths)), lengths)[~flat["special"]]
    stream = flat["ids"][~flat["special"]]
    special = np.zeros(len(stream), bool)
    separator = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    if separator is not None:
        breaks = np.flatnonzero(np.diff(text_of)) + 1
        stream, special = np.insert(stream, breaks, separator), np.insert(special, breaks, True)
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
    """Tokenise texts and conversations for a causal model; with ``split`` a long text becomes several rows."""
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
    left: dict[int, list[int]] = {}  # rows by the number of tokens that still fit
    sizes: list[int] = []  # those numbers, ascending
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


def _write(path: Path, flat: dict[str, Any]) -> None:
    part = path.with_suffix(f".part-{os.getpid()}")
    with wrap_write_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: torch.from_numpy(values) for name, values in flat.items()}, part)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any] | None:
    """The memory-mapped arrays; ``None`` if the file is missing or damaged, so that the texts are tokenised again."""
    try:
        return {name: values.numpy() for name, values in load_file(path).items()}
    except (SafetensorError, OSError):
        return None
