"""Teachers: anything that gives one typed signal for a batch."""

from tutelage.teachers.cache import CachedTeacher, Layout
from tutelage.teachers.ensemble import Ensemble, EnsembleTeacher, learned_weights
from tutelage.teachers.live import LiveTeacher
from tutelage.teachers.memory import MemoryTeacher
from tutelage.teachers.prefetching import PrefetchingTeacher
from tutelage.teachers.served import ServedTeacher
from tutelage.teachers.signal import Signal, Sparse, Teacher

__all__ = [
    "CachedTeacher",
    "Ensemble",
    "EnsembleTeacher",
    "Layout",
    "LiveTeacher",
    "MemoryTeacher",
    "PrefetchingTeacher",
    "ServedTeacher",
    "Signal",
    "Sparse",
    "Teacher",
    "learned_weights",
]
