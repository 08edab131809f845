"""Options of methods on logits: soft labels and hard labels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from tutelage.config.base import NotNegative, Positive, known
from tutelage.config.methods.base import MethodOptions, labels_weight_misfit
from tutelage.config.methods.losses import LOGIT_LOSSES, LossOptions, option_misfits


def _without_nulls(given: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in given.items() if value is not None}


class SoftLabelOptions(MethodOptions):
    """Soft labels and hard labels: the keys of several methods."""

    temperature: Positive | None = None
    """T of teacher and student. Default: 4 for ``binary_kd``, ``dkd``, ``kd`` and ``soft_cross_entropy``, else 1;
    ``mse``, ``margin_mse`` and ``mlkd`` have none."""
    alpha: NotNegative = 0.9
    """Weight of the soft labels; at most 1 unless ``hard`` is given."""
    hard: NotNegative | None = None
    """Weight of the hard labels. Default: 1 - alpha."""
    soft: Annotated[str, known("soft loss", LOGIT_LOSSES)] = "kd"
    """The loss on logits: ``dist``, ``dkd``, ``js``, ``kd``, ``mlkd``, ``mse``, ``reverse_kl``, ``skew_kl``,
    ``soft_cross_entropy`` or ``tvd``; for task ``multi-label`` ``binary_kd`` or ``mse``, for ``regression`` ``mse``,
    for ``ranking`` ``margin_mse``."""
    soft_options: Annotated[dict[str, Any], AfterValidator(_without_nulls)] = Field(default_factory=dict)
    """Options of that loss; the table below lists them."""

    def misfits(self) -> Iterator[tuple[str, str]]:
        """Weights, options and a temperature that do not fit the loss."""
        yield from labels_weight_misfit(self.alpha, self.hard)
        yield from option_misfits(self.soft, self.soft_options, LOGIT_LOSSES[self.soft], "soft_options")
        if self.temperature is not None and LOGIT_LOSSES[self.soft].temperature is None:
            yield "temperature", f"{self.soft} has no temperature, given {self.temperature:g}; leave it out"

    @model_validator(mode="after")
    def _set_temperature(self) -> SoftLabelOptions:
        self.temperature = self.temperature or LOGIT_LOSSES[self.soft].temperature
        return self

    @property
    def loss_options(self) -> LossOptions:
        """``soft_options`` as the section of the loss."""
        return LOGIT_LOSSES[self.soft].options.model_validate(self.soft_options)

    @property
    def hard_weight(self) -> float:
        """The weight of the hard labels."""
        return 1.0 - self.alpha if self.hard is None else self.hard

    def logit_options(self) -> LogitOptions:
        """The soft and hard labels alone."""
        return LogitOptions(**{name: getattr(self, name) for name in SoftLabelOptions.model_fields})


class LogitOptions(SoftLabelOptions):
    """Soft labels of Hinton et al.: alpha * T^2 * KL(p_T || p_S) + (1 - alpha) * CE; or another loss on logits."""

    kind: Literal["logit"] = "logit"
    """The loss compares the logits of teacher and student."""
