"""Sets of classes in few bits.

A set is coded by the gaps between its classes in ascending order. A gap from 2^e to 2^(e+1) - 1 is stored as the
exponent e (4 bits) and the e bits below the leading one. Frequent tokens have small ids, so samples from
a language model are dense at small ids, where gaps are short: 11.4 bits per class for SmolLM2's 49,152 tokens with 12
to 50 draws, where a plain integer takes 16 (``benchmarks/sparse_tokens.py``). All exponents of a sample come first
and have one width, so that the position of every field follows without reading the fields before it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tutelage.teachers.cache.columns import Array, Ragged, prefix_sums, sum_groups

EXPONENT_BITS = 4


class Counts(NamedTuple):
    """How often each class occurs in each row; rows differ in length.

    Attributes:
        classes: classes of all rows, concatenated; ascending within a row.
        counts: occurrences of each of these classes, at least 1.
        sizes: number of classes in each row.
    """

    classes: Array
    counts: Array
    sizes: Array


class Coder(NamedTuple):
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

    def encode(self, rows: Counts, lengths: Array) -> Ragged:
        """The bytes of each sample; samples have ``lengths`` rows.

        Raises:
            ValueError: a row has more classes, or a class a higher count, than the format holds.
        """
        if len(rows.counts) and (rows.counts.max() > self.most or rows.sizes.max() > self._largest):
            raise ValueError(
                f"a row has {rows.sizes.max()} classes, one of them with count {rows.counts.max()}; "
                f"the format holds at most {self._largest} and {self.most}"
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

    def decode(self, coded: Ragged, lengths: Array) -> Counts:
        """The inverse of :meth:`encode`."""
        raw = np.concatenate([coded.values, np.zeros(8, np.uint8)])
        start = 8 * (np.cumsum(coded.lengths.astype(np.int64)) - coded.lengths)
        if self.size is None:
            sizes = _read_bits(
                raw, np.repeat(start, lengths) + self._size_bits * _positions(lengths), self._size_bits
            )
        else:
            sizes = np.full(int(lengths.sum()), self.size, np.int64)
        entries, heads, rests = self._places(sizes, lengths)
        head = _read_bits(raw, heads + np.repeat(start, entries), self._head_bits)
        exponent, is_repeated = head, np.zeros(len(head), bool)
        if self.most > 1:
            exponent, is_repeated = head >> 1, (head & 1).astype(bool)
        widths = self._widths(exponent, is_repeated)
        rest = _read_bits(raw, np.repeat(rests + start, entries) + _sum_before(widths, entries), widths)
        counts = np.where(is_repeated, (rest & ((1 << self._count_bits) - 1)) + 2, 1)
        rest = np.where(is_repeated, rest >> self._count_bits, rest)
        gap = np.where(exponent < self._top, (1 << exponent) + rest, rest)
        before_row = np.repeat(prefix_sums(gap)[np.cumsum(sizes) - sizes], sizes)
        return Counts(np.cumsum(gap) - before_row - 1, counts, sizes)

    # Widths and places, in bits ----------------------------------------------------------------------------

    @property
    def _gap_bits(self) -> int:
        return int(self.classes).bit_length()

    @property
    def _top(self) -> int:
        """The exponent from which a gap is stored in full."""
        return min((1 << EXPONENT_BITS) - 1, self._gap_bits)

    @property
    def _head_bits(self) -> int:
        return self._top.bit_length() + (self.most > 1)

    @property
    def _count_bits(self) -> int:
        return max(self.most - 2, 1).bit_length()

    @property
    def _largest(self) -> int:
        return self.largest if self.size is None else self.size

    @property
    def _size_bits(self) -> int:
        return 0 if self.size is not None else self.largest.bit_length()

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
    byte = place >> 3
    shifted = values.astype(np.uint64) << (np.uint64(56) - (place & 7).astype(np.uint64) - _u64(widths))
    for i in range(7):
        np.bitwise_or.at(out, byte + i, ((shifted >> np.uint64(48 - 8 * i)) & np.uint64(255)).astype(np.uint8))


def _read_bits(raw: Array, place: Array, widths: Array | int) -> Array:
    """Read numbers of ``widths`` bits, at most 57, from the bit ``place`` on."""
    windows: Array = np.ndarray((len(raw) - 7,), ">u8", buffer=raw, strides=(1,))
    values = windows[place >> 3].astype(np.uint64) << (place & 7).astype(np.uint64)
    return ((values >> np.uint64(1)) >> (np.uint64(63) - _u64(widths))).astype(np.int64)


def _u64(widths: Array | int) -> Array:
    return np.asarray(widths).astype(np.uint64)
