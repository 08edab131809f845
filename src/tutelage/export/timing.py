"""Measure latency, operations and peak memory of models in each runtime."""

import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tutelage.errors import TutelageError, first_line
from tutelage.export.bundle import Inputs, TraceModule
from tutelage.export.formats import quantise_onnx, trace_rows, write_onnx
from tutelage.export.runtimes import Run, onnx_runner
from tutelage.taps import compile_apart

COLUMNS = ("eager", "compiled", "onnx", "int8")
"""Runtimes: eager torch, ``torch.compile``, ONNX Runtime, ONNX Runtime with int8 weights."""

Cell = tuple[str, str, int]
"""Model, runtime, batch size."""


def time_interleaved(
    cells: Mapping[Cell, Callable[[], object]], rounds: int, seed: int = 0
) -> dict[Cell, list[float]]:
    """Seconds of each call. Every round calls all cells once, in a new random order.

    Drift of the machine's speed and warm caches then affect all cells equally, so ratios within a round are more
    reliable than the seconds themselves. Each call gets one warm-up call.
    """
    order, draw = list(cells), random.Random(seed)
    times: dict[Cell, list[float]] = {cell: [] for cell in cells}
    for call in cells.values():
        call()
    for _ in range(rounds):
        draw.shuffle(order)
        for cell in order:
            start = time.perf_counter()
            cells[cell]()
            times[cell].append(time.perf_counter() - start)
    return times


def summarise_times(times: Sequence[float], rows: int, base: Sequence[float] | None) -> dict[str, Any]:
    """Latency percentiles, rows per second, and the speedup over the seconds ``base`` of the same rounds."""
    ordered = sorted(times)
    p50 = statistics.median(ordered)
    result: dict[str, Any] = {
        "p50_ms": 1000 * p50,
        "p95_ms": 1000 * ordered[math.ceil(0.95 * len(ordered)) - 1],
        "per_second": rows / p50,
    }
    if base is not None:
        result["faster"] = statistics.median(b / t for b, t in zip(base, times, strict=True))
    return result


def count_flops(model: nn.Module, names: tuple[str, ...], one: Inputs) -> int:
    """Floating-point operations of a forward pass on one row; a multiplication and an addition are two.

    torch counts matrix products, convolutions and attention.
    """
    graph = TraceModule(model, names)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        graph.run(one)
    return int(counter.get_total_flops())


def prepare_runner(column: str, model: nn.Module, names: tuple[str, ...], few: Inputs, calibration: Sequence[Inputs],
           folder: Path) -> tuple[Run, Path | None]:  # fmt: skip
    """A model in the runtime ``column``, and the file that the runtime reads, if any.

    ``few`` are rows to trace with; ``calibration`` calibrates int8 activations of models with convolutions.

    Raises:
        TutelageError: the runtime does not support the model.
    """
    if column == "eager":
        return TraceModule(model, names).run, None
    if column == "compiled":
        graph = TraceModule(model, names).eval()
        compile_apart(graph, dynamic=False)  # separate graphs: shared ones would hit torch's recompile limit
        return graph.run, None
    whole = folder / "whole.onnx"
    if not whole.exists():
        write_onnx(model, names, trace_rows(few), whole)
    path = whole
    if column == "int8":
        path = folder / "int8.onnx"
        quantise_onnx(whole, path, names, calibration)
    return onnx_runner(path, names), path


def try_call(call: Callable[[], Any]) -> tuple[Any, str | None]:
    """The result of a call and ``None``, or ``None`` and the reason why it failed."""
    try:
        return call(), None
    except TutelageError as error:
        return None, error.what
    except Exception as error:  # noqa: BLE001 - compilers raise errors of any class
        return None, first_line(error)[:200]


def peak_memory(kind: str, path: Path, names: tuple[str, ...], inputs: Inputs, threads: int) -> dict[str, int]:
    """Peak of resident memory of a new process that loads a model and runs it.

    ``kind`` is ``model`` for a folder that torch runs, ``onnx`` for a file that ONNX Runtime runs without torch.
    Returns ``peak`` bytes, and ``before``: bytes with all libraries loaded, before the model.

    Raises:
        RuntimeError: the process failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "inputs.npz"
        arrays: dict[str, Any] = {name: inputs[name].numpy() for name in names}
        np.savez(file, **arrays)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        process = subprocess.run(
            [sys.executable, "-m", "tutelage.export.memory_probe", kind, str(path), str(file), str(threads)],
            capture_output=True, text=True, env=environment, check=False,
        )  # fmt: skip
    if process.returncode != 0:
        raise RuntimeError(
            f"the process that measures memory failed: {(process.stderr.strip() or '?').splitlines()[-1]}"
        )
    result: dict[str, int] = json.loads(process.stdout.strip().splitlines()[-1])
    return result
