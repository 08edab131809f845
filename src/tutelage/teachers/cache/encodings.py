"""How a row's distribution over classes is stored: one encoding for each value of ``keep``."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tutelage.data.views import uniform, view_seeds
from tutelage.errors import ConfigError, NumericsError
from tutelage.teachers.cache.coding import Coder, Counts
from tutelage.teachers.cache.columns import Array, Columns, Ragged, sum_groups

DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
STORED: dict[str, Any] = {"bf16": np.uint16, "fp16": np.float16, "fp32": np.float32}

ColumnTypes = dict[str, tuple[int | None, Any]]

CHUNK_NUMBERS = 2**23
"""Float64 numbers that are processed at a time, so that only part of a long text's distributions is in memory."""


class TeacherRows(NamedTuple):
    """Rows of a batch: one for each sample, or (``tokens``) one for each counted token, with seeds of their own.

    ``scores`` are ``[N, C]`` logits or inputs of the output head, float32 on the CPU; ``largest`` are ``[N, k]``
    classes and log-probabilities from a top-k teacher, and ``scores`` are empty then.
    """

    scores: Tensor
    lengths: Array
    seeds: Tensor
    tokens: bool
    largest: tuple[Tensor, Tensor] | None = None

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Chunks of rows, each with the seeds of its rows."""
        seeds = self.seeds
        if self.tokens:
            each = zip(seeds.tolist(), self.lengths.tolist(), strict=True)
            seeds = torch.cat([seeds.new_empty(0), *(view_seeds(s, 1, torch.arange(n)) for s, n in each)])
        for start in range(0, len(self.scores), self._chunk_size):
            yield self.scores[start : start + self._chunk_size], seeds[start : start + self._chunk_size]

    def samples(self) -> Iterator[tuple[int, list[Tensor]]]:
        """The seed of each sample, and its rows in chunks."""
        at = 0
        for seed, length in zip(self.seeds.tolist(), self.lengths.tolist(), strict=True):
            yield seed, list(self.scores[at : at + length].split(self._chunk_size)) if length else []
            at += length

    @property
    def _chunk_size(self) -> int:
        return max(CHUNK_NUMBERS // max(self.scores.shape[1], 1), 1)


@dataclass(frozen=True)
class Encoding:
    """Converts rows to columns and back; this one stores all logits, and the subclasses part of the distribution.

    The fields of a class are the fields of a layout that it uses.
    """

    dtype: str
    classes: int
    provides: ClassVar[frozenset[str]] = frozenset({"logits"})

    def check(self) -> None:
        """Raise :class:`ConfigError` if an option is out of range."""

    def columns(self) -> ColumnTypes:
        """The columns: values per row and dtype. ``None`` values: a variable number for each sample."""
        return {"logits": (self.classes, STORED[self.dtype])}

    def encode(self, rows: TeacherRows) -> Columns:
        """Columns ``[N, width]``, and columns of variable width with a row for each sample."""
        return {"logits": to_stored(rows.scores, self.dtype)}

    def decode(self, columns: Columns, lengths: Array, temperature: float) -> Tensor | tuple[Tensor, Tensor]:
        """The rows of samples, which have ``lengths`` rows: scores, or classes and values of sparse distributions."""
        return from_stored(columns["logits"], self.dtype)


@dataclass(frozen=True)
class _HeadInputEncoding(Encoding):
    """The inputs of the output head. The head's weights are stored once, and logits are computed from both."""

    width: int
    provides = frozenset({"logits", "head"})

    def check(self) -> None:
        if self.width < 1:
            raise ConfigError(
                f"a cache of head inputs has width {self.width}", remedy="set Layout(width=...) to the hidden size"
            )

    def columns(self) -> ColumnTypes:
        return {"logits": (self.width, STORED[self.dtype])}


@dataclass(frozen=True)
class _TopKEncoding(Encoding):
    """The largest classes with their log-probabilities at each temperature."""

    k: int
    temperatures: tuple[float, ...]
    provides = frozenset({"topk"})

    def check(self) -> None:
        if not 1 <= self.k <= self.classes:
            raise ConfigError(
                f"k of the top-k cache is {self.k}, and the teacher has {self.classes} classes",
                remedy=f"set k to 1 to {self.classes}",
            )

    def columns(self) -> ColumnTypes:
        if not self.k:
            return {}
        return {"log_probs": (self.k * len(self.temperatures), STORED[self.dtype]), "index": (None, np.uint8)}

    def encode(self, rows: TeacherRows) -> Columns:
        indices = [torch.empty(0, self.k, dtype=torch.int64)]
        values = [torch.empty(0, self.k * len(self.temperatures))]
        if rows.largest is not None:
            index, order = rows.largest[0].sort(-1)
            indices, values = [index], [rows.largest[1].gather(-1, order)]
        for scores, _ in rows.chunks():
            indices.append(scores.topk(self.k, dim=-1).indices.sort(-1).values)
            logs = [(scores.double() / t).log_softmax(-1).gather(-1, indices[-1]) for t in self.temperatures]
            values.append(torch.cat(logs, -1).float())
        index, value = torch.cat(indices), torch.cat(values)
        flat = index.flatten().numpy()
        counts = Counts(flat, np.ones_like(flat), np.full(len(index), self.k))
        return {
            "index": Coder(self.classes, size=self.k).encode(counts, rows.lengths),
            "log_probs": to_stored(value, self.dtype),
        }

    def decode(self, columns: Columns, lengths: Array, temperature: float) -> tuple[Tensor, Tensor]:
        at = self.temperatures.index(temperature)
        index = Coder(self.classes, size=self.k).decode(columns["index"], lengths).classes
        values = from_stored(columns["log_probs"], self.dtype)[:, at * self.k : (at + 1) * self.k]
        return torch.from_numpy(index).view(-1, self.k), values


