"""Time and memory of token losses from hidden states and heads: dense, chunked (ours) and Liger's.

    OMP_NUM_THREADS=1 python benchmarks/token_losses.py

The loss is KL at T = 2, forward and backward down to hidden states and head: hidden 576, vocabulary 49,152
(SmolLM2's), float32. Memory is of a fresh process for each cell: by how much its largest resident size lies above its
size with the inputs made and every library loaded, so the gradients themselves count. Times are of one process, in
turn, a round being one of each; figures are medians and quartiles of the rounds, and ratios are of the same round.
Liger's chunked loss (``pip install liger-kernel``) runs with beta 0, which is KL, and chunks of 1,024 as it does by
default and of 256, without and with its ``torch.compile``; a way that fails is left out and named. Beside the clock's
seconds are those of the processor, which other work on a busy machine does not lengthen. What would not fit in 70%
of the free memory is not run; of dense, whose memory is linear in tokens, it is drawn from smaller cells. With a CUDA
device Liger's own shape is measured too, 8,192 x 4,096 x 128,256 in bf16, and there chunked with Liger's kernel,
which is taken where it is installed, and without. Writes ``results/token-losses.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import torch
from torch import Tensor
from torch.nn import functional as F

from tutelage import losses
from tutelage.losses import kernels

TABLE = Path("results/token-losses.json")
HIDDEN, VOCABULARY, TEMPERATURE = 576, 49_152, 2.0
COUNTS = (1_024, 2_048, 8_192)
LARGE = (8_192, 4_096, 128_256)
Way = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def dense(hidden: Tensor, head: Tensor, said: Tensor, other: Tensor) -> Tensor:
    """All scores at once."""
    with torch.no_grad():
        teacher = F.linear(said, other)
    return losses.kd(F.linear(hidden, head), teacher, temperature=TEMPERATURE)


def ours(hidden: Tensor, head: Tensor, said: Tensor, other: Tensor) -> Tensor:
    """Some tokens at a time."""
    return losses.linear_divergence(hidden, head, (said, other), divergence="kl", temperature=TEMPERATURE)


def plain(hidden: Tensor, head: Tensor, said: Tensor, other: Tensor) -> Tensor:
    """Some tokens at a time, without kernels of other packages."""
    with patch.object(kernels, "DEVICES", set()):
        return ours(hidden, head, said, other)


def liger(chunk: int, compiled: bool) -> Way:
    """Liger's chunked loss, which has no T^2."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, temperature=TEMPERATURE, chunk_size=chunk,
        compiled=compiled,
    )  # fmt: skip

    def call(hidden: Tensor, head: Tensor, said: Tensor, other: Tensor) -> Tensor:
        labels = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
        value: Tensor = loss(hidden, head, said, other, labels) * TEMPERATURE**2
        return value

    return call


WAYS: dict[str, Callable[[], Way]] = {
    "dense": lambda: dense,
    "chunked": lambda: ours,
    "Liger": lambda: liger(1_024, False),
    "Liger, chunk 256": lambda: liger(256, False),
    "Liger, compiled": lambda: liger(1_024, True),
    "Liger, compiled, chunk 256": lambda: liger(256, True),
}


