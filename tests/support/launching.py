"""Processes of torch's launcher, and comparisons of what they train."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from support import language_worlds as worlds
from support import python

HERE = Path(__file__).parents[1]


# As a user's shell is: nothing tells accelerate to stay on the CPU but the lack of anything else.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONFAULTHANDLER": "1"}


for name in ("ACCELERATE_USE_CPU", "WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
    ENVIRONMENT.pop(name, None)


def launch(processes: int, *command: str, cwd: Path = HERE, **environment: str) -> str:
    """Run a Python command in so many processes as torch's launcher would; gives what they print."""
    given = {**ENVIRONMENT, **environment}
    ranks: list[dict[str, str]] = [{}]
    if processes > 1:
        every = {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(python.free_port()), "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes), "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1",
        }  # fmt: skip
        ranks = [{**every, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in ranks]
        started = [
            python.Popen(command, cwd=cwd, env={**given, **rank}, stdout=log.fileno(), stderr=python.STDOUT)
            for rank, log in zip(ranks, logs, strict=True)
        ]
        for process in started:
            stack.callback(process.close)
        until = time.monotonic() + int(environment.get("PATIENCE", 300))
        while any(process.poll() is None for process in started) and not any(process.poll() for process in started):
            assert time.monotonic() < until, "a process does not end"
            time.sleep(0.01)
        for process in started:
            if process.poll() is None:  # another has failed
                process.kill()
        for log in logs:
            log.seek(0)
        texts = [log.read() for log in logs]
        assert not any(process.wait() for process in started), "".join(text[-3000:] for text in texts)
        return "".join(texts)


def torchrun(processes: int, *command: str, cwd: Path = HERE) -> None:
    """Run a Python command by torch's launcher itself."""
    prefix = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "0"]
    prefix += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0"]
    done = python.run([*prefix, *command], cwd=cwd, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def steps(
    out: Path, processes: int, accumulate: int, kind: str = "plain", count: int = 3, **environment: str
) -> dict[str, Tensor]:
    launch(processes, "-m", "support.distributed_job", str(out), str(accumulate), kind, str(count), **environment)
    return load_file(str(out / "steps.safetensors"))


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> None:
    assert a.keys() == b.keys()
    assert any("project" in k for k in a), "the projector is not among the trained weights"
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def same_students(first: Path, second: Path, *, rtol: float, atol: float) -> None:
    """Of two runs."""
    one, two = (load_file(str(run / "student" / "model.safetensors")) for run in (first, second))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=rtol, atol=atol)


def language_world(folder: Path) -> None:
    """A small language model in ``teacher``, and conversations in ``chats.jsonl``."""
    worlds.llama(folder / "teacher")
    rows = worlds.conversations(60)
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
