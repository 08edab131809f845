"""A process that loads one model, runs it three times, and says how much memory it had resident at most.

``python -m tutelage.export.memory_probe model|onnx PATH INPUTS.npz THREADS``; of ONNX Runtime, torch is not imported.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

PASSES = 3


def resident() -> tuple[int, int]:
    """Bytes resident now and at most, of this process.

    On Linux of its own memory map: what ``getrusage`` gives begins with that of the process that started it.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        known = dict(line.split(":", 1) for line in lines if ":" in line)
        return 1024 * int(known["VmRSS"].split()[0]), 1024 * int(known["VmHWM"].split()[0])
    except (OSError, KeyError, ValueError):
        import resource

        import psutil

        unit = 1 if sys.platform == "darwin" else 1024
        return int(psutil.Process().memory_info().rss), unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forget_peak() -> None:
    """Let the peak begin again from what is resident now, where the system can."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _onnx(path: str, threads: int) -> Callable[[dict[str, Any]], object]:
    import onnxruntime

    def load() -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    return _after_libraries(lambda: load().run, lambda run, given: run(None, given))


def _model(path: str, threads: int) -> Callable[[dict[str, Any]], object]:
    import torch

    from tutelage.export.bundle import TraceModule, load_bundle

    torch.set_num_threads(threads)

    def load() -> Any:
        return load_bundle(path).model

    def run(model: Any, given: dict[str, Any]) -> object:
        return TraceModule(model, tuple(given)).run({k: torch.from_numpy(v) for k, v in given.items()})

    return _after_libraries(load, run)


def _after_libraries(
    load: Callable[[], Any], run: Callable[[Any, dict[str, Any]], object]
) -> Callable[[dict[str, Any]], object]:
    def measured(given: dict[str, Any]) -> object:
        before, _ = resident()
        forget_peak()
        model = load()
        for _ in range(PASSES):
            run(model, given)
        return {"before": before, "peak": resident()[1]}

    return measured


def main(kind: str, path: str, inputs: str, threads: str) -> None:
    """Measure, and print what was found as one line of JSON."""
    given = dict(np.load(inputs))
    found = {"onnx": _onnx, "model": _model}[kind](path, int(threads))(given)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
