"""Python processes that start fast: forks of a server that has imported torch, transformers and tutelage.

A fork is a process of its own: it can be killed, has an exit code, and shares no state with the tests. Tests of the
start of Python (a fresh import, ``-W error``, torch's launcher) use ``subprocess``.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import types
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT
from typing import Any

TESTS = Path(__file__).parents[1]
SOURCE = TESTS.parent / "src"

__all__ = ["DEVNULL", "PIPE", "STDOUT", "Popen", "context", "free_port", "run", "server_pid"]


def context() -> Any:
    """A context of multiprocessing whose processes are forks of the server, which it starts."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["support.preloaded"])
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(SOURCE), str(TESTS), *([path] if path else [])])
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH") if path is None else os.environ.update(PYTHONPATH=path)
    return found


def server_pid() -> int:
    """The process whose forks are given."""
    context()
    return forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined,no-any-return]


class Popen:
    """The part of ``subprocess.Popen`` that tests use. ``command`` is what follows ``python``."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        cwd: str | Path | None = None,
        env: Mapping[str, str] | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        text: bool = True,
    ) -> None:
        assert text, "pipes are read as text"
        environment = dict(os.environ if env is None else env)
        server = context()
        self.args = command
        ends: dict[str, Connection | int | None] = {"stdout": stdout, "stderr": stderr}
        pipes = {name: server.Pipe(duplex=False) for name, kind in ends.items() if kind == PIPE}
        ends.update({name: writer for name, (_, writer) in pipes.items()})
        for name, end in ends.items():
            if isinstance(end, int) and end >= 0:  # a file's number
                ends[name] = Connection(os.dup(end), readable=False)
        arguments = (list(command), str(cwd or Path.cwd()), environment, ends["stdout"], ends["stderr"])
        self._process = server.Process(target=_main, args=arguments)
        self._process.start()
        files = {}
        for name, (reader, writer) in pipes.items():
            writer.close()
            files[name] = open(os.dup(reader.fileno()), encoding="utf-8", errors="replace")  # noqa: SIM115
            reader.close()
        self.stdout, self.stderr = files.get("stdout"), files.get("stderr")
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(list(self.args), timeout or 0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str | None, str | None]:
        texts: dict[str, str | None] = {"stdout": None, "stderr": None}

        def read(name: str) -> None:
            texts[name] = getattr(self, name).read()

        readers = [threading.Thread(target=read, args=(name,)) for name in texts if getattr(self, name) is not None]
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join(timeout)
        self.close()
        return texts["stdout"], texts["stderr"]

    def close(self) -> None:
        """Kill the process if it still runs, and close the pipes."""
        self.kill()
        self._process.join()
        for file in (self.stdout, self.stderr):
            if file is not None:
                file.close()

    def __enter__(self) -> Popen:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()
        self.close()


def run(
    command: Sequence[str],
    *,
    cwd: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Like ``subprocess.run`` with ``capture_output`` and ``text``."""
    process = Popen(command, cwd=cwd, env=env, stdout=PIPE, stderr=PIPE)
    try:
        stdout, stderr = process.communicate(timeout)
        return subprocess.CompletedProcess(list(command), process.wait(), stdout, stderr)
    finally:
        process.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _redirect(target: Connection | int | None, number: int) -> None:
    if target == STDOUT:
        os.dup2(1, number)
    elif target == DEVNULL:
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    elif isinstance(target, Connection):
        os.dup2(target.fileno(), number)
        target.close()


def _main(
    command: list[str], cwd: str, environment: dict[str, str], stdout: Connection | int | None,
    stderr: Connection | int | None,
) -> None:  # fmt: skip
    _redirect(stdout, 1)
    _redirect(stderr, 2)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    if "PYTHONFAULTHANDLER" in environment:
        faulthandler.enable()
    kind, rest = command[0], command[1:]
    if kind == "-m":
        sys.path.insert(0, cwd)
        sys.argv = list(rest)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *rest[1:]]
        module = types.ModuleType("__main__")
        sys.modules["__main__"] = module
        exec(compile(rest[0], "<string>", "exec"), module.__dict__)
    else:
        sys.path.insert(0, str(Path(kind).parent))
        sys.argv = list(command)
        runpy.run_path(kind, run_name="__main__")
