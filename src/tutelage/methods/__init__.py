"""Methods: what is the loss of this batch."""

from tutelage.methods.base import Method, Term, Trainee, built, check_capabilities
from tutelage.methods.feature import FEATURE_OBJECTIVES, FeatureMethod
from tutelage.methods.logit import LogitMethod, SupervisedMethod

METHODS: dict[str, type[Method]] = {"feature": FeatureMethod, "logit": LogitMethod}
"""Every method that a recipe can name. ``tutelage.config.METHOD_KINDS`` has their options."""

__all__ = [
    "FEATURE_OBJECTIVES",
    "METHODS",
    "FeatureMethod",
    "LogitMethod",
    "Method",
    "SupervisedMethod",
    "Term",
    "Trainee",
    "built",
    "check_capabilities",
]
