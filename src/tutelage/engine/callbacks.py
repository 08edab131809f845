"""Who is told how a training goes."""

from __future__ import annotations

from typing import Any, Protocol


class TrainingCallback(Protocol):
    """Somebody who is told how a training goes."""

    def on_start(self, name: str, step: int, total: int) -> None:
        """A training begins, or goes on from ``step``."""
        ...

    def on_step(self, step: int) -> None:
        """An optimizer step is done."""
        ...

    def on_log(self, line: dict[str, Any]) -> None:
        """A line went to the metrics."""
        ...


class NullCallback:
    """A watcher that says nothing."""

    def on_start(self, name: str, step: int, total: int) -> None:
        """Nothing."""

    def on_step(self, step: int) -> None:
        """Nothing."""

    def on_log(self, line: dict[str, Any]) -> None:
        """Nothing."""
