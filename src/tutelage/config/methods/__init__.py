"""Sections of a recipe's ``method``: one class for each kind."""

from tutelage.config.base import by_kind
from tutelage.config.methods import encoders, feature, language, logit, teacherless
from tutelage.config.methods.base import MethodOptions

AnyMethod = (
    encoders.EmbeddingOptions | encoders.MinilmOptions | encoders.PatientOptions | encoders.TinybertOptions
    | encoders.TripleOptions | feature.FeatureOptions | feature.SimkdOptions | language.CrossTokenizerOptions
    | language.OnPolicyOptions | language.SequenceOptions | language.TokenOptions | logit.LogitOptions
    | teacherless.ByotOptions | teacherless.MutualOptions | teacherless.SupervisedOptions
    | teacherless.TeacherFreeOptions
)  # fmt: skip
"""The section of any method."""

METHOD_KINDS: dict[str, type[MethodOptions]] = by_kind(AnyMethod)
"""Every method that a recipe can name, with its options."""
