"""What can be kept of a row's distribution over classes, and how: one form for each ``keep``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from tutelage.data.views import view_seeds
from tutelage.errors import ConfigError, NumericsError
from tutelage.teachers.cache.coding import Coder, Counts
from tutelage.teachers.cache.columns import Array, Columns, Ragged
from tutelage.teachers.cache.sampling import concat_counts, draw_samples, round_stochastically

if TYPE_CHECKING:
    from tutelage.teachers.cache.layout import Layout

DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
STORED: dict[str, Any] = {"bf16": np.uint16, "fp16": np.float16, "fp32": np.float32}

NUMBERS = 2**23
"""Of float64 that are worked on at a time: a long text's distributions never exist all at once."""


class TeacherRows(NamedTuple):
    """Rows of a batch: of one sample each, or of all its tokens that count.

    Attributes:
        scores: ``[N, C]`` logits, or what goes into the output head, float32 on the CPU.
        lengths: rows of each sample.
        seeds: of each sample.
        tokens: whether rows are tokens, each of which has a seed of its own then.
        largest: ``[N, k]`` classes and log-probabilities of a teacher that says no more; ``scores`` are empty then.
    """

    scores: Tensor
    lengths: Array
    seeds: Tensor
    tokens: bool
    largest: tuple[Tensor, Tensor] | None = None

    def pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Some rows at a time, and the seed of each."""
        size = max(NUMBERS // max(self.scores.shape[1], 1), 1)
        seeds = self.seeds
        if self.tokens:
            each = zip(seeds.tolist(), self.lengths.tolist(), strict=True)
            seeds = torch.cat(
                [torch.empty(0, dtype=torch.int64), *(view_seeds(s, 1, torch.arange(n)) for s, n in each)]
            )
        for start in range(0, len(self.scores), size):
            yield self.scores[start : start + size], seeds[start : start + size]

    def samples(self) -> Iterator[tuple[int, list[Tensor]]]:
        """The seed of each sample, and its rows, some at a time."""
        size = max(NUMBERS // max(self.scores.shape[1], 1), 1)
        at = 0
        for seed, length in zip(self.seeds.tolist(), self.lengths.tolist(), strict=True):
            yield seed, list(self.scores[at : at + length].split(size)) if length else []
            at += length


@dataclass(frozen=True)
class DecodedRows:
    """Rows as they are read: scores, or a part of a distribution."""

    scores: Tensor | None = None
    index: Tensor | None = None
    values: Tensor | None = None


class Encoding(Protocol):
    """How rows of one ``keep`` become columns, and columns rows."""

    options: tuple[str, ...]
    """Fields of a layout that matter."""
    provides: frozenset[str]
    """What a teacher that reads it can give."""

    def check(self, layout: Layout) -> None:
        """Raise :class:`ConfigError` where the layout's numbers do not fit."""
        ...

    def even(self, layout: Layout) -> dict[str, tuple[int, Any]]:
        """Columns with as many numbers for each row, and their type."""
        ...

    def ragged(self, layout: Layout) -> dict[str, Any]:
        """Columns of any length for each sample, and their type."""
        ...

    def encode(self, layout: Layout, given: TeacherRows) -> Columns:
        """Even columns ``[N, width]``, and ragged ones, a row for each sample."""
        ...

    def decode(self, layout: Layout, columns: Columns, lengths: Array, temperature: float) -> DecodedRows:
        """The rows of samples, which have ``lengths`` of them."""
        ...


class DenseEncoding:
    """All logits."""

    options: tuple[str, ...] = ("classes",)
    provides: frozenset[str] = frozenset({"logits"})

    def check(self, layout: Layout) -> None:
        """Whether its numbers fit: they do."""

    def even(self, layout: Layout) -> dict[str, tuple[int, Any]]:
        """Columns of one width."""
        return {"logits": (layout.classes, STORED[layout.dtype])}

    def ragged(self, layout: Layout) -> dict[str, Any]:
        """Columns of any length."""
        return {}

    def encode(self, layout: Layout, given: TeacherRows) -> Columns:
        """Rows to columns."""
        return {"logits": to_stored(given.scores, layout.dtype)}

    def decode(self, layout: Layout, columns: Columns, lengths: Array, temperature: float) -> DecodedRows:
        """Columns to rows."""
        return DecodedRows(from_stored(columns["logits"], layout.dtype))


class HeadInputEncoding(DenseEncoding):
    """What goes into the output head, whose weights are kept once: logits are made of both again."""

    options: tuple[str, ...] = ("classes", "width")
    provides: frozenset[str] = frozenset({"logits", "head"})

    def check(self, layout: Layout) -> None:
        """Whether its numbers fit."""
        if layout.width < 1:
            raise ConfigError(
                "a cache of what goes into the output head, of no width", remedy="say how wide: Layout(width=...)"
            )

    def even(self, layout: Layout) -> dict[str, tuple[int, Any]]:
        """Columns of one width."""
        return {"logits": (layout.width, STORED[layout.dtype])}


