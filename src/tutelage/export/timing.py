"""How large, how fast and how hungry models are, in each way to run them, measured side by side."""

from __future__ import annotations

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
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tutelage.errors import TutelageError
from tutelage.export.bundle import Inputs, TraceModule
from tutelage.export.formats import quantise_onnx, trace_rows, write_onnx
from tutelage.export.runtimes import Run, onnx_session
from tutelage.taps import compile_apart

COLUMNS = ("eager", "compiled", "onnx", "int8")
"""Ways to run a model: torch as it is, ``torch.compile``, ONNX Runtime, ONNX Runtime in eight bits."""

Cell = tuple[str, str, int]
"""Model, column, rows of a batch."""


def time_interleaved(
    cells: Mapping[Cell, Callable[[], object]], rounds: int, seed: int = 0
) -> dict[Cell, list[float]]:
    """Seconds of each call, all of them once a round, in another order each round.

    A machine's speed drifts, and what runs first after another finds warm or cold caches: both fall on all alike, so
    that ratios within a round can be believed where the seconds themselves cannot.

    Args:
        cells: what is timed; each is called once before.
        rounds: how often.
        seed: of the orders.
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
    """Figures of one cell: milliseconds of a batch, rows a second, and how often it fits into the base's time.

    Args:
        times: seconds of each round.
        rows: of a batch.
        base: seconds of what it is compared with, in the same rounds.
    """
    ordered = sorted(times)
    p50 = statistics.median(ordered)
    found: dict[str, Any] = {
        "p50_ms": 1000 * p50,
        "p95_ms": 1000 * ordered[math.ceil(0.95 * len(ordered)) - 1],
        "per_second": rows / p50,
    }
    if base is not None:
        found["faster"] = statistics.median(b / t for b, t in zip(base, times, strict=True))
    return found


def count_flops(model: nn.Module, names: tuple[str, ...], one: Inputs) -> int:
    """Floating-point operations of one forward pass on one row, a multiplication and an addition being two.

    Counted are matrix products, convolutions and attention, as torch counts them.
    """
    graph = TraceModule(model, names)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        graph.run(one)
    return int(counter.get_total_flops())


def prepare_runner(column: str, model: nn.Module, names: tuple[str, ...], few: Inputs, calibration: Sequence[Inputs],
           folder: Path) -> tuple[Run, Path | None]:  # fmt: skip
    """A model made ready to run in one way, and the file that it is run from, where there is one.

    Args:
        column: one of :data:`COLUMNS`.
        model: in evaluation mode.
        names: of its inputs.
        few: rows to draw a graph with.
        calibration: inputs by which eight bits fix the ranges of activations, of convolutions.
        folder: where files go.

    Raises:
        TutelageError: it cannot be run so.
    """
    if column == "eager":
        return TraceModule(model, names).run, None
    if column == "compiled":
        return _compiled(model, names), None
    whole = folder / "whole.onnx"
    if not whole.exists():
        write_onnx(model, names, trace_rows(few), whole)
    path = whole
    if column == "int8":
        path = folder / "int8.onnx"
        quantise_onnx(whole, path, names, calibration)
    session = onnx_session(path)

    def run(inputs: Inputs) -> Tensor:
        return torch.from_numpy(session.run(None, {name: inputs[name].numpy() for name in names})[0])

    return run, path


def _compiled(model: nn.Module, names: tuple[str, ...]) -> Run:
    graph = TraceModule(model, names).eval()
    compile_apart(graph, dynamic=False)  # models that share graphs would soon have no more, and run uncompiled

    @torch.no_grad()
    def run(inputs: Inputs) -> Tensor:
        found: Tensor = graph(*(inputs[name] for name in names))
        return found

    return run


def try_call(call: Callable[[], Any]) -> tuple[Any, str | None]:
    """What a call gives, or why it cannot: a way to run that a machine or a model does not have is left out."""
    try:
        return call(), None
    except TutelageError as error:
        return None, error.what
    except Exception as error:  # noqa: BLE001 - compilers fail in their own ways
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return None, reason.strip()[:200]


# Memory ------------------------------------------------------------------------------------------------


def peak_memory(kind: str, path: Path, names: tuple[str, ...], inputs: Inputs, threads: int) -> dict[str, int]:
    """Most memory that a process of its own had resident while it loaded a model and ran it.

    Args:
        kind: ``model`` for a folder that torch runs, ``onnx`` for a file that ONNX Runtime does, without torch.
        path: the folder or file.
        names: of its inputs.
        inputs: a batch, run three times.
        threads: of the runtime.

    Returns:
        ``peak`` bytes, and ``before``, those of the process with its libraries before it loaded the model.

    Raises:
        RuntimeError: the process failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder) / "inputs.npz"
        arrays: dict[str, Any] = {name: inputs[name].numpy() for name in names}
        np.savez(given, **arrays)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(
            [sys.executable, "-m", "tutelage.export.memory_probe", kind, str(path), str(given), str(threads)],
            capture_output=True, text=True, env=environment, check=False,
        )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(
            f"the process that measures memory failed: {(done.stderr.strip() or '?').splitlines()[-1]}"
        )
    found: dict[str, int] = json.loads(done.stdout.strip().splitlines()[-1])
    return found
