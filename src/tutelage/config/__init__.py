"""Recipes: YAML in, typed and resolved settings out.

Nothing here imports torch, so that a mistake in a recipe is reported at once. The keys of a section are the fields
of its class; any other key is an error with the line, the given value, what is allowed and the nearest spelling.
"""

from tutelage.config.data import (
    AUGMENTS,
    METRICS,
    SOURCES,
    TEACHER_ONLY_TASKS,
    UNLABELLED,
    DataConfig,
    TextDataConfig,
)
from tutelage.config.evaluate import EvaluateConfig, SamplesConfig
from tutelage.config.generate import (
    AnswerConfig,
    BestConfig,
    BudgetConfig,
    ConversationConfig,
    DecontaminateConfig,
    EndpointConfig,
    EvolveConfig,
    GenerateConfig,
    Generations,
    PriceConfig,
    QualityConfig,
    SamplingConfig,
    SelfInstructConfig,
)
from tutelage.config.judge import GIVEN, EndpointRecipe, JudgeConfig
from tutelage.config.load import (
    build_recipe,
    differing_keys,
    dump_recipe,
    load_endpoint_recipe,
    load_recipe,
)
from tutelage.config.methods import METHOD_KINDS
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
from tutelage.config.methods.losses import FEATURE_LOSSES, LOGIT_LOSSES, PROJECTORS, SOFT_OF_TASK, LossOptions
from tutelage.config.methods.teacherless import ByotOptions, MutualOptions, SupervisedOptions, TeacherFreeOptions
from tutelage.config.models import MODELS, LoraConfig, ModelConfig, StudentConfig
from tutelage.config.multistage import AssistantChainConfig, BornAgainConfig
from tutelage.config.recipe import Recipe
from tutelage.config.search import KeySpace, SearchConfig
from tutelage.config.teachers import (
    CacheConfig,
    EnsembleConfig,
    InferenceConfig,
    MemberConfig,
    RemoteTeacherConfig,
    TeacherConfig,
    TeacherInferenceConfig,
)
from tutelage.config.train import OPTIMIZERS, SCHEDULES, OptimizerConfig, ScheduleConfig, TrainConfig

__all__ = [
    "AUGMENTS", "FEATURE_LOSSES", "GIVEN", "LOGIT_LOSSES", "METHOD_KINDS", "METRICS",
    "MODELS", "OPTIMIZERS", "PROJECTORS", "SCHEDULES", "SOFT_OF_TASK", "SOURCES", "TEACHER_ONLY_TASKS",
    "UNLABELLED", "AnswerConfig", "AssistantChainConfig", "BestConfig",
    "BornAgainConfig", "BudgetConfig", "ByotOptions", "CacheConfig", "ConversationConfig", "CrossTokenizerOptions",
    "DataConfig", "DecontaminateConfig", "EmbeddingOptions", "EndpointConfig", "EndpointRecipe", "EnsembleConfig",
    "EvaluateConfig", "EvolveConfig", "FeatureOptions", "GenerateConfig",
    "Generations", "InferenceConfig", "JudgeConfig", "KeySpace", "LogitOptions",
    "LoraConfig", "LossOptions", "MemberConfig", "MethodOptions", "MinilmOptions", "ModelConfig", "MutualOptions",
    "OnPolicyOptions", "OptimizerConfig", "PairOptions", "PatientOptions", "PriceConfig", "QualityConfig", "Recipe",
    "RemoteTeacherConfig", "ResolvedPair", "RolloutsOptions", "SamplesConfig", "SamplingConfig", "ScheduleConfig",
    "SearchConfig", "SelfInstructConfig", "SequenceOptions", "SimkdOptions", "SoftLabelOptions", "StudentConfig",
    "SupervisedOptions", "TeacherConfig", "TeacherFreeOptions", "TeacherInferenceConfig", "TextDataConfig",
    "TinybertOptions", "TokenOptions", "TrainConfig", "TripleOptions", "build_recipe", "differing_keys",
    "dump_recipe", "load_endpoint_recipe", "load_recipe",
]  # fmt: skip
