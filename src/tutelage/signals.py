"""Ctrl-C and SIGTERM as a wish that the engine grants at the end of a step."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def catch_stop_signals(
    announce: Callable[[str], None] = lambda text: None, doing: str = "saving after this step"
) -> Iterator[Callable[[], bool]]:
    """Gives a function that is true once a stop was asked for; a second Ctrl-C stops at once.

    ``doing`` tells a person who asked what happens first.

    Only the main thread can receive signals; elsewhere the answer is always no.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    mine = os.getpid()

    def ask(number: int, frame: FrameType | None) -> None:
        if os.getpid() != mine:  # a process that fetches data: the main one stops it
            return
        if asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()
        announce(f"{signal.Signals(number).name}: {doing}; once more Ctrl-C stops at once")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
