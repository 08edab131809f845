"""A teacher that computes its output for the next batch while the student trains."""

from __future__ import annotations

import pickle
import queue
import signal as signals
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch import multiprocessing as mp

from tutelage.data.batch import Batch
from tutelage.errors import CapabilityError, ModelError, TutelageError
from tutelage.taps import Needs
from tutelage.teachers.signal import Signal, Teacher

QUEUE_SIZE = 4
"""Batches that can wait for a teacher in a separate process."""


class PrefetchingTeacher:
    """Computes the signals of another teacher ahead of time: :meth:`prefetch` starts, and its result waits.

    On a GPU the teacher runs on a CUDA stream of its own; on a CPU in a thread, since torch's operators release the
    GIL. With ``process`` it runs in a separate process, whose Python code does not compete with the
    student's. Signals are the same bits as the teacher's own. The teacher must not draw random numbers: a thread
    would draw them from the student's generator.

    Args:
        teacher: no other code may use it in the meantime.
        process: run the teacher in a separate process; pickle must be able to copy it.

    Raises:
        CapabilityError: the teacher cannot be sent to another process.
    """

    def __init__(self, teacher: Teacher, *, process: bool = False) -> None:
        self.teacher, self.provides = teacher, teacher.provides
        self._process = _TeacherProcess(teacher) if process else None
        self._thread: ThreadPoolExecutor | None = None
        self._stream: torch.cuda.Stream | None = None

    def prefetch(self, batch: Batch, needs: Needs) -> Callable[[], Signal]:
        """Start to compute the signal of a batch; the result waits for it and returns it, or raises its error."""
        autocast = current_autocast(batch.labels.device)
        if self._process is not None:
            return self._process.prefetch(batch, needs, autocast)
        if batch.labels.is_cuda:
            return self._on_stream(batch, needs)
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "teacher")
        return self._thread.submit(compute_signal, self.teacher, batch, needs, autocast).result

    def signal(self, batch: Batch, needs: Needs) -> Signal:
        """Compute the signal of a batch, and wait for it."""
        return self.prefetch(batch, needs)()

    def close(self) -> None:
        """End the thread or the process; pending signals are dropped."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._thread = None
        if self._process is not None:
            self._process.close()

    def _on_stream(self, batch: Batch, needs: Needs) -> Callable[[], Signal]:
        if self._stream is None:
            self._stream = torch.cuda.Stream(batch.labels.device)
        stream, done = self._stream, torch.cuda.Event()
        stream.wait_stream(torch.cuda.current_stream(batch.labels.device))  # the copy of the batch may still run
        with torch.cuda.stream(stream):
            signal = self.teacher.signal(batch, needs)
            done.record(stream)
        for x in _tensors(batch):
            x.record_stream(stream)

        def wait() -> Signal:
            current = torch.cuda.current_stream(batch.labels.device)
            current.wait_event(done)
            for x in _tensors(signal):
                x.record_stream(current)
            return signal

        return wait


Autocast = tuple[str, torch.dtype] | None
"""Device type and dtype of an active autocast."""


def current_autocast(device: torch.device) -> Autocast:
    """The active autocast for a device; autocast is a setting of each thread."""
    kind = device.type
    return (kind, torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None


def compute_signal(teacher: Teacher, batch: Batch, needs: Needs, autocast: Autocast) -> Signal:
    """The teacher's signal under the autocast of another thread."""
    with nullcontext() if autocast is None else torch.autocast(autocast[0], dtype=autocast[1]):
        return teacher.signal(batch, needs)


def _tensors(of: Batch | Signal) -> Iterator[Tensor]:
    for part in fields(of):
        value: Any = getattr(of, part.name)
        for x in value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,):
            if isinstance(x, Tensor):
                yield x


# A separate process ------------------------------------------------------------------------------------


class _TeacherProcess:
    """A process that computes signals in the order of the requests. It ends with this one."""

    def __init__(self, teacher: Teacher) -> None:
        if callable(close := getattr(teacher, "close", None)):
            close()  # taps cannot be pickled
        context = mp.get_context("spawn")  # a fork would copy the locks of threads, and cannot use a GPU
        self.requests, self.replies = context.Queue(QUEUE_SIZE), context.Queue()
        self.number, self.waiting = 0, dict[int, tuple[Signal | None, TutelageError | None]]()
        self.process = context.Process(
            target=_serve, args=(teacher, self.requests, self.replies, torch.get_num_threads()), daemon=True
        )
        try:
            self.process.start()
        except (TypeError, AttributeError, ValueError, ImportError, RuntimeError, pickle.PicklingError) as error:
            raise CapabilityError(
                f"the teacher cannot be sent to a separate process: {str(error)[:200]}",
                remedy="define its class in a module, or remove process",
            ) from None

    def prefetch(self, batch: Batch, needs: Needs, autocast: Autocast) -> Callable[[], Signal]:
        number, device = self.number, batch.labels.device
        self.number += 1
        copied = batch._map(lambda x: x.detach().cpu().clone())  # a view would send the storage of its base
        self._until(lambda: self.requests.put((number, copied, needs, autocast), timeout=1), queue.Full)

        def wait() -> Signal:
            oldest = number - 2 * QUEUE_SIZE  # nobody waits for older ones: their training was stopped
            while number not in self.waiting:
                arrived, *reply = self._until(lambda: self.replies.get(timeout=1), queue.Empty)
                if arrived > oldest:
                    self.waiting[arrived] = (reply[0], reply[1])
            self.waiting = {k: v for k, v in self.waiting.items() if k > oldest}
            signal, error = self.waiting.pop(number)
            if error is not None:
                raise error
            assert signal is not None
            return signal.map(lambda x: x.to(device))

        return wait

    def _until(self, act: Callable[[], Any], busy: type[Exception]) -> Any:
        while True:
            try:
                return act()
            except busy:
                if not self.process.is_alive():
                    raise ModelError(
                        f"the teacher's process ended unexpectedly (exit code {self.process.exitcode})",
                        remedy="remove process to see why; a script needs `if __name__ == '__main__':`",
                    ) from None

    def close(self) -> None:
        if self.process.is_alive():
            try:
                self.requests.put(None, timeout=1)
                self.process.join(5)
            except queue.Full:
                pass
            if self.process.is_alive():
                self.process.terminate()
                self.process.join()
        for pipe in (self.requests, self.replies):
            pipe.close()
            pipe.cancel_join_thread()


def _serve(teacher: Teacher, requests: Any, replies: Any, threads: int) -> None:
    signals.signal(signals.SIGINT, signals.SIG_IGN)  # the main process decides when to end
    torch.set_num_threads(threads)
    while (request := requests.get()) is not None:
        number, batch, needs, autocast = request
        try:
            signal = compute_signal(teacher, batch, needs, autocast)
            if signal.head is not None:
                raise CapabilityError("an output head cannot come from a separate process", remedy="remove process")
            replies.put((number, signal, None))
        except TutelageError as error:
            replies.put((number, None, error))
        except Exception as error:  # noqa: BLE001 - the main process raises it
            wrapped = ModelError(
                f"the teacher failed in its process: {type(error).__name__}: {str(error)[:500]}",
                remedy="remove process to see where",
            )
            replies.put((number, None, wrapped))
