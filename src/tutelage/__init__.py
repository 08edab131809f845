"""Knowledge distillation: train a small student model from a large teacher model.

``tutelage.distill(teacher, student, train_loader, eval_data=...)`` trains the student with and without its teacher
and compares the two. ``tutelage.losses`` has the losses as pure functions. Names are imported on first use, so
the command line starts without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tutelage import data, losses, methods, models, teachers
    from tutelage.api import DistillResult, distill, judge, run, run_search
    from tutelage.errors import TutelageError
    from tutelage.experiment.export_student import export_student
    from tutelage.export import predict
    from tutelage.generation import generate

__version__ = "0.1.0"

_MODULES = {
    "DistillResult": "tutelage.api",
    "TutelageError": "tutelage.errors",
    "distill": "tutelage.api",
    "export_student": "tutelage.experiment.export_student",
    "generate": "tutelage.generation",
    "judge": "tutelage.api",
    "predict": "tutelage.export",
    "run": "tutelage.api",
    "run_search": "tutelage.api",
}
_PACKAGES = ("config", "data", "export", "engine", "methods", "models", "losses", "reports", "taps", "teachers")

__all__ = [
    "DistillResult", "TutelageError", "data", "distill", "export_student", "generate", "judge", "losses", "methods",
    "models", "predict", "run", "run_search", "teachers",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    if name in _PACKAGES:
        return importlib.import_module(f"tutelage.{name}")
    raise AttributeError(f"module 'tutelage' has no attribute {name!r}")
