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
    Generations,
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
from tutelage.config.methods.feature import FeatureOptions, ResolvedPair
from tutelage.config.methods.logit import LogitOptions, SoftLabelOptions
from tutelage.config.methods.losses import FEATURE_LOSSES, LOGIT_LOSSES, PROJECTORS, SOFT_OF_TASK, LossOptions
from tutelage.config.models import MODELS, LoraConfig, ModelConfig, StudentConfig
from tutelage.config.multistage import AssistantChainConfig, BornAgainConfig
from tutelage.config.recipe import Recipe
from tutelage.config.search import KeySpace, SearchConfig
from tutelage.config.teachers import (
    CacheConfig,
    EnsembleConfig,
    InferenceConfig,
    MemberConfig,
    TeacherConfig,
    TeacherInferenceConfig,
)
from tutelage.config.train import OPTIMIZERS, SCHEDULES, OptimizerConfig, ScheduleConfig, TrainConfig

__all__ = [
    "AUGMENTS", "FEATURE_LOSSES", "GIVEN", "LOGIT_LOSSES", "METHOD_KINDS", "METRICS", "MODELS", "OPTIMIZERS",
    "PROJECTORS", "SCHEDULES", "SOFT_OF_TASK", "SOURCES", "TEACHER_ONLY_TASKS", "UNLABELLED", "AnswerConfig",
    "AssistantChainConfig", "BestConfig", "BornAgainConfig", "BudgetConfig", "CacheConfig",
    "ConversationConfig", "DataConfig", "DecontaminateConfig", "EndpointConfig", "EndpointRecipe",
    "EnsembleConfig", "EvaluateConfig", "EvolveConfig", "FeatureOptions", "Generations",
    "InferenceConfig", "JudgeConfig", "KeySpace", "LogitOptions", "LoraConfig", "LossOptions", "MemberConfig",
    "MethodOptions", "ModelConfig", "OptimizerConfig", "QualityConfig", "Recipe",
    "ResolvedPair", "SamplesConfig", "SamplingConfig", "ScheduleConfig", "SearchConfig",
    "SelfInstructConfig", "SoftLabelOptions", "StudentConfig", "TeacherConfig", "TeacherInferenceConfig",
    "TextDataConfig", "TrainConfig", "build_recipe", "differing_keys", "dump_recipe", "load_endpoint_recipe",
    "load_recipe",
]  # fmt: skip
