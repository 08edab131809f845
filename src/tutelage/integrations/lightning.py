"""Distillation as a ``LightningModule``: Lightning's trainer, our methods and teachers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.data import Batch, as_batch
from tutelage.errors import CapabilityError, require
from tutelage.integrations.distiller import Distiller
from tutelage.methods import Method
from tutelage.taps import logits_of
from tutelage.teachers.signal import Teacher

require("lightning", "lightning", "tutelage.integrations.lightning")

from lightning import LightningModule  # noqa: E402

Optimizers = Callable[[Iterable[nn.Parameter]], Any]
"""Makes what ``configure_optimizers`` returns, of the parameters that are trained."""


class LightningDistillationModule(LightningModule):
    """Any student, teacher and method for Lightning's ``Trainer``.

    Each batch of the loader is one optimizer step, as in our engine. Lightning's own ``accumulate_grad_batches``
    would divide by the number of micro-batches, and counts of terms differ between these: cut the loader's batch
    here, with ``accumulate``, and the gradient is that of the whole batch.

    Logged: ``train_loss``, each term as ``term/NAME``, ``val_loss``, and of one class of several ``val_accuracy``.

    Args:
        student: any module.
        teacher: as of :class:`tutelage.integrations.Distiller`.
        method: default :class:`tutelage.methods.LogitMethod` at T = 4, alpha = 0.9.
        example: a batch of the data, for a dry run.
        optimizer: a function of the parameters that returns an optimizer, or anything that Lightning's
            ``configure_optimizers`` may return. Default: AdamW at 1e-3.
        accumulate: micro-batches that a batch is cut into; above 1 on one process only.
        clip: largest norm of the gradient, where ``accumulate`` is above 1; else it is Lightning's own
            ``gradient_clip_val``.
        to_batch: makes a batch of what the loader yields; for causal language models
            :func:`tutelage.data.causal_batch`.
        seed: of what the method initialises.
        ids: sample ids of the training data, for a method that needs them.
        peers: modules that are trained with the student, for a method that asks for some.
        phases_done: the trainings that the method needs first are done.

    Raises:
        CapabilityError: as of :class:`tutelage.integrations.Distiller`, or ``clip`` where it is Lightning's to do.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | Teacher | None,
        method: Method | None = None,
        *,
        example: Any,
        optimizer: Optimizers | None = None,
        accumulate: int = 1,
        clip: float | None = None,
        to_batch: Callable[[Any], Batch] = as_batch,
        seed: int = 0,
        ids: Tensor | None = None,
        peers: Sequence[nn.Module] = (),
        phases_done: bool = False,
    ) -> None:
        super().__init__()
        if accumulate < 1:
            raise CapabilityError(f"accumulate={accumulate}", remedy="a number of micro-batches, from 1 on")
        if clip is not None and accumulate == 1:
            raise CapabilityError(
                f"clip={clip} where Lightning steps itself", remedy="Trainer(gradient_clip_val=...), which it knows"
            )
        self.distiller = Distiller(
            student, teacher, method, example=example, to_batch=to_batch, seed=seed, ids=ids, peers=peers,
            phases_done=phases_done,
        )  # fmt: skip
        self._optimizer, self.accumulate, self.clip = optimizer, accumulate, clip
        self.automatic_optimization = accumulate == 1

    @property
    def student(self) -> nn.Module:
        """What to save."""
        return self.distiller.student

    def forward(self, inputs: Any) -> Tensor:
        """The student's logits.

        Args:
            inputs: a tensor, or a mapping of keyword arguments.

        Returns:
            ``[B, C]`` or ``[B, L, C]``.
        """
        return logits_of(self.student(**inputs) if isinstance(inputs, dict) else self.student(inputs))

    def configure_optimizers(self) -> Any:
        """What ``optimizer`` makes of the parameters of student and method."""
        trained = [p for p in self.distiller.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=1e-3) if self._optimizer is None else self._optimizer(trained)

    def on_fit_start(self) -> None:
        """Checks what does not go together, and tells the method how long the training is."""
        if self.trainer.accumulate_grad_batches != 1:
            raise CapabilityError(
                f"Trainer(accumulate_grad_batches={self.trainer.accumulate_grad_batches}) divides by the number of "
                "micro-batches, and not by what counts in them",
                remedy="leave it at 1, make the loader's batch as large as the step, and pass accumulate= here",
            )
        if self.accumulate > 1 and self.trainer.world_size > 1:
            raise CapabilityError(
                f"accumulate={self.accumulate} on {self.trainer.world_size} processes",
                remedy="accumulate=1 with smaller batches, or the engine: tutelage.distill under torchrun",
            )
        self.distiller.begin(int(self.trainer.estimated_stepping_batches), self.global_step)

    def training_step(self, raw: Any, index: int) -> Tensor:
        """The method's loss of a batch; with ``accumulate`` the whole step."""
        batch = self.distiller.batch(raw)
        if self.automatic_optimization:
            loss = self.distiller.loss(batch, self.distiller.scales([batch]))
        else:
            loss = self._whole_step(batch)
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=len(batch))
        self.log_dict({f"term/{k}": v for k, v in self.distiller.values().items()}, batch_size=len(batch))
        return loss

    def _whole_step(self, batch: Batch) -> Tensor:
        optimizers: Any = self.optimizers()
        if isinstance(optimizers, list):
            raise CapabilityError(f"{len(optimizers)} optimizers", remedy="one, of all parameters")
        micros = batch.split(self.accumulate)
        scale = self.distiller.scales(micros)
        total = torch.zeros((), device=self.device)
        for micro in micros:
            loss = self.distiller.loss(micro, scale)
            self.manual_backward(loss)
            total += loss.detach()
        if self.clip is not None:
            self.clip_gradients(optimizers, gradient_clip_val=self.clip, gradient_clip_algorithm="norm")
        optimizers.step()
        optimizers.zero_grad()
        schedules: Any = self.lr_schedulers()
        for schedule in [] if schedules is None else schedules if isinstance(schedules, list) else [schedules]:
            schedule.step()
        return total

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Tells the method that a step is done."""
        self.distiller.after_step()

    def validation_step(self, raw: Any, index: int) -> None:
        """Logs the method's loss, and of one class of several the accuracy."""
        batch = self.distiller.batch(raw)
        self.log("val_loss", self.distiller.evaluated(batch), batch_size=len(batch), sync_dist=True)
        labelled = batch.labelled()
        if batch.task == "classes" and bool(labelled.any()):
            right = (self.distiller.logits(batch).argmax(-1) == batch.labels)[labelled]
            self.log(
                "val_accuracy", right.float().mean(), batch_size=int(labelled.sum()), prog_bar=True, sync_dist=True
            )
