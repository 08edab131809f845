"""Sections of a recipe's ``method``: one class for each kind."""

from __future__ import annotations

from tutelage.config.methods.base import MethodConfig
from tutelage.config.methods.encoders import (
    EmbeddingConfig,
    MinilmConfig,
    PatientConfig,
    TinybertConfig,
    TripleConfig,
)
from tutelage.config.methods.feature import FEATURE_LOSSES, PROJECTORS, FeatureConfig, PairConfig, SimkdConfig
from tutelage.config.methods.language import (
    CrossTokenizerConfig,
    OnPolicyConfig,
    RolloutsConfig,
    SequenceConfig,
    TokenConfig,
)
from tutelage.config.methods.logit import LOGIT_LOSSES, SOFT_OF_TASK, SOFT_TEMPERATURES, LogitConfig, SoftConfig
from tutelage.config.methods.untaught import ByotConfig, MutualConfig, SupervisedConfig, TeacherFreeConfig

METHOD_KINDS: dict[str, type[MethodConfig]] = {
    "byot": ByotConfig,
    "cross-tokenizer": CrossTokenizerConfig,
    "embedding": EmbeddingConfig,
    "feature": FeatureConfig,
    "logit": LogitConfig,
    "minilm": MinilmConfig,
    "mutual": MutualConfig,
    "on-policy": OnPolicyConfig,
    "patient": PatientConfig,
    "sequence": SequenceConfig,
    "simkd": SimkdConfig,
    "supervised": SupervisedConfig,
    "teacher-free": TeacherFreeConfig,
    "tinybert": TinybertConfig,
    "token": TokenConfig,
    "triple": TripleConfig,
}
"""Every method that a recipe can name, with its options."""

__all__ = [
    "FEATURE_LOSSES",
    "LOGIT_LOSSES",
    "METHOD_KINDS",
    "PROJECTORS",
    "SOFT_OF_TASK",
    "SOFT_TEMPERATURES",
    "ByotConfig",
    "CrossTokenizerConfig",
    "EmbeddingConfig",
    "FeatureConfig",
    "LogitConfig",
    "MethodConfig",
    "MinilmConfig",
    "MutualConfig",
    "OnPolicyConfig",
    "PairConfig",
    "PatientConfig",
    "RolloutsConfig",
    "SequenceConfig",
    "SimkdConfig",
    "SoftConfig",
    "SupervisedConfig",
    "TeacherFreeConfig",
    "TinybertConfig",
    "TokenConfig",
    "TripleConfig",
]
