"""The training loop, the same for every model and method."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from tutelage.config import TrainConfig
from tutelage.data.batch import IGNORE, Batch
from tutelage.data.loader import Batches, RankSlice
from tutelage.engine import checkpoint
from tutelage.engine.ema import EMA
from tutelage.engine.launch import broadcast_from_main
from tutelage.engine.optim import build_optimizer, build_schedule
from tutelage.engine.run_directory import RunDirectory
from tutelage.engine.zero import Zero
from tutelage.errors import CapabilityError, CheckpointError, DataError, Interrupted, NumericsError
from tutelage.evaluation.evaluate import TeacherOutput, evaluate
from tutelage.methods.base import DistillationModule, Method, Term, needs_of
from tutelage.methods.step import TermSums, check_terms, count_terms, get_signal, scale_terms
from tutelage.taps import compile_apart
from tutelage.teachers.signal import Signal, Teacher

EVALUATIONS = 100
"""Maximum number of evaluations if ``evaluate_every`` is not set."""

CHECKPOINT_SECONDS = 20.0
"""Minimum seconds between checkpoints if ``checkpoint_every`` is not set; each one follows an evaluation."""


class TrainingCallback(Protocol):
    """Is called during a training; by default it does nothing."""

    def on_start(self, name: str, step: int, total: int) -> None:
        """A training starts, or continues from ``step``."""
        return

    def on_step(self, step: int) -> None:
        """An optimizer step is done."""
        return

    def on_log(self, line: dict[str, Any]) -> None:
        """A line was written to the metrics."""
        return


class NullCallback(TrainingCallback):
    """A callback that does nothing."""


@dataclass
class Training:
    """One training: the student, the method, the data, the teacher and the run directory.

    Attributes:
        student: trained in place.
        validation: batches on which the best weights are selected; ``None``: the last weights are used.
        seed: seed of all random numbers except the initial weights, which the caller sets.
        should_stop: called after every step; if it returns true, the state is saved and :class:`Interrupted` raised.
        epoch_steps: steps of an epoch, for the schedule and the evaluations. Default: one pass over ``batches``.
            A baseline student on fewer images gets the steps of the distilled student.
        classes: the number of classes, against which labels are checked.
        metric: the validation metric that selects the best weights.
        validation_outputs: the teacher outputs on ``validation``, for metrics that compare with them.
    """

    name: str
    student: nn.Module
    method: Method
    batches: Batches
    config: TrainConfig
    run: RunDirectory
    teacher: Teacher | None = None
    validation: Iterable[Batch] | None = None
    seed: int = 0
    should_stop: Callable[[], bool] = lambda: False
    callback: TrainingCallback = field(default_factory=NullCallback)
    epoch_steps: int | None = None
    classes: int | None = None
    metric: str = "accuracy"
    validation_outputs: Iterable[TeacherOutput] | None = None

    @property
    def epoch_length(self) -> int:
        """``epoch_steps``, resolved."""
        return self.epoch_steps or self.batches.steps_per_epoch

    @property
    def steps(self) -> int:
        """Total number of optimizer steps."""
        return self.config.steps or (self.config.epochs or 1) * self.epoch_length


@dataclass
class Progress:
    """The progress of a training; part of its checkpoints."""

    step: int = 0
    best: list[float] | None = None
    """Metric, negative loss, and step of the best evaluation so far."""
    stale: int = 0
    """Number of evaluations since the best one."""
    seconds: float = 0.0
    stopped_early: bool = False


@dataclass
class Outcome:
    """A finished training.

    Attributes:
        last: weights after the last step, by name, on the CPU; empty except in the main process.
        best: weights at the best validation; ``last`` without validation.
        method: the method's own weights after the last step.
        best_method: the method's own weights at the best validation of the student.
    """

    last: dict[str, Tensor]
    best: dict[str, Tensor]
    method: dict[str, Tensor]
    best_method: dict[str, Tensor]
    progress: Progress


def fit(t: Training, accelerator: Accelerator) -> Outcome:
    """Train ``t.student``, from its newest checkpoint if there is one.

    Raises:
        Interrupted: ``t.should_stop`` returned true; the state is saved.
        NumericsError: the loss is no longer finite.
        CheckpointError: the newest checkpoint is damaged.
        ModelError: a tap names no module of the student, or captures no tensor with a gradient.
    """
    module = DistillationModule(t.student, t.method).train()
    with closing(module):  # removes the taps from the caller's module, also after an error
        module.open()  # before anything compiles or wraps the student
        return _train(t, accelerator, _State(t, accelerator, module))


def _train(t: Training, accelerator: Accelerator, s: _State) -> Outcome:
    s.resume()
    s.bare.method.before_training(s.bare.student, s.at.step, t.steps)
    t.callback.on_start(t.name, s.at.step, t.steps)
    per_epoch = t.batches.steps_per_epoch
    while s.at.step < t.steps and not s.at.stopped_early:
        epoch, done = divmod(s.at.step, per_epoch)
        for micros in s.with_signals(t.batches.epoch(epoch, s.share, skip=done)):
            s.bare.method.loss_scales = scale = s.scales([batch for batch, _ in micros])
            for batch, get_batch_signal in micros:
                with accelerator.accumulate(s.module):
                    terms = s.module(batch, get_batch_signal())
                    accelerator.backward(s.loss(terms, scale))
            if t.config.clip is not None:
                accelerator.clip_grad_norm_(s.module.parameters(), t.config.clip)
            s.optimizer.step()
            s.schedule.step()
            s.optimizer.zero_grad()
            s.bare.method.after_step()
            s.after_step()
            if s.at.step >= t.steps or s.at.stopped_early:
                break
    return s.finish()


def enable_gradient_checkpointing(student: nn.Module) -> None:
    """Turn on gradient checkpointing in a model of transformers."""
    model: Any = getattr(student, "model", student) if hasattr(student, "weights_prefix") else student
    older = getattr(model, "gradient_checkpointing_enable", None)  # transformers uses both names
    enable = getattr(model, "activation_checkpointing_enable", older)
    if not callable(enable) or not getattr(model, "supports_gradient_checkpointing", False):
        raise CapabilityError(
            f"{type(student).__name__} does not support gradient checkpointing",
            where="train.gradient_checkpointing",
            remedy="remove it; models of transformers support it",
        )
    # The re-entrant variant gives no gradient to activations that are tapped inside a layer.
    enable({"use_reentrant": False})


class _State:
    """The state of :func:`fit`, and the work before and after a step: signals, log, validation, checkpoints."""

    def __init__(self, t: Training, accelerator: Accelerator, module: DistillationModule) -> None:
        self.t, self.accelerator = t, accelerator
        accelerator.gradient_state.plugin_kwargs.update(num_steps=t.config.accumulate, sync_with_dataloader=False)
        accelerator.step = 0
        if accelerator.scaler is not None:  # shared by all trainings of a run: reset it to torch's defaults
            accelerator.scaler.load_state_dict(torch.amp.GradScaler("cpu").state_dict())
        self.share = RankSlice(accelerator.process_index, accelerator.num_processes, t.config.accumulate)
        torch.manual_seed((t.seed * 2_147_483_629 + accelerator.process_index) & (2**63 - 1))
        if t.config.gradient_checkpointing:
            enable_gradient_checkpointing(t.student)
        if t.config.compile:
            compile_apart(t.student)
        optimizer = build_optimizer(module, t.config.optimizer)
        deepspeed = accelerator.distributed_type.value == "DEEPSPEED"
        self.zero = Zero(accelerator, t.config, module, optimizer) if deepspeed else None
        with nullcontext() if self.zero is None else self.zero.hide_bf16():
            self.module, prepared = accelerator.prepare(module, optimizer)
        self.bare: DistillationModule = accelerator.unwrap_model(self.module)
        if t.method.needs_validation and t.validation is None:
            raise CapabilityError(
                f"{type(t.method).__name__} adapts to the validation loss, but there is no validation data",
                remedy="add validation data, or remove adaptive",
            )
        self.bare_optimizer = getattr(prepared, "optimizer", prepared)
        if self.zero is not None:  # its wrapper makes the step in backward
            self.zero.outer, self.bare_optimizer = self.bare_optimizer, optimizer
        # accelerate's wrapper searches optional packages on disk at every step, which takes 0.2 ms. It is used only
        # where it does more than forward the call.
        wrapped = accelerator.scaler is not None or deepspeed or accelerator.distributed_type.value == "XLA"
        self.optimizer = prepared if wrapped else self.bare_optimizer
        self.schedule = build_schedule(self.bare_optimizer, t.config.schedule, t.steps, t.epoch_length)
        self.ema = EMA(self.bare, t.config.ema) if t.config.ema is not None else None
        self.evaluate_every = t.config.evaluate_every or max(t.epoch_length, -(-t.steps // EVALUATIONS))
        self.at = Progress()
        self.best: dict[str, Tensor] | None = None
        self.terms, self.counted = TermSums(), 0.0
        self.clock = self.saved_at = time.monotonic()
        self.stop = torch.zeros(())
        self.first = True

    def check_labels(self, micros: list[Batch]) -> None:
        """Check labels on the CPU, where it is cheap; on a GPU a wrong label fails with an assertion of CUDA."""
        if self.t.classes is None:
            return
        for batch in micros:
            if batch.labels.is_cpu and batch.labels.numel():
                low, high = (int(v) for v in batch.labels.aminmax())
                if high >= self.t.classes or (low < 0 and low != IGNORE):
                    raise DataError(
                        f"a training batch has labels from {low} to {high}, but the models have classes 0 to "
                        f"{self.t.classes - 1}",
                        remedy=f"use class indices as labels, and {IGNORE} for a sample without a label",
                    )

    def with_signals(self, steps: Iterator[list[Batch]]) -> Iterator[list[tuple[Batch, Callable[[], Signal | None]]]]:
        """The micro-batches of each step, on the device, each with a function that returns its teacher signal.

        A teacher with ``prefetch`` gets the batches of a step during the step before it.
        """
        pending: list[tuple[Batch, Callable[[], Signal | None]]] | None = None
        prefetching = self.t.method.needs is not None and hasattr(self.t.teacher, "prefetch")
        for micros in itertools.islice(steps, self.t.steps - self.at.step):
            self.check_labels(micros)
            moved = [self.prepare(batch.to(self.accelerator.device)) for batch in micros]
            if not prefetching:
                yield [(batch, partial(self.signal, batch)) for batch in moved]
                continue
            before, pending = pending, [(batch, self.prefetch(batch)) for batch in moved]
            if before is not None:
                yield before
        if pending is not None:
            yield pending

    def prepare(self, batch: Batch) -> Batch:
        if not self.t.method.generates_batches:
            return batch
        with self.autocast():
            module: Any = self.module
            if isinstance(module, FSDPModule):
                generated: Batch = module(batch, None, writing=True)  # type: ignore[operator]
                return generated
            return self.t.method.prepare_batch(self.bare.student, batch)

    def signal(self, batch: Batch) -> Signal | None:
        with self.autocast():
            return get_signal(self.t.teacher, self.t.method, batch)

    def prefetch(self, batch: Batch) -> Callable[[], Signal | None]:
        teacher: Any = self.t.teacher
        with self.autocast():
            return teacher.prefetch(batch, needs_of(self.t.method, teacher))

    def scales(self, micros: list[Batch]) -> dict[str, Tensor]:
        """Each term's weight divided by its count in the full step: all micro-batches and processes."""
        counts = count_terms(self.t.method, micros)
        if self.share.world > 1:
            stop = torch.tensor(float(self.t.should_stop()), device=self.accelerator.device)
            stacked = torch.stack([stop, *(c.float() for c in counts.values())])
            self.stop, *summed = self.accelerator.reduce(stacked, "sum").unbind()
            counts = dict(zip(counts, summed, strict=True))
        # accelerate's backward divides by the micro-batches, and DDP averages over processes: undo both.
        parts = self.share.world * self.share.accumulate
        return scale_terms(self.t.method, counts, parts)

    def loss(self, terms: dict[str, Term], scale: dict[str, Tensor]) -> Tensor:
        if self.first:
            check_terms(self.t.method, terms, scale)
            self.first = False
        return self.terms.add(terms, scale)

    def after_step(self) -> None:
        t, at = self.t, self.at
        at.step += 1
        if self.ema is not None:
            self.ema.update()
        last = at.step == t.steps
        evaluating = at.step % self.evaluate_every == 0 or last
        due = t.config.checkpoint_every is not None and at.step % t.config.checkpoint_every == 0
        if at.step % t.config.log_every == 0 or evaluating or due:
            self.log()
        if evaluating and t.validation is not None:
            self.validate()
            last = last or at.stopped_early
        if t.config.checkpoint_every is None and evaluating:
            due = broadcast_from_main(
                self.accelerator, lambda: time.monotonic() - self.saved_at >= CHECKPOINT_SECONDS
            )
        if due or last:
            self.save()
        t.callback.on_step(at.step)
        if not last and self.is_stop_requested():
            if self.share.world > 1:  # a single process keeps the sums for the line that it will write
                self.log()
            self.save()
            raise Interrupted(f"stopped at step {at.step} of {t.steps} of {t.name}; the state is saved")

    def is_stop_requested(self) -> bool:
        if self.share.world == 1:
            return self.t.should_stop()
        check = self.accelerator.device.type == "cpu" or self.at.step % self.t.config.log_every == 0
        return check and bool(self.stop.item())

    def log(self) -> None:
        t = self.t
        sums, counts = self.terms.sums, self.terms.counts
        if not sums:
            return
        names = list(sums)
        stacked = torch.stack([*(sums[n].float() for n in names), *(counts[n].float() for n in names)])
        values = self.accelerator.reduce(stacked, "sum").tolist() if self.share.world > 1 else stacked.tolist()
        raw = {n: values[i] / max(values[len(names) + i], 1.0) for i, n in enumerate(names)}
        self.terms = TermSums()
        self.counted += sum(values[len(names) :])
        if not self.counted and self.at.step >= min(t.epoch_length, t.steps):
            raise DataError(
                f"{t.name}: no sample of the first epoch counts in the loss, so nothing is learned",
                remedy=f"give samples with labels ({IGNORE} is no label), or leave out the baseline",
            )
        line: dict[str, Any] = {
            "training": t.name,
            "step": self.at.step,
            "epoch": self.at.step / t.epoch_length,
            "lr": self.bare_optimizer.param_groups[0]["lr"],
            "loss": sum(t.method.weights[n] * v for n, v in raw.items()),
            "terms": {n: {"raw": v, "weighted": t.method.weights[n] * v} for n, v in raw.items()},
        }
        if not all(abs(v) < float("inf") for v in raw.values()):
            raise NumericsError(
                f"{t.name}: the loss is no longer finite at step {self.at.step} ({raw})",
                remedy="inputs and targets of all batches so far are finite numbers, so the cause is the training: "
                "lower train.optimizer.lr, set train.clip: 1.0 or use bf16 instead of fp16",
            )
        self.emit(line, {"loss": line["loss"], "lr": line["lr"], **{f"term/{n}": v for n, v in raw.items()}})

    def emit(self, line: dict[str, Any], tracked: dict[str, float]) -> None:
        self.t.run.log(line)
        if self.accelerator.trackers:
            self.accelerator.log({f"{self.t.name}/{k}": v for k, v in tracked.items()}, step=self.at.step)
        self.t.callback.on_log(line)

    def validate(self) -> None:
        t, at = self.t, self.at
        assert t.validation is not None
        with self.autocast(), self.averaged():
            with self.gathered():
                scores = evaluate(
                    self.bare.student,
                    t.validation,
                    self.accelerator.device,
                    t.validation_outputs,
                    share=self.share,
                    reduce=partial(self.accelerator.reduce, reduction="sum"),
                )
            score = [scores[t.metric], -scores["loss"], float(at.step)]
            if at.best is None or score[:2] > at.best[:2]:
                at.best, at.stale = score, 0
                self.best = checkpoint.full_model_state(self.module, self.zero)
            else:
                at.stale += 1
        self.bare.method.after_validation(scores)
        if t.config.early_stop is not None and at.stale >= t.config.early_stop:
            at.stopped_early = True
        line = {
            "training": t.name,
            "step": at.step,
            "epoch": at.step / t.epoch_length,
            "validation": {k: scores[k] for k in dict.fromkeys((t.metric, "accuracy", "loss", "ece")) if k in scores},
        }
        self.emit(line, {f"validation/{k}": v for k, v in line["validation"].items()})  # type: ignore[attr-defined]

    def autocast(self) -> Any:
        return self.accelerator.autocast() if self.zero is None else self.zero.autocast()

    def averaged(self) -> Any:
        return nullcontext() if self.ema is None else self.ema.applied()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """During the block the unwrapped student can run, and every process has the weights that are saved.

        Under FSDP2 the weights of the root are gathered. Batch statistics, which differ between processes, become
        those of the main process, as at the next training step.
        """
        if self.share.world > 1:
            for buffer in self.module.buffers():
                torch.distributed.broadcast(buffer, 0)
        sharded = isinstance(self.module, FSDPModule)
        if sharded:
            self.module.unshard()
        try:
            yield
        finally:
            if sharded:
                self.module.reshard()

    def save(self) -> None:
        t, accelerator = self.t, self.accelerator
        self.at.seconds += time.monotonic() - self.clock
        self.clock = self.saved_at = time.monotonic()
        captured = checkpoint.capture_training(self.module, self.bare_optimizer, self.zero)
        ema = None if self.ema is None else self.ema.state()
        generators = [checkpoint.rng_state()]
        if self.share.world > 1:
            generators = gather_object(generators)
        if accelerator.is_main_process and t.run.writes:
            folder = t.run.checkpoints(t.name)
            parts = {
                **captured,
                "schedule": self.schedule.state_dict(),
                "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
                "ema": ema,
                "best": self.best,
                "generators": generators,
                "progress": vars(self.at),
                "terms": vars(self.terms),
            }
            checkpoint.save_checkpoint(folder / f"step-{self.at.step:09d}", parts)
            checkpoint.prune(folder, t.config.keep_checkpoints)
        accelerator.wait_for_everyone()

    def resume(self) -> None:
        t = self.t
        folder = checkpoint.newest(t.run.checkpoints(t.name))
        if folder is None:
            t.run.rewind(t.name, 0)
            return
        parts = checkpoint.load_checkpoint(folder)
        try:
            checkpoint.restore_training(self.module, self.bare_optimizer, parts, self.zero)
            if self.ema is not None:
                self.ema.load(parts["ema"])
        except (RuntimeError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"does not fit {type(t.student).__name__} and its optimizer: {error}",
                where=str(folder),
                remedy="resume with the model and the optimizer of the run, or choose another --out",
            ) from error
        self.schedule.load_state_dict(parts["schedule"])
        if parts["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(parts["scaler"])
        self.best = parts["best"]
        self.at, self.counted = Progress(**parts["progress"]), 1.0
        for kind, values in parts["terms"].items():
            setattr(self.terms, kind, {name: x.to(self.accelerator.device) for name, x in values.items()})
        if len(parts["generators"]) == self.share.world:
            checkpoint.set_rng_state(parts["generators"][self.share.rank])
        t.run.rewind(t.name, self.at.step)

    def finish(self) -> Outcome:
        with self.averaged():
            last = checkpoint.full_model_state(self.module, self.zero)
        self.accelerator.free_memory()
        best = self.best if self.best is not None else last
        of_method = _part(last, "method."), _part(best, "method.")
        return Outcome(_part(last, "student."), _part(best, "student."), *of_method, self.at)


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
