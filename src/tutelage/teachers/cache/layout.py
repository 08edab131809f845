"""What a cache keeps of each row, and how: from a signal to Arrow columns and back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tutelage.data.views import uniform
from tutelage.errors import CapabilityError, ConfigError, NumericsError
from tutelage.taps import Needs
from tutelage.teachers.signal import Signal, Sparse

Keep = Literal["dense", "topk", "sampled"]
Array = npt.NDArray[Any]
Columns = dict[str, "Array | Ragged"]

DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_STORED: dict[str, Any] = {"bf16": np.uint16, "fp16": np.float16, "fp32": np.float32}


@dataclass
class Ragged:
    """Rows of different lengths: all values in a row, and where each row ends."""

    values: Array
    lengths: Array


@dataclass(frozen=True)
class Layout:
    """What is kept of each row.

    Attributes:
        keep: of the logits: all (``dense``), the ``k`` largest (``topk``), or ``draws`` from the distribution
            (``sampled``), the ``head`` largest exactly and the draws from the rest. ``None``: no logits.
        classes: how many the teacher scores.
        dtype: of numbers that are stored.
        temperatures: at which ``topk`` and ``sampled`` keep the distribution.
        hidden: the shape of a row of each tap.
    """

    keep: Keep | None = "dense"
    classes: int = 0
    dtype: str = "fp16"
    k: int = 8
    draws: int = 64
    head: int = 0
    temperatures: tuple[float, ...] = ()
    hidden: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"a cache of dtype {self.dtype!r}", remedy=f"allowed: {', '.join(DTYPES)}")
        if self.keep in ("topk", "sampled") and not self.temperatures:
            raise ConfigError(
                f"a {self.keep} cache without a temperature", remedy="say at which T the distribution is kept"
            )
        if self.keep == "topk" and not 1 <= self.k <= self.classes:
            raise ConfigError(
                f"a cache of the {self.k} largest of {self.classes} classes", remedy=f"k is 1 to {self.classes}"
            )
        if self.keep == "sampled" and not (self.draws >= 1 and 0 <= self.head < self.classes):
            raise ConfigError(
                f"a cache of {self.draws} draws beside {self.head} of {self.classes} classes",
                remedy="draws is at least 1, head below the number of classes",
            )
        if self.draws > 65_535:
            raise ConfigError(f"a cache of {self.draws} draws a row", remedy="give at most 65535")

    def to_dict(self) -> dict[str, Any]:
        """JSON, with what the kind of cache does not use left out."""
        unused = {
            "dense": {"k", "draws", "head", "temperatures"},
            "topk": {"draws", "head"},
            "sampled": {"k"},
            None: {"k", "draws", "head", "temperatures", "classes"},
        }[self.keep]
        raw = {k: v for k, v in asdict(self).items() if k not in unused}
        raw["hidden"] = {tap: list(shape) for tap, shape in self.hidden.items()}
        if "temperatures" in raw:
            raw["temperatures"] = list(self.temperatures)
        return raw

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
        logits = {None: set(), "dense": {"logits"}, "topk": {"topk"}, "sampled": {"sampled"}}[self.keep]
        return frozenset(logits | ({"hidden"} if self.hidden else set()))

    @property
    def needs(self) -> Needs:
        """What must be asked of the teacher that fills it."""
        return Needs(logits=self.keep is not None, hidden=tuple(self.hidden))

    @property
    def index_dtype(self) -> Any:
        """Of class numbers."""
        return np.uint8 if self.classes <= 2**8 else np.uint16 if self.classes <= 2**16 else np.int32

    @property
    def count_dtype(self) -> Any:
        """Of numbers of draws."""
        return np.uint8 if self.draws < 2**8 else np.uint16

    def widths(self) -> dict[str, tuple[int, Any]]:
        """Columns of one width: numbers a row, and their type."""
        number = _STORED[self.dtype]
        columns: dict[str, tuple[int, Any]] = {}
        if self.keep == "dense":
            columns["logits"] = (self.classes, number)
        if self.keep == "topk" or (self.keep == "sampled" and self.head):
            width = self.k if self.keep == "topk" else self.head
            columns["index"] = (width, self.index_dtype)
            columns["log_probs"] = (width * len(self.temperatures), number)
        for tap, shape in self.hidden.items():
            columns[f"hidden:{tap}"] = (math.prod(shape), number)
        return columns

    def ragged(self) -> dict[str, Any]:
        """Columns of any length, and their type."""
        if self.keep != "sampled":
            return {}
        return {
            f"{what}@{t:g}": dtype
            for t in self.temperatures
            for what, dtype in (("drawn", self.index_dtype), ("count", self.count_dtype))
        }

    # To columns ------------------------------------------------------------------------------------------

    def encode(self, signal: Signal, seeds: Tensor) -> Columns:
        """The columns of a signal's rows; ``seeds`` ``[B]`` decide what is drawn of each."""
        columns: Columns = {}
        if self.keep is not None:
            logits = signal.dense().detach().float().cpu()
            if self.keep == "dense":
                columns["logits"] = self._numbers(logits)
            else:
                columns.update(self._encode_sparse(logits, seeds))
        for tap, shape in self.hidden.items():
            given = tuple(signal.hidden[tap].shape[1:])
            if given != tuple(shape):
                raise CapabilityError(
                    f"{tap} of the teacher is {given} in this batch, and the cache keeps {tuple(shape)}",
                    remedy="pad all samples to one size, or use the live teacher",
                )
            columns[f"hidden:{tap}"] = self._numbers(signal.hidden[tap].detach().float().cpu().flatten(1))
        return columns

    def _numbers(self, x: Tensor) -> Array:
        stored = x.to(DTYPES[self.dtype])
        if not bool(torch.isfinite(stored).all()):
            raise NumericsError(
                f"the teacher gives numbers up to {x.abs().max().item():.3g}, which {self.dtype} does not hold",
                remedy="set teacher.cache.dtype to bf16 or fp32" if bool(torch.isfinite(x).all()) else "check it",
            )
        return _to_numpy(stored)

    def _encode_sparse(self, logits: Tensor, seeds: Tensor) -> Columns:
        columns: Columns = {}
        width = self.k if self.keep == "topk" else self.head
        index = logits.topk(width, dim=-1).indices
        logs = [(logits.double() / t).log_softmax(-1) for t in self.temperatures]
        if width:
            columns["index"] = index.numpy().astype(self.index_dtype)
            columns["log_probs"] = self._numbers(torch.cat([log.gather(-1, index) for log in logs], -1).float())
        if self.keep == "sampled":
            for i, (t, log) in enumerate(zip(self.temperatures, logs, strict=True)):
                p = log.exp().scatter(-1, index, 0.0) if width else log.exp()
                drawn, count = _draw(p, self.draws, seeds, i)
                columns[f"drawn@{t:g}"] = Ragged(drawn.values.astype(self.index_dtype), drawn.lengths)
                columns[f"count@{t:g}"] = Ragged(count.astype(self.count_dtype), drawn.lengths)
        return columns

    # And back ----------------------------------------------------------------------------------------------

    def decode(self, columns: Columns, temperature: float | None, device: torch.device | str) -> Signal:
        """The signal of rows.

        Raises:
            CapabilityError: ``temperature`` is not among those that are kept.
        """
        logits, sparse = None, None
        if self.keep == "dense":
            logits = self._tensor(columns["logits"]).to(device)
        elif self.keep is not None:
            sparse = self._decode_sparse(columns, self.check_temperature(temperature), device)
        hidden = {
            tap: self._tensor(columns[f"hidden:{tap}"]).view(-1, *shape).to(device)
            for tap, shape in self.hidden.items()
        }
        return Signal(logits, hidden, sparse=sparse)

    def check_temperature(self, temperature: float | None) -> float:
        """The temperature to read at, of ``topk`` and ``sampled``."""
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

    def _tensor(self, column: Array | Ragged) -> Tensor:
        assert isinstance(column, np.ndarray)
        x = torch.from_numpy(column)
        return (x.view(torch.bfloat16) if self.dtype == "bf16" else x).float()

    def _decode_sparse(self, columns: Columns, temperature: float, device: torch.device | str) -> Sparse:
        at = self.temperatures.index(temperature)
        index = values = None
        if "index" in columns:
            width = self.k if self.keep == "topk" else self.head
            index = torch.from_numpy(np.asarray(columns["index"]).astype(np.int64))
            values = self._tensor(columns["log_probs"])[:, at * width : (at + 1) * width]
        if self.keep == "topk":
            assert index is not None
            assert values is not None
            return Sparse("topk", index.to(device), values.to(device), self.classes, temperature)
        drawn, count = columns[f"drawn@{temperature:g}"], columns[f"count@{temperature:g}"]
        assert isinstance(drawn, Ragged)
        assert isinstance(count, Ragged)
        tail_index = torch.from_numpy(_padded(drawn, np.int64))
        tail = torch.from_numpy(_padded(count, np.float32)) / self.draws
        if index is not None and values is not None:
            exact = values.exp()
            tail = tail * (1.0 - exact.sum(-1, keepdim=True)).clamp(min=0.0)
            tail_index, tail = torch.cat([index, tail_index], -1), torch.cat([exact, tail], -1)
        return Sparse("sampled", tail_index.to(device), tail.to(device), self.classes, temperature)


