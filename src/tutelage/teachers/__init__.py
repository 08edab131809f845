"""Teachers: anything that gives one typed signal for a batch."""

from tutelage.teachers.cache import CachedTeacher, Layout
from tutelage.teachers.live import LiveTeacher
from tutelage.teachers.memory import MemoryTeacher
from tutelage.teachers.signal import Signal, Sparse, Teacher

__all__ = ["CachedTeacher", "Layout", "LiveTeacher", "MemoryTeacher", "Signal", "Sparse", "Teacher"]
