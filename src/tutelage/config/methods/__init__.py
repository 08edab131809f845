"""Sections of a recipe's ``method``: one class for each kind."""

from __future__ import annotations

from tutelage.config.base import by_kind
from tutelage.config.methods.base import MethodOptions
from tutelage.config.methods.encoders import (
    EmbeddingOptions,
    MinilmOptions,
    PatientOptions,
    TinybertOptions,
    TripleOptions,
)
from tutelage.config.methods.feature import FeatureOptions, SimkdOptions
from tutelage.config.methods.language import (
    CrossTokenizerOptions,
    OnPolicyOptions,
    SequenceOptions,
    TokenOptions,
)
from tutelage.config.methods.logit import LogitOptions
from tutelage.config.methods.teacherless import ByotOptions, MutualOptions, SupervisedOptions, TeacherFreeOptions

AnyMethod = (
    ByotOptions | CrossTokenizerOptions | EmbeddingOptions | FeatureOptions | LogitOptions | MinilmOptions
    | MutualOptions | OnPolicyOptions | PatientOptions | SequenceOptions | SimkdOptions | SupervisedOptions
    | TeacherFreeOptions | TinybertOptions | TokenOptions | TripleOptions
)  # fmt: skip
"""The section of any method."""

METHOD_KINDS: dict[str, type[MethodOptions]] = by_kind(AnyMethod)
"""Every method that a recipe can name, with its options."""