def _to_numpy(x: Tensor) -> Array:
    array: Array = (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).contiguous().numpy()
    return array.view(np.uint16) if x.dtype == torch.bfloat16 else array


def _draw(p: Tensor, draws: int, seeds: Tensor, stream: int) -> tuple[Ragged, Array]:
    """``draws`` classes of each row of unnormalised ``p`` ``[B, C]``: each class once, with how often it came.

    By inverse of the cumulative distribution from numbers that are functions of the row's seed, so that a row is
    drawn the same whenever and with whatever others it is computed.
    """
    u = np.stack([uniform(seeds, 1_000_003 * stream + d) for d in range(draws)], 1)
    total = p.cumsum(-1)
    aimed = torch.from_numpy(u) * total[:, -1:]
    found = torch.searchsorted(total, aimed, right=True).clamp(max=p.shape[-1] - 1).sort(-1).values.numpy()
    first = np.ones_like(found, dtype=bool)
    first[:, 1:] = found[:, 1:] != found[:, :-1]
    lengths = first.sum(1)
    starts = np.flatnonzero(first)
    count = np.diff(np.append(starts, found.size))
    return Ragged(found.ravel()[starts], lengths), count


def _padded(column: Ragged, dtype: Any) -> Array:
    """``[B, longest]`` with zeros after each row's end."""
    width = max(int(column.lengths.max(initial=0)), 1)
    out = np.zeros((len(column.lengths), width), dtype=dtype)
    out[np.arange(width) < column.lengths[:, None]] = column.values
    return out


