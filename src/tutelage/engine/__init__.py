"""The engine: backward, step, log, checkpoint. No other package imports accelerate."""

from tutelage.engine.launch import (
    Accelerator,
    broadcast_from_main,
    build_accelerator,
    is_bf16_slow,
    leave,
    open_trackers,
    resolve_precision,
)
from tutelage.engine.loop import Outcome, Training, TrainingCallback, fit
from tutelage.engine.run_directory import RunDirectory

__all__ = [
    "Accelerator", "Outcome", "RunDirectory", "Training", "TrainingCallback", "broadcast_from_main",
    "build_accelerator", "fit", "is_bf16_slow", "leave", "open_trackers", "resolve_precision",
]  # fmt: skip
