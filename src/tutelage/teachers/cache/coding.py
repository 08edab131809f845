"""Sets of classes in few bits.

A set is coded by the gaps between its classes in ascending order. A gap from 2^e to 2^(e+1) - 1 is stored as the
exponent e (4 bits) and the e bits below the leading one. Frequent tokens have small ids, so samples from
a language model are dense at small ids, where gaps are short: 11.4 bits per class for SmolLM2's 49,152 tokens with 12
to 50 draws, where a plain integer takes 16 (``benchmarks/sparse_tokens.py``). All exponents of a sample come first
and have one width, so that the position of every field follows without reading the fields before it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tutelage.teachers.cache.columns import Array, Ragged, prefix_sums, sum_groups

EXPONENT_BITS = 4


class Counts(NamedTuple):
    """Classes of all rows, ascending within a row; occurrences of each, at least 1; number of classes in each row."""

    classes: Array
    counts: Array
    sizes: Array


@dataclass
class Coder:
    """Encodes :class:`Counts` as bytes and decodes them.

    Attributes:
        classes: number of classes in total.
        most: highest count that can occur; with 1 no counts are stored.
        size: number of classes in every row; ``None``: rows have up to ``largest`` classes, and each row stores its
            number.
        largest: see ``size``.
    """

    classes: int
    most: int = 1
    size: int | None = None
    largest: int = 255

    def __post_init__(self) -> None:
        self.largest = self.largest if self.size is None else self.size
        self._gap_bits = int(self.classes).bit_length()
        self._top = min((1 << EXPONENT_BITS) - 1, self._gap_bits)  # the exponent from which a gap is stored in full
        self._head_bits = self._top.bit_length() + (self.most > 1)
        self._count_bits = max(self.most - 2, 1).bit_length()
        self._size_bits = 0 if self.size is not None else self.largest.bit_length()

    def encode(self, rows: Counts, lengths: Array) -> Ragged:
        """The bytes of each sample of ``lengths`` rows; raises ``ValueError`` for more than the format holds."""
        if len(rows.counts) and (rows.counts.max() > self.most or rows.sizes.max() > self.largest):
            raise ValueError(
                f"a row has {rows.sizes.max()} classes, one of them with count {rows.counts.max()}; "
                f"the format holds at most {self.largest} and {self.most}"
            )
        is_first = _positions(rows.sizes) == 0
        gap = rows.classes.astype(np.int64) - np.where(is_first, -1, np.roll(rows.classes, 1))
        exponent = np.frexp(gap.astype(np.float64))[1].astype(np.int64) - 1
        exponent = np.minimum(exponent, self._top)
        rest = np.where(exponent < self._top, gap - (1 << exponent), gap)
        is_repeated = rows.counts.astype(np.int64) > 1
        widths = self._widths(exponent, is_repeated)
        rest = np.where(is_repeated, (rest << self._count_bits) | (rows.counts.astype(np.int64) - 2), rest)
        entries, heads, rests = self._places(rows.sizes, lengths)
        size = -(-(rests + sum_groups(widths, entries)) // 8)
        start = 8 * (np.cumsum(size) - size)
        out = np.zeros(int(size.sum()) + 8, np.uint8)
        if self.size is None:
            place = np.repeat(start, lengths) + self._size_bits * _positions(lengths)
            _write_bits(out, place, rows.sizes, self._size_bits)
        head = (exponent << 1) | is_repeated if self.most > 1 else exponent
        _write_bits(out, heads + np.repeat(start, entries), head, self._head_bits)
        _write_bits(out, np.repeat(rests + start, entries) + _sum_before(widths, entries), rest, widths)
        return Ragged(out[: len(out) - 8], size)

    def decode(self, coded: Array | Ragged, lengths: Array) -> Counts:
        """The inverse of :meth:`encode`."""
        assert isinstance(coded, Ragged)
        raw = np.concatenate([coded.values, np.zeros(8, np.uint8)])
        start = 8 * (np.cumsum(coded.lengths.astype(np.int64)) - coded.lengths)
        sizes = np.full(int(lengths.sum()), self.largest, np.int64)
        if self.size is None:
            place = np.repeat(start, lengths) + self._size_bits * _positions(lengths)
            sizes = _read_bits(raw, place, self._size_bits)
        entries, heads, rests = self._places(sizes, lengths)
        head = _read_bits(raw, heads + np.repeat(start, entries), self._head_bits)
        exponent, is_repeated = (head >> 1, head & 1 == 1) if self.most > 1 else (head, np.zeros(len(head), bool))
        widths = self._widths(exponent, is_repeated)
        rest = _read_bits(raw, np.repeat(rests + start, entries) + _sum_before(widths, entries), widths)
        counts = np.where(is_repeated, (rest & ((1 << self._count_bits) - 1)) + 2, 1)
        rest = np.where(is_repeated, rest >> self._count_bits, rest)
        gap = np.where(exponent < self._top, (1 << exponent) + rest, rest)
        before_row = np.repeat(prefix_sums(gap)[np.cumsum(sizes) - sizes], sizes)
        return Counts(np.cumsum(gap) - before_row - 1, counts, sizes)

    def _widths(self, exponent: Array, is_repeated: Array) -> Array:
        widths: Array = np.where(exponent < self._top, exponent, self._gap_bits) + self._count_bits * is_repeated
        return widths

    def _places(self, sizes: Array, lengths: Array) -> tuple[Array, Array, Array]:
        """Number of classes of each sample; first bit of each head and of each sample's rest, from the sample on."""
        entries = sum_groups(sizes, lengths)
        start = lengths * self._size_bits
        heads = np.repeat(start, entries) + self._head_bits * _positions(entries)
        return entries, heads, start + self._head_bits * entries


def _positions(lengths: Array) -> Array:
    """0, 1, ... within each group."""
    out: Array = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return out


def _sum_before(widths: Array, lengths: Array) -> Array:
    """For each value the sum of the values before it in its group."""
    total = prefix_sums(widths)
    out: Array = total[:-1] - np.repeat(total[np.cumsum(lengths) - lengths], lengths)
    return out


def _write_bits(out: Array, place: Array, values: Array, widths: Array | int) -> None:
    """Write ``values`` of ``widths`` bits, at most 49, from the bit ``place`` on."""
    byte, bit = place >> 3, (place & 7).astype(np.uint64)
    shifted = values.astype(np.uint64) << (np.uint64(56) - bit - np.asarray(widths, np.uint64))
    for i in range(7):
        np.bitwise_or.at(out, byte + i, ((shifted >> np.uint64(48 - 8 * i)) & np.uint64(255)).astype(np.uint8))


def _read_bits(raw: Array, place: Array, widths: Array | int) -> Array:
    """Read numbers of ``widths`` bits, at most 57, from the bit ``place`` on."""
    windows: Array = np.ndarray((len(raw) - 7,), ">u8", buffer=raw, strides=(1,))
    values = windows[place >> 3].astype(np.uint64) << (place & 7).astype(np.uint64)
    return ((values >> np.uint64(1)) >> (np.uint64(63) - np.asarray(widths, np.uint64))).astype(np.int64)
