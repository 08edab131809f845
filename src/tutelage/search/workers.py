"""Worker processes that run the trials of a search; only the search's own process decides and stores results."""

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
    """Processes that each run one trial at a time and send its evaluations."""

    def __init__(self, workers: int, warmup: float) -> None:
        context = multiprocessing.get_context("spawn")
        self.stop = context.Event()
        threads = max(1, (os.cpu_count() or 1) // workers)
        self.processes: dict[Connection, BaseProcess] = {}
        self.running: dict[Connection, TrialRequest] = {}
        for _ in range(workers):
            here, there = context.Pipe()
            process = context.Process(
                target=_work, args=(there, self.stop, os.getpid(), threads, warmup), daemon=True
            )
            process.start()
            there.close()
            self.processes[here] = process

    def idle(self) -> list[Connection]:
        """Processes without a trial."""
        return [c for c in self.processes if c not in self.running]

    def start(self, trial: TrialRequest, recipe: Recipe, folder: Path) -> None:
        """Give a trial to an idle process."""
        connection = self.idle()[0]
        connection.send((recipe, folder))
        self.running[connection] = trial

    def results(
        self, report: Callable[[int, int, float], bool], should_stop: Callable[[], bool]
    ) -> Iterator[tuple[TrialRequest, TrialResult | TutelageError]]:
        """Wait until trials end; meanwhile answer the evaluations that processes send.

        ``report`` takes number, evaluation and accuracy; true prunes the trial. Raises :class:`Interrupted` once
        ``should_stop`` was true and all processes have stopped.
        """
        ended: list[tuple[TrialRequest, TrialResult | TutelageError]] = []
        while self.running and not ended:
            if should_stop():
                self.stop.set()
            for connection in wait(list(self.running), timeout=0.2):
                assert isinstance(connection, Connection)
                try:
                    message = connection.recv()
                except (EOFError, OSError):
                    raise self._died(connection) from None
                if isinstance(message, tuple):
                    connection.send(report(self.running[connection].number, *message))
                elif isinstance(message, Interrupted):
                    self.running.pop(connection)
                else:
                    ended.append((self.running.pop(connection), message))
        yield from ended
        if self.stop.is_set() and not self.running:
            raise Interrupted("stopped; everything is saved")

    def _died(self, connection: Connection) -> CapabilityError:
        process = self.processes[connection]
        process.join(5)
        code = process.exitcode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
        return CapabilityError(
            f"the process of trial {self.running[connection].number} {how}",
            remedy="continue with --resume; if memory ran out, with fewer --workers",
        )

    def close(self) -> None:
        """End the processes; a running trial stays at its last checkpoint."""
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


def _work(connection: Connection, stop: Any, parent: int, threads: int, warmup: float) -> None:
    """Run trials until a ``None`` arrives, or until the search's process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the search decides when to stop
    torch.set_num_threads(threads)
    runner = TrialRunner(SILENT, lambda: stop.is_set() or os.getppid() != parent, warmup)

    def report(step: int, value: float) -> bool:
        connection.send((step, value))
        is_pruned: bool = connection.recv()
        return is_pruned

    try:
        while (job := connection.recv()) is not None:
            recipe, folder = job
            try:
                outcome: TrialResult | TutelageError = runner.run(recipe, folder, report)
            except TutelageError as error:
                outcome = error
            connection.send(outcome)
    except (EOFError, OSError):  # the search is gone; its trial continues with --resume
        return
