"""What a person sees of a run's speed: never nought, however slow its steps."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from tutelage.progress import Terminal, show_rate


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


@pytest.mark.parametrize(
    ("rate", "words"),
    [
        (1234.5, "1234 steps/s"),
        (1.0, "1 steps/s"),
        (0.99, "1.0 s/step"),
        (1 / 2.3, "2.3 s/step"),
        (0.01, "100.0 s/step"),
    ],
)
def test_a_rate_is_in_the_unit_in_which_it_is_no_nought(rate: float, words: str) -> None:
    assert show_rate(rate) == words


@pytest.mark.parametrize(("seconds", "words"), [(2.3, "2.3 s/step, 207 s left"), (0.25, "4 steps/s, 22 s left")])
def test_plain_lines_say_how_long_a_slow_step_takes(clock: Clock, seconds: float, words: str) -> None:
    written = io.StringIO()
    terminal = Terminal(Console(file=written, width=200))
    terminal.on_start("baseline-seed0", 5, 145)
    clock.now += 50 * seconds
    terminal.on_log({"step": 55, "validation": {"accuracy": 0.5}})
    assert f"step 55/145, {words}" in written.getvalue()


@pytest.mark.parametrize("seconds", [2.3, 45.0])
def test_the_live_line_shows_slow_steps_as_they_come(clock: Clock, seconds: float) -> None:
    written = io.StringIO()
    terminal = Terminal(Console(file=written, width=160, force_terminal=True, get_time=clock))
    terminal.on_start("baseline-seed0", 0, 100)
    try:
        for step in (1, 2, 3):
            clock.now += seconds
            terminal.on_step(step)
            assert terminal.progress is not None
            terminal.progress.refresh()
    finally:
        terminal.on_end()
    assert "3/100" in written.getvalue()
    assert f"{seconds:.1f} s/step" in written.getvalue()
