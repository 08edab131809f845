"""A teacher that is a model in this process."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from tutelage.data.batch import Batch
from tutelage.data.loader import current_rank
from tutelage.errors import CapabilityError
from tutelage.taps import Needs, Observer, compile_apart
from tutelage.teachers.int8 import quantise_linear_layers
from tutelage.teachers.sharding import find_blocks, shard_model
from tutelage.teachers.signal import Signal

_BatchNorm = nn.modules.batchnorm._BatchNorm

FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Types of numbers that a whole model can be in."""


class LiveTeacher:
    """A frozen model: no gradient, evaluation mode at every call, out of reach of the student's training.

    It is not an ``nn.Module`` itself, so it cannot end up in a student's parameters, state dict,
    optimizer or distributed wrapper. Whatever else switches the model to training mode, each call
    switches it back first, so its batch statistics never move and its dropout is off. Its taps stay on the model
    from the first signal that needs them to the end of this object, or :meth:`close`; whatever else runs the model
    is not recorded.

    What makes it faster never touches ``model``: with a ``dtype`` a copy of it runs, compiled or not, made at the
    first signal and again after :meth:`to`. Signals are float32 on the batch's device whatever runs.

    Args:
        model: any module; its parameters are frozen in place and their gradients dropped.
        mode: ``eval``, or ``train_bn`` to normalise by the statistics of the batch at hand. The
            running statistics stay as they are in both.
        dtype: ``bf16`` or ``fp16``, the numbers that a copy of the model computes in, whatever mixed precision the
            student has; ``int8``, linear layers of a copy quantised, on a CPU.
        compile: ``torch.compile`` what runs.
        batch_size: most rows that run at once; a longer batch is cut and what is said of its parts put together.
        device: where it runs. Default: where :meth:`to` put it.
        sharded: where a launcher started several processes, each keeps a part of its blocks' weights (FSDP2) where it
            runs; ``model`` stays whole where it is, on the CPU. The processes must ask it the same number of times.

    Raises:
        CapabilityError: unknown mode or dtype, ``train_bn`` without batch norm or in parts of a batch, ``int8``
            without a linear layer or on a GPU; ``sharded`` with what runs another way, or without blocks.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        mode: Literal["eval", "train_bn"] = "eval",
        dtype: Literal["bf16", "fp16", "int8"] | None = None,
        compile: bool = False,
        batch_size: int | None = None,
        device: torch.device | str | None = None,
        sharded: bool = False,
    ) -> None:
        if mode not in ("eval", "train_bn"):
            raise CapabilityError(f"unknown teacher mode {mode!r}", remedy="allowed: eval, train_bn")
        if dtype not in (None, "int8", *FLOATS):
            raise CapabilityError(f"unknown dtype {dtype!r} of a teacher", remedy="allowed: bf16, fp16, int8")
        if batch_size is not None and batch_size < 1:
            raise CapabilityError(f"batch_size={batch_size} of a teacher", remedy="give at least 1")
        others = {"mode": mode == "train_bn", "dtype": dtype == "int8", "compile": compile, "batch_size": batch_size,
                  "device": device}  # fmt: skip
        if sharded and any(others.values()):
            key = next(k for k, given in others.items() if given)
            raise CapabilityError(f"a sharded teacher runs as it is, and {key} is set", remedy=f"leave {key} out")
        if sharded:
            find_blocks(model)
        self.sharded = sharded
        self.model = model.requires_grad_(False).eval()
        self.model.zero_grad(set_to_none=True)  # what its own training left
        self.mode, self.dtype, self.compile, self.batch_size = mode, dtype, compile, batch_size
        self.device = None if device is None else _device(device)
        self.provides = frozenset({"logits", "hidden"} if dtype == "int8" else {"logits", "hidden", "head"})
        self._observers: dict[Needs, Observer] = {}
        self._modules: list[nn.Module] = []
        self._parts: nn.Module | None = None
        self._here = torch.device("cpu")
        if mode == "train_bn" and not any(isinstance(m, _BatchNorm) for m in model.modules()):
            raise CapabilityError(
                f"teacher mode 'train_bn', but {type(model).__name__} has no batch norm", remedy="use mode: eval"
            )
        if mode == "train_bn" and batch_size is not None:
            raise CapabilityError(
                "teacher mode 'train_bn' normalises by the whole batch, and batch_size would cut it",
                remedy="leave batch_size out, or use mode: eval",
            )
        if dtype == "int8":
            quantise_linear_layers(model)  # whether it can be, before anything is trained
        if self.device is not None:
            model.to(self.device)

    def to(self, device: torch.device | str) -> Self:
        """This teacher, its model moved to ``device`` unless it has one of its own."""
        self.close()
        self._here = torch.device(device)
        if not (self.sharded and current_rank().world > 1):
            self.model.to(self.device or device)
        return self

    def signal(self, batch: Batch, needs: Needs) -> Signal:
        """The model's word on the batch, without gradient.

        Raises:
            CapabilityError: the model cannot run in its ``dtype``.
        """
        needs = replace(needs, temperature=None)  # logits are whole, whatever softens them
        batch = batch.for_teacher()
        here, size = batch.labels.device, self.batch_size or len(batch)
        if self.device is not None:
            batch = batch.to(self.device)
        starts = range(0, max(len(batch), 1), max(size, 1))
        said = [self._run(batch.rows(i, i + size) if len(batch) > size else batch, needs) for i in starts]
        return _moved(_joined(said), here)

    def close(self) -> None:
        """Take the taps off the model, and drop its copies; the next signal makes them again."""
        while self._observers:
            self._observers.popitem()[1].close()
        self._modules, self._parts = [], None

    def __getstate__(self) -> dict[str, Any]:
        """What goes to another process: taps are put on there."""
        return {**self.__dict__, "_observers": {}, "_modules": [], "_parts": None}

    def _run(self, batch: Batch, needs: Needs) -> Signal:
        observer = self._observers.get(needs)
        if observer is None:
            observer = self._observers[needs] = self._opened(needs)
        if any(m.training for m in self._modules):
            for module in (self.model, observer.model):
                module.eval()
        cast = FLOATS.get(self.dtype or "")
        inputs = batch.inputs
        if cast is not None:
            inputs = (
                {k: _cast(v, cast) for k, v in inputs.items()} if isinstance(inputs, dict) else _cast(inputs, cast)
            )
        # Not inference_mode: it is no faster (docs/log.md), and what it gives cannot be saved for backward.
        with torch.no_grad(), self._own_precision(batch.labels.device), self._batch_statistics(observer.model):
            try:
                seen = observer(inputs)
            except NotImplementedError as error:
                raise CapabilityError(
                    f"the teacher cannot run in {self.dtype or 'its type of numbers'} here: {str(error)[:200]}",
                    remedy="another teacher.inference.dtype, or none",
                ) from error
        if self.dtype is None:
            return Signal(seen.logits, seen.hidden, seen.head)
        head = seen.head and seen.head.map(lambda x: x.float())
        hidden = {tap: x.float() for tap, x in seen.hidden.items()}
        return Signal(None if seen.logits is None else seen.logits.float(), hidden, head)

    def _opened(self, needs: Needs) -> Observer:
        """An observer of what runs for these needs: the model, or a copy of it."""
        runs = self.model
        if self.dtype in FLOATS:
            runs = copy.deepcopy(runs).to(FLOATS[self.dtype])
        elif self.dtype == "int8":
            place = next(runs.parameters()).device
            if place.type != "cpu":
                raise CapabilityError(
                    f"int8 is for teachers on a CPU, this one is on {place}",
                    remedy="set teacher.inference.device: cpu, or dtype: bf16",
                )
            runs = quantise_linear_layers(runs)
        elif self.compile:  # a copy with the same weights, so that the caller's module is not compiled
            tensors = [*runs.parameters(), *runs.buffers()]
            runs = copy.deepcopy(runs, {id(x): x for x in tensors})
        if self.sharded and current_rank().world > 1:
            self._parts = runs = self._parts or shard_model(runs, self._here)
        observer = Observer(runs, needs)
        if self.compile:  # after the taps, which a compiled model would ignore
            compile_apart(runs)
        running = (self.model, runs, *(o.model for o in self._observers.values()))
        self._modules = list({id(m): m for model in running for m in model.modules()}.values())
        return observer

    @contextmanager
    def _own_precision(self, device: torch.device) -> Iterator[None]:
        if self.dtype is None:
            yield
            return
        with torch.autocast(device.type, enabled=False):
            yield

    @contextmanager
    def _batch_statistics(self, model: nn.Module) -> Iterator[None]:
        if self.mode == "eval":
            yield
            return
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        tracking = [m.track_running_stats for m in norms]
        for m in norms:  # not tracking: the batch's own statistics are used and none are kept
            m.training, m.track_running_stats = True, False
        try:
            yield
        finally:
            for m, track in zip(norms, tracking, strict=True):
                m.training, m.track_running_stats = False, track


def _device(device: torch.device | str) -> torch.device:
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise CapabilityError(
            f"there is no device {str(device)!r} for the teacher: {str(error).splitlines()[0]}",
            remedy="give cpu, cuda or cuda:1, as this machine has them, or leave it out",
        ) from None
    return found


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


def _moved(signal: Signal, device: torch.device) -> Signal:
    def to(x: Tensor) -> Tensor:
        return x if x.device == device else x.to(device, non_blocking=device.type != "cpu")

    head = signal.head and signal.head.map(to)
    logits = None if signal.logits is None else to(signal.logits)
    return Signal(logits, {tap: to(x) for tap, x in signal.hidden.items()}, head)


def _joined(said: Sequence[Signal]) -> Signal:
    """What was said of the parts of a batch, as of the whole."""
    first = said[0]
    if len(said) == 1:
        return first
    head = first.head and first.head._replace(inputs=torch.cat([s.head.inputs for s in said if s.head]))
    logits = None if first.logits is None else torch.cat([s.dense() for s in said])
    return Signal(logits, {tap: torch.cat([s.hidden[tap] for s in said]) for tap in first.hidden}, head)
