"""What a student needs while it is trained: projectors into its teacher's features, and where these are."""

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
from tutelage.students.sites import before_activations, embedding, last_norm, stages

__all__ = [
    "PROJECTORS", "Projector", "ReusedHead", "before_activations", "build_projector", "embedding", "feature_shapes",
    "fitting",
    "last_norm", "resize", "reuse_head", "stages", "untouched",
]  # fmt: skip
