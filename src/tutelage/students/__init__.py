"""What a student needs beside itself while it is trained: projectors into its teacher's features."""

from tutelage.students.projectors import PROJECTORS, Projector, build_projector, feature_shapes, stages

__all__ = ["PROJECTORS", "Projector", "build_projector", "feature_shapes", "stages"]
