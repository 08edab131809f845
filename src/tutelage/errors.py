"""The errors that tutelage raises on purpose.

All are subclasses of :class:`TutelageError`, and of the error of the standard library that a caller would expect. A
message states what is wrong, where, and what to do.
"""

import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
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
"""The reasons for which an operating system does not write a file, by error number."""


class TutelageError(Exception):
    """Base class of all errors raised on purpose.

    Args:
        what: what is wrong, with the value that the user gave.
        where: the file and line, the key, or the module path.
        remedy: what the user can do about it; ``None`` only where nothing can be done.
    """

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        self.what, self.where, self.remedy = what, where, remedy
        super().__init__(what, where, remedy)

    def __reduce__(self) -> tuple[Any, ...]:  # a process that fetches data sends its error to the main process
        return partial(type(self), where=self.where, remedy=self.remedy), (self.what,)

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        return f"{head}\n  -> {self.remedy}" if self.remedy else head


class ConfigError(TutelageError, ValueError):
    """A recipe, or an override of it, cannot be used."""


class DataError(TutelageError, ValueError):
    """The data cannot be read, or does not fit the task."""


class ModelError(TutelageError, ValueError):
    """A model cannot be built, or a module path names none of its modules."""


class CheckpointError(TutelageError, ValueError):
    """A checkpoint or weights file is missing, damaged, unsafe or of another model."""


class CapabilityError(TutelageError, ValueError):
    """Teacher, student, data, method or hardware do not fit each other."""


class NumericsError(TutelageError, ArithmeticError):
    """A loss, an input or a weight is not finite."""


class RunDirectoryError(TutelageError, OSError):
    """A run directory cannot be created, written or resumed."""


class CacheError(TutelageError, OSError):
    """A cache of teacher outputs is damaged, belongs to another teacher or other data, or cannot be written."""


class EndpointError(TutelageError, ConnectionError):
    """A server that generates or scores text cannot be reached, does not reply, or rejects the request."""


class JournalError(TutelageError, OSError):
    """A journal of answers is damaged, belongs to another recipe, or is open in another process."""


class BudgetSpent(TutelageError):
    """The remaining budget does not cover the next request. All answers so far are saved."""


class MissingDependencyError(TutelageError, ImportError):
    """A feature needs a package that is not installed."""


class Interrupted(TutelageError):
    """The run stopped after SIGTERM or Ctrl-C. Its state is saved, and it can be resumed."""


@contextmanager
def at_key(key: str) -> Iterator[None]:
    """Errors raised inside name ``key`` of the recipe, unless they name a key of the same section."""
    try:
        yield
    except TutelageError as error:
        if (error.where or key).partition(".")[0] != key.partition(".")[0]:
            error.where = f"{key}: {error.where}"
        raise


def refusal(error: OSError) -> str:
    """The reason of an error of the operating system."""
    return REFUSALS.get(error.errno or 0, str(error))


def shorten(value: Any, limit: int = 80) -> str:
    """``repr(value)`` on one line of at most ``limit`` characters, for messages."""
    text = repr(value[: limit + 1] if isinstance(value, str | bytes) else value)
    text = " ".join(text.split()) if "\n" in text else text
    return text if len(text) <= limit else text[: limit - 3] + "..."


def nearest(given: str, allowed: list[str], count: int = 3) -> list[str]:
    """The ``count`` names in ``allowed`` that are spelled most like ``given``."""
    import difflib

    return difflib.get_close_matches(given[:80], allowed, n=count, cutoff=0.4)


def did_you_mean(path: Path, otherwise: str, names: Iterable[str] = ()) -> str:
    """A remedy for a path that does not exist: the sibling with the nearest name, else ``otherwise``."""
    siblings = [str(p) for p in path.parent.glob("*")] if path.parent.is_dir() else []
    close = nearest(str(path), [*siblings, *names], 1)
    return f"did you mean {close[0]}?" if close else otherwise


def first_line(error: BaseException) -> str:
    """The first line of an error's message that is not empty; the name of its class if the message is empty."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def suggest(given: str, allowed: Iterable[str]) -> str:
    """`` (did you mean X?)``, or an empty string if no name is similar."""
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