@dataclass(frozen=True)
class _StochasticRounding(Encoding):
    """``draws`` times each probability, rounded stochastically; the rounding error is carried to the next token."""

    draws: int
    temperatures: tuple[float, ...]
    provides = frozenset({"sampled"})

    def check(self) -> None:
        if not 1 <= self.draws <= 65_535:
            raise ConfigError(f"a cache has {self.draws} draws per row", remedy="set draws to 1 to 65535")

    @property
    def _coder(self) -> Coder:
        # The number of classes in a row varies by less than the square root of draws, but randomly.
        return Coder(self.classes, self.draws + 1, largest=min(self.classes, 2 * self.draws + 64))

    def columns(self) -> ColumnTypes:
        return {f"drawn@{t:g}": (None, np.uint8) for t in self.temperatures}

    def encode(self, rows: TeacherRows) -> Columns:
        columns: Columns = {}
        for i, t in enumerate(self.temperatures):
            parts = [
                part
                for seed, chunks in rows.samples()
                for part in round_stochastically(((x.double() / t).softmax(-1) for x in chunks), self.draws, seed, i)
            ]
            columns[f"drawn@{t:g}"] = self._coder.encode(concat_counts(parts), rows.lengths)
        return columns

    def _decode_counts(self, columns: Columns, lengths: Array, temperature: float) -> tuple[Array, Tensor, Tensor]:
        """Number of classes of each row, and padded classes and weights."""
        rows = self._coder.decode(columns[f"drawn@{temperature:g}"], lengths)
        index, count = (torch.from_numpy(pad_rows(x, rows.sizes)) for x in (rows.classes, rows.counts))
        return rows.sizes, index, count.float() / self.draws

    def decode(self, columns: Columns, lengths: Array, temperature: float) -> tuple[Tensor, Tensor]:
        return self._decode_counts(columns, lengths, temperature)[1:]


@dataclass(frozen=True)
class _SampledEncoding(_StochasticRounding):
    """Independent draws from p, or from the proposal p^power, and the ``head`` largest classes exactly."""

    head: int
    power: float

    def check(self) -> None:
        if not (1 <= self.draws <= 65_535 and 0 <= self.head < self.classes):
            raise ConfigError(
                f"a cache has {self.draws} draws per row and {self.head} of {self.classes} classes exactly",
                remedy="set draws to 1 to 65535, and head below the number of classes",
            )
        if self.power <= 0:
            raise ConfigError(
                f"a cache draws from p^{self.power:g}", remedy="set power above 0; 1 draws from p itself"
            )

    @property
    def _exact(self) -> _TopKEncoding:
        return _TopKEncoding(self.dtype, self.classes, self.head, self.temperatures)

    @property
    def _coder(self) -> Coder:
        return Coder(self.classes, self.draws, largest=min(self.classes, self.draws))

    def columns(self) -> ColumnTypes:
        columns = self._exact.columns() | super().columns()
        if self.power != 1:
            columns |= {f"weight@{t:g}": (None, STORED[self.dtype]) for t in self.temperatures}
        return columns

    def encode(self, rows: TeacherRows) -> Columns:
        columns = self._exact.encode(rows) if self.head else {}
        for i, t in enumerate(self.temperatures):
            parts, weights = [], []
            for scores, seeds in rows.chunks():
                p = (scores.double() / t).softmax(-1)
                rest = p.scatter(-1, scores.topk(self.head, dim=-1).indices, 0.0) if self.head else p
                proposal = rest if self.power == 1 else rest.pow(self.power)
                part = draw_samples(proposal, self.draws, seeds, i)
                parts.append(part)
                if self.power != 1:
                    row = torch.from_numpy(np.repeat(np.arange(len(scores)), part.sizes))
                    at = torch.from_numpy(part.classes)
                    log = rest[row, at].log() - proposal[row, at].log() + proposal.sum(-1)[row].log()
                    weights.append(to_stored(log.float(), self.dtype))
            samples = concat_counts(parts)
            columns[f"drawn@{t:g}"] = self._coder.encode(samples, rows.lengths)
            if self.power != 1:
                flat = np.concatenate(weights) if weights else np.empty(0, STORED[self.dtype])
                columns[f"weight@{t:g}"] = Ragged(flat, sum_groups(samples.sizes, rows.lengths))
        return columns

    def decode(self, columns: Columns, lengths: Array, temperature: float) -> tuple[Tensor, Tensor]:
        sizes, index, values = self._decode_counts(columns, lengths, temperature)
        exact = self._exact.decode(columns, lengths, temperature) if self.head else None
        if self.power != 1:
            weights = columns[f"weight@{temperature:g}"]
            assert isinstance(weights, Ragged)
            log = from_stored(weights.values, self.dtype)
            values = values * torch.from_numpy(pad_rows(log.exp().numpy(), sizes))
        elif exact is not None:
            values = values * (1.0 - exact[1].exp().sum(-1, keepdim=True)).clamp(min=0.0)
        if exact is None:
            return index, values
        return torch.cat([exact[0], index], -1), torch.cat([exact[1].exp(), values], -1)


