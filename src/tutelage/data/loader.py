"""From a data set, or somebody's loader, to the micro-batches of each optimizer step.

A step's batch is the same whatever the number of processes or micro-batches: it is planned
as one list of rows and cut into equal shares. That is what makes the gradient, and a resumed
run, independent of how the work was split.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tutelage.data.batch import Batch, as_batch, even_spans
from tutelage.data.views import view_seeds
from tutelage.errors import DataError, TutelageError


class Rows(Protocol):
    """A split: rows that can be fetched in any order, in a view or as they are."""

    @property
    def ids(self) -> Tensor:
        """One stable number for each row."""
        ...

    @property
    def is_augmented(self) -> bool:
        """Whether a row looks different under another view seed."""
        ...

    def __len__(self) -> int: ...
    def fetch(self, rows: Tensor, views: Tensor | None = None) -> Batch:
        """The given rows; with ``views``, augmented from these seeds."""
        ...


@dataclass(frozen=True)
class RankSlice:
    """Which part of every batch is this process's."""

    rank: int = 0
    world: int = 1
    accumulate: int = 1

    def micro_batches(self, length: int) -> list[tuple[int, int]]:
        """The spans of this process's micro-batches in a batch of ``length`` rows."""
        parts = even_spans(length, self.world * self.accumulate)
        return parts[self.rank * self.accumulate : (self.rank + 1) * self.accumulate]


def current_rank() -> RankSlice:
    """This process among those that a launcher started and that see each other; alone without one."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return RankSlice(torch.distributed.get_rank(), torch.distributed.get_world_size()) if together else RankSlice()


class Batches(Protocol):
    """The training data of one run, step by step."""

    steps_per_epoch: int

    @property
    def ids(self) -> Tensor | None:
        """The sample ids of an epoch, where samples have any."""
        ...

    def epoch(self, epoch: int, share: RankSlice, skip: int = 0) -> Iterator[list[Batch]]:
        """This process's micro-batches for each step of an epoch, from step ``skip`` on."""
        ...


def epoch_order(length: int, seed: int, epoch: int) -> Tensor:
    """A permutation that is a function of run seed and epoch alone."""
    generator = torch.Generator().manual_seed(((seed * 1_000_003) ^ (epoch * 7_919)) & (2**63 - 1))
    return torch.randperm(length, generator=generator)


WINDOW = 64
"""Batches whose rows are sorted by length among each other, where rows have lengths."""

SHARED_VIEWS = 0
"""The seed of views that all runs share."""


class PlannedBatches:
    """Batches of a :class:`Rows`, shuffled and augmented as functions of (seed, epoch, sample id).

    Rows that have ``lengths`` (texts) are bucketed: of each :data:`WINDOW` batches those of like length come
    together, and then the batches are shuffled, so that little is padded.

    Args:
        data: the training split.
        batch_size: rows of one optimizer step, over all processes.
        seed: the run's seed.
        workers: processes that fetch; 0 is this one.
        views: how many views a sample has, the same for every seed; epochs go round them. Default: new ones in
            each epoch of each seed.

    Raises:
        DataError: no rows.
    """

    def __init__(self, data: Rows, batch_size: int, seed: int, workers: int = 0, views: int | None = None) -> None:
        if len(data) == 0:
            raise DataError(
                "there is nothing to train on: the data set has no rows", remedy="check data.labels and path"
            )
        self.data, self.batch_size, self.seed, self.workers, self.views = data, batch_size, seed, workers, views
        self.steps_per_epoch = len(self.cut(torch.arange(len(data))))

    @property
    def ids(self) -> Tensor:
        """One number for each sample."""
        return self.data.ids

    def cut(self, rows: Tensor) -> list[Tensor]:
        """The rows of each step. A last one all by itself joins the others: batch norm cannot train on it."""
        steps = list(rows.split(self.batch_size))
        if len(steps) > 1 and len(steps[-1]) == 1 and self.batch_size > 1:
            steps[-2:] = [torch.cat(steps[-2:])]
        return steps

    def plan(self, epoch: int) -> list[Tensor]:
        """The rows of each step of an epoch."""
        rows = epoch_order(len(self.data), self.seed, epoch)
        lengths: Tensor | None = getattr(self.data, "lengths", None)
        if lengths is None:
            return self.cut(rows)
        windows = [w[lengths[w].argsort(stable=True)] for w in rows.split(WINDOW * self.batch_size)]
        steps = self.cut(torch.cat(windows))
        return [steps[i] for i in epoch_order(len(steps), self.seed + 1, epoch)]

    def epoch(self, epoch: int, share: RankSlice, skip: int = 0) -> Iterator[list[Batch]]:
        """This process's micro-batches for each step of an epoch, from step ``skip`` on."""
        rows = self.plan(epoch)[skip:]
        view, seed = (epoch, self.seed) if self.views is None else (epoch % self.views, SHARED_VIEWS)
        keys = [(view, step_rows, span) for step_rows in rows for span in share.micro_batches(len(step_rows))]
        fetched = iter(_fetch_all(_Views(self.data, seed), keys, self.workers))
        for _ in rows:
            yield [next(fetched) for _ in range(share.accumulate)]


