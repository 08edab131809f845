"""Files that appear whole or not at all, what an operating system says when it refuses, in words, and libraries that
say nothing while they read and write."""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tutelage.errors import REFUSALS, RunDirectoryError, refusal

TEMPORARY_PREFIX = ".tutelage-tmp."
"""How the names of files and folders begin that are not complete yet."""

_ROOM = "free some space, then go on with --resume"
_REMEDIES = dict.fromkeys(REFUSALS, "choose another --out") | {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EACCES: "choose another --out, or fix the folder's permissions",
}


@contextmanager
def wrap_write_errors(path: Path) -> Iterator[None]:
    """Turn an operating system's refusal to write at ``path`` into a :class:`RunDirectoryError`."""
    try:
        yield
    except RunDirectoryError:
        raise
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "check the path and the disk")
        raise RunDirectoryError(f"cannot be written: {refusal(error)}", where=str(path), remedy=remedy) from error
    except Exception as error:
        # safetensors reports the system's refusal as an error of its own
        if type(error).__name__ == "SafetensorError" and "os error" in str(error).lower():
            full = "28" in str(error) or "space" in str(error)
            reason = REFUSALS[errno.ENOSPC] if full else str(error)
            remedy = _ROOM if full else "check the path and the disk"
            raise RunDirectoryError(f"cannot be written: {reason}", where=str(path), remedy=remedy) from error
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: to a temporary name, synced, then renamed."""
    with wrap_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{TEMPORARY_PREFIX}{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder that appears at ``path`` complete, synced, in one rename, or not at all."""
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
    """Whether this process now holds the lock of an open file, which ends with the process."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextmanager
def silence_transformers() -> Iterator[None]:
    """transformers without its bars and its remarks on new heads, which are said better elsewhere."""
    if importlib.util.find_spec("transformers") is None:  # whatever has save_pretrained without it
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
