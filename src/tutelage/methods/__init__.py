"""Methods: what is the loss of this batch."""

from tutelage.methods.base import Method, Term, Trainee, check_capabilities
from tutelage.methods.logit import LogitMethod, SupervisedMethod

METHODS: dict[str, type[Method]] = {"logit": LogitMethod}
"""Every method that a recipe can name. ``tutelage.config.METHOD_KINDS`` has their options."""

__all__ = [
    "METHODS",
    "LogitMethod",
    "Method",
    "SupervisedMethod",
    "Term",
    "Trainee",
    "check_capabilities",
]