ENCODINGS: dict[str, type[Encoding]] = {
    "dense": Encoding,
    "topk": _TopKEncoding,
    "sampled": _SampledEncoding,
    "stochastic_rounding": _StochasticRounding,
    "hidden": _HeadInputEncoding,
}


# Samples. Random numbers are functions of a seed, so a row gets the same sample in every batch ---------------


def draw_samples(p: Tensor, draws: int, seeds: Tensor, stream: int) -> Counts:
    """``draws`` independent draws from each row of unnormalised ``p``, by the inverse of its cumulative sum.

    ``p`` ``[N, C]`` is float64 with positive sums; ``seeds`` are ``[N]``; different streams give independent draws.
    """
    u = np.stack([uniform(seeds, 1_000_003 * stream + d) for d in range(draws)], 1)
    total = p.cumsum(-1)
    thresholds = torch.from_numpy(u) * total[:, -1:]
    classes = torch.searchsorted(total, thresholds, right=True).clamp(max=p.shape[-1] - 1).sort(-1).values.numpy()
    first = np.diff(classes, axis=1, prepend=-1) != 0
    starts = np.flatnonzero(first)
    return Counts(classes.ravel()[starts], np.diff(np.append(starts, classes.size)), first.sum(1))


def round_stochastically(pieces: Iterator[Tensor], draws: int, seed: int, stream: int) -> Iterator[Counts]:
    r"""Stochastic rounding of ``draws`` times the distributions of one sample's tokens, with error feedback.

    The rounding error of each class is carried to the next token. With :math:`C_t = n (p_1 + ... + p_t)` and one
    uniform u of [0, 1) for each class, the count at t is :math:`\lfloor C_t + u \rfloor - \lfloor C_{t-1} + u
    \rfloor`. Its expectation is :math:`n p_t` at every token. Over any stretch of tokens the total count of a class
    is wrong by less than one, where independent draws are wrong by the square root of their number. ``pieces`` are
    ``[L, C]`` float64 distributions of consecutive tokens; different streams round independently.
    """
    carry: Tensor | None = None
    for p in pieces:
        if carry is None:
            classes = view_seeds(seed, stream, torch.arange(p.shape[-1]))
            carry = torch.from_numpy(uniform(classes, 11))
        places, counts = [], []
        for share in p * draws:  # one token at a time keeps the carry in the processor's cache
            carry += share
            place = (carry >= 1.0).nonzero().squeeze(1)
            values = carry[place]
            count = values.floor()
            carry[place] = values - count
            places.append(place)
            counts.append(count)
        sizes = np.array([len(place) for place in places], np.int64)
        yield Counts(torch.cat(places).numpy(), torch.cat(counts).long().numpy(), sizes)


def concat_counts(parts: list[Counts]) -> Counts:
    """The rows of several parts, concatenated."""
    none = Counts(*(np.empty(0, np.int64) for _ in range(3)))
    return Counts(*(np.concatenate(column) for column in zip(none, *parts, strict=True)))


# Numbers -----------------------------------------------------------------------------------------------


def to_stored(x: Tensor, dtype: str) -> Array:
    """``x`` as an array; raises :class:`NumericsError` if it is not finite in ``dtype``."""
    stored = x.to(DTYPES[dtype])
    if not bool(torch.isfinite(stored).all()):
        finite = bool(torch.isfinite(x).all())
        raise NumericsError(
            f"the teacher returns numbers up to {x.abs().max().item():.3g}, which {dtype} cannot represent",
            remedy="set teacher.cache.dtype to bf16 or fp32"
            if finite
            else "check why the teacher returns inf or nan",
        )
    is_bf16 = stored.dtype == torch.bfloat16  # which numpy does not have
    array: Array = (stored.view(torch.int16) if is_bf16 else stored).contiguous().numpy()
    return array.view(np.uint16) if is_bf16 else array


def from_stored(column: Array | Ragged, dtype: str) -> Tensor:
    """The numbers of a column as float32."""
    assert isinstance(column, np.ndarray)
    x = torch.from_numpy(column)
    return (x.view(torch.bfloat16) if dtype == "bf16" else x).float()


def pad_rows(values: Array, lengths: Array) -> Array:
    """``[N, longest]``, at least one wide, with zeros after each row's end."""
    width = max(int(lengths.max(initial=0)), 1)
    out: Array = np.zeros((len(lengths), width), dtype=values.dtype)
    out[np.arange(width) < lengths[:, None]] = values
    return out
