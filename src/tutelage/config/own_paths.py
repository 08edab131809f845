"""Paths in the files of a run that lead into its own folder: they hold after the folder is moved.

Such a path starts with ``$HERE``, the folder of the file that names it, as in ``$HERE/../teacher/models/teacher``.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = "$HERE"


def write_own_paths(config: Any, folder: Path, root: Path) -> Any:
    """``config`` for a file in ``folder``, where paths below ``root`` are relative to that folder."""
    top = str(root.resolve())

    def convert(path: str) -> str:
        place = os.path.realpath(path) if os.sep in path else ""
        inside = place.startswith(f"{top}{os.sep}")
        return f"{HERE}{os.sep}{os.path.relpath(place, folder.resolve())}" if inside else path

    return _convert(config, convert)


def read_own_paths(config: Any, folder: Path) -> Any:
    """``config`` of a file in ``folder``, with paths that start with ``$HERE`` as they are now."""
    begin = f"{HERE}{os.sep}"
    return _convert(
        config, lambda path: os.path.normpath(folder / path.removeprefix(begin)) if path.startswith(begin) else path
    )


def _convert(value: Any, convert: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {key: _convert(inner, convert) for key, inner in value.items()}
    if isinstance(value, list):
        return [_convert(inner, convert) for inner in value]
    if not isinstance(value, str):
        return value
    scheme = "hf:" if value.startswith("hf:") else ""
    return scheme + convert(value.removeprefix(scheme))
