"""Students cut from their teachers, and what a student needs in training: projectors, and where to compare."""

from tutelage.students.embeddings import trim_embeddings
from tutelage.students.encoders import Cut, cut
from tutelage.students.layers import LAYER_MAPS, block_influence, layer_map
from tutelage.students.lora import has_adapters, low_rank, merged
from tutelage.students.projectors import (
    PROJECTORS,
    Projector,
    build_projector,
    feature_shapes,
    fitting,
    resize,
    untouched,
)
from tutelage.students.reuse import ReusedHead, reuse_head
from tutelage.students.rounding import is_rounded, plain, rounded
from tutelage.students.sites import before_activations, embedding, last_norm, stages
from tutelage.students.vocabulary import trim

__all__ = [
    "LAYER_MAPS", "PROJECTORS", "Cut", "Projector", "ReusedHead", "before_activations", "block_influence",
    "build_projector", "cut", "embedding", "feature_shapes", "fitting", "has_adapters", "is_rounded", "last_norm",
    "layer_map", "low_rank", "merged", "plain", "resize", "reuse_head", "rounded", "stages", "trim",
    "trim_embeddings", "untouched",
]  # fmt: skip
