"""A teacher that computes its output for the next batch while the student trains."""

import pickle
import signal as signals
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
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

_teacher: Teacher  # of a process that _TeacherProcess started


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


class _TeacherProcess:
    """A process that computes signals in the order of the requests. It ends with this one."""

    def __init__(self, teacher: Teacher) -> None:
        if callable(close := getattr(teacher, "close", None)):
            close()  # taps cannot be pickled
        context = mp.get_context("spawn")  # a fork would copy the locks of threads, and cannot use a GPU
        others = set(context.active_children())
        self.pool = ProcessPoolExecutor(1, context, _start, (teacher, torch.get_num_threads()))
        try:
            self.pool.submit(int)  # starts the process, which takes the teacher
        except (TypeError, AttributeError, ValueError, ImportError, RuntimeError, pickle.PicklingError) as error:
            raise CapabilityError(
                f"the teacher cannot be sent to a separate process: {str(error)[:200]}",
                remedy="define its class in a module, or remove process",
            ) from None
        (self.process,) = set(context.active_children()) - others

    def prefetch(self, batch: Batch, needs: Needs, autocast: Autocast) -> Callable[[], Signal]:
        device = batch.labels.device
        copied = batch._map(lambda x: x.detach().cpu().clone())  # a view would send the storage of its base
        try:
            future = self.pool.submit(_compute_in_process, copied, needs, autocast)
        except BrokenProcessPool:
            raise self._end() from None

        def wait() -> Signal:
            try:
                return future.result().map(lambda x: x.to(device))
            except BrokenProcessPool:
                raise self._end() from None

        return wait

    def _end(self) -> ModelError:
        self.process.join(5)
        return ModelError(
            f"the teacher's process ended unexpectedly (exit code {self.process.exitcode})",
            remedy="remove process to see why; a script needs `if __name__ == '__main__':`",
        )

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)


def _start(teacher: Teacher, threads: int) -> None:
    global _teacher
    _teacher = teacher
    signals.signal(signals.SIGINT, signals.SIG_IGN)  # the main process decides when to end
    torch.set_num_threads(threads)


def _compute_in_process(batch: Batch, needs: Needs, autocast: Autocast) -> Signal:
    try:
        signal = compute_signal(_teacher, batch, needs, autocast)
    except TutelageError:
        raise
    except Exception as error:  # noqa: BLE001  any error goes to the main process
        raise ModelError(
            f"the teacher failed in its process: {type(error).__name__}: {str(error)[:500]}",
            remedy="remove process to see where",
        ) from None
    if signal.head is not None:
        raise CapabilityError("an output head cannot come from a separate process", remedy="remove process")
    return signal
