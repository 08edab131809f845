"""Teachers: anything that gives one typed signal for a batch."""

from tutelage.teachers.cache import CachedTeacher, Layout
from tutelage.teachers.ensemble import Ensemble, EnsembleTeacher, fit_ensemble_weights
from tutelage.teachers.functions import FunctionModel, StoredProbabilities, as_model, from_estimator, from_onnx
from tutelage.teachers.live import LiveTeacher
from tutelage.teachers.memory import MemoryTeacher
from tutelage.teachers.prefetching import PrefetchingTeacher
from tutelage.teachers.remote import RemoteTeacher
from tutelage.teachers.signal import Signal, Sparse, Teacher

__all__ = [
    "CachedTeacher", "Ensemble", "EnsembleTeacher", "FunctionModel", "Layout", "LiveTeacher", "MemoryTeacher",
    "PrefetchingTeacher", "RemoteTeacher", "Signal", "Sparse", "StoredProbabilities", "Teacher", "as_model",
    "fit_ensemble_weights", "from_estimator", "from_onnx",
]  # fmt: skip
