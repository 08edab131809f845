"""Recipes: YAML in, typed and resolved settings out.

Nothing here imports torch, so that a mistake in a recipe is answered at once. The
keys of each section are the fields of its class; anything else is an error that names
the line, what was given, what is allowed and the nearest spelling.
"""

from tutelage.config.data import (
    AUGMENTS,
    DATA_KINDS,
    METRICS,
    SOURCES,
    TEACHER_ONLY_TASKS,
    TEXT_SOURCES,
    UNLABELLED,
    DataConfig,
    TextDataConfig,
)
from tutelage.config.evaluate import EvaluateConfig
from tutelage.config.generate import (
    GENERATE_KINDS,
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
    Generation,
    Judgement,
    build_recipe,
    differing_keys,
    dump_recipe,
    load_generation,
    load_judgement,
    load_recipe,
)
from tutelage.config.methods import (
    FEATURE_LOSSES,
    LOGIT_LOSSES,
    METHOD_KINDS,
    PROJECTORS,
    SOFT_OF_TASK,
    ByotOptions,
    CrossTokenizerOptions,
    EmbeddingOptions,
    FeatureLossSpec,
    FeatureOptions,
    LogitLossSpec,
    LogitOptions,
    LossOptions,
    MethodOptions,
    MinilmOptions,
    MutualOptions,
    OnPolicyOptions,
    PairOptions,
    PatientOptions,
    ResolvedPair,
    RolloutsOptions,
    SequenceOptions,
    SimkdOptions,
    SoftLabelOptions,
    SupervisedOptions,
    TeacherFreeOptions,
    TinybertOptions,
    TokenOptions,
    TripleOptions,
)
from tutelage.config.models import MODELS, LoraConfig, ModelConfig, StudentConfig
from tutelage.config.multistage import WORKFLOW_KINDS, AssistantChainConfig, BornAgainConfig
from tutelage.config.recipe import Recipe
from tutelage.config.sample_outputs import SamplesConfig
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
from tutelage.config.train import (
    OPTIMIZERS,
    SCHEDULES,
    TRACKERS,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)

__all__ = [
    "AUGMENTS", "DATA_KINDS", "FEATURE_LOSSES", "GENERATE_KINDS", "GIVEN", "LOGIT_LOSSES", "METHOD_KINDS", "METRICS",
    "MODELS", "OPTIMIZERS", "PROJECTORS", "SCHEDULES", "SOFT_OF_TASK", "SOURCES", "TEACHER_ONLY_TASKS",
    "TEXT_SOURCES", "TRACKERS", "UNLABELLED", "WORKFLOW_KINDS", "AnswerConfig", "AssistantChainConfig", "BestConfig",
    "BornAgainConfig", "BudgetConfig", "ByotOptions", "CacheConfig", "ConversationConfig", "CrossTokenizerOptions",
    "DataConfig", "DecontaminateConfig", "EmbeddingOptions", "EndpointConfig", "EndpointRecipe", "EnsembleConfig",
    "EvaluateConfig", "EvolveConfig", "FeatureLossSpec", "FeatureOptions", "GenerateConfig", "Generation",
    "Generations", "InferenceConfig", "JudgeConfig", "Judgement", "KeySpace", "LogitLossSpec", "LogitOptions",
    "LoraConfig", "LossOptions", "MemberConfig", "MethodOptions", "MinilmOptions", "ModelConfig", "MutualOptions",
    "OnPolicyOptions", "OptimizerConfig", "PairOptions", "PatientOptions", "PriceConfig", "QualityConfig", "Recipe",
    "RemoteTeacherConfig", "ResolvedPair", "RolloutsOptions", "SamplesConfig", "SamplingConfig", "ScheduleConfig",
    "SearchConfig", "SelfInstructConfig", "SequenceOptions", "SimkdOptions", "SoftLabelOptions", "StudentConfig",
    "SupervisedOptions", "TeacherConfig", "TeacherFreeOptions", "TeacherInferenceConfig", "TextDataConfig",
    "TinybertOptions", "TokenOptions", "TrainConfig", "TripleOptions", "build_recipe", "differing_keys",
    "dump_recipe", "load_generation", "load_judgement", "load_recipe",
]  # fmt: skip
