"""Teachers: anything that gives one typed signal for a batch."""

from tutelage.teachers.live import LiveTeacher
from tutelage.teachers.memory import MemoryTeacher
from tutelage.teachers.signal import Signal, Teacher

__all__ = ["LiveTeacher", "MemoryTeacher", "Signal", "Teacher"]