def concatenated(parts: Sequence[Columns]) -> Columns:
    """Rows of several parts after each other."""
    joined: Columns = {}
    for name in parts[0]:
        columns = [part[name] for part in parts]
        if isinstance(columns[0], Ragged):
            joined[name] = Ragged(
                np.concatenate([c.values for c in columns]),  # type: ignore[union-attr]
                np.concatenate([c.lengths for c in columns]),  # type: ignore[union-attr]
            )
        else:
            joined[name] = np.concatenate(columns)  # type: ignore[arg-type]
    return joined


def taken(columns: Columns, rows: Array) -> Columns:
    """The given rows."""
    out: Columns = {}
    for name, column in columns.items():
        if isinstance(column, Ragged):
            ends = np.cumsum(column.lengths)
            out[name] = pick(column.values, ends - column.lengths, column.lengths, rows)
        else:
            out[name] = column[rows]
    return out


def pick(values: Array, starts: Array, lengths: Array, rows: Array) -> Ragged:
    """The given rows of a ragged column."""
    some = lengths[rows].astype(np.int64)
    before = np.cumsum(some) - some
    at = np.arange(int(some.sum())) + np.repeat(starts[rows].astype(np.int64) - before, some)
    return Ragged(values[at], some)


def nbytes(columns: Columns) -> int:
    """Bytes of all columns."""
    return sum(c.values.nbytes + 4 * len(c.lengths) if isinstance(c, Ragged) else c.nbytes for c in columns.values())
