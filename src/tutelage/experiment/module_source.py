"""The parts of an experiment from the caller's own modules and loaders, for ``tutelage.distill``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tutelage.config import CacheConfig
from tutelage.data import Batch, LoaderBatches, SequentialBatches
from tutelage.engine import resolve_precision
from tutelage.errors import ConfigError, Interrupted, ModelError
from tutelage.experiment.caching import open_cache, teacher_provenance
from tutelage.experiment.dataset_fingerprint import fingerprint_samples, fingerprint_tokenizer
from tutelage.experiment.spec import Arm, ExperimentSource, ModelTeacher, RunContext
from tutelage.methods import Method, SupervisedMethod
from tutelage.teachers import CachedTeacher, RemoteTeacher


@dataclass(frozen=True)
class ModuleSource(ExperimentSource):
    """Builds the parts of an experiment from the caller's objects; see :class:`ExperimentSource`."""

    teachers: Sequence[nn.Module]
    student: nn.Module | Callable[[], nn.Module]
    method: Method
    train_loader: Iterable[Any]
    eval_data: Iterable[Any]
    to_batch: Callable[[Any], Batch]
    cache: CacheConfig | None = None
    precision: str | None = None

    def build_student(self, seed: int) -> nn.Module:
        """See :class:`ExperimentSource`."""
        if isinstance(self.student, nn.Module):
            return copy.deepcopy(self.student)
        return _call(self.student, seed, "the function given as student")

    def build_peer(self, options: Any, seed: int) -> nn.Module:
        """See :class:`ExperimentSource`."""
        if options is None:
            return self.build_student(seed)
        if not callable(options) or isinstance(options, nn.Module):
            raise ConfigError(
                f"peers: {options!r} is not a function that returns a module",
                remedy="give a number, or a list of functions such as lambda: Net(width=8)",
            )
        return _call(options, seed, "a function given as a peer")

    def peer_card(self, options: Any) -> dict[str, Any]:
        """See :class:`ExperimentSource`."""
        return {} if options is None else {"class": "the given function's result"}

    def build_teacher(self, number: int) -> nn.Module:
        """See :class:`ExperimentSource`."""
        return self.teachers[number]

    def build_method(self) -> Method:
        """See :class:`ExperimentSource`."""
        return copy.deepcopy(self.method)

    def build_baseline_method(self) -> Method:
        """See :class:`ExperimentSource`."""
        return SupervisedMethod()

    def training_batches(self, arm: Arm, seed: int) -> LoaderBatches:
        """See :class:`ExperimentSource`."""
        return LoaderBatches(self.train_loader, seed, self.to_batch)

    def connect_teacher(self, classes: int) -> RemoteTeacher:
        """See :class:`ExperimentSource`: not supported."""
        raise NotImplementedError("distill(...) takes modules as teachers")

    def open_cache(
        self, teacher: ModelTeacher | RemoteTeacher, classes: int, method: Method, ctx: RunContext
    ) -> CachedTeacher:
        """See :class:`ExperimentSource`; reads the training data once, without any model."""
        assert self.cache is not None
        assert not isinstance(teacher, RemoteTeacher)

        def watch(batches: Iterable[list[Batch]]) -> Iterator[list[Batch]]:
            for step in ctx.terminal.iterate(batches, "reading training data"):
                yield step
                if ctx.should_stop():
                    raise Interrupted("stopped before any training", remedy="repeat the same call to start again")

        tokenizer = fingerprint_tokenizer(self.train_loader)
        made_from = {
            "teacher": teacher_provenance(teacher),
            "data": fingerprint_samples(self.train_loader, self.to_batch, watch),
            "preprocessing": {} if tokenizer is None else {"tokenizer": tokenizer},
            "precision": resolve_precision(self.precision),
        }
        example = next(iter(SequentialBatches(self.eval_data, to_batch=self.to_batch))).rows(0, 1)
        return open_cache(self.cache, "distill", made_from, example, teacher, classes, method, ctx.accelerator)


def _call(make: Callable[[], nn.Module], seed: int, who: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = make()
    if not isinstance(module, nn.Module):
        raise ModelError(f"{who} returned a {type(module).__name__}", remedy="it must return a torch.nn.Module")
    return module
