"""Options of methods on logits: soft labels and hard labels."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tutelage.config.base import NotNegative, Positive
from tutelage.config.messages import Misfit
from tutelage.config.methods.base import MethodOptions, check_labels_weight, known
from tutelage.config.methods.losses import LOGIT_LOSSES, LossOptions, loss_options


class SoftLabelOptions(MethodOptions):
    """The soft labels and the hard labels, which several methods have."""

    temperature: Positive | None = None
    """T, of teacher and student. Default: 4 for ``binary_kd``, ``dkd``, ``kd`` and ``soft_cross_entropy``, else 1;
    ``mse``, ``margin_mse`` and ``mlkd`` have none."""
    alpha: NotNegative = 0.9
    """Weight of the soft labels; at most 1 unless ``hard`` is given."""
    hard: NotNegative | None = None
    """Weight of the hard labels. Default: 1 - alpha."""
    soft: Annotated[str, known("soft loss", LOGIT_LOSSES)] = "kd"
    """The loss on logits: ``dist``, ``dkd``, ``js``, ``kd``, ``mlkd``, ``mse``, ``reverse_kl``, ``skew_kl``,
    ``soft_cross_entropy`` or ``tvd``. For several labels ``binary_kd`` or ``mse``, for numbers ``mse``, and
    ``margin_mse`` for a query's scores of passages, the relevant one first."""
    soft_options: dict[str, Any] = Field(default_factory=dict)
    """Options of that loss: ``alpha`` and ``beta`` of dkd, ``standardize`` of kd, ``beta`` and ``gamma`` of dist."""

    @model_validator(mode="after")
    def _check_soft_labels(self) -> SoftLabelOptions:
        check_labels_weight(self.alpha, self.hard)
        self.soft_options = {k: v for k, v in self.soft_options.items() if v is not None}
        _ = self.loss_options
        default = LOGIT_LOSSES[self.soft].temperature
        if self.temperature is not None and default is None:
            raise Misfit(f"{self.soft} has no temperature, given {self.temperature:g}; leave it out", "temperature")
        self.temperature = self.temperature or default
        return self

    @property
    def loss_options(self) -> LossOptions:
        """``soft_options`` as the section of the loss."""
        return loss_options(self.soft, self.soft_options, LOGIT_LOSSES[self.soft], "soft_options")

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