def inputs(
    tokens: int, width: int, size: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Student's hidden states and head, then the teacher's."""
    generator = torch.Generator(device).manual_seed(0)
    made = [
        torch.randn(n, width, generator=generator, device=device, dtype=dtype).mul_(s)
        for n, s in ((tokens, 1.0), (size, 0.05), (tokens, 1.0), (size, 0.05))
    ]
    return [x.requires_grad_() for x in made[:2]] + made[2:]


def step(way: Way, given: list[Tensor]) -> float:
    """Forward and backward; the value."""
    for x in given[:2]:
        x.grad = None
    value = way(*given)
    value.backward()
    return float(value.detach())


def resident(what: str) -> float:
    """Megabytes: ``VmRSS`` now, ``VmHWM`` the most so far."""
    found = re.search(rf"{what}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def memory(name: str, tokens: int) -> dict[str, float]:
    """The peak of one cell; run in a process of its own."""
    way = WAYS[name]()
    step(way, inputs(8, 16, 128))  # libraries load what they load once
    given = inputs(tokens, HIDDEN, VOCABULARY)
    before = resident("VmRSS")
    value = step(way, given)
    return {"mb": resident("VmHWM") - before, "value": value}


def times(names: list[str], tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds of each way in each round."""
    given, ways, failed = inputs(tokens, HIDDEN, VOCABULARY), dict[str, Way](), dict[str, str]()
    for name in names:
        try:
            ways[name] = WAYS[name]()
            step(ways[name], given)
        except Exception as error:  # noqa: BLE001  # a way of another package that does not run here is a finding
            ways.pop(name, None)
            failed[name] = str(error).splitlines()[0][:200]
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    busy: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start, used = time.perf_counter(), time.process_time()
            step(way, given)
            seconds[name].append(time.perf_counter() - start)
            busy[name].append(time.process_time() - used)
    return {"seconds": seconds, "processor_seconds": busy, "failed": failed}


def on_cuda(rounds: int) -> dict[str, Any]:
    """Milliseconds and gigabytes at Liger's shape, for what is not dense."""
    tokens, width, size = LARGE
    given = inputs(tokens, width, size, "cuda", torch.bfloat16)
    found: dict[str, Any] = {}
    ways = {name: make for name, make in WAYS.items() if name != "dense"} | {"chunked, torch alone": lambda: plain}
    for name, make in ways.items():
        try:
            way = make()
            step(way, given)
        except Exception as error:  # noqa: BLE001
            found[name] = {"failed": str(error).splitlines()[0][:200]}
            continue
        spent = []
        for x in given[:2]:
            x.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(rounds):
            torch.cuda.synchronize()
            start = time.perf_counter()
            step(way, given)
            torch.cuda.synchronize()
            spent.append(1000 * (time.perf_counter() - start))
        peak = (torch.cuda.max_memory_allocated() - before) / 1e9
        found[name] = {"ms": quartiles(spent), "gb": peak}
    return {"device": torch.cuda.get_device_name(), "ways": found}


def quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return statistics.quantiles(values, n=4, method="inclusive")


def apart(*options: str) -> Any:
    """What this script says in a process of its own."""
    done = subprocess.run([sys.executable, __file__, *options], capture_output=True, text=True, check=False)
    return json.loads(done.stdout.splitlines()[-1]) if not done.returncode else done.stderr.strip().splitlines()[-1]


def main() -> None:
    """Measure, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="*", default=list(WAYS))
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--times", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        print(json.dumps(memory(args.memory[0], int(args.memory[1]))))
        return
    if args.times:
        print(json.dumps(times(args.only, COUNTS[0], args.rounds)))
        return
    peaks: dict[str, dict[str, Any]] = {}
    for name in args.only:
        for tokens in COUNTS:
            together = tokens if name == "dense" else min(tokens, 2_047)  # which Liger does not split yet
            if psutil.virtual_memory().available * 0.7 < 7 * 4 * together * VOCABULARY:
                continue
            found = apart("--memory", name, str(tokens))
            peaks.setdefault(name, {})[str(tokens)] = found if isinstance(found, str) else found["mb"]
            print(f"{name:28} {tokens:6} tokens  {peaks[name][str(tokens)]}", flush=True)
    if len(row := peaks.get("dense", {})) == 2:
        one, two = row.values()
        row[str(COUNTS[2])] = one + (two - one) * (COUNTS[2] - COUNTS[0]) / (COUNTS[1] - COUNTS[0])
        row["drawn"] = str(COUNTS[2])
    spent = apart("--times", "--rounds", str(args.rounds), "--only", *args.only)
    assert isinstance(spent, dict), spent
    table = {
        "machine": {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__,
                    "threads": os.environ.get("OMP_NUM_THREADS", "")},
        "memory_mb": peaks, "time": spent,
    }  # fmt: skip
    if torch.cuda.is_available():
        table["cuda"] = on_cuda(args.rounds) | {"kernel": kernels.liger_kl() is not None}
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
    TABLE.with_suffix(".md").write_text(page(table))
    print(page(table))


def page(table: dict[str, Any]) -> str:
    """The tables as Markdown."""
    peaks, seconds, threads = table["memory_mb"], table["time"]["seconds"], table["machine"]["threads"]
    lines = [
        f"KL at T = 2 from hidden states and heads, forward and backward: hidden {HIDDEN}, vocabulary "
        f"{VOCABULARY:,}, float32, CPU, {threads or 'all'} thread. "
        f"`{f'OMP_NUM_THREADS={threads} ' if threads else ''}python benchmarks/token_losses.py`",
        "",
        "| MB above the inputs | " + " | ".join(f"{t:,} tokens" for t in COUNTS) + " |",
        "| --- |" + " --- |" * len(COUNTS),
    ]
    for name, row in peaks.items():
        shown = [row.get(str(t), "-") for t in COUNTS]
        cells = []
        for tokens, value in zip(COUNTS, shown, strict=True):
            whole = peaks.get("dense", {}).get(str(tokens))
            ratio = f" ({value / whole:.3f})" if isinstance(value, float) and isinstance(whole, float) else ""
            cells.append(f"{value:.0f}{ratio}" if isinstance(value, float) else "-")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"The head's gradient is {VOCABULARY * HIDDEN * 4 / 2**20:.0f} MB of each. In brackets: of dense."
        + (f" Dense at {COUNTS[2]:,} is drawn from the other two." if "drawn" in peaks.get("dense", {}) else ""),
        "",
        f"| {COUNTS[0]:,} tokens | seconds | chunked over it, same round | processor seconds | chunked over it |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in seconds:
        cells = []
        for of in (seconds, table["time"]["processor_seconds"]):
            low, middle, high = quartiles([a / b for a, b in zip(of["chunked"], of[name], strict=True)])
            cells.append(f"{statistics.median(of[name]):.2f} | {middle:.2f} ({low:.2f} to {high:.2f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "Medians, and in brackets quartiles of the rounds."]
    lines += [f"{name} failed: {why}" for name, why in table["time"]["failed"].items()]
    if "cuda" in table:
        lines += ["", f"{' x '.join(f'{n:,}' for n in LARGE)}, bf16, {table['cuda']['device']}, Liger's kernel "
                  f"{'taken' if table['cuda']['kernel'] else 'not found'}:", "",
                  "| way | ms | GB |", "| --- | --- | --- |"]  # fmt: skip
        for name, row in table["cuda"]["ways"].items():
            lines.append(
                f"| {name} | {row['ms'][1]:.1f} | {row['gb']:.1f} |" if "ms" in row else f"| {name} | - | - |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
