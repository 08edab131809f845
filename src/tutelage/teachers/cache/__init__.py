"""Teacher signals on disk: written once, by any number of processes, and read in any order."""

from tutelage.teachers.cache.columns import input_digest
from tutelage.teachers.cache.layout import Layout
from tutelage.teachers.cache.maintenance import compact_cache, inspect_cache, verify_cache
from tutelage.teachers.cache.reader import CacheReader
from tutelage.teachers.cache.teacher import CachedTeacher
from tutelage.teachers.cache.writer import CacheWriter

__all__ = [
    "CacheReader", "CacheWriter", "CachedTeacher", "Layout", "compact_cache", "input_digest", "inspect_cache",
    "verify_cache",
]  # fmt: skip
