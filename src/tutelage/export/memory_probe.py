"""A process that loads one model, runs it three times, and prints its peak of resident memory.

``python -m tutelage.export.memory_probe model|onnx PATH INPUTS.npz THREADS``; with ``onnx`` torch is not imported.
"""

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

PASSES = 3


def resident() -> tuple[int, int]:
    """Resident bytes of this process: now, and the peak.

    On Linux from ``/proc``, because the peak of ``getrusage`` includes that of the parent process.
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


def _onnx_loader(path: str, threads: int) -> Callable[[], Callable[[Any], object]]:
    import onnxruntime

    def load() -> Callable[[Any], object]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return lambda inputs: session.run(None, inputs)

    return load


def _torch_loader(path: str, threads: int) -> Callable[[], Callable[[Any], object]]:
    import torch

    from tutelage.export.bundle import TraceModule, load_bundle

    torch.set_num_threads(threads)

    def load() -> Callable[[Any], object]:
        model = load_bundle(path).model
        return lambda inputs: TraceModule(model, tuple(inputs)).run(
            {k: torch.from_numpy(v) for k, v in inputs.items()}
        )

    return load


def main(kind: str, path: str, inputs: str, threads: str) -> None:
    """Measure, and print the result as one line of JSON."""
    arrays = dict(np.load(inputs))
    load = {"onnx": _onnx_loader, "model": _torch_loader}[kind](path, int(threads))
    before, _ = resident()
    with suppress(OSError):  # reset the peak to the current value, if the system can
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    run = load()
    for _ in range(PASSES):
        run(arrays)
    sys.stdout.write(json.dumps({"before": before, "peak": resident()[1]}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
