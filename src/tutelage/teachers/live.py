"""A teacher that runs a model in this process."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from tutelage.data.batch import Batch, Inputs
from tutelage.data.loader import current_rank
from tutelage.errors import CapabilityError, shorten
from tutelage.taps import Needs, Observer, compile_apart
from tutelage.teachers.model_copies import find_blocks, quantise_linear_layers, shard_model
from tutelage.teachers.signal import Signal

_BatchNorm = nn.modules.batchnorm._BatchNorm

FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Types to which a model can be converted."""


class LiveTeacher:
    """A frozen model: no gradient, and evaluation mode at every call.

    It is not an ``nn.Module``, so it cannot become part of a student's parameters, state dict, optimizer or
    distributed wrapper. Every call switches the model to evaluation mode first, so its batch statistics never change
    and its dropout is off, even if other code switches the model to training mode. Its taps stay on the model from
    the first signal that needs them until :meth:`close` or the end of this object. They record nothing when other
    code runs the model.

    Speed options never change ``model``: with a ``dtype`` or ``compile`` a copy runs, which the first signal after
    construction or :meth:`to` creates. Signals are float32 on the batch's device in every case.

    Args:
        model: any module; its parameters are frozen in place and their gradients dropped.
        mode: ``eval``, or ``train_bn`` to normalise by the statistics of the batch. Running statistics never change.
        dtype: ``bf16`` or ``fp16``: a copy of the model computes in it, independently of the student's mixed
            precision. ``int8``: a copy with quantised linear layers, on a CPU.
        compile: apply ``torch.compile``.
        batch_size: largest number of rows that run at once; longer batches are split, and their signals concatenated.
        device: where the model runs. Default: the device of :meth:`to`.
        sharded: with several processes, each holds a part of the weights of the model's blocks (FSDP2). ``model``
            itself stays complete on the CPU. All processes must call :meth:`signal` the same number of times.

    Raises:
        CapabilityError: unknown mode or dtype; ``train_bn`` without batch norm or with ``batch_size``; ``int8``
            without a linear layer or on a GPU; ``sharded`` with another option, or without blocks.
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
        for is_wrong, what, remedy in (
            (mode not in ("eval", "train_bn"), f"unknown teacher mode {mode!r}", "allowed: eval, train_bn"),
            (dtype not in (None, "int8", *FLOATS), f"unknown teacher dtype {dtype!r}", "allowed: bf16, fp16, int8"),
            (batch_size is not None and batch_size < 1, f"the teacher has batch_size={batch_size}", "set at least 1"),
            (
                mode == "train_bn" and not any(isinstance(m, _BatchNorm) for m in model.modules()),
                f"teacher mode is 'train_bn', and {type(model).__name__} has no batch norm",
                "set mode: eval",
            ),
            (
                mode == "train_bn" and batch_size is not None,
                "teacher mode 'train_bn' normalises by the whole batch, and batch_size splits it",
                "remove batch_size, or set mode: eval",
            ),
        ):
            if is_wrong:
                raise CapabilityError(what, remedy=remedy)
        others = {"mode": mode == "train_bn", "dtype": dtype == "int8", "compile": compile, "batch_size": batch_size,
                  "device": device}  # fmt: skip
        if sharded:
            for key in (key for key, value in others.items() if value):
                raise CapabilityError(
                    f"a sharded teacher takes no other option, and {key} is set", remedy=f"remove {key}"
                )
            find_blocks(model)
        self.sharded = sharded
        self.model = model.eval()
        for parameter in model.parameters():  # a scripted module has no requires_grad_
            parameter.requires_grad, parameter.grad = False, None
        self.mode, self.dtype, self.compile, self.batch_size = mode, dtype, compile, batch_size
        self.device = None if device is None else _device(device)
        self.provides = frozenset({"logits", "hidden"} if dtype == "int8" else {"logits", "hidden", "head"})
        self._observers: dict[Needs, Observer] = {}
        self._modules: list[nn.Module] = []
        self._parts: nn.Module | None = None
        self._here = torch.device("cpu")
        if dtype == "int8":
            quantise_linear_layers(model)  # an early error if there is nothing to quantise
        if self.device is not None:
            model.to(self.device)

    def to(self, device: torch.device | str) -> Self:
        """Move the model to ``device``, unless the teacher has a device of its own; returns the teacher."""
        self.close()
        self._here = torch.device(device)
        if not (self.sharded and current_rank().world > 1):
            self.model.to(self.device or device)
        return self

    def signal(self, batch: Batch, needs: Needs) -> Signal:
        """The model's output, without gradient; raises :class:`CapabilityError` if it cannot run in ``dtype``."""
        needs = replace(needs, temperature=None)  # dense logits serve every temperature
        batch = batch.for_teacher()
        device, size = batch.labels.device, self.batch_size or len(batch)
        if self.device is not None:
            batch = batch.to(self.device)
        starts = range(0, max(len(batch), 1), max(size, 1))
        signal = _concat([self._run(batch.rows(i, i + size) if len(batch) > size else batch, needs) for i in starts])
        return signal.map(lambda x: x if x.device == device else x.to(device, non_blocking=device.type != "cpu"))

    def close(self) -> None:
        """Remove the taps from the model and delete its copies; the next signal creates them again."""
        while self._observers:
            self._observers.popitem()[1].close()
        self._modules, self._parts = [], None

    def __getstate__(self) -> dict[str, Any]:
        """The state without taps and copies, which another process creates again."""
        return {**self.__dict__, "_observers": {}, "_modules": [], "_parts": None}

    def _run(self, batch: Batch, needs: Needs) -> Signal:
        observer = self._observers.get(needs)
        if observer is None:
            observer = self._observers[needs] = self._open(needs)
        if any(m.training for m in self._modules):
            for module in (self.model, observer.model):
                module.eval()
        inputs = batch.inputs
        if self.dtype in FLOATS:
            named = inputs if isinstance(inputs, dict) else {"": inputs}
            own = FLOATS[self.dtype]
            named = type(named)({k: x.to(own) if x.is_floating_point() else x for k, x in named.items()})
            inputs = named if isinstance(inputs, dict) else named[""]
        else:
            inputs = _in_type_of(self.model, inputs)
        # Not inference_mode: it is no faster (docs/log.md), and its outputs cannot be saved for backward.
        device = batch.labels.device.type
        precision = nullcontext() if self.dtype is None else torch.autocast(device, enabled=False)
        with torch.no_grad(), precision, self._batch_statistics(observer.model):
            try:
                output = observer(inputs)
            except NotImplementedError as error:
                raise CapabilityError(
                    f"the teacher cannot run in {self.dtype or 'its dtype'} on this device: {str(error)[:200]}",
                    remedy="set another dtype for the teacher, or remove dtype",
                ) from error
        signal = Signal(output.logits, output.hidden, output.head)
        return signal if self.dtype is None else signal.map(Tensor.float)

    def _open(self, needs: Needs) -> Observer:
        """An observer of the module that runs for these needs: the model, or a copy of it."""
        runs = self.model
        if self.dtype in FLOATS:
            runs = copy.deepcopy(runs).to(FLOATS[self.dtype])
        elif self.dtype == "int8":
            device = next(runs.parameters()).device
            if device.type != "cpu":
                raise CapabilityError(
                    f"dtype int8 runs on a CPU only, and the teacher is on {device}",
                    remedy="set teacher.inference.device: cpu, or dtype: bf16",
                )
            runs = quantise_linear_layers(runs)
        elif self.compile:  # a copy with the same weights, so that the caller's module is not compiled
            tensors = [*runs.parameters(), *runs.buffers()]
            runs = copy.deepcopy(runs, {id(x): x for x in tensors})
        if self.sharded and current_rank().world > 1:
            self._parts = runs = self._parts or shard_model(runs, self._here)
        observer = Observer(runs, needs)
        if self.compile:  # after the taps, since a compiled model ignores later hooks
            compile_apart(runs)
        running = (self.model, runs, *(o.model for o in self._observers.values()))
        self._modules = list({id(m): m for model in running for m in model.modules()}.values())
        return observer

    @contextmanager
    def _batch_statistics(self, model: nn.Module) -> Iterator[None]:
        if self.mode == "eval":
            yield
            return
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        tracking = [m.track_running_stats for m in norms]
        for m in norms:  # without tracking, a batch norm uses the statistics of the batch and stores none
            m.training, m.track_running_stats = True, False
        try:
            yield
        finally:
            for m, track in zip(norms, tracking, strict=True):
                m.training, m.track_running_stats = False, track


def _device(device: torch.device | str) -> torch.device:
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        raise CapabilityError(
            f"there is no device {shorten(str(device))} for the teacher: {str(error).splitlines()[0]}",
            remedy="set a device of this machine, such as cpu, cuda or cuda:1, or remove it",
        ) from None


def _in_type_of(model: nn.Module, inputs: Inputs) -> Inputs:
    """Float inputs in the type of a float32 or bf16 model, where a loop in another precision converted them."""
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    named = inputs if isinstance(inputs, dict) else {"": inputs}
    lower = (torch.bfloat16, torch.float16)
    if own is None or own in lower or not any(x.dtype in lower for x in named.values()):
        return inputs
    named = type(named)({k: x.to(own) if x.dtype in lower else x for k, x in named.items()})
    return named if isinstance(inputs, dict) else named[""]


def _concat(signals: Sequence[Signal]) -> Signal:
    first = signals[0]
    if len(signals) == 1:
        return first
    head = first.head and first.head._replace(inputs=torch.cat([s.head.inputs for s in signals if s.head]))
    logits = None if first.logits is None else torch.cat([s.dense() for s in signals])
    return Signal(logits, {tap: torch.cat([s.hidden[tap] for s in signals]) for tap in first.hidden}, head)
