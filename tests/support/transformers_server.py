"""The server of transformers as a process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def served(folder: Path | None, place: Path) -> Iterator[str]:
    """`transformers serve` on a model's folder, or on what it is asked for; gives its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [
        str(Path(sys.executable).with_name("transformers")),
        "serve",
        *([] if folder is None else [folder.name]),
        "--device",
        "cpu",
    ]
    log = open(place / "serve.log", "wb")  # noqa: SIM115
    process = subprocess.Popen(
        [*words, "--host", "127.0.0.1", "--port", str(port)], stdout=log, stderr=log, cwd=place,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    try:
        until = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < until:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        else:
            pytest.fail((place / "serve.log").read_text()[-2000:])
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()
        log.close()