_FetchKey = tuple[int, Tensor, tuple[int, int]]


@dataclass(frozen=True)
class _Views:
    data: Rows
    seed: int | None
    """Of the run, or none for samples as they are."""

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: _FetchKey) -> Batch | TutelageError:
        try:
            return self.fetch(key)
        except TutelageError as error:  # as a value: a worker process would wrap a raised one in a traceback
            return error

    def fetch(self, key: _FetchKey) -> Batch:
        epoch, rows, (start, stop) = key
        mine = rows[start : max(stop, start + 1)] if start < len(rows) else rows[-1:]
        views = None
        if self.seed is not None and self.data.is_augmented:
            views = view_seeds(self.seed, epoch, self.data.ids[mine])
        batch = self.data.fetch(mine, views).check_finite()
        return batch if start < stop else batch.rows(0, 0)


def _fetch_all(views: _Views, keys: Sequence[_FetchKey], workers: int) -> Iterable[Batch]:
    if workers == 0:
        for key in keys:
            yield views.fetch(key)
        return
    loader: Iterable[Batch | TutelageError] = torch.utils.data.DataLoader(
        views,  # type: ignore[arg-type]
        batch_size=None,
        sampler=keys,
        num_workers=workers,
        collate_fn=_identity,
        generator=torch.Generator().manual_seed(0),  # else each pass draws a number from the global generator
        pin_memory=torch.cuda.is_available(),
    )
    for item in loader:
        if isinstance(item, TutelageError):
            raise item
        yield item


def _identity(x: Any) -> Any:
    return x


_END = object()


class _Stream:
    """Random states of torch, Python and numpy that belong to a loader alone, a function of its seed.

    Whatever it draws from, the loader gives the same batches again, and what the student draws (dropout) does
    not depend on it. A generator of the loader's own is seeded too.
    """

    def __init__(self, seed: int, loader: Any) -> None:
        for owner in (loader, getattr(loader, "sampler", None)):
            own = getattr(owner, "generator", None)
            if isinstance(own, torch.Generator):
                own.manual_seed(seed)
        self.torch = torch.Generator().manual_seed(seed).get_state()
        self.python = random.Random(seed).getstate()
        self.numpy = np.random.RandomState(seed % 2**32).get_state()

    @contextmanager
    def drawing(self) -> Iterator[None]:
        outer = torch.get_rng_state(), random.getstate(), np.random.get_state()
        self._install(self.torch, self.python, self.numpy)
        try:
            yield
        finally:
            self.torch, self.python, self.numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()
            self._install(*outer)

    @staticmethod
    def _install(of_torch: Tensor, of_python: Any, of_numpy: Any) -> None:
        torch.set_rng_state(of_torch)
        random.setstate(of_python)
        np.random.set_state(of_numpy)


