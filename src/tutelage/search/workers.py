"""Processes that run the trials of a search; the search's own process alone decides and remembers."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from tutelage.config import Recipe
from tutelage.errors import CapabilityError, Interrupted, TutelageError
from tutelage.search.study import TrialRequest, TrialResult
from tutelage.search.trials import SILENT, TrialRunner


class WorkerPool:
    """Processes that each run a trial at a time, and tell of its evaluations.

    Args:
        workers: how many.
        warmup: see :class:`TrialRunner`.
    """

    def __init__(self, workers: int, warmup: float) -> None:
        context = multiprocessing.get_context("spawn")
        self.stop = context.Event()
        threads = max(1, (os.cpu_count() or 1) // workers)
        self.processes: dict[Connection, BaseProcess] = {}
        self.running: dict[Connection, TrialRequest] = {}
        for _ in range(workers):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(there, self.stop, os.getpid(), threads, warmup), daemon=True
            )
            process.start()
            there.close()
            self.processes[here] = process

    def idle(self) -> list[Connection]:
        """Processes without a trial."""
        return [c for c in self.processes if c not in self.running]

    def start(self, ticket: TrialRequest, recipe: Recipe, folder: Path) -> None:
        """Give a trial to an idle process."""
        connection = self.idle()[0]
        connection.send((recipe, folder))
        self.running[connection] = ticket

    def results(
        self, report: Callable[[int, int, float], bool], should_stop: Callable[[], bool]
    ) -> Iterator[tuple[TrialRequest, TrialResult | TutelageError]]:
        """Wait until trials are over; meanwhile answers what their processes ask.

        Args:
            report: is told number, evaluation and accuracy; true gives the trial up.
            should_stop: true makes every process save and stop.

        Raises:
            Interrupted: ``should_stop`` said so, and all have stopped.
            CapabilityError: a process died.
        """
        over: list[tuple[TrialRequest, TrialResult | TutelageError]] = []
        stopped = False
        while self.running and not over:
            if should_stop() and not stopped:
                stopped = True
                self.stop.set()
            for connection in wait(list(self.running), timeout=0.2):
                assert isinstance(connection, Connection)
                try:
                    said = connection.recv()
                except (EOFError, OSError):
                    raise self._died(connection) from None
                if isinstance(said, tuple):
                    connection.send(report(self.running[connection].number, *said))
                elif isinstance(said, Interrupted):
                    self.running.pop(connection)
                else:
                    over.append((self.running.pop(connection), said))
        yield from over
        if stopped and not self.running:
            raise Interrupted("stopped; everything is saved")

    def _died(self, connection: Connection) -> CapabilityError:
        process = self.processes[connection]
        process.join(5)
        code = process.exitcode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
        return CapabilityError(
            f"the process of trial {self.running[connection].number} {how}",
            remedy="go on with --resume; with fewer --workers where memory ran out",
        )

    def close(self) -> None:
        """End the processes; what runs is left where its last checkpoint is."""
        self.stop.set()
        for connection, process in self.processes.items():
            if connection not in self.running and process.is_alive():
                try:
                    connection.send(None)
                except OSError:  # it has just ended
                    continue
        for connection, process in self.processes.items():
            process.join(0.1 if connection in self.running else 10)
            if process.is_alive():
                process.terminate()
                process.join()
            connection.close()


def _serve(connection: Connection, stop: Any, parent: int, threads: int, warmup: float) -> None:
    """A process of the pool: trials until told to end, or until the search's process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the search says when to stop
    torch.set_num_threads(threads)
    bench = TrialRunner(SILENT, lambda: stop.is_set() or os.getppid() != parent, warmup)

    def report(step: int, value: float) -> bool:
        connection.send((step, value))
        answer: bool = connection.recv()
        return answer

    try:
        while (job := connection.recv()) is not None:
            try:
                recipe, folder = job
                said: TrialResult | TutelageError = bench.run(recipe, folder, report)
            except TutelageError as error:
                said = error
            connection.send(said)
    except (EOFError, OSError):  # the search is gone; its trial goes on with --resume
        return
