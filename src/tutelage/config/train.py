"""How a model is trained: the ``train`` of a recipe and of its teachers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from tutelage.config.base import Count, NotNegative, Positive, Section
from tutelage.config.messages import Misfit
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


class OptimizerConfig(Section):
    """A torch optimizer."""

    model_config = ConfigDict(extra="allow", strict=True)
    kind: str = "adamw"
    lr: Positive = 1e-3
    weight_decay: NotNegative = 0.0
    decay_vectors: bool = False
    """Decay biases and norms too, as torch does and most CIFAR and ImageNet recipes."""

    @model_validator(mode="after")
    def _known(self) -> OptimizerConfig:
        check_options("optimizer", self.kind, self.options, OPTIMIZERS)
        return self

    @property
    def options(self) -> dict[str, Any]:
        """What goes to the constructor beside ``lr`` and ``weight_decay``."""
        return dict(self.model_extra or {})


class ScheduleConfig(Section):
    """A learning-rate schedule, with a linear warm-up before it."""

    model_config = ConfigDict(extra="allow", strict=True)
    kind: str = "cosine"
    warmup: NotNegative = 0.0
    """Below 1: share of all steps; from 1 on: number of steps."""

    @model_validator(mode="after")
    def _known(self) -> ScheduleConfig:
        check_options("schedule", self.kind, self.options, SCHEDULES)
        if self.kind == "onecycle" and self.warmup:
            raise Misfit("onecycle rises by itself, for the share 'rise' of all steps; leave 'warmup' out", "warmup")
        return self

    @property
    def options(self) -> dict[str, Any]:
        """The schedule's own options."""
        return dict(self.model_extra or {})


class TrainConfig(Section):
    """How a model is trained. The teacher's own training starts from the student's settings."""

    epochs: Count | None = None
    """Passes over the training images. Give this or ``steps``; default 10 epochs."""
    steps: Count | None = None
    """Optimizer steps, in place of ``epochs``."""
    batch_size: Count = 128
    """Examples of one optimizer step, over all processes and micro-batches together."""
    accumulate: Count = 1
    """Micro-batches that each process cuts its share of a batch into. The gradient stays the same."""
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    clip: Positive | None = None
    """Largest norm of the gradient. Default: no clipping."""
    precision: Literal["auto", "no", "bf16", "fp16"] | None = None
    """Mixed precision; ``auto`` is ``bf16`` where the hardware computes in it, else none. Default: what
    ``accelerate launch`` says, else none."""
    compile: bool = False
    """``torch.compile`` the student."""
    gradient_checkpointing: bool = False
    """Compute the student's layers once more in the backward pass, in place of keeping what is between them: a third
    more time, for far less memory. For models of transformers."""
    ema: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Decay of an exponential moving average of the weights, which then is evaluated and exported."""
    evaluate_every: Count | None = None
    """Steps between evaluations on the validation split. Default: one epoch, or a hundredth of all steps."""
    early_stop: Count | None = None
    """Stop after this many evaluations without a better validation accuracy. Default: never."""
    checkpoint_every: Count | None = None
    """Steps between checkpoints. Default: at evaluations, at most every 20 seconds."""
    keep_checkpoints: Count = 2
    """Newest checkpoints kept. Each holds the weights of the best validation so far too."""
    log_every: Count = 50
    """Steps between lines of ``metrics.jsonl``."""
    trackers: list[Literal[TRACKERS]] = Field(default_factory=list)  # type: ignore[valid-type]
    """Experiment trackers that the metrics also go to."""

    @model_validator(mode="after")
    def _budget(self) -> TrainConfig:
        if self.epochs is not None and self.steps is not None:
            raise Misfit(f"both 'epochs' ({self.epochs}) and 'steps' ({self.steps}) are given; give one", "steps")
        if self.epochs is None and self.steps is None:
            self.epochs = 10
        return self


def check_options(what: str, kind: str, given: Mapping[str, Any], known: Mapping[str, tuple[str, ...]]) -> None:
    """Raise ``ValueError`` unless ``kind`` is known and takes every option ``given``."""
    if kind not in known:
        raise Misfit(f"unknown {what} {shorten(kind)}{suggest(kind, known)}; allowed: {', '.join(known)}", "kind")
    for key in given:
        if key not in known[kind]:
            allowed = [
                "kind",
                *(["lr", "weight_decay", "decay_vectors"] if what == "optimizer" else ["warmup"]),
                *known[kind],
            ]
            raise Misfit(
                f"{what} {shorten(kind)} has no option {key!r}{suggest(key, allowed)}; allowed: {', '.join(allowed)}",
                key,
            )
