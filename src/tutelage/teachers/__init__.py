"""Teachers: anything that gives one typed signal for a batch."""

from tutelage.teachers.cache import CachedTeacher, Layout
from tutelage.teachers.ensemble import Ensemble, EnsembleTeacher, fit_ensemble_weights
from tutelage.teachers.live import LiveTeacher
from tutelage.teachers.memory import MemoryTeacher
from tutelage.teachers.prefetching import PrefetchingTeacher
from tutelage.teachers.remote import RemoteTeacher
from tutelage.teachers.signal import Signal, Sparse, Teacher

__all__ = [
    "CachedTeacher", "Ensemble", "EnsembleTeacher", "Layout", "LiveTeacher", "MemoryTeacher", "PrefetchingTeacher",
    "RemoteTeacher", "Signal", "Sparse", "Teacher", "fit_ensemble_weights",
]  # fmt: skip
