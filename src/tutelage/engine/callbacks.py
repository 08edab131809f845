"""Callbacks of a training."""

from __future__ import annotations

from typing import Any, Protocol


class TrainingCallback(Protocol):
    """Is called as a training proceeds; by default it does nothing."""

    def on_start(self, name: str, step: int, total: int) -> None:
        """A training starts, or continues from ``step``."""
        return

    def on_step(self, step: int) -> None:
        """An optimizer step is done."""
        return

    def on_log(self, line: dict[str, Any]) -> None:
        """A line was written to the metrics."""
        return


class NullCallback(TrainingCallback):
    """A callback that does nothing."""
