"""Export a trained student, check and run the export, and measure models.

Names are imported on first use, so a process that only runs an ONNX graph starts without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tutelage.export.bundle import ModelBundle
    from tutelage.export.export import ExportResult, write_export
    from tutelage.export.inference import predict
    from tutelage.export.runtimes import Export, open_export

_MODULES = {
    "Export": "runtimes",
    "ExportResult": "export",
    "ModelBundle": "bundle",
    "open_export": "runtimes",
    "predict": "inference",
    "write_export": "export",
}

__all__ = ["Export", "ExportResult", "ModelBundle", "open_export", "predict", "write_export"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"tutelage.export.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'tutelage.export' has no attribute {name!r}")