class TopKEncoding:
    """The largest classes with their log-probabilities."""

    options: tuple[str, ...] = ("classes", "k", "temperatures")
    provides: frozenset[str] = frozenset({"topk"})

    def check(self, layout: Layout) -> None:
        """Whether its numbers fit."""
        if not 1 <= layout.k <= layout.classes:
            raise ConfigError(
                f"a cache of the {layout.k} largest of {layout.classes} classes", remedy=f"k is 1 to {layout.classes}"
            )

    def _width(self, layout: Layout) -> int:
        return layout.k

    def even(self, layout: Layout) -> dict[str, tuple[int, Any]]:
        """Columns of one width."""
        width = self._width(layout) * len(layout.temperatures)
        return {"log_probs": (width, STORED[layout.dtype])} if width else {}

    def ragged(self, layout: Layout) -> dict[str, Any]:
        """Columns of any length."""
        return {"index": np.uint8} if self._width(layout) else {}

    def encode(self, layout: Layout, given: TeacherRows) -> Columns:
        """Rows to columns."""
        width = self._width(layout)
        indices, values = [], []
        if given.largest is not None:
            index, order = given.largest[0].sort(-1)
            indices, values = [index], [given.largest[1].gather(-1, order)]
        for rows, _ in given.pieces():
            index = rows.topk(width, dim=-1).indices.sort(-1).values
            indices.append(index)
            logs = [(rows.double() / t).log_softmax(-1).gather(-1, index) for t in layout.temperatures]
            values.append(torch.cat(logs, -1).float())
        index = torch.cat(indices) if indices else torch.empty(0, width, dtype=torch.int64)
        value = torch.cat(values) if values else torch.empty(0, width * len(layout.temperatures))
        flat = index.flatten().numpy()
        counts = Counts(flat, np.ones_like(flat), np.full(len(index), width))
        return {
            "index": Coder(layout.classes, size=width).encode(counts, given.lengths),
            "log_probs": to_stored(value, layout.dtype),
        }

    def decode(self, layout: Layout, columns: Columns, lengths: Array, temperature: float) -> DecodedRows:
        """Columns to rows."""
        width, at = self._width(layout), layout.temperatures.index(temperature)
        index = Coder(layout.classes, size=width).decode(_ragged(columns["index"]), lengths).classes
        values = from_stored(columns["log_probs"], layout.dtype)[:, at * width : (at + 1) * width]
        return DecodedRows(None, torch.from_numpy(index).view(-1, width), values)


class StochasticRounding:
    """Every class's share of ``draws``, rounded by chance; what is left over is carried along a sample's tokens."""

    options: tuple[str, ...] = ("classes", "draws", "temperatures")
    provides: frozenset[str] = frozenset({"sampled"})

    def check(self, layout: Layout) -> None:
        """Whether its numbers fit."""
        if not 1 <= layout.draws <= 65_535:
            raise ConfigError(f"a cache of {layout.draws} draws a row", remedy="give 1 to 65535")

    def even(self, layout: Layout) -> dict[str, tuple[int, Any]]:
        """Columns of one width."""
        return {}

    def ragged(self, layout: Layout) -> dict[str, Any]:
        """Columns of any length."""
        return {f"drawn@{t:g}": np.uint8 for t in layout.temperatures}

    def _coder(self, layout: Layout) -> Coder:
        # How many classes a row has varies: by less than the square root of draws, but by chance.
        return Coder(layout.classes, layout.draws + 1, largest=min(layout.classes, 2 * layout.draws + 64))

    def encode(self, layout: Layout, given: TeacherRows) -> Columns:
        """Rows to columns."""
        columns: Columns = {}
        for i, t in enumerate(layout.temperatures):
            parts = [
                part
                for seed, pieces in given.samples()
                for part in round_stochastically(
                    ((x.double() / t).softmax(-1) for x in pieces), layout.draws, seed, i
                )
            ]
            columns[f"drawn@{t:g}"] = self._coder(layout).encode(concat_counts(parts), given.lengths)
        return columns

    def decode(self, layout: Layout, columns: Columns, lengths: Array, temperature: float) -> DecodedRows:
        """Columns to rows."""
        rows = self._coder(layout).decode(_ragged(columns[f"drawn@{temperature:g}"]), lengths)
        index, count = (torch.from_numpy(pad_rows(x, rows.sizes)) for x in (rows.classes, rows.counts))
        return DecodedRows(None, index, count.float() / layout.draws)


