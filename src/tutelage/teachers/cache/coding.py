"""Sets of classes in few bits.

A set is coded by the gaps between its classes in ascending order: an exponent of 4 bits and, for a gap of 2^e to
2^(e+1) - 1, the e bits that tell which. Tokenizers number tokens about in the order of how frequent they are, so sets
drawn from a language model are dense at the low end, where gaps are short: 11.4 bits a class of SmolLM2's 49,152, 12
draws or 50, where a number takes 16 (``benchmarks/sparse_tokens.py``). All exponents of a sample come first and have
one width, so that the place of everything is known without reading one after another.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tutelage.teachers.cache.columns import Array, Ragged

EXPONENT_BITS = 4


class Counts(NamedTuple):
    """How often classes came, in rows of any length.

    Attributes:
        classes: of all rows, one row after another, ascending in each.
        counts: of each of them, 1 or more.
        sizes: classes of each row.
    """

    classes: Array
    counts: Array
    sizes: Array


class Coder(NamedTuple):
    """Writes and reads :class:`Counts`.

    Attributes:
        classes: how many there are in all.
        most: the highest count; with 1 no counts are written.
        size: classes of each row where all have as many; ``None``: at most ``largest``, and their number is written.
        largest: see ``size``.
    """

    classes: int
    most: int = 1
    size: int | None = None
    largest: int = 255

    def encode(self, rows: Counts, lengths: Array) -> Ragged:
        """Bytes of each sample, which has ``lengths`` rows.

        Raises:
            ValueError: a row is larger, or a count higher, than can be written.
        """
        if len(rows.counts) and (rows.counts.max() > self.most or rows.sizes.max() > self._largest):
            raise ValueError(
                f"a row of {rows.sizes.max()} classes, one {rows.counts.max()} times; "
                f"at most {self._largest} and {self.most} can be kept"
            )
        gap = rows.classes.astype(np.int64) - np.where(_first(rows.sizes), -1, np.roll(rows.classes, 1))
        exponent = np.frexp(gap.astype(np.float64))[1].astype(np.int64) - 1
        exponent = np.minimum(exponent, self._top)
        rest = np.where(exponent < self._top, gap - (1 << exponent), gap)
        again = rows.counts.astype(np.int64) > 1
        widths = self._widths(exponent, again)
        rest = np.where(again, (rest << self._count_bits) | (rows.counts.astype(np.int64) - 2), rest)
        places = self._places(rows.sizes, lengths)
        ends = places.rest + _sums(widths, places.entries)
        size = -(-(ends - places.start) // 8)
        start = np.cumsum(size) - size
        move = 8 * start - places.start  # places so far were those in an endless row of bits for each sample
        out = np.zeros(int(size.sum()) + 8, np.uint8)
        if self.size is None:
            _put(out, places.sizes + np.repeat(move, lengths), rows.sizes, self._size_bits)
        of = np.repeat(move, places.entries)
        head = (exponent << 1) | again if self.most > 1 else exponent
        _put(out, places.heads + of, head, self._head_bits)
        first = np.repeat(places.rest, places.entries) + of
        _put(out, first + _before(widths, places.entries), rest, widths)
        return Ragged(out[: len(out) - 8], size)

    def decode(self, coded: Ragged, lengths: Array) -> Counts:
        """What was encoded."""
        raw = np.concatenate([coded.values, np.zeros(8, np.uint8)])
        start = 8 * (np.cumsum(coded.lengths.astype(np.int64)) - coded.lengths)
        rows = int(lengths.sum())
        if self.size is None:
            at = np.repeat(start, lengths) + self._size_bits * _order(lengths)
            sizes = _get(raw, at, self._size_bits)
        else:
            sizes = np.full(rows, self.size, np.int64)
        places = self._places(sizes, lengths)
        move = start - places.start
        of = np.repeat(move, places.entries)
        head = _get(raw, places.heads + of, self._head_bits)
        exponent, again = (head >> 1, (head & 1).astype(bool)) if self.most > 1 else (head, np.zeros(len(head), bool))
        widths = self._widths(exponent, again)
        first = np.repeat(places.rest, places.entries) + of
        rest = _get(raw, first + _before(widths, places.entries), widths)
        counts = np.where(again, (rest & ((1 << self._count_bits) - 1)) + 2, 1)
        rest = np.where(again, rest >> self._count_bits, rest)
        gap = np.where(exponent < self._top, (1 << exponent) + rest, rest)
        through = np.cumsum(gap)
        base = np.repeat(_at(through, np.cumsum(sizes) - sizes - 1), sizes)
        return Counts(through - base - 1, counts, sizes)

    # Widths and places, in bits ----------------------------------------------------------------------------

    @property
    def _gap_bits(self) -> int:
        return int(self.classes).bit_length()

    @property
    def _top(self) -> int:
        """The exponent behind which the gap is written whole."""
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

    def _widths(self, exponent: Array, again: Array) -> Array:
        widths: Array = np.where(exponent < self._top, exponent, self._gap_bits) + self._count_bits * again
        return widths

    def _places(self, sizes: Array, lengths: Array) -> _Places:
        """Where fields are, as if each sample began where ``start`` says."""
        ends = np.cumsum(lengths)
        total = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        entries = total[ends] - total[ends - lengths]
        room = lengths * self._size_bits
        start = np.zeros(len(lengths), np.int64)
        return _Places(
            start, entries,
            np.repeat(start, lengths) + self._size_bits * _order(lengths),
            np.repeat(start + room, entries) + self._head_bits * _order(entries),
            start + room + self._head_bits * entries,
        )  # fmt: skip


class _Places(NamedTuple):
    start: Array
    entries: Array
    """Classes of each sample."""
    sizes: Array
    heads: Array
    rest: Array
    """Where each sample's last part begins."""