class LoaderBatches:
    """Batches of a user's own loader: each that it yields is one optimizer step.

    The loader draws from a random stream of its own, seeded by (seed, epoch), so that one that
    shuffles gives the same order when a run is resumed and on every process. With several
    processes each one iterates the whole loader and takes its share of every batch.

    Args:
        loader: yields anything that ``to_batch`` understands; iterated once an epoch.
        seed: the run's seed.
        to_batch: makes a :class:`Batch`; :func:`as_batch` or :func:`causal_batch`.

    Raises:
        DataError: the loader has no length or yields nothing.
    """

    def __init__(self, loader: Iterable[Any], seed: int, to_batch: Callable[[Any], Batch] = as_batch) -> None:
        try:
            self.steps_per_epoch = len(loader)  # type: ignore[arg-type]
        except TypeError:
            raise DataError(
                f"the loader, a {type(loader).__name__}, has no length, so no schedule can be planned",
                remedy="give it __len__: the number of batches of an epoch",
            ) from None
        if self.steps_per_epoch == 0:
            raise DataError("the loader yields no batches", remedy="check its data set and drop_last")
        self.loader, self.seed, self.to_batch = loader, seed, to_batch

    def check_no_drop_last(self) -> None:
        """Raise :class:`DataError` where the loader leaves out the last rows of an epoch, others each time."""
        if getattr(self.loader, "drop_last", False) is True:
            raise DataError(
                "the loader drops the last rows of every epoch, so that its samples cannot be known in advance",
                remedy="use drop_last=False",
            )

    @property
    def ids(self) -> Tensor | None:
        """The sample ids of an epoch, found by one pass; ``None`` where batches have none.

        Raises:
            DataError: the loader leaves out the last rows of an epoch, others each time.
        """
        self.check_no_drop_last()
        found = []
        for (batch,) in self.epoch(0, RankSlice()):
            if batch.ids is None:
                return None
            found.append(batch.ids)
        return torch.cat(found).unique()

    def epoch(self, epoch: int, share: RankSlice, skip: int = 0) -> Iterator[list[Batch]]:
        """This process's micro-batches for each step of an epoch, from step ``skip`` on."""
        stream = _Stream((self.seed * 1_000_003 + epoch) & (2**63 - 1), self.loader)
        with stream.drawing():
            iterator = iter(self.loader)
        for step in itertools.count():
            with stream.drawing():
                raw = next(iterator, _END)
            if (raw is _END) != (step == self.steps_per_epoch):
                more = "more" if raw is not _END else f"only {step}"
                raise DataError(
                    f"the loader's length is {self.steps_per_epoch}, but it gave {more} batches in epoch {epoch}",
                    remedy="its __len__ must be the number of batches of every pass",
                )
            if raw is _END:
                return
            if step >= skip:
                batch = self.to_batch(raw).check_finite()
                yield [batch.rows(start, stop) for start, stop in share.micro_batches(len(batch))]


class SequentialBatches:
    """All rows once, in order, unaugmented: for evaluation.

    Args:
        data: a split, or a user's loader.
        batch_size: rows a batch; ignored for a loader.
        to_batch: for a loader.
        workers: processes that fetch; 0 is this one. Ignored for a loader.
        view: which of the views that all runs share; ``None``: rows as they are.
    """

    def __init__(
        self,
        data: Any,
        batch_size: int = 256,
        to_batch: Callable[[Any], Batch] = as_batch,
        workers: int = 0,
        view: int | None = None,
    ) -> None:
        self.data, self.batch_size, self.to_batch, self.workers, self.view = data, batch_size, to_batch, workers, view

    def __len__(self) -> int:
        return -(-len(self.data) // self.batch_size) if hasattr(self.data, "fetch") else len(self.data)

    def __iter__(self) -> Iterator[Batch]:
        if hasattr(self.data, "fetch"):
            rows = torch.arange(len(self.data)).split(self.batch_size)
            keys = [(self.view or 0, step_rows, (0, len(step_rows))) for step_rows in rows]
            seed = None if self.view is None else SHARED_VIEWS
            yield from _fetch_all(_Views(self.data, seed), keys, self.workers)
        else:
            for raw in self.data:
                yield self.to_batch(raw).check_finite()