class SampledEncoding(TopKEncoding):
    """Independent draws, of a proposal p^power where that is not 1, beside the ``head`` largest classes exactly."""

    options: tuple[str, ...] = ("classes", "draws", "head", "power", "temperatures")
    provides: frozenset[str] = frozenset({"sampled"})

    def check(self, layout: Layout) -> None:
        """Whether its numbers fit."""
        if not (1 <= layout.draws <= 65_535 and 0 <= layout.head < layout.classes):
            raise ConfigError(
                f"a cache of {layout.draws} draws beside {layout.head} of {layout.classes} classes",
                remedy="draws is 1 to 65535, head below the number of classes",
            )
        if layout.power <= 0:
            raise ConfigError(f"draws from p^{layout.power:g}", remedy="power is above 0; 1 draws from p itself")

    def _width(self, layout: Layout) -> int:
        return layout.head

    def _coder(self, layout: Layout) -> Coder:
        return Coder(layout.classes, layout.draws, largest=min(layout.classes, layout.draws))

    def ragged(self, layout: Layout) -> dict[str, Any]:
        """Columns of any length."""
        columns = super().ragged(layout) | {f"drawn@{t:g}": np.uint8 for t in layout.temperatures}
        if layout.power != 1:
            columns |= {f"weight@{t:g}": STORED[layout.dtype] for t in layout.temperatures}
        return columns

    def encode(self, layout: Layout, given: TeacherRows) -> Columns:
        """Rows to columns."""
        columns = super().encode(layout, given) if layout.head else {}
        for i, t in enumerate(layout.temperatures):
            parts, weights = [], []
            for rows, seeds in given.pieces():
                p = (rows.double() / t).softmax(-1)
                rest = p.scatter(-1, rows.topk(layout.head, dim=-1).indices, 0.0) if layout.head else p
                proposal = rest if layout.power == 1 else rest.pow(layout.power)
                found = draw_samples(proposal, layout.draws, seeds, i)
                parts.append(found)
                if layout.power != 1:
                    row = torch.from_numpy(np.repeat(np.arange(len(rows)), found.sizes))
                    at = torch.from_numpy(found.classes)
                    log = rest[row, at].log() - proposal[row, at].log() + proposal.sum(-1)[row].log()
                    weights.append(to_stored(log.float(), layout.dtype))
            rows_drawn = concat_counts(parts)
            columns[f"drawn@{t:g}"] = self._coder(layout).encode(rows_drawn, given.lengths)
            if layout.power != 1:
                flat = np.concatenate(weights) if weights else np.empty(0, STORED[layout.dtype])
                columns[f"weight@{t:g}"] = Ragged(flat, sum_per_sample(rows_drawn.sizes, given.lengths))
        return columns

    def decode(self, layout: Layout, columns: Columns, lengths: Array, temperature: float) -> DecodedRows:
        """Columns to rows."""
        rows = self._coder(layout).decode(_ragged(columns[f"drawn@{temperature:g}"]), lengths)
        index, count = (torch.from_numpy(pad_rows(x, rows.sizes)) for x in (rows.classes, rows.counts))
        values = count.float() / layout.draws
        exact = super().decode(layout, columns, lengths, temperature) if layout.head else None
        if layout.power != 1:
            log = from_stored(_ragged(columns[f"weight@{temperature:g}"]).values, layout.dtype)
            values = values * torch.from_numpy(pad_rows(log.exp().numpy(), rows.sizes))
        elif exact is not None and exact.values is not None:
            values = values * (1.0 - exact.values.exp().sum(-1, keepdim=True)).clamp(min=0.0)
        if exact is None or exact.index is None or exact.values is None:
            return DecodedRows(None, index, values)
        return DecodedRows(None, torch.cat([exact.index, index], -1), torch.cat([exact.values.exp(), values], -1))


ENCODINGS: dict[str, Encoding] = {
    "dense": DenseEncoding(),
    "topk": TopKEncoding(),
    "sampled": SampledEncoding(),
    "stochastic_rounding": StochasticRounding(),
    "hidden": HeadInputEncoding(),
}


# Numbers -----------------------------------------------------------------------------------------------


def to_stored(x: Tensor, dtype: str) -> Array:
    """``x`` as it is stored.

    Raises:
        NumericsError: it holds what ``dtype`` does not.
    """
    stored = x.to(DTYPES[dtype])
    if not bool(torch.isfinite(stored).all()):
        raise NumericsError(
            f"the teacher gives numbers up to {x.abs().max().item():.3g}, which {dtype} does not hold",
            remedy="set teacher.cache.dtype to bf16 or fp32" if bool(torch.isfinite(x).all()) else "check it",
        )
    array: Array = (stored.view(torch.int16) if stored.dtype == torch.bfloat16 else stored).contiguous().numpy()
    return array.view(np.uint16) if stored.dtype == torch.bfloat16 else array


def from_stored(column: Array | Ragged, dtype: str) -> Tensor:
    """What is stored, as float32."""
    assert isinstance(column, np.ndarray)
    x = torch.from_numpy(column)
    return (x.view(torch.bfloat16) if dtype == "bf16" else x).float()


def pad_rows(values: Array, lengths: Array) -> Array:
    """``[N, longest]``, at least one wide, with zeros after each row's end."""
    width = max(int(lengths.max(initial=0)), 1)
    out: Array = np.zeros((len(lengths), width), dtype=values.dtype)
    out[np.arange(width) < lengths[:, None]] = values
    return out


def sum_per_sample(sizes: Array, lengths: Array) -> Array:
    """What ``sizes`` of rows are together for each sample of so many rows."""
    total = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    ends = np.cumsum(lengths)
    out: Array = total[ends] - total[ends - lengths]
    return out


def _ragged(column: Array | Ragged) -> Ragged:
    assert isinstance(column, Ragged)
    return column
