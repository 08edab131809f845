"""Callbacks of a training."""

from __future__ import annotations

from typing import Any, Protocol


class TrainingCallback(Protocol):
    """Is called as a training proceeds."""

    def on_start(self, name: str, step: int, total: int) -> None:
        """A training starts, or continues from ``step``."""
        ...

    def on_step(self, step: int) -> None:
        """An optimizer step is done."""
        ...

    def on_log(self, line: dict[str, Any]) -> None:
        """A line was written to the metrics."""
        ...


class NullCallback:
    """A callback that does nothing."""

    def on_start(self, name: str, step: int, total: int) -> None:
        """Nothing."""

    def on_step(self, step: int) -> None:
        """Nothing."""

    def on_log(self, line: dict[str, Any]) -> None:
        """Nothing."""
