"""What a cache keeps of each sample: from a signal to Arrow columns and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

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
    DecodedRows,
    Encoding,
    TeacherRows,
    from_stored,
    to_stored,
)
from tutelage.teachers.signal import Signal, Sparse

Keep = Literal["dense", "topk", "sampled", "stochastic_rounding", "hidden"]

TOKENS = "tokens"
"""The column that says how many rows a sample has."""


class OutputLayer(NamedTuple):
    """The output head without its input, which a cache of what goes into it keeps once; as in :class:`Head`."""

    weight: Tensor
    bias: Tensor | None
    scale: float = 1.0
    softcap: float | None = None

    @staticmethod
    def of(head: Head) -> OutputLayer:
        """All of a head but its input."""
        whole = head.merged()
        return OutputLayer(whole.weight, whole.bias, whole.scale, whole.softcap)

    def to(self, device: torch.device | str) -> OutputLayer:
        """The same on a device."""
        return OutputLayer.of(Head(self.weight, *self).map(lambda x: x.to(device)))


@dataclass(frozen=True)
class Layout:
    """What is kept of each sample: a distribution over classes, or one for each of its tokens that count.

    Attributes:
        keep: of the logits: all (``dense``); the ``k`` largest (``topk``); ``draws`` from the distribution
            (``sampled``), the ``head`` largest exactly and the draws from the rest; ``draws`` times each class's
            probability, rounded by chance (``stochastic_rounding``); or all, as what goes into the output head,
            whose weights are kept once (``hidden``). ``None``: no logits.
        classes: how many the teacher scores.
        dtype: of numbers that are stored.
        temperatures: at which parts of a distribution are kept.
        power: ``sampled`` draws from p^power, with weights that make up for it. 1 has the least variance.
        width: of what goes into the output head.
        hidden: the shape of a row of each tap; with ``tokens`` of each token.
        tokens: whether a sample has a row for each position that counts.
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
            raise ConfigError(f"a cache of dtype {self.dtype!r}", remedy=f"allowed: {', '.join(DTYPES)}")
        if self.partial and not self.temperatures:
            raise ConfigError(
                f"a {self.keep} cache without a temperature", remedy="say at which T the distribution is kept"
            )
        if self.form is not None:
            self.form.check(self)

    @property
    def form(self) -> Encoding | None:
        """How the logits are kept."""
        return None if self.keep is None else ENCODINGS[self.keep]

    @property
    def partial(self) -> bool:
        """Whether part of a distribution is kept, which is one at some temperature."""
        return self.form is not None and "temperatures" in self.form.options

    def to_dict(self) -> dict[str, Any]:
        """JSON, with what the kind of cache does not use left out."""
        used = {"keep", "dtype", "hidden", *(() if self.form is None else self.form.options)}
        raw = {k: v for k, v in asdict(self).items() if k in used}
        raw["hidden"] = {tap: list(shape) for tap, shape in self.hidden.items()}
        if "temperatures" in raw:
            raw["temperatures"] = list(self.temperatures)
        return raw | ({"tokens": True} if self.tokens else {})

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> Layout:
        """The inverse of :meth:`to_dict`."""
        fields = dict(raw)
        fields["hidden"] = {tap: tuple(shape) for tap, shape in raw["hidden"].items()}
        fields["temperatures"] = tuple(raw.get("temperatures", ()))
        return Layout(**fields)

    @property
    def provides(self) -> frozenset[str]:
        """What a teacher that reads this can give."""
        return frozenset(
            (set() if self.form is None else self.form.provides) | ({"hidden"} if self.hidden else set())
        )

    @property
    def needs(self) -> Needs:
        """What must be asked of the teacher that fills it."""
        head = "head" in self.provides
        return Needs(logits=self.keep is not None and not head, hidden=tuple(self.hidden), head=head)

    def widths(self) -> dict[str, tuple[int, Any]]:
        """Columns with as many numbers for each sample, and their type."""
        return {TOKENS: (1, np.int32)} if self.tokens else self._even()

    def ragged(self) -> dict[str, Any]:
        """Columns of any length, and their type."""
        even = {name: dtype for name, (_, dtype) in self._even().items()} if self.tokens else {}
        return even | ({} if self.form is None else self.form.ragged(self))

    def _even(self) -> dict[str, tuple[int, Any]]:
        """Columns with as many numbers for each row."""
        columns = {} if self.form is None else self.form.even(self)
        for tap, shape in self.hidden.items():
            columns[f"hidden:{tap}"] = (math.prod(shape), STORED[self.dtype])
        return columns

    # To columns ------------------------------------------------------------------------------------------

    def encode(self, signal: Signal, seeds: Tensor, counted: Tensor | None = None) -> Columns:
        """The columns of a signal's samples.

        Args:
            signal: of a batch.
            seeds: ``[B]``, which decide what is drawn of each sample.
            counted: ``[B, L]``, true at the tokens that are kept; for a layout of tokens.
        """
        if self.tokens and counted is None:
            raise CapabilityError("a layout of tokens needs to know which count", remedy="pass counted=")
        columns: Columns = {}
        lengths = np.ones(len(seeds), np.int64)
        if self.tokens and counted is not None:
            counted = counted.cpu()
            lengths = counted.sum(1).numpy()
        if self.form is not None:
            largest = self._largest(signal, counted)
            scores = torch.empty(0, 1)
            if largest is None:
                scores = self._rows("the logits", self._scores(signal), counted)
            columns.update(self.form.encode(self, TeacherRows(scores, lengths, seeds, self.tokens, largest)))
        for tap, shape in self.hidden.items():
            rows = self._rows(tap, signal.hidden[tap], counted)
            given = tuple(rows.shape[1:])
            if given != tuple(shape):
                raise CapabilityError(
                    f"{tap} of the teacher is {given} in this batch, and the cache keeps {tuple(shape)}",
                    remedy="pad all samples to one size, or use the live teacher",
                )
            columns[f"hidden:{tap}"] = to_stored(rows.flatten(1), self.dtype)
        if not self.tokens:
            return columns
        columns[TOKENS] = lengths[:, None].astype(np.int32)
        for name, (width, _) in self._even().items():
            values = columns[name]
            assert isinstance(values, np.ndarray)
            columns[name] = Ragged(values.reshape(-1), lengths * width)
        return columns

    def _largest(self, signal: Signal, counted: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """The classes and log-probabilities of a teacher that says the largest alone, which is what is kept then."""
        sparse = signal.sparse
        if sparse is None or signal.logits is not None:
            return None
        said = ("topk", sparse.index.shape[-1], (sparse.temperature,))
        if sparse.kind != "topk" or (self.keep, self.k, self.temperatures) != said:
            raise CapabilityError(
                f"the teacher says the {said[1]} largest of each distribution at T = {sparse.temperature:g}, and the "
                f"cache is to keep {self.keep}, {self.k} at T = {', '.join(f'{t:g}' for t in self.temperatures)}",
                remedy="keep what it says: topk, of as many, at that temperature",
            )
        what = "the largest"
        index = self._rows(what, sparse.index, counted).long()
        return index, self._rows(what, sparse.values, counted)

    def _scores(self, signal: Signal) -> Tensor:
        if "head" not in self.provides:
            return signal.dense()
        assert signal.head is not None
        return signal.head.inputs

    def _rows(self, what: str, x: Tensor, counted: Tensor | None) -> Tensor:
        """One row for each sample, or for each token that counts."""
        if not self.tokens or counted is None:
            return x.detach().float().cpu()
        if tuple(x.shape[:2]) != tuple(counted.shape):
            raise CapabilityError(
                f"{what} of the teacher is {tuple(x.shape)} where the batch has {tuple(counted.shape)} tokens",
                remedy="a cache by tokens keeps what has a row for each of them; teacher and student must see the "
                "same tokens",
            )
        return x.detach()[counted.to(x.device)].float().cpu()

    # And back ----------------------------------------------------------------------------------------------

    def decode(
        self,
        columns: Columns,
        temperature: float | None,
        device: torch.device | str,
        *,
        counted: Tensor | None = None,
        output: OutputLayer | None = None,
        logits: bool = True,
    ) -> Signal:
        """The signal of samples; zeros at tokens that do not count.

        Args:
            columns: of the samples that have any token that counts.
            temperature: at which to read.
            device: of the signal.
            counted: ``[B, L]``, for a layout of tokens.
            output: the output head, of a cache of what goes into it.
            logits: whether such a cache shall make the logits.

        Raises:
            CapabilityError: ``temperature`` is not among those that are kept.
        """
        lengths = np.ones(_rows_of(columns), np.int64)
        if self.tokens:
            assert counted is not None
            lengths = np.asarray(columns[TOKENS]).reshape(-1).astype(np.int64)
            widths = {name: width for name, (width, _) in self._even().items()}
            columns = {n: c.values.reshape(-1, widths[n]) if isinstance(c, Ragged) and n in widths else c
                       for n, c in columns.items()}  # fmt: skip

        def placed(x: Tensor) -> Tensor:
            return _placed(x.to(device), counted) if self.tokens and counted is not None else x.to(device)

        kept, at = DecodedRows(), 0.0
        if self.form is not None:
            at = self.check_temperature(temperature)
            kept = self.form.decode(self, columns, lengths, at)
        hidden = {
            tap: placed(from_stored(columns[f"hidden:{tap}"], self.dtype).view(-1, *shape))
            for tap, shape in self.hidden.items()
        }
        if kept.index is not None and kept.values is not None:
            assert self.form is not None
            kind: Literal["topk", "sampled"] = "topk" if "topk" in self.form.provides else "sampled"
            sparse = Sparse(kind, placed(kept.index), placed(kept.values), self.classes, at)
            return Signal(None, hidden, sparse=sparse)
        if kept.scores is None or "head" not in self.provides:
            return Signal(None if kept.scores is None else placed(kept.scores), hidden)
        if output is None:
            raise CapabilityError("the output head is not there", remedy="pass output=")
        output, inputs = output.to(device), kept.scores.to(device)
        made = placed(Head(inputs, *output).map(Tensor.float).scores(slice(None))) if logits else None
        return Signal(made, hidden, Head(placed(inputs), *output))

    def check_temperature(self, temperature: float | None) -> float:
        """The temperature to read at; of parts of a distribution one that is kept.

        Raises:
            CapabilityError: it is not.
        """
        if not self.partial:
            return 1.0
        if temperature is None and len(self.temperatures) == 1:
            return self.temperatures[0]
        if temperature not in self.temperatures:
            kept = ", ".join(f"{t:g}" for t in self.temperatures)
            raise CapabilityError(
                f"the cache keeps {self.keep} distributions at T = {kept}, and T = {temperature} is asked for",
                remedy="set method.temperature to that, or write another cache: a part of a distribution cannot "
                "be softened afterwards",
            )
        return temperature

    def empty(self) -> Columns:
        """The columns of no sample."""
        columns: Columns = {name: np.empty((0, width), dtype) for name, (width, dtype) in self.widths().items()}
        none = np.empty(0, np.int64)
        return columns | {name: Ragged(np.empty(0, dtype), none) for name, dtype in self.ragged().items()}


def tokens_per_sample(columns: Columns) -> Array:
    """How many rows each sample has, of a layout of tokens."""
    out: Array = np.asarray(columns[TOKENS]).reshape(-1).astype(np.int64)
    return out


def _rows_of(columns: Columns) -> int:
    first = next(iter(columns.values()), None)
    return 0 if first is None else len(first.lengths) if isinstance(first, Ragged) else len(first)


def _placed(rows: Tensor, counted: Tensor) -> Tensor:
    """``[B, L, ...]`` with ``rows`` where the mask is true and zeros elsewhere."""
    out = rows.new_zeros(*counted.shape, *rows.shape[1:])
    out[counted.to(rows.device)] = rows
    return out
