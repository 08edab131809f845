"""Recipes: YAML in, typed and resolved settings out.

Nothing here imports torch, so that a mistake in a recipe is answered at once. The
keys of each section are the fields of its class; anything else is an error that names
the line, what was given, what is allowed and the nearest spelling.
"""

from tutelage.config.load import build_recipe, differing_keys, dump_recipe, load_recipe
from tutelage.config.methods import (
    FEATURE_OBJECTIVES,
    METHOD_KINDS,
    PROJECTORS,
    SOFT_OBJECTIVES,
    SOFT_TEMPERATURES,
    ByotConfig,
    FeatureConfig,
    LogitConfig,
    MutualConfig,
    PairConfig,
    SimkdConfig,
    SupervisedConfig,
    TeacherFreeConfig,
)
from tutelage.config.models import MODELS, ModelConfig
from tutelage.config.schema import (
    AUGMENTS,
    OPTIMIZERS,
    SCHEDULES,
    SOURCES,
    TRACKERS,
    CacheConfig,
    DataConfig,
    EnsembleConfig,
    MemberConfig,
    OptimizerConfig,
    Recipe,
    ScheduleConfig,
    SpeedConfig,
    TeacherConfig,
    TeacherSpeedConfig,
    TrainConfig,
)
from tutelage.config.search import KeySpace, SearchConfig
from tutelage.config.workflows import WORKFLOW_KINDS, AssistantChainConfig, BornAgainConfig

__all__ = [
    "AUGMENTS",
    "FEATURE_OBJECTIVES",
    "METHOD_KINDS",
    "MODELS",
    "OPTIMIZERS",
    "PROJECTORS",
    "SCHEDULES",
    "SOFT_OBJECTIVES",
    "SOFT_TEMPERATURES",
    "SOURCES",
    "TRACKERS",
    "WORKFLOW_KINDS",
    "AssistantChainConfig",
    "BornAgainConfig",
    "ByotConfig",
    "CacheConfig",
    "DataConfig",
    "EnsembleConfig",
    "FeatureConfig",
    "KeySpace",
    "LogitConfig",
    "MemberConfig",
    "ModelConfig",
    "MutualConfig",
    "OptimizerConfig",
    "PairConfig",
    "Recipe",
    "ScheduleConfig",
    "SearchConfig",
    "SimkdConfig",
    "SpeedConfig",
    "SupervisedConfig",
    "TeacherConfig",
    "TeacherFreeConfig",
    "TeacherSpeedConfig",
    "TrainConfig",
    "build_recipe",
    "differing_keys",
    "dump_recipe",
    "load_recipe",
]  # fmt: skip
