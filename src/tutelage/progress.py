"""The progress of a run: a live line in a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterable, Iterator
from typing import Any, Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn, track
from rich.table import Column
from rich.text import Text

T = TypeVar("T")


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(show_rate(task.speed) if task.speed else "", style="progress.data.speed")


def show_rate(rate: float) -> str:
    """``12 steps/s``, or ``2.3 s/step`` if a step takes longer than a second."""
    return f"{rate:.0f} steps/s" if rate >= 1 else f"{1 / rate:.1f} s/step"


class Terminal:
    """A callback that shows the rate, the remaining time, the loss terms and the validation metric."""

    def __init__(self, console: Console | None = None, *, speaks: bool = True) -> None:
        self.console = console or Console(stderr=True)
        self.speaks = speaks
        self.live = speaks and self.console.is_terminal
        self.progress: Progress | None = None
        self.name, self.total, self.terms, self.validation = "", 0, "", ""
        self.printed_at = self.began = self.drawn_at = 0.0
        self.first = 0

    def only_on(self, main_process: bool) -> Self:
        """This terminal, silent unless in the main process."""
        self.speaks = self.speaks and main_process
        self.live = self.live and main_process
        return self

    def say(self, text: str) -> None:
        """Print one line above the live one."""
        if self.speaks:
            self.console.print(text, highlight=False, markup=False)

    def on_start(self, name: str, step: int, total: int) -> None:
        """A training starts, or continues from ``step``."""
        self.name, self.total, self.terms, self.validation = name, total, "", ""
        self.began, self.first, self.printed_at = time.monotonic(), step, time.monotonic()
        if step and step < total:
            self.say(f"{name}: continuing from step {step} of {total}")
        if self.live and step < total:
            self.progress = Progress(
                TextColumn("{task.description}", table_column=Column(no_wrap=True)),
                BarColumn(bar_width=16),
                TextColumn("{task.completed}/{task.total}", table_column=Column(no_wrap=True)),
                _Rate(table_column=Column(no_wrap=True)),
                TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
                TextColumn("{task.fields[terms]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
                console=self.console,
                transient=True,
                expand=True,
                refresh_per_second=5,
                speed_estimate_period=120,
            )
            self.task = self.progress.add_task(name, total=total, completed=step, terms="")
            self.progress.start()

    def on_step(self, step: int) -> None:
        """An optimizer step is done."""
        now = time.monotonic()
        if self.progress is not None and (step % 20 == 0 or step == self.total or now - self.drawn_at > 0.5):
            self.drawn_at = now
            self.progress.update(self.task, completed=step, terms=f"{self.validation}  {self.terms}".strip())

    def on_log(self, line: dict[str, Any]) -> None:
        """A line was written to the metrics."""
        if "terms" in line:
            parts = " + ".join(f"{name} {term['weighted']:.3g}" for name, term in line["terms"].items())
            self.terms = f"loss {line['loss']:.3g}" + (f" = {parts}" if len(line["terms"]) > 1 else "")
        else:
            self.validation = f"val {next(iter(line['validation'].values())):.1%}"  # the metric comes first
            now = time.monotonic()
            if self.speaks and not self.live and now - self.printed_at > 10:
                self.printed_at = now
                done, left = line["step"] - self.first, self.total - line["step"]
                rate = done / (now - self.began)
                self.say(
                    f"{self.name}: step {line['step']}/{self.total}, {show_rate(rate)}, "
                    f"{left / rate:.0f} s left, {self.terms}, {self.validation}"
                )

    def on_end(self) -> None:
        """Remove the live line."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def iterate(self, items: Iterable[T], what: str) -> Iterator[T]:
        """The items, with a progress bar in a terminal."""
        if not self.live:
            yield from items
            return
        yield from track(items, what, console=self.console, transient=True)
