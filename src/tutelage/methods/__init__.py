"""Methods: what is the loss of this batch."""

from tutelage.methods.base import Method, Phase, Term, Trainee, adapted, built, check_capabilities, check_task
from tutelage.methods.byot import ByotMethod
from tutelage.methods.feature import FeatureMethod, PairsMethod
from tutelage.methods.links import FEATURE_OBJECTIVES
from tutelage.methods.logit import SOFT_OBJECTIVES, LogitMethod, SupervisedMethod, TeacherFreeMethod
from tutelage.methods.mutual import MutualMethod
from tutelage.methods.simkd import SimkdMethod

METHODS: dict[str, type[Method]] = {
    "byot": ByotMethod,
    "feature": FeatureMethod,
    "logit": LogitMethod,
    "mutual": MutualMethod,
    "simkd": SimkdMethod,
    "supervised": SupervisedMethod,
    "teacher-free": TeacherFreeMethod,
}
"""Every method that a recipe can name. ``tutelage.config.METHOD_KINDS`` has their options."""

__all__ = [
    "FEATURE_OBJECTIVES",
    "METHODS",
    "SOFT_OBJECTIVES",
    "ByotMethod",
    "FeatureMethod",
    "LogitMethod",
    "Method",
    "MutualMethod",
    "PairsMethod",
    "Phase",
    "SimkdMethod",
    "SupervisedMethod",
    "TeacherFreeMethod",
    "Term",
    "Trainee",
    "adapted",
    "built",
    "check_capabilities",
    "check_task",
]
