"""Every error that tutelage raises on purpose.

One root, so that a caller can catch all of them; each subclass is also the
standard-library error that a caller would expect. A message says what is
wrong, where, and what to do about it.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from pathlib import Path
from typing import Any

REFUSALS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EACCES: "permission denied",
    errno.EROFS: "the file system is read-only",
    errno.ENOTDIR: "a part of the path is a file",
    errno.EEXIST: "it is a file",
    errno.ENOENT: "a part of the path does not exist",
    errno.ENAMETOOLONG: "the name is too long",
}
"""Why an operating system does not write a file, by its error number."""


class TutelageError(Exception):
    """Root of all errors raised on purpose.

    Args:
        what: what is wrong, with what was given.
        where: the place: a file and line, a key, a module path. Optional.
        remedy: what the reader can do about it. Optional only where nothing can be done.
    """

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        self.what, self.where, self.remedy = what, where, remedy
        super().__init__(what, where, remedy)

    def __reduce__(self) -> tuple[Any, ...]:  # survives the way from a process that fetches data
        return _rebuilt, (type(self), self.what, self.where, self.remedy)

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        return f"{head}\n  -> {self.remedy}" if self.remedy else head


def _rebuilt(cls: type[TutelageError], what: str, where: str | None, remedy: str | None) -> TutelageError:
    return cls(what, where=where, remedy=remedy)


class ConfigError(TutelageError, ValueError):
    """A recipe, or an override of it, cannot be used."""


class DataError(TutelageError, ValueError):
    """The data cannot be read, or is not what the run needs."""


class ModelError(TutelageError, ValueError):
    """A model cannot be built, or has no such module."""


class CheckpointError(TutelageError, ValueError):
    """A checkpoint or weights file is missing, broken, unsafe or of another model."""


class CapabilityError(TutelageError, ValueError):
    """The teacher, student, data and method do not fit each other."""


class NumericsError(TutelageError, ArithmeticError):
    """A loss, an input or a weight is not finite."""


class RunDirectoryError(TutelageError, OSError):
    """A run directory cannot be created, written or continued."""

    def __str__(self) -> str:  # OSError has its own idea of three arguments
        return TutelageError.__str__(self)


class CacheError(TutelageError, OSError):
    """A cache of teacher signals is damaged, was made from something else, or cannot be written."""

    def __str__(self) -> str:
        return TutelageError.__str__(self)


class EndpointError(TutelageError, ConnectionError):
    """A server that generates or scores text refuses, cannot be reached, or does not answer."""

    def __str__(self) -> str:
        return TutelageError.__str__(self)


class JournalError(TutelageError, OSError):
    """A journal of answers is damaged, of another recipe, or written by another process."""

    def __str__(self) -> str:
        return TutelageError.__str__(self)


class BudgetSpent(TutelageError):
    """The remaining budget does not cover the next request. All answers are kept."""


class MissingDependencyError(TutelageError, ImportError):
    """A feature needs a package that is not installed."""


class Interrupted(TutelageError):
    """The run was asked to stop (SIGTERM or Ctrl-C), saved itself and can go on."""


def refusal(error: OSError) -> str:
    """Why the operating system refused, in words."""
    return REFUSALS.get(error.errno or 0, str(error))


def shorten(value: Any, limit: int = 80) -> str:
    """``repr(value)`` on one line of at most ``limit`` characters, for messages that show a given value."""
    text = repr(value[: limit + 1] if isinstance(value, str | bytes) else value)
    if "\n" in text:
        text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def nearest(given: str, allowed: list[str], count: int = 3) -> list[str]:
    """The ``count`` names in ``allowed`` that are spelled most like ``given``."""
    import difflib

    return difflib.get_close_matches(given[:80], allowed, n=count, cutoff=0.4)


def did_you_mean(path: Path, otherwise: str, names: Iterable[str] = ()) -> str:
    """A remedy for a path that does not exist: its nearest sibling, else ``otherwise``."""
    siblings = [str(p) for p in path.parent.glob("*")] if path.parent.is_dir() else []
    close = nearest(str(path), [*siblings, *names], 1)
    return f"did you mean {close[0]}?" if close else otherwise


def first_line(error: BaseException) -> str:
    """The first line of an error's message that is not empty; the name of its class where it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def suggest(given: str, allowed: Iterable[str]) -> str:
    """`` (did you mean X?)``, or nothing where nothing is near."""
    close = nearest(given, list(allowed), 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def require(package: str, extra: str, purpose: str) -> None:
    """Raise :class:`MissingDependencyError` when ``package`` is not importable."""
    import importlib.util

    if importlib.util.find_spec(package) is None:
        raise MissingDependencyError(
            f"{purpose} needs the package {package}, which is not installed",
            remedy=f"pip install 'tutelage[{extra}]'",
        )
