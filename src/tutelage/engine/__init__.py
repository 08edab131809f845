"""The engine: backward, step, log, checkpoint. The only room that imports accelerate."""

from tutelage.engine.callbacks import TrainingCallback
from tutelage.engine.launch import (
    Accelerator,
    from_main,
    leave,
    make_accelerator,
    precision_here,
    slow_bf16,
    tracking,
)
from tutelage.engine.loop import Outcome, Training, fit
from tutelage.engine.run_directory import RunDirectory

__all__ = [
    "Accelerator",
    "Outcome",
    "RunDirectory",
    "Training",
    "TrainingCallback",
    "fit",
    "from_main",
    "leave",
    "make_accelerator",
    "precision_here",
    "slow_bf16",
    "tracking",
]
