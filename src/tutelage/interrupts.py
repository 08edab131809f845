"""Convert Ctrl-C and SIGTERM to a request to stop at the end of a step."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def catch_interrupts(
    announce: Callable[[str], None] = lambda text: None, doing: str = "saving after this step"
) -> Iterator[Callable[[], bool]]:
    """Yield a function that returns true after Ctrl-C or SIGTERM; a second Ctrl-C stops at once.

    Only the main thread receives them; in other threads the function always returns false. ``doing`` names what
    happens before the stop, for the message.
    """
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested.is_set
        return

    main_process = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != main_process:  # a data-loading process, which the main process stops
            return
        if requested.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        requested.set()
        announce(f"{signal.Signals(number).name}: {doing}; press Ctrl-C again to stop immediately")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requested.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
