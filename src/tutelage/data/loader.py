"""The rows of each optimizer step: one list for any number of processes and micro-batches, also if resumed."""

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
    """A split whose rows can be fetched in any order, augmented or not."""

    @property
    def ids(self) -> Tensor:
        """A stable number for each row."""

    @property
    def is_augmented(self) -> bool:
        """Whether a row depends on the view seed."""

    def __len__(self) -> int: ...
    def fetch(self, rows: Tensor, views: Tensor | None = None) -> Batch:
        """The given rows, augmented from the seeds ``views`` if given."""


@dataclass(frozen=True)
class RankSlice:
    """The part of every batch that belongs to this process, in micro-batches."""

    rank: int = 0
    world: int = 1
    accumulate: int = 1

    def micro_batches(self, length: int) -> list[tuple[int, int]]:
        """Row spans of this process's micro-batches in a batch of ``length`` rows."""
        parts = even_spans(length, self.world * self.accumulate)
        return parts[self.rank * self.accumulate : (self.rank + 1) * self.accumulate]


def current_rank() -> RankSlice:
    """Rank and world size of ``torch.distributed``; 0 and 1 without it."""
    dist = torch.distributed
    is_distributed = dist.is_available() and dist.is_initialized()
    return RankSlice(dist.get_rank(), dist.get_world_size()) if is_distributed else RankSlice()


class Batches(Protocol):
    """The training batches of a run."""

    steps_per_epoch: int

    @property
    def ids(self) -> Tensor | None:
        """The sample ids of an epoch; ``None`` if samples have none."""

    def epoch(self, epoch: int, rank_slice: RankSlice, skip: int = 0) -> Iterator[list[Batch]]:
        """This process's micro-batches for each step of an epoch, starting at step ``skip``."""


def epoch_order(length: int, seed: int, epoch: int) -> Tensor:
    """A permutation that depends on run seed and epoch only."""
    generator = torch.Generator().manual_seed(((seed * 1_000_003) ^ (epoch * 7_919)) & (2**63 - 1))
    return torch.randperm(length, generator=generator)


WINDOW = 64
"""Number of batches whose rows are sorted by length together."""

SHARED_VIEWS = 0
"""The seed of views that are the same in all runs."""


class PlannedBatches:
    """Batches of a :class:`Rows`, shuffled and augmented as functions of (seed, epoch, sample id).

    Rows with ``lengths`` (texts) are bucketed to reduce padding: rows are sorted by length within :data:`WINDOW`
    batches, then the batches are shuffled.

    Args:
        data: the training split.
        batch_size: rows of one optimizer step, over all processes.
        seed: seed of the run.
        workers: processes that fetch rows; 0: this process.
        views: number of views of each sample, the same for every seed, used in turn. Default: new views in each
            epoch and for each seed.

    Raises:
        DataError: there are no rows.
    """

    def __init__(self, data: Rows, batch_size: int, seed: int, workers: int = 0, views: int | None = None) -> None:
        if len(data) == 0:
            raise DataError("the training split has no rows", remedy="check data.labels and data.path")
        self.data, self.batch_size, self.seed, self.workers, self.views = data, batch_size, seed, workers, views
        self.steps_per_epoch = len(self.split_steps(torch.arange(len(data))))

    @property
    def ids(self) -> Tensor:
        """A stable number for each sample."""
        return self.data.ids

    def split_steps(self, rows: Tensor) -> list[Tensor]:
        """The rows of each step. A single last row joins the step before, since batch norm needs two rows."""
        steps = list(rows.split(self.batch_size))
        if len(steps) > 1 and len(steps[-1]) == 1 and self.batch_size > 1:
            steps[-2:] = [torch.cat(steps[-2:])]
        return steps

    def plan(self, epoch: int) -> list[Tensor]:
        """The rows of each step of an epoch."""
        rows = epoch_order(len(self.data), self.seed, epoch)
        lengths: Tensor | None = getattr(self.data, "lengths", None)
        if lengths is None:
            return self.split_steps(rows)
        windows = [w[lengths[w].argsort(stable=True)] for w in rows.split(WINDOW * self.batch_size)]
        steps = self.split_steps(torch.cat(windows))
        return [steps[i] for i in epoch_order(len(steps), self.seed + 1, epoch)]

    def epoch(self, epoch: int, rank_slice: RankSlice, skip: int = 0) -> Iterator[list[Batch]]:
        """This process's micro-batches for each step of an epoch, starting at step ``skip``."""
        rows = self.plan(epoch)[skip:]
        view, seed = (epoch, self.seed) if self.views is None else (epoch % self.views, SHARED_VIEWS)
        keys = [(view, step_rows, span) for step_rows in rows for span in rank_slice.micro_batches(len(step_rows))]
        fetched = iter(_fetch_all(_Views(self.data, seed), keys, self.workers))
        for _ in rows:
            yield [next(fetched) for _ in range(rank_slice.accumulate)]


_FetchKey = tuple[int, Tensor, tuple[int, int]]


@dataclass(frozen=True)
class _Views:
    data: Rows
    seed: int | None
    """Seed of the run; ``None``: no augmentation."""

    def __getitem__(self, key: _FetchKey) -> Batch | TutelageError:
        try:
            return self.fetch(key)
        except TutelageError as error:  # as a value, since a DataLoader worker wraps raised errors in a traceback
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
        generator=torch.Generator().manual_seed(0),  # without it each pass would use the global generator
        pin_memory=torch.cuda.is_available(),
    )
    for item in loader:
        if isinstance(item, TutelageError):
            raise item
        yield item


