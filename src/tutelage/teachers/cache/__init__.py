"""Teacher signals on disk: written once, by any number of processes, and read in any order."""

from tutelage.teachers.cache.layout import Layout
from tutelage.teachers.cache.reader import Reader
from tutelage.teachers.cache.teacher import CachedTeacher, digest
from tutelage.teachers.cache.tools import compact, info, verify
from tutelage.teachers.cache.writer import Writer

__all__ = ["CachedTeacher", "Layout", "Reader", "Writer", "compact", "digest", "info", "verify"]
