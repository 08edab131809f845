"""A finished student made ready for use: written in a format that runs elsewhere, checked there, asked, and timed.

Names load when they are used, so that a process that only runs a graph starts without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tutelage.export.answers import predict
    from tutelage.export.export import Exported, write_export
    from tutelage.export.runtimes import Export, open_export
    from tutelage.export.subject import Subject

_WHERE = {
    "Export": "runtimes",
    "Exported": "export",
    "Subject": "subject",
    "open_export": "runtimes",
    "predict": "answers",
    "write_export": "export",
}

__all__ = ["Export", "Exported", "Subject", "open_export", "predict", "write_export"]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"tutelage.export.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'tutelage.export' has no attribute {name!r}")