_END = object()


class _LoaderRandomState:
    """Random states of torch, Python and numpy that only a loader uses, seeded by ``seed``.

    A second run of the loader then yields the same batches, and the student's random numbers (dropout) do not depend
    on the loader. A generator that the loader or its sampler owns is seeded too.
    """

    def __init__(self, seed: int, loader: Any) -> None:
        batches = getattr(loader, "batch_sampler", None)
        for owner in (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)):
            own, set_epoch = getattr(owner, "generator", None), getattr(owner, "set_epoch", None)
            if isinstance(own, torch.Generator):
                own.manual_seed(seed)
            elif callable(set_epoch):  # its order depends on that number alone
                set_epoch(seed % 2**31)
        self.torch = torch.Generator().manual_seed(seed).get_state()
        self.python = random.Random(seed).getstate()
        self.numpy: Any = np.random.RandomState(seed % 2**32).get_state()

    @contextmanager
    def active(self) -> Iterator[None]:
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        """Exchange the global states and those of the loader."""
        outer = torch.get_rng_state(), random.getstate(), np.random.get_state()
        torch.set_rng_state(self.torch)
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        self.torch, self.python, self.numpy = outer


class LoaderBatches:
    """Batches of a user's loader; each batch is one optimizer step.

    The loader has its own random state, seeded by (seed, epoch), so a loader that shuffles yields the same order in a
    resumed run and in every process. Each process iterates the loader and takes its slice of every batch.

    Args:
        loader: yields items that ``to_batch`` accepts; iterated once per epoch.
        seed: seed of the run.
        to_batch: converts an item to a :class:`Batch`, as :func:`as_batch` and :func:`causal_batch` do.
        steps: the length of the training, for a loader without a length: it is read again whenever it ends.

    Raises:
        DataError: the loader has no length and there are no ``steps``, or is empty.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        seed: int,
        to_batch: Callable[[Any], Batch] = as_batch,
        steps: int | None = None,
    ) -> None:
        self.is_endless = False
        try:
            self.steps_per_epoch = len(loader)  # type: ignore[arg-type]
        except TypeError:
            if steps is None:
                raise DataError(
                    f"the loader, a {type(loader).__name__}, has no length, so no schedule can be planned",
                    remedy="give the number of steps, as in train={'steps': 1000}, or give the loader __len__, the "
                    "number of batches of an epoch",
                ) from None
            self.is_endless, self.steps_per_epoch = True, steps
        if self.steps_per_epoch == 0:
            raise DataError("the loader yields no batches", remedy="check its data set and drop_last")
        self.loader, self.seed, self.to_batch = loader, seed, to_batch

    def check_no_drop_last(self) -> None:
        """Raise :class:`DataError` if the loader drops the last rows of an epoch."""
        if getattr(self.loader, "drop_last", False) is True:
            raise DataError(
                "the loader drops the last rows of every epoch, which are different samples each time, so the set of "
                "training samples is unknown",
                remedy="use drop_last=False",
            )

    @property
    def ids(self) -> Tensor | None:
        """The sample ids of an epoch, from one pass; ``None`` if batches have none.

        Raises:
            DataError: the loader drops the last rows of an epoch.
        """
        self.check_no_drop_last()
        ids = []
        for (batch,) in self.epoch(0, RankSlice()):
            if batch.ids is None:
                return None
            ids.append(batch.ids)
        return torch.cat(ids).unique()

    def epoch(self, epoch: int, rank_slice: RankSlice, skip: int = 0) -> Iterator[list[Batch]]:
        """This process's micro-batches for each step of an epoch, starting at step ``skip``."""
        state = _LoaderRandomState((self.seed * 1_000_003 + epoch) & (2**63 - 1), self.loader)
        with state.active():
            iterator = iter(self.loader)
        for step in itertools.count():
            if self.is_endless and step == self.steps_per_epoch:
                return
            with state.active():
                raw = next(iterator, _END)
                if raw is _END and self.is_endless:
                    iterator = iter(self.loader)
                    raw = next(iterator, _END)
                    if raw is _END:
                        raise DataError(
                            f"the loader yields no more batches after {step} of {self.steps_per_epoch} steps",
                            remedy="give a loader that can be read again, or fewer train.steps",
                        )
            if (raw is _END) != (step == self.steps_per_epoch):
                more = "more" if raw is not _END else f"only {step}"
                raise DataError(
                    f"the loader's length is {self.steps_per_epoch}, but it yielded {more} batches in epoch {epoch}",
                    remedy="make its __len__ return the number of batches of an epoch",
                )
            if raw is _END:
                return
            if step >= skip:
                batch = self.to_batch(raw).check_finite()
                yield [batch.rows(start, stop) for start, stop in rank_slice.micro_batches(len(batch))]


@dataclass(eq=False)
class SequentialBatches:
    """All rows once, in order, for evaluation.

    Args:
        data: a split, or a user's loader.
        batch_size: rows per batch; ignored for a loader.
        to_batch: converts the items of a loader.
        workers: processes that fetch rows; 0: this process. Ignored for a loader.
        view: index of the shared view; ``None``: no augmentation.
    """

    data: Any
    batch_size: int = 256
    to_batch: Callable[[Any], Batch] = as_batch
    workers: int = 0
    view: int | None = None

    @property
    def tag_names(self) -> Sequence[str]:
        """The names of the classes of words; empty for other data."""
        return tuple(getattr(self.data, "tag_names", ()))

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
