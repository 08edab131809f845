"""Who is told how a training goes."""

from __future__ import annotations

from typing import Any, Protocol


class TrainingCallback(Protocol):
    """Somebody who is told how a training goes."""

    def started(self, name: str, step: int, total: int) -> None:
        """A training begins, or goes on from ``step``."""
        ...

    def stepped(self, step: int) -> None:
        """An optimizer step is done."""
        ...

    def logged(self, line: dict[str, Any]) -> None:
        """A line went to the metrics."""
        ...


class Silent:
    """A watcher that says nothing."""

    def started(self, name: str, step: int, total: int) -> None:
        """Nothing."""

    def stepped(self, step: int) -> None:
        """Nothing."""

    def logged(self, line: dict[str, Any]) -> None:
        """Nothing."""
