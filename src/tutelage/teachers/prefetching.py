"""A teacher that is asked for a batch before its word is needed, and answers while the student trains."""

from __future__ import annotations

import queue
import signal as signals
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch import multiprocessing as mp

from tutelage.data.batch import Batch
from tutelage.errors import CapabilityError, ModelError, TutelageError
from tutelage.taps import Needs
from tutelage.teachers.signal import Signal, Teacher

WAITING = 4
"""Batches that may wait for a teacher in a process of its own."""


class PrefetchingTeacher:
    """Another teacher, asked ahead: :meth:`prefetch` starts, and what it returns waits for the answer.

    Batches on a GPU are put on a stream of their own, beside the student's; on a CPU a thread computes, since torch's
    operators do not hold Python's lock. With ``process`` another process does, whose Python does not compete with
    the student's. The words are those of the teacher itself, bit for bit. It is for teachers that draw no random
    numbers: a thread would draw from the student's generator.

    Args:
        teacher: answers; nobody else may ask it in the meantime.
        process: answer from a process of its own. The teacher must be one that pickle can copy.

    Raises:
        CapabilityError: the teacher cannot be sent to another process.
    """

    def __init__(self, teacher: Teacher, *, process: bool = False) -> None:
        self.teacher, self.provides = teacher, teacher.provides
        self._elsewhere = _Elsewhere(teacher) if process else None
        self._thread: ThreadPoolExecutor | None = None
        self._stream: torch.cuda.Stream | None = None

    def prefetch(self, batch: Batch, needs: Needs) -> Callable[[], Signal]:
        """Start on a batch; the result waits for its signal and returns it, or raises what went wrong."""
        precision = current_autocast(batch.labels.device)
        if self._elsewhere is not None:
            return self._elsewhere.prefetch(batch, needs, precision)
        if batch.labels.is_cuda:
            return self._on_stream(batch, needs)
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "teacher")
        return self._thread.submit(compute_signal, self.teacher, batch, needs, precision).result

    def signal(self, batch: Batch, needs: Needs) -> Signal:
        """Ask, and wait."""
        return self.prefetch(batch, needs)()

    def close(self) -> None:
        """End the thread or the process; what was asked and not fetched is dropped."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._thread = None
        if self._elsewhere is not None:
            self._elsewhere.close()

    def _on_stream(self, batch: Batch, needs: Needs) -> Callable[[], Signal]:
        if self._stream is None:
            self._stream = torch.cuda.Stream(batch.labels.device)
        stream, done = self._stream, torch.cuda.Event()
        stream.wait_stream(torch.cuda.current_stream(batch.labels.device))  # the batch may still be on its way
        with torch.cuda.stream(stream):
            said = self.teacher.signal(batch, needs)
            done.record(stream)
        for x in _tensors(batch):
            x.record_stream(stream)

        def fetch() -> Signal:
            here = torch.cuda.current_stream(batch.labels.device)
            here.wait_event(done)
            for x in _tensors(said):
                x.record_stream(here)
            return said

        return fetch


Precision = tuple[str, torch.dtype] | None


def current_autocast(device: torch.device) -> Precision:
    """The mixed precision that is on here, which is a matter of each thread."""
    kind = device.type
    return (kind, torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None


@contextmanager
def _in(precision: Precision) -> Iterator[None]:
    if precision is None:
        yield
        return
    with torch.autocast(precision[0], dtype=precision[1]):
        yield


def compute_signal(teacher: Teacher, batch: Batch, needs: Needs, precision: Precision) -> Signal:
    """The teacher's signal in a mixed precision that was on elsewhere."""
    with _in(precision):
        return teacher.signal(batch, needs)


def _tensors(of: Batch | Signal) -> Iterator[Tensor]:
    for part in fields(of):
        value: Any = getattr(of, part.name)
        for x in value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,):
            if isinstance(x, Tensor):
                yield x


# Another process --------------------------------------------------------------------------------------


class _Elsewhere:
    """A process that answers in the order in which it was asked. It ends with this one."""

    def __init__(self, teacher: Teacher) -> None:
        if callable(close := getattr(teacher, "close", None)):
            close()  # taps do not travel
        context = mp.get_context("spawn")  # a fork would copy threads' locks, and cannot use a GPU
        self.asked, self.said = context.Queue(WAITING), context.Queue()
        self.number, self.waiting = 0, dict[int, tuple[Signal | None, TutelageError | None]]()
        self.process = context.Process(
            target=_serve, args=(teacher, self.asked, self.said, torch.get_num_threads()), daemon=True
        )
        try:
            self.process.start()
        except (TypeError, AttributeError, ValueError, ImportError, RuntimeError, _pickling()) as error:
            raise CapabilityError(
                f"the teacher cannot be sent to a process of its own: {str(error)[:200]}",
                remedy="define its class in a module, or leave process out",
            ) from None

    def prefetch(self, batch: Batch, needs: Needs, precision: Precision) -> Callable[[], Signal]:
        number, device = self.number, batch.labels.device
        self.number += 1
        sent = batch._map(lambda x: x.detach().cpu().clone())  # else all that it is a part of would travel
        self._until(lambda: self.asked.put((number, sent, needs, precision), timeout=1), queue.Full)

        def fetch() -> Signal:
            while number not in self.waiting:
                late, *answer = self._until(lambda: self.said.get(timeout=1), queue.Empty)
                if late > number - 2 * WAITING:  # older ones were never fetched: their training was stopped
                    self.waiting[late] = (answer[0], answer[1])
            self.waiting = {k: v for k, v in self.waiting.items() if k > number - 2 * WAITING}
            said, error = self.waiting.pop(number)
            if error is not None:
                raise error
            assert said is not None
            hidden = {tap: x.to(device) for tap, x in said.hidden.items()}
            return replace(said, logits=None if said.logits is None else said.logits.to(device), hidden=hidden)

        return fetch

    def _until(self, act: Callable[[], Any], busy: type[Exception]) -> Any:
        while True:
            try:
                return act()
            except busy:
                if not self.process.is_alive():
                    raise ModelError(
                        f"the teacher's process ended by itself (exit code {self.process.exitcode})",
                        remedy="leave process out to see why; a script needs `if __name__ == '__main__':`",
                    ) from None

    def close(self) -> None:
        if self.process.is_alive():
            try:
                self.asked.put(None, timeout=1)
                self.process.join(5)
            except queue.Full:
                pass
            if self.process.is_alive():
                self.process.terminate()
                self.process.join()
        for pipe in (self.asked, self.said):
            pipe.close()
            pipe.cancel_join_thread()


def _pickling() -> type[Exception]:
    import pickle

    return pickle.PicklingError


def _serve(teacher: Teacher, asked: Any, said: Any, threads: int) -> None:
    signals.signal(signals.SIGINT, signals.SIG_IGN)  # the main process says when to end
    torch.set_num_threads(threads)
    while (question := asked.get()) is not None:
        number, batch, needs, precision = question
        try:
            answer = compute_signal(teacher, batch, needs, precision)
            if answer.head is not None:
                raise CapabilityError("an output head cannot come from another process", remedy="leave process out")
            said.put((number, answer, None))
        except TutelageError as error:
            said.put((number, None, error))
        except Exception as error:  # noqa: BLE001 - it is raised where the answer is awaited
            wrapped = ModelError(
                f"the teacher failed in its process: {type(error).__name__}: {str(error)[:500]}",
                remedy="leave process out to see where",
            )
            said.put((number, None, wrapped))
