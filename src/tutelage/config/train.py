"""How a model is trained: the ``train`` of a recipe and of its teachers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from tutelage.config.base import Count, NotNegative, Positive, Section, Share
from tutelage.errors import shorten, suggest

OPTIMIZERS: dict[str, tuple[str, ...]] = {
    "adadelta": ("rho", "eps"),
    "adafactor": ("beta2_decay", "eps", "d"),
    "adagrad": ("lr_decay", "initial_accumulator_value", "eps"),
    "adam": ("betas", "eps", "amsgrad", "fused"),
    "adamax": ("betas", "eps"),
    "adamw": ("betas", "eps", "amsgrad", "fused"),
    "asgd": ("lambd", "alpha", "t0"),
    "nadam": ("betas", "eps", "momentum_decay", "decoupled_weight_decay"),
    "radam": ("betas", "eps", "decoupled_weight_decay"),
    "rmsprop": ("alpha", "eps", "momentum", "centered"),
    "sgd": ("momentum", "dampening", "nesterov", "fused"),
}
"""torch's optimizers by name, each with the options it takes beside ``lr`` and ``weight_decay``."""

SCHEDULES: dict[str, tuple[str, ...]] = {
    "constant": (),
    "cosine": ("final",),
    "exponential": ("gamma",),
    "linear": ("final",),
    "multistep": ("milestones", "gamma"),
    "onecycle": ("rise",),
    "polynomial": ("power",),
    "step": ("every", "gamma"),
}
"""Learning-rate schedules by name, each with its options. All are stepped once an optimizer step."""

TRACKERS = (
    "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb",
)  # fmt: skip
"""Experiment trackers by the names that accelerate gives them."""


class _Choice(Section):
    """A section whose ``kind`` decides which other keys it takes."""

    model_config = ConfigDict(extra="allow", strict=True)

    @property
    def options(self) -> dict[str, Any]:
        """The keys that only this ``kind`` takes."""
        return dict(self.model_extra or {})

    def _unknown(self, what: str, table: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[str, str]]:
        """A ``kind`` that is not in ``table``, or an option that the kind does not have."""
        kind: str = self.kind  # type: ignore[attr-defined]
        if kind not in table:
            yield "kind", f"unknown {what} {shorten(kind)}{suggest(kind, table)}; allowed: {', '.join(table)}"
            return
        for key in self.options:
            if key not in table[kind]:
                keys = [*type(self).model_fields, *table[kind]]
                allowed = f"allowed: {', '.join(keys)}"
                yield key, f"{what} {shorten(kind)} has no option {key!r}{suggest(key, keys)}; {allowed}"


class OptimizerConfig(_Choice):
    """A torch optimizer."""

    kind: str = "adamw"
    """Name of the optimizer; see the table below."""
    lr: Positive = 1e-3
    """Learning rate; the highest of the schedule."""
    weight_decay: NotNegative = 0.0
    """Weight decay of matrices and kernels, not of biases and norms."""
    decay_vectors: bool = False
    """Decay biases and norms too, as torch does, and most CIFAR and ImageNet recipes."""

    def misfits(self) -> Iterator[tuple[str, str]]:
        """An unknown optimizer or option."""
        yield from self._unknown("optimizer", OPTIMIZERS)


class ScheduleConfig(_Choice):
    """A learning-rate schedule, with a linear warm-up before it."""

    kind: str = "cosine"
    """Name of the schedule; see the table below."""
    warmup: NotNegative = 0.0
    """Length of the warm-up. Below 1: share of all steps; from 1 on: number of steps."""

    def misfits(self) -> Iterator[tuple[str, str]]:
        """An unknown schedule or option, or a second warm-up."""
        yield from self._unknown("schedule", SCHEDULES)
        if self.kind == "onecycle" and self.warmup:
            yield "warmup", "onecycle rises by itself, for the share 'rise' of all steps; leave 'warmup' out"


class TrainConfig(Section):
    """How a model is trained. The teacher's own training starts from the student's settings."""

    epochs: Count | None = None
    """Passes over the training data. Give this or ``steps``; default 10 epochs."""
    steps: Count | None = None
    """Optimizer steps, in place of ``epochs``."""
    batch_size: Count = 128
    """Examples of one optimizer step, summed over all processes and micro-batches."""
    accumulate: Count = 1
    """Number of micro-batches into which each process splits its part of a batch. The gradient stays the same."""
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    """See below."""
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    """See below."""
    clip: Positive | None = None
    """Largest norm of the gradient. Default: no clipping."""
    precision: Literal["auto", "no", "bf16", "fp16"] | None = None
    """Mixed precision; ``auto``: ``bf16`` if the hardware supports it, else none. Default: the setting of
    ``accelerate launch``, else none."""
    compile: bool = False
    """``torch.compile`` the student."""
    gradient_checkpointing: bool = False
    """Recompute activations of the student's layers in the backward pass in place of storing them: about a third more
    time, far less memory. For transformers models."""
    ema: Share | None = None
    """Decay of an exponential moving average of the weights, which is then evaluated and exported. Default: none."""
    evaluate_every: Count | None = None
    """Steps between evaluations on the validation split. Default: one epoch, or a hundredth of all steps."""
    early_stop: Count | None = None
    """Stop after this many evaluations without a better validation accuracy. Default: never."""
    checkpoint_every: Count | None = None
    """Steps between checkpoints. Default: at evaluations, at most every 20 seconds."""
    keep_checkpoints: Count = 2
    """Number of newest checkpoints to keep. Each also holds the weights that were best on validation."""
    log_every: Count = 50
    """Steps between lines of ``metrics.jsonl``."""
    trackers: list[Literal[TRACKERS]] = Field(default_factory=list)  # type: ignore[valid-type]
    """Experiment trackers that also receive the metrics."""

    def misfits(self) -> Iterator[tuple[str, str]]:
        """Both lengths."""
        if self.epochs is not None and self.steps is not None:
            yield "steps", f"both 'epochs' ({self.epochs}) and 'steps' ({self.steps}) are given; give one"

    @model_validator(mode="after")
    def _set_default(self) -> TrainConfig:
        if self.epochs is None and self.steps is None:
            self.epochs = 10
        return self
