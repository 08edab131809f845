"""What a cache stores for each sample: from a signal to Arrow columns and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tutelage.errors import CapabilityError, ConfigError
from tutelage.taps import Head, Needs
from tutelage.teachers.cache.columns import Array, Columns, Ragged
from tutelage.teachers.cache.encodings import (
    DTYPES,
    ENCODINGS,
    STORED,
    ColumnTypes,
    Encoding,
    TeacherRows,
    from_stored,
    to_stored,
)
from tutelage.teachers.signal import Signal, Sparse

Keep = Literal["dense", "topk", "sampled", "stochastic_rounding", "hidden"]

TOKENS = "tokens"
"""The column with the number of rows of each sample."""


def without_inputs(head: Head) -> Head:
    """A head as a cache of head inputs stores it once: without inputs, its adapter merged into the weight."""
    merged = head.merged()
    return merged._replace(inputs=merged.weight.new_empty(0))


@dataclass(frozen=True)
class Layout:
    """What a cache stores for each sample: one distribution over classes, or one for each counted token.

    Attributes:
        keep: ``dense``: all logits; ``topk``: the ``k`` largest; ``sampled``: ``draws`` from the distribution, with
            the ``head`` largest classes exactly and the draws from the others; ``stochastic_rounding``: ``draws``
            times each probability, rounded stochastically; ``hidden``: the inputs of the output head, whose weights
            are stored once. ``None``: no logits.
        classes: number of classes of the teacher.
        dtype: of stored numbers.
        k, draws, head: see ``keep``.
        temperatures: of sparse distributions.
        hidden: the shape of one row at each tap; with ``tokens`` of one token.
        power: ``sampled`` draws from p^power, with importance weights. 1 has the least variance.
        width: size of the output head's input.
        tokens: store a row for each counted position of a sample.

    Raises:
        ConfigError: an unknown dtype, or an option out of range.
    """

    keep: Keep | None = "dense"
    classes: int = 0
    dtype: str = "fp16"
    k: int = 8
    draws: int = 64
    head: int = 0
    temperatures: tuple[float, ...] = ()
    hidden: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    power: float = 1.0
    width: int = 0
    tokens: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"unknown cache dtype {self.dtype!r}", remedy=f"allowed: {', '.join(DTYPES)}")
        if self.is_sparse and not self.temperatures:
            raise ConfigError(
                f"a {self.keep} cache has no temperature", remedy="set the temperatures of the distributions"
            )
        if self.encoding is not None:
            self.encoding.check()

    @cached_property
    def encoding(self) -> Encoding | None:
        """How logits are stored."""
        if self.keep is None:
            return None
        kind = ENCODINGS[self.keep]
        return kind(**{option.name: getattr(self, option.name) for option in fields(kind)})

    @property
    def is_sparse(self) -> bool:
        """Whether part of a distribution is stored, which exists at fixed temperatures only."""
        return hasattr(self.encoding, "temperatures")

    def to_dict(self) -> dict[str, Any]:
        """The layout as JSON, without the options that its encoding does not use."""
        used = {"keep", "dtype", "hidden", *(() if self.encoding is None else vars(self.encoding))}
        hidden = {tap: list(shape) for tap, shape in self.hidden.items()}
        lists = asdict(self) | {"hidden": hidden, "temperatures": list(self.temperatures)}
        raw = {k: v for k, v in lists.items() if k in used}
        return raw | ({"tokens": True} if self.tokens else {})

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> Layout:
        """The inverse of :meth:`to_dict`."""
        hidden = {tap: tuple(shape) for tap, shape in raw["hidden"].items()}
        return Layout(**{**raw, "hidden": hidden, "temperatures": tuple(raw.get("temperatures", ()))})

    @property
    def provides(self) -> frozenset[str]:
        """What a teacher that reads this layout provides."""
        logits = frozenset[str]() if self.encoding is None else self.encoding.provides
        return logits | ({"hidden"} if self.hidden else frozenset())

    @property
    def needs(self) -> Needs:
        """What the teacher that fills the cache must provide."""
        head = "head" in self.provides
        return Needs(logits=self.keep is not None and not head, hidden=tuple(self.hidden), head=head)

    def missing(self, needs: Needs) -> list[str]:
        """What is needed and not stored."""
        missing = [tap for tap in needs.hidden if tap not in self.hidden]
        missing += ["the output head"] * (needs.head and "head" not in self.provides)
        return missing + ["logits"] * (needs.logits and self.keep is None)

    def columns(self) -> ColumnTypes:
        """The columns: values per sample and dtype. ``None`` values: a variable number for each sample."""
        rows = self._row_columns()
        if not self.tokens:
            return rows
        return {TOKENS: (1, np.int32)} | {name: (None, dtype) for name, (_, dtype) in rows.items()}

    def _row_columns(self) -> ColumnTypes:
        """The columns of rows, those of variable width last."""
        columns = {} if self.encoding is None else self.encoding.columns()
        columns |= {f"hidden:{tap}": (math.prod(shape), STORED[self.dtype]) for tap, shape in self.hidden.items()}
        return dict(sorted(columns.items(), key=lambda column: column[1][0] is None))

    # To columns ------------------------------------------------------------------------------------------

    def encode(self, signal: Signal, seeds: Tensor, counted: Tensor | None = None) -> Columns:
        """The columns of a signal's samples; raises :class:`CapabilityError` if it does not fit the layout.

        ``seeds`` ``[B]`` determine the random draws of each sample. ``counted`` ``[B, L]`` is true at the
        tokens that a layout of tokens stores.
        """
        assert counted is not None or not self.tokens
        mask = counted.cpu() if self.tokens and counted is not None else None
        lengths = np.ones(len(seeds), np.int64) if mask is None else mask.sum(1).numpy()
        columns: Columns = {}
        if self.encoding is not None:
            largest = self._largest(signal, mask)
            scores = torch.empty(0, 1)
            if largest is None:
                head = signal.head if "head" in self.provides else None
                scores = self._rows("the logits", signal.dense() if head is None else head.inputs, mask)
            columns.update(self.encoding.encode(TeacherRows(scores, lengths, seeds, self.tokens, largest)))
        for tap, shape in self.hidden.items():
            rows = self._rows(tap, signal.hidden[tap], mask)
            if tuple(rows.shape[1:]) != tuple(shape):
                raise CapabilityError(
                    f"{tap} of the teacher has shape {tuple(rows.shape[1:])} in this batch, and the cache stores "
                    f"{tuple(shape)}",
                    remedy="pad all samples to one size, or use the live teacher",
                )
            columns[f"hidden:{tap}"] = to_stored(rows.flatten(1), self.dtype)
        if not self.tokens:
            return columns
        for name, values in columns.items():
            if isinstance(values, np.ndarray):
                columns[name] = Ragged(values.reshape(-1), lengths * values.shape[1])
        columns[TOKENS] = lengths[:, None].astype(np.int32)
        return columns

    def _largest(self, signal: Signal, counted: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Classes and log-probabilities of a top-k signal, which a cache stores as they are."""
        sparse = signal.sparse
        if sparse is None or signal.logits is not None:
            return None
        k = sparse.index.shape[-1]
        if sparse.kind != "topk" or (self.keep, self.k, self.temperatures) != ("topk", k, (sparse.temperature,)):
            temperatures = ", ".join(f"{t:g}" for t in self.temperatures)
            raise CapabilityError(
                f"the teacher provides the top {k} classes at T = {sparse.temperature:g}, and the cache is set to "
                f"{self.keep}, {self.k} at T = {temperatures}",
                remedy=f"set the cache to topk, k: {k}, at T = {sparse.temperature:g}",
            )
        index = self._rows("top-k classes", sparse.index, counted).long()
        return index, self._rows("top-k values", sparse.values, counted)

    def _rows(self, what: str, x: Tensor, counted: Tensor | None) -> Tensor:
        if counted is None:
            return x.detach().float().cpu()
        if tuple(x.shape[:2]) != tuple(counted.shape):
            raise CapabilityError(
                f"{what} of the teacher has shape {tuple(x.shape)}, and the batch has {tuple(counted.shape)} tokens",
                remedy="use a tap with one row per token, and the same tokens for teacher and student",
            )
        return x.detach()[counted.to(x.device)].float().cpu()

    # From columns ----------------------------------------------------------------------------------------------

    def decode(
        self,
        columns: Columns,
        needs: Needs,
        device: torch.device | str,
        *,
        counted: Tensor | None = None,
        output: Head | None = None,
    ) -> Signal:
        """The signal of samples with counted tokens, as far as needed; zeros at tokens that do not count.

        ``counted`` is ``[B, L]``, for a layout of tokens; ``output`` the head without inputs, for a cache of head
        inputs. Raises :class:`CapabilityError` if the temperature is not stored.
        """
        first = next(iter(columns.values()), np.empty(0))
        lengths = np.ones(len(first.lengths if isinstance(first, Ragged) else first), np.int64)
        if self.tokens:
            lengths = tokens_per_sample(columns)
            widths = {name: width for name, (width, _) in self._row_columns().items() if width is not None}
            columns = {n: c.values.reshape(-1, widths[n]) if isinstance(c, Ragged) and n in widths else c
                       for n, c in columns.items()}  # fmt: skip

        def place(x: Tensor) -> Tensor:
            rows = x.to(device)
            if not self.tokens or counted is None:
                return rows
            out = rows.new_zeros(*counted.shape, *rows.shape[1:])
            out[counted.to(device)] = rows
            return out

        hidden = {
            tap: place(from_stored(columns[f"hidden:{tap}"], self.dtype).view(-1, *self.hidden[tap]))
            for tap in needs.hidden
        }
        if self.encoding is None or not (needs.logits or needs.head):
            return Signal(None, hidden)
        temperature = self.check_temperature(needs.temperature)
        rows = self.encoding.decode(columns, lengths, temperature)
        if isinstance(rows, tuple):
            kind: Literal["topk", "sampled"] = "topk" if "topk" in self.provides else "sampled"
            sparse = Sparse(kind, place(rows[0]), place(rows[1]), self.classes, temperature)
            return Signal(None, hidden, sparse=sparse)
        if "head" not in self.provides:
            return Signal(place(rows), hidden)
        assert output is not None
        head = output.map(lambda x: x.to(device))._replace(inputs=rows.to(device))
        logits = place(head.map(Tensor.float).scores(slice(None))) if needs.logits else None
        return Signal(logits, hidden, head._replace(inputs=place(head.inputs)) if needs.head else None)

    def check_temperature(self, temperature: float | None) -> float:
        """The temperature to decode at; raises :class:`CapabilityError` if it is not stored."""
        if not self.is_sparse:
            return 1.0
        if temperature is None and len(self.temperatures) == 1:
            return self.temperatures[0]
        if temperature not in self.temperatures:
            stored = ", ".join(f"{t:g}" for t in self.temperatures)
            needed = "states no temperature" if temperature is None else f"needs T = {temperature:g}"
            raise CapabilityError(
                f"the cache stores {self.keep} distributions at T = {stored}, and the method {needed}",
                remedy="set method.temperature to a stored one, or write another cache: the temperature of a sparse "
                "distribution cannot change afterwards",
            )
        return temperature

    def empty(self) -> Columns:
        """The columns of no sample."""
        return {
            name: Ragged(np.empty(0, dtype), np.empty(0, np.int64)) if width is None else np.empty((0, width), dtype)
            for name, (width, dtype) in self.columns().items()
        }


def tokens_per_sample(columns: Columns) -> Array:
    """Number of rows of each sample, in a layout of tokens."""
    out: Array = np.asarray(columns[TOKENS]).reshape(-1).astype(np.int64)
    return out
