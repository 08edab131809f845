"""Sections of a recipe's ``method``: one class for each kind."""

from __future__ import annotations

from tutelage.config.methods.base import MethodOptions
from tutelage.config.methods.encoders import (
    EmbeddingOptions,
    MinilmOptions,
    PatientOptions,
    TinybertOptions,
    TripleOptions,
)
from tutelage.config.methods.feature import FeatureOptions, PairOptions, ResolvedPair, SimkdOptions
from tutelage.config.methods.language import (
    CrossTokenizerOptions,
    OnPolicyOptions,
    RolloutsOptions,
    SequenceOptions,
    TokenOptions,
)
from tutelage.config.methods.logit import LogitOptions, SoftLabelOptions
from tutelage.config.methods.losses import (
    FEATURE_LOSSES,
    LOGIT_LOSSES,
    PROJECTORS,
    SOFT_OF_TASK,
    FeatureLossSpec,
    LogitLossSpec,
    LossOptions,
)
from tutelage.config.methods.teacherless import ByotOptions, MutualOptions, SupervisedOptions, TeacherFreeOptions

METHOD_KINDS: dict[str, type[MethodOptions]] = {
    "byot": ByotOptions,
    "cross-tokenizer": CrossTokenizerOptions,
    "embedding": EmbeddingOptions,
    "feature": FeatureOptions,
    "logit": LogitOptions,
    "minilm": MinilmOptions,
    "mutual": MutualOptions,
    "on-policy": OnPolicyOptions,
    "patient": PatientOptions,
    "sequence": SequenceOptions,
    "simkd": SimkdOptions,
    "supervised": SupervisedOptions,
    "teacher-free": TeacherFreeOptions,
    "tinybert": TinybertOptions,
    "token": TokenOptions,
    "triple": TripleOptions,
}
"""Every method that a recipe can name, with its options."""

__all__ = [
    "FEATURE_LOSSES", "LOGIT_LOSSES", "METHOD_KINDS", "PROJECTORS", "SOFT_OF_TASK", "ByotOptions",
    "CrossTokenizerOptions", "EmbeddingOptions", "FeatureLossSpec", "FeatureOptions", "LogitLossSpec", "LogitOptions",
    "LossOptions", "MethodOptions", "MinilmOptions", "MutualOptions", "OnPolicyOptions", "PairOptions",
    "PatientOptions", "ResolvedPair", "RolloutsOptions", "SequenceOptions", "SimkdOptions", "SoftLabelOptions",
    "SupervisedOptions", "TeacherFreeOptions", "TinybertOptions", "TokenOptions", "TripleOptions",
]  # fmt: skip
