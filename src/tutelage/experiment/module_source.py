"""Experiments on the caller's own modules and loaders, and fingerprints of their data for a cache."""

import copy
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from tutelage.config import CacheConfig, TrainConfig
from tutelage.data import Batch, LoaderBatches, RankSlice
from tutelage.engine import resolve_precision
from tutelage.errors import CapabilityError, ConfigError, DataError, Interrupted, ModelError
from tutelage.experiment.caching import cache_layout, open_cache, teacher_provenance
from tutelage.experiment.measure import short_hash
from tutelage.experiment.spec import Arm, ExperimentSource, ModelTeacher, RunContext
from tutelage.methods import Method, SupervisedMethod
from tutelage.students import prepare_outputs
from tutelage.taps import copy_model
from tutelage.teachers import CachedTeacher, RemoteTeacher
from tutelage.teachers.cache import input_digest


@dataclass(frozen=True)
class ModuleSource(ExperimentSource):
    """Builds the parts of an experiment from the caller's objects; see :class:`ExperimentSource`."""

    teachers: Sequence[nn.Module]
    student: nn.Module | Callable[[], nn.Module]
    method: Method
    train_loader: Iterable[Any]
    to_batch: Callable[[Any], Batch]
    example: Batch
    cache: CacheConfig | None = None
    train: TrainConfig = field(default_factory=TrainConfig)
    outputs: str | int | None = None
    class_axis: int | None = None

    def build_student(self, seed: int) -> nn.Module:
        return self._build(self.student, seed, "the function given as student")

    def _build(self, student: nn.Module | Callable[[], nn.Module], seed: int, who: str) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = copy_model(student) if isinstance(student, nn.Module) else _call(student, who)
            return prepare_outputs(model, self.example, self.outputs, self.class_axis)

    def build_peer(self, options: Any, seed: int) -> nn.Module:
        if options is None:
            return self.build_student(seed)
        if not callable(options) or isinstance(options, nn.Module):
            raise ConfigError(
                f"peers: {options!r} is not a function that returns a module",
                remedy="give a number, or a list of functions such as lambda: Net(width=8)",
            )
        return self._build(options, seed, "a function given as a peer")

    def peer_card(self, options: Any) -> dict[str, Any]:
        return {} if options is None else {"class": "the given function's result"}

    def build_teacher(self, number: int) -> nn.Module:
        return self.teachers[number]

    def build_method(self) -> Method:
        return copy.deepcopy(self.method)

    def build_baseline_method(self) -> Method:
        return SupervisedMethod(task=self.method.task)

    def training_batches(self, arm: Arm, seed: int) -> LoaderBatches:
        return LoaderBatches(self.train_loader, seed, self.to_batch, self.train.steps)

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
            "precision": resolve_precision(self.train.precision),
        }
        layout = cache_layout(self.cache, self.example.rows(0, 1), teacher, classes, method)
        return open_cache(self.cache, "distill", made_from, layout, teacher, ctx.accelerator)


def call_student(student: nn.Module | Callable[[], nn.Module], seed: int) -> nn.Module:
    """The student's module, made under ``seed`` by a function; raises :class:`ModelError` if it makes no module."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return student if isinstance(student, nn.Module) else _call(student, "the function given as student")


def _call(make: Callable[[], nn.Module], who: str) -> nn.Module:
    module = make()
    module = getattr(module, "_orig_mod", module)
    if not isinstance(module, nn.Module):
        raise ModelError(f"{who} returned a {type(module).__name__}", remedy="it must return a torch.nn.Module")
    return module


REREAD_BATCHES = 8
"""Batches that are read a second time, to see whether a sample always looks the same."""


def fingerprint_samples(
    loader: Iterable[Any],
    to_batch: Callable[[Any], Batch],
    watch: Callable[[Iterator[list[Batch]]], Iterable[list[Batch]]] = lambda batches: batches,
) -> dict[str, Any]:
    """The number of a loader's samples, a digest of their ids and one of their contents, as JSON.

    It does not depend on the samples' order or the batch size. Reads one epoch and the first batches of another,
    without any model.
    """
    batches = LoaderBatches(loader, 0, to_batch)
    batches.check_no_drop_last()
    ids, digests = [], []
    for (batch,) in itertools.chain(
        watch(batches.epoch(0, RankSlice())), itertools.islice(batches.epoch(1, RankSlice()), REREAD_BATCHES)
    ):
        ids.append(_ids(batch))
        digests.append(np.array([input_digest(batch, row) for row in range(len(batch))], dtype=np.uint64))
    every = np.stack([np.concatenate(ids).view(np.uint64), np.concatenate(digests)], 1)
    every = np.unique(every, axis=0)
    again = np.flatnonzero(every[1:, 0] == every[:-1, 0])
    if len(again):
        raise CapabilityError(
            f"different inputs have the same sample id, such as id {int(every[again[0], 0])} ({len(again)} ids): "
            "the loader augments, or several samples share an id",
            where="distill(cache=...)",
            remedy="remove the augmentation, or give every sample its own id; a recipe with data.augment "
            "and data.views keeps several views of a sample",
        )
    return {
        "samples": len(every),
        "ids": short_hash(every[:, 0].tobytes()),
        "inputs": short_hash(every[:, 1].tobytes()),
    }


def _ids(batch: Batch) -> Any:
    if batch.ids is None:
        raise CapabilityError(
            "a cache keeps teacher outputs by sample id, and the loader's batches have no ids",
            where="distill(cache=...)",
            remedy="tutelage.data.IndexedDataset(data) numbers the samples of a data set of pairs; else "
            "set ids in to_batch, or leave cache out",
        )
    if batch.views is not None:
        raise CapabilityError(
            "the loader's batches are augmented differently each time, so cached outputs would never be used again",
            where="distill(cache=...)",
            remedy="remove the augmentation; a recipe with data.augment and data.views keeps several views",
        )
    if batch.ids.shape != (len(batch),) or batch.ids.dtype != torch.int64:
        raise DataError(
            f"the ids of a batch of {len(batch)} are {batch.ids.dtype} {tuple(batch.ids.shape)}",
            where="distill(cache=...)",
            remedy="give one int64 for each sample",
        )
    return batch.ids.cpu().numpy()


def fingerprint_tokenizer(loader: Iterable[Any]) -> dict[str, Any] | None:
    """Class and vocabulary of the tokenizer of a loader's collator, as those of transformers have one."""
    tokenizer = getattr(getattr(loader, "collate_fn", None), "tokenizer", None)
    vocabulary = getattr(tokenizer, "get_vocab", None)
    if not callable(vocabulary):
        return None
    facts = {
        "class": type(tokenizer).__name__,
        "vocabulary": short_hash(json.dumps(sorted(vocabulary().items()), ensure_ascii=True)),
    }
    template = getattr(tokenizer, "chat_template", None)
    return facts | {"chat_template": short_hash(str(template))} if template else facts
