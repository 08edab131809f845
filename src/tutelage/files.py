"""Atomic writes of files and folders, file locks, and transformers without its log."""

import errno
import fcntl
import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from tutelage.errors import REFUSALS, RunDirectoryError

TEMPORARY_PREFIX = ".tutelage-tmp."
"""Prefix of the names of incomplete files and folders."""

_FREE_SPACE = "free some space, then continue with --resume"
_REMEDIES = dict.fromkeys(REFUSALS, "choose another --out") | {
    errno.ENOSPC: _FREE_SPACE,
    errno.EDQUOT: _FREE_SPACE,
    errno.EACCES: "choose another --out, or fix the folder's permissions",
}


@contextmanager
def wrap_write_errors(path: Path) -> Iterator[None]:
    """Convert an error of the operating system about ``path`` to :class:`RunDirectoryError`."""
    try:
        yield
    except RunDirectoryError:
        raise
    except Exception as error:
        # safetensors has its own class for errors of the operating system, with the number in the message.
        code = re.search(r"os error (\d+)", str(error)) if type(error).__name__ == "SafetensorError" else None
        if code is None and not isinstance(error, OSError):
            raise
        number = int(code[1]) if code else getattr(error, "errno", None)
        raise RunDirectoryError(
            f"cannot be written: {REFUSALS.get(number or 0, str(error))}",
            where=str(path),
            remedy=_REMEDIES.get(number or 0, "check the path and the disk"),
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: write and sync a temporary file, then rename it."""
    with wrap_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.write(text.encode())


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a temporary file; on success sync it and rename it to ``path``, on failure delete it."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{TEMPORARY_PREFIX}{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder; on success sync it and rename it to ``path``, on failure delete it."""
    with wrap_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{TEMPORARY_PREFIX}{path.name}."))
        try:
            yield draft
            for file in draft.rglob("*"):
                if file.is_file():
                    with open(file, "rb") as opened:
                        os.fsync(opened.fileno())
            draft.chmod(0o755)
            old = None
            if path.exists():
                old = path.with_name(f"{TEMPORARY_PREFIX}{path.name}.old")
                shutil.rmtree(old, ignore_errors=True)
                path.rename(old)
            draft.rename(path)
            if old is not None:
                shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise


def try_lock(handle: int) -> bool:
    """Lock an open file until this process ends; return whether the lock was free."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextmanager
def silence_transformers() -> Iterator[None]:
    """Turn off the progress bars and warnings of transformers during the block."""
    if importlib.util.find_spec("transformers") is None:
        yield
        return
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
