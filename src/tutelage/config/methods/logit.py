"""Methods on logits: soft labels beside hard ones."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tutelage.config.base import Misfit, NotNegative, Positive
from tutelage.config.methods.base import MethodOptions, check_known_options, check_labels_weight, known

LOGIT_LOSSES: dict[str, tuple[str, ...]] = {
    "binary_kd": (),
    "dist": ("beta", "gamma"),
    "dkd": ("alpha", "beta"),
    "js": ("beta",),
    "kd": ("standardize",),
    "margin_mse": (),
    "mlkd": ("temperatures", "instance", "batch", "classes"),
    "mse": (),
    "reverse_kl": (),
    "skew_kl": ("alpha", "reverse"),
    "soft_cross_entropy": (),
    "tvd": (),
}
"""Losses on logits by name, each with its options."""

SOFT_TEMPERATURES: dict[str, float | None] = {
    "binary_kd": 4.0, "dist": 1.0, "dkd": 4.0, "js": 1.0, "kd": 4.0, "margin_mse": None, "mlkd": None, "mse": None,
    "reverse_kl": 1.0, "skew_kl": 1.0, "soft_cross_entropy": 4.0, "tvd": 1.0,
}  # fmt: skip
"""T of each where none is given; none for those that take none."""

SOFT_OF_TASK = {"classes": "kd", "multi-label": "binary_kd", "regression": "mse", "ranking": "margin_mse"}
"""The loss on logits that goes with what labels are, where none is given."""


class SoftLabelOptions(MethodOptions):
    """Soft labels beside hard ones: what every method has."""

    temperature: Positive | None = None
    """T, of teacher and student alike. Default: 4 for ``dkd``, ``kd`` and ``soft_cross_entropy``, else 1; ``mse``,
    ``margin_mse`` and ``mlkd`` have none."""
    alpha: NotNegative = 0.9
    """Weight of the soft labels; at most 1 unless ``hard`` is given."""
    hard: NotNegative | None = None
    """Weight of the hard labels. Default: 1 - alpha."""
    soft: Annotated[str, known("soft loss", LOGIT_LOSSES)] = "kd"
    """How the soft labels are compared: ``dist``, ``dkd``, ``js``, ``kd``, ``mlkd``, ``mse``, ``reverse_kl``,
    ``skew_kl``, ``soft_cross_entropy`` or ``tvd``. Where labels are several or numbers: ``binary_kd``, ``mse``.
    Where logits are a query's scores of passages, the relevant one first: ``margin_mse``."""
    soft_options: dict[str, Any] = Field(default_factory=dict)
    """Options of that: ``alpha`` and ``beta`` of dkd, ``standardize`` of kd, ``beta`` and ``gamma`` of dist ..."""

    @model_validator(mode="after")
    def _weighed(self) -> SoftLabelOptions:
        check_labels_weight(self.alpha, self.hard)
        check_known_options(self.soft, self.soft_options, LOGIT_LOSSES, "soft_options")
        usual = SOFT_TEMPERATURES[self.soft]
        if self.temperature is not None and usual is None:
            raise Misfit(f"{self.soft} has no temperature, given {self.temperature:g}; leave it out", "temperature")
        self.temperature = self.temperature or usual
        return self


class LogitOptions(SoftLabelOptions):
    """Soft labels of Hinton et al.: alpha * T^2 * KL(p_T || p_S) + (1 - alpha) * CE; or others on logits."""

    kind: Literal["logit"] = "logit"
    """Learns from the teacher's logits."""
