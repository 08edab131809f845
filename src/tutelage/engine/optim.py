"""Optimizers and learning-rate schedules by name."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

from tutelage.config import OptimizerConfig, ScheduleConfig
from tutelage.errors import ConfigError

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    name.lower(): getattr(torch.optim, name)
    for name in (
        "Adadelta", "Adafactor", "Adagrad", "Adam", "Adamax", "AdamW", "ASGD", "NAdam", "RAdam", "RMSprop", "SGD",
    )
}  # fmt: skip


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer of all parameters of ``module`` that require a gradient.

    Weight decay does not apply to vectors and scalars (biases, norms), unless ``decay_vectors`` is set.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not parameters:
        raise ConfigError("the student has no parameter that requires a gradient", remedy="unfreeze some of it")
    decayed = [p for p in parameters if config.decay_vectors or p.ndim > 1]
    other = [p for p in parameters if not config.decay_vectors and p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": other, "weight_decay": 0.0}]
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in config.options.items()}
    try:
        return OPTIMIZERS[config.kind]([g for g in groups if g["params"]], lr=config.lr, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"train.optimizer: {config.kind} with {config.options}: {error}",
            remedy=f"see torch.optim.{OPTIMIZERS[config.kind].__name__} for its options and their values",
        ) from None


def _steps(value: Any, steps_per_epoch: int) -> int:
    return max(1, round(value * steps_per_epoch))


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer, int, int, dict[str, Any]], Any]] = {
    "constant": lambda o, n, e, k: schedulers.ConstantLR(o, factor=1.0),
    "cosine": lambda o, n, e, k: schedulers.CosineAnnealingLR(
        o, T_max=n, eta_min=k.get("final", 0.0) * o.param_groups[0]["lr"]
    ),
    "exponential": lambda o, n, e, k: schedulers.ExponentialLR(o, gamma=k.get("gamma", 0.95) ** (1 / e)),
    "linear": lambda o, n, e, k: schedulers.LinearLR(o, 1.0, k.get("final", 0.0), total_iters=n),
    "multistep": lambda o, n, e, k: schedulers.MultiStepLR(
        o, [_steps(m, e) for m in k["milestones"]], gamma=k.get("gamma", 0.1)
    ),
    "onecycle": lambda o, n, e, k: schedulers.OneCycleLR(
        o, max_lr=o.param_groups[0]["lr"], total_steps=n + 1, pct_start=k.get("rise", 0.3), cycle_momentum=False
    ),
    "polynomial": lambda o, n, e, k: schedulers.PolynomialLR(o, total_iters=n, power=k.get("power", 1.0)),
    "step": lambda o, n, e, k: schedulers.StepLR(o, _steps(k.get("every", 30), e), gamma=k.get("gamma", 0.1)),
}
"""Name -> (optimizer, number of steps, steps per epoch, options) -> schedule.

The options ``milestones``, ``every``, and ``gamma`` of the exponential schedule are in epochs.
"""


def build_schedule(
    optimizer: torch.optim.Optimizer, config: ScheduleConfig, steps: int, steps_per_epoch: int
) -> schedulers.ChainedScheduler:
    """The schedule, with a linear warm-up; it makes one step per optimizer step."""
    warmup = round(config.warmup * steps) if config.warmup < 1 else round(config.warmup)
    try:
        chain = [SCHEDULES[config.kind](optimizer, max(1, steps), steps_per_epoch, config.options)]
        if warmup:
            chain.append(schedulers.LinearLR(optimizer, 1 / (warmup + 1), 1.0, total_iters=warmup))
        return schedulers.ChainedScheduler(chain, optimizer=optimizer)
    except KeyError as error:
        raise ConfigError(
            f"train.schedule: {config.kind} needs the option {error}",
            remedy="for example milestones: [150, 180, 210]",
        ) from None
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ConfigError(
            f"train.schedule: {config.kind} with {config.options}: {error}", remedy="see docs/recipes.md"
        ) from None