def _order(lengths: Array) -> Array:
    """0, 1, ... within each group."""
    out: Array = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return out


def _first(sizes: Array) -> Array:
    out: Array = _order(sizes) == 0
    return out


def _at(sums: Array, place: Array) -> Array:
    """Sums up to and with ``place``; 0 before the first."""
    padded = np.concatenate([[0], sums])
    out: Array = padded[place + 1]
    return out


def _sums(widths: Array, lengths: Array) -> Array:
    """Sum of each group."""
    ends = np.cumsum(lengths)
    total = np.concatenate([[0], np.cumsum(widths)])
    out: Array = total[ends] - total[ends - lengths]
    return out


def _before(widths: Array, lengths: Array) -> Array:
    """Sum of what comes before within each group."""
    total = np.cumsum(widths) - widths
    first = np.cumsum(lengths) - lengths
    out: Array = total - np.repeat(total[np.minimum(first, max(len(total) - 1, 0))] if len(total) else first, lengths)
    return out


def _put(out: Array, place: Array, values: Array, widths: Array | int) -> None:
    """Write ``values`` of ``widths`` bits, at most 49, from the bit ``place`` on."""
    byte = place >> 3
    shifted = values.astype(np.uint64) << (np.uint64(56) - (place & 7).astype(np.uint64) - _u64(widths))
    for i in range(7):
        np.bitwise_or.at(out, byte + i, ((shifted >> np.uint64(48 - 8 * i)) & np.uint64(255)).astype(np.uint8))


def _get(raw: Array, place: Array, widths: Array | int) -> Array:
    """Read numbers of ``widths`` bits, at most 57, from the bit ``place`` on."""
    windows: Array = np.ndarray((len(raw) - 7,), ">u8", buffer=raw, strides=(1,))
    seen = windows[place >> 3].astype(np.uint64) << (place & 7).astype(np.uint64)
    return ((seen >> np.uint64(1)) >> (np.uint64(63) - _u64(widths))).astype(np.int64)


def _u64(widths: Array | int) -> Array:
    return np.asarray(widths).astype(np.uint64)
