"""A teacher that is a model in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

from tutelage.data.batch import Batch
from tutelage.errors import CapabilityError
from tutelage.taps import Needs, Observer
from tutelage.teachers.signal import Signal

_BatchNorm = nn.modules.batchnorm._BatchNorm


class LiveTeacher:
    """A frozen model: no gradient, evaluation mode at every call, out of reach of the student's training.

    It is not an ``nn.Module`` itself, so it cannot end up in a student's parameters, state dict,
    optimizer or distributed wrapper. Whatever else switches the model to training mode, each call
    switches it back first, so its batch statistics never move and its dropout is off. Its taps stay on the model
    from the first signal that needs them to the end of this object, or :meth:`close`; whatever else runs the model
    is not recorded.

    Args:
        model: any module; its parameters are frozen in place and their gradients dropped.
        mode: ``eval``, or ``train_bn`` to normalise by the statistics of the batch at hand. The
            running statistics stay as they are in both.

    Raises:
        CapabilityError: unknown mode, or ``train_bn`` without batch norm.
    """

    provides = frozenset({"logits", "hidden", "head"})

    def __init__(self, model: nn.Module, *, mode: Literal["eval", "train_bn"] = "eval") -> None:
        if mode not in ("eval", "train_bn"):
            raise CapabilityError(f"unknown teacher mode {mode!r}", remedy="allowed: eval, train_bn")
        self.model = model.requires_grad_(False).eval()
        self.model.zero_grad(set_to_none=True)  # what its own training left
        self.mode = mode
        self._observers: dict[Needs, Observer] = {}
        self._modules = list(model.modules())
        self._norms = [m for m in self._modules if isinstance(m, _BatchNorm)]
        if mode == "train_bn" and not self._norms:
            raise CapabilityError(
                f"teacher mode 'train_bn', but {type(model).__name__} has no batch norm", remedy="use mode: eval"
            )

    def to(self, device: torch.device | str) -> LiveTeacher:
        """This teacher, its model moved to ``device``."""
        self.model.to(device)
        return self

    def signal(self, batch: Batch, needs: Needs) -> Signal:
        """The model's word on the batch, without gradient."""
        if any(m.training for m in self._modules):
            self.model.eval()
        with torch.no_grad(), self._batch_statistics():
            if needs not in self._observers:
                self._observers[needs] = Observer(self.model, needs)
            seen = self._observers[needs](batch.inputs)
        return Signal(seen.logits, seen.hidden, seen.head)

    def close(self) -> None:
        """Take the taps off the model; the next signal puts its own on again."""
        while self._observers:
            self._observers.popitem()[1].close()

    @contextmanager
    def _batch_statistics(self) -> Iterator[None]:
        if self.mode == "eval":
            yield
            return
        tracking = [m.track_running_stats for m in self._norms]
        for m in self._norms:  # not tracking: the batch's own statistics are used and none are kept
            m.training, m.track_running_stats = True, False
        try:
            yield
        finally:
            for m, track in zip(self._norms, tracking, strict=True):
                m.training, m.track_running_stats = False, track
