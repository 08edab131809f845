"""Methods: what is the loss of this batch."""

from tutelage.config import FEATURE_LOSSES, LOGIT_LOSSES
from tutelage.methods.base import (
    DistillationModule,
    Method,
    Phase,
    Term,
    check_capabilities,
    check_task,
    needs_of,
    prepare_method,
    prepare_student,
)
from tutelage.methods.byot import ByotMethod
from tutelage.methods.cross_tokenizer import CrossTokenizerMethod
from tutelage.methods.embedding import EmbeddingMethod
from tutelage.methods.feature import FeatureMethod, PairsMethod
from tutelage.methods.logit import LogitMethod, SupervisedMethod, TeacherFreeMethod
from tutelage.methods.minilm import MinilmMethod
from tutelage.methods.mutual import MutualMethod
from tutelage.methods.on_policy import OnPolicyMethod
from tutelage.methods.patient import PatientMethod
from tutelage.methods.simkd import SimkdMethod
from tutelage.methods.tinybert import TinybertMethod
from tutelage.methods.token import SequenceMethod, TokenMethod
from tutelage.methods.triple import MaskedMethod, TripleMethod

METHODS: dict[str, type[Method]] = {
    "byot": ByotMethod,
    "cross-tokenizer": CrossTokenizerMethod,
    "embedding": EmbeddingMethod,
    "feature": FeatureMethod,
    "logit": LogitMethod,
    "minilm": MinilmMethod,
    "mutual": MutualMethod,
    "on-policy": OnPolicyMethod,
    "patient": PatientMethod,
    "sequence": SequenceMethod,
    "simkd": SimkdMethod,
    "supervised": SupervisedMethod,
    "teacher-free": TeacherFreeMethod,
    "tinybert": TinybertMethod,
    "token": TokenMethod,
    "triple": TripleMethod,
}
"""Every method that a recipe can name. ``tutelage.config.METHOD_KINDS`` has their options."""

__all__ = [
    "FEATURE_LOSSES", "LOGIT_LOSSES", "METHODS", "ByotMethod", "CrossTokenizerMethod", "DistillationModule",
    "EmbeddingMethod", "FeatureMethod", "LogitMethod", "MaskedMethod", "Method", "MinilmMethod", "MutualMethod",
    "OnPolicyMethod", "PairsMethod", "PatientMethod", "Phase", "SequenceMethod", "SimkdMethod", "SupervisedMethod",
    "TeacherFreeMethod", "Term", "TinybertMethod", "TokenMethod", "TripleMethod", "check_capabilities", "check_task",
    "needs_of", "prepare_method", "prepare_student",
]  # fmt: skip
