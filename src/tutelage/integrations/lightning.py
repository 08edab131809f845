"""Distillation as a ``LightningModule``: Lightning's trainer, our methods and teachers."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.data import Batch
from tutelage.errors import CapabilityError, require
from tutelage.integrations.distiller import Distiller
from tutelage.methods import Method
from tutelage.taps import scores_of

require("lightning", "lightning", "tutelage.integrations.lightning")

from lightning import LightningModule  # noqa: E402

Optimizers = Callable[[Iterable[nn.Parameter]], Any]
"""Takes the trained parameters and returns what ``configure_optimizers`` may return."""


class LightningDistillationModule(LightningModule):
    """Any student, teacher and method for Lightning's ``Trainer``.

    Each batch of the loader is one optimizer step, as in our engine. Split it into micro-batches with ``accumulate``
    here, which keeps its gradient, and not with Lightning's ``accumulate_grad_batches``: that divides by the number
    of micro-batches, whose term counts differ.

    Logs ``train_loss``, each term as ``term/NAME``, ``val_loss``, and ``val_accuracy`` for classification.

    Args:
        student: any module.
        teacher: see :class:`tutelage.integrations.Distiller`.
        method: default :class:`tutelage.methods.LogitMethod` at T = 4, alpha = 0.9.
        example: a batch of the data, for a dry run.
        optimizer: a function of the parameters that returns an optimizer, or anything that Lightning's
            ``configure_optimizers`` may return. Default: AdamW at 1e-3.
        accumulate: micro-batches of a batch; above 1 on one process only.
        clip: maximum norm of the gradient, if ``accumulate`` is above 1; else use Lightning's ``gradient_clip_val``.
        options: other arguments of :class:`tutelage.integrations.Distiller`: ``to_batch``, ``batch``,
            ``class_axis``, ``seed``, ``ids``, ``peers``, ``phases_done`` and ``outputs``.

    Raises:
        CapabilityError: see :class:`tutelage.integrations.Distiller`; or ``clip`` without ``accumulate``.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Any,
        method: Method | None = None,
        *,
        example: Any,
        optimizer: Optimizers | None = None,
        accumulate: int = 1,
        clip: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if accumulate < 1:
            raise CapabilityError(f"accumulate={accumulate}", remedy="give a number of micro-batches, 1 or more")
        if clip is not None and accumulate == 1:
            raise CapabilityError(
                f"clip={clip} without accumulate, where Lightning makes the step",
                remedy=f"leave clip out, and give Lightning's Trainer(gradient_clip_val={clip})",
            )
        self.distiller = Distiller(student, teacher, method, example=example, **options)
        self._optimizer, self.accumulate, self.clip = optimizer, accumulate, clip

    @property
    def student(self) -> nn.Module:
        """The module to save."""
        return self.distiller.student

    def forward(self, inputs: Any) -> Tensor:
        """The student's logits.

        Args:
            inputs: a tensor, or a mapping of keyword arguments.

        Returns:
            ``[B, C]`` or ``[B, L, C]``.
        """
        return scores_of(self.student, inputs)

    def configure_optimizers(self) -> Any:
        """The optimizer for the parameters of student and method."""
        trained = [p for p in self.distiller.parameters() if p.requires_grad]
        configured = torch.optim.AdamW(trained, lr=1e-3) if self._optimizer is None else self._optimizer(trained)
        if count_optimizers(configured) > 1:  # Lightning leaves the steps of several to the module
            self.automatic_optimization = False
        return configured

    def on_fit_start(self) -> None:
        """Check Lightning's arguments, and report the number of steps to the method."""
        if self.trainer.accumulate_grad_batches != 1:
            raise CapabilityError(
                f"Trainer(accumulate_grad_batches={self.trainer.accumulate_grad_batches}) divides by the number of "
                "micro-batches, not by their term counts",
                remedy="leave it at 1, make the loader's batch as large as the step, and pass accumulate= here",
            )
        if self.accumulate > 1:  # not before: Lightning drops interval and monitor of manual schedules
            self.automatic_optimization = False
        if self.trainer.gradient_clip_val is not None and not self.automatic_optimization:
            given = self.trainer.gradient_clip_val
            raise CapabilityError(
                f"Trainer(gradient_clip_val={given}) with accumulate={self.accumulate}: this module makes the step",
                remedy=f"leave gradient_clip_val out, and give LightningDistillationModule(clip={given})",
            )
        if self.accumulate > 1 and self.trainer.world_size > 1:
            raise CapabilityError(
                f"accumulate={self.accumulate} on {self.trainer.world_size} processes",
                remedy="accumulate=1 with smaller batches, or the engine: tutelage.distill under torchrun",
            )
        self.distiller.begin(int(self.trainer.estimated_stepping_batches), self.global_step)

    def training_step(self, raw: Any, index: int) -> Tensor:
        """The method's loss of a batch; with ``accumulate`` the full step."""
        batch = self.distiller.batch(raw)
        if self.automatic_optimization:
            loss = self.distiller.loss(batch, self.distiller.scales([batch]))
        else:
            loss = self._full_step(batch)
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=len(batch))
        self.log_dict({f"term/{k}": v for k, v in self.distiller.values().items()}, batch_size=len(batch))
        return loss

    def _full_step(self, batch: Batch) -> Tensor:
        given: Any = self.optimizers()
        optimizers = given if isinstance(given, list) else [given]
        micros = batch.split(self.accumulate)
        scale = self.distiller.scales(micros)
        total = torch.zeros((), device=self.device)
        for micro in micros:
            loss = self.distiller.loss(micro, scale)
            self.manual_backward(loss)
            total += loss.detach()
        if self.clip is not None:  # one norm over the parameters of all optimizers
            torch.nn.utils.clip_grad_norm_([p for p in self.distiller.parameters() if p.grad is not None], self.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self._step_schedules("step", self.global_step // len(optimizers))  # Lightning counts each optimizer's
        return total

    def _step_schedules(self, interval: str, done: int) -> None:
        """Step the schedules of an interval as Lightning does, which leaves them to a module that makes the step."""
        for config in self.trainer.lr_scheduler_configs:
            if config.interval != interval or done % config.frequency:
                continue
            monitor = str(config.monitor or "val_loss") if config.reduce_on_plateau else None
            if monitor is not None and monitor not in self.trainer.callback_metrics:
                raise CapabilityError(
                    f"the learning rate schedule follows {monitor!r}, which is not logged",
                    remedy=f"monitor one of {', '.join(self.trainer.callback_metrics)}, or pass validation data",
                )
            self.lr_scheduler_step(
                config.scheduler, None if monitor is None else self.trainer.callback_metrics[monitor]
            )

    def on_train_epoch_end(self) -> None:
        """Step the schedules of epochs, if this module makes the step."""
        if not self.automatic_optimization:
            self._step_schedules("epoch", self.current_epoch + 1)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Report the end of a step to the method."""
        self.distiller.after_step()

    def validation_step(self, raw: Any, index: int) -> None:
        """Log the method's loss, and the accuracy for classification."""
        self._evaluate(raw, "val")

    def test_step(self, raw: Any, index: int) -> None:
        """Log ``test_loss`` and ``test_accuracy``, as :meth:`validation_step`."""
        self._evaluate(raw, "test")

    def predict_step(self, raw: Any, index: int) -> Tensor:
        """The student's logits; the batches need no labels."""
        return self.distiller.logits(self.distiller.batch(raw))

    def _evaluate(self, raw: Any, split: str) -> None:
        batch = self.distiller.batch(raw)
        self.log(f"{split}_loss", self.distiller.evaluated(batch), batch_size=len(batch), sync_dist=True)
        labelled = batch.labelled()
        if batch.task == "classes" and bool(labelled.any()):
            right = (self.distiller.logits(batch).argmax(-1) == batch.labels)[labelled]
            self.log(
                f"{split}_accuracy",
                right.float().mean(),
                batch_size=int(labelled.sum()),
                prog_bar=True,
                sync_dist=True,
            )


def count_optimizers(configured: Any) -> int:
    """The number of optimizers in what ``configure_optimizers`` returns."""
    if isinstance(configured, tuple) and len(configured) == 2 and isinstance(configured[0], (list, tuple)):
        configured = configured[0]  # (optimizers, schedules)
    return len(configured) if isinstance(configured, (list, tuple)) else 1
