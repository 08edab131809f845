"""What every loss costs beside the student's own forward and backward pass.

    python benchmarks/losses.py

The student is ResNet-18 at 64x64 with a batch of 64 and 100 classes, the teacher's features are those of ResNet-34.
Each loss runs in a process of its own, with what it learns (projectors, fusion, memory), forward and backward
down to the student's features, in turn with the student's own step; the figure is the median of the ratios. Memory is
by how much the largest size of the process grows when the loss joins a step, over what the student's step takes.
Writes ``results/losses.json`` and ``.md``. Nothing above 15 %, but for CRD and ReviewKD, is the project's bound.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BOUND = 0.15
FREE = ("crd", "review")
ATTENTION = ("attention_kl", "attention_mse", "value_relation")
TABLE = Path("results/losses.json")


def peak() -> float:
    """Megabytes that the process had at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name: str, rounds: int) -> dict[str, float]:
    """Time and memory of one loss."""
    import torch
    from torch import Tensor
    from torchvision.models import resnet18, resnet34

    from tutelage import losses
    from tutelage.data import Batch
    from tutelage.methods import (
        FEATURE_LOSSES,
        LOGIT_LOSSES,
        DistillationModule,
        FeatureMethod,
        LogitMethod,
        SimkdMethod,
        SupervisedMethod,
        prepare_method,
        prepare_student,
    )
    from tutelage.taps import Needs, Observation, observe
    from tutelage.teachers import LiveTeacher, Signal

    torch.manual_seed(0)
    student, teacher = resnet18(num_classes=100), resnet34(num_classes=100)
    batch = Batch(torch.randn(64, 3, 64, 64), torch.randint(100, (64,)), ids=torch.arange(64))
    example, ids = batch.rows(0, 2), torch.arange(50_000)
    if name in LOGIT_LOSSES:
        method: Any = LogitMethod(soft=name, alpha=1.0, hard=1.0)
    elif name == "simkd":
        method = SimkdMethod()
    elif name in FEATURE_LOSSES and name not in ATTENTION:
        method = FeatureMethod(loss=name)
    else:
        method = None
    plain = DistillationModule(student, SupervisedMethod()).train()
    start = peak()

    def step() -> None:
        for term in plain(batch, None).values():
            (term.sum / term.count).backward()
        student.zero_grad(set_to_none=True)

    extra: Callable[[], Any]
    if method is None:
        tokens = [torch.randn(64, 64, 192), torch.randn(64, 64, 384)] if name == "value_relation" else [
            torch.randn(64, 12, 64, 64) for _ in range(2)
        ]  # fmt: skip
        s, t = tokens[0].requires_grad_(), tokens[1]

        def extra() -> None:
            getattr(losses, name)(s, t).backward()
            s.grad = None

    else:
        student = prepare_student(
            method, student if name != "simkd" else resnet18(num_classes=100), teacher, example, 0
        )
        method = prepare_method(method, student, teacher, example, 0, ids).train()
        signal = LiveTeacher(teacher).signal(batch, method.needs)
        taps = method.student_needs.hidden
        if name == "simkd":
            maps = observe(student.model.train(), batch.inputs, Needs(logits=False, hidden=(student.tap,)))
            feature = maps.hidden[student.tap].detach().requires_grad_()
            leaves = {"projector": feature}
        else:
            seen = observe(student.train(), batch.inputs, method.student_needs)
            leaves = {tap: seen.hidden[tap].detach().requires_grad_() for tap in taps}
            logits = seen.logits.detach().requires_grad_()

        def terms(hidden: dict[str, Tensor], scores: Tensor | None, word: Signal) -> Any:
            return method(Observation(scores, hidden), batch, word)

        def extra() -> None:
            if name == "simkd":
                found = terms({"projector": student.projector(feature)}, None, signal)
            elif name in LOGIT_LOSSES:
                found = {name: terms({}, logits, signal)[name]}
            else:
                found = method.hidden(Observation(None, leaves), batch, signal)
            torch.stack([term.sum for term in found.values()]).sum().backward()
            method.zero_grad(set_to_none=True)
            method.after_step()

    for _ in range(2):
        step()
    own = peak()
    for _ in range(2):
        extra()
    pairs = []
    for _ in range(rounds):
        times = []
        for run in (step, extra):
            before = time.perf_counter()
            run()
            times.append(time.perf_counter() - before)
        pairs.append(times)
    if method is not None and name != "simkd":  # both at once, for what memory they need together
        module = DistillationModule(student, method).train()
        for _ in range(2):
            found = module(batch, signal)
            torch.stack([t.sum / t.count.clamp(min=1) for t in found.values()]).sum().backward()
            module.zero_grad(set_to_none=True)
            method.after_step()
    return {
        "student_ms": 1000 * statistics.median(p[0] for p in pairs),
        "objective_ms": 1000 * statistics.median(p[1] for p in pairs),
        "ratio": statistics.median(p[1] / p[0] for p in pairs),
        "student_mb": own - start,
        "objective_mb": peak() - own,
        "learned": 0 if method is None else sum(p.numel() for p in method.parameters()),
    }


def main() -> None:
    """Measure what is asked for, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.rounds)))
        return
    from tutelage.methods import FEATURE_LOSSES, LOGIT_LOSSES

    rows = json.loads(TABLE.read_text()) if args.only and TABLE.exists() else {}
    environment = {  # malloc's page faults would be charged to whoever frees last
        **os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**34),
    }  # fmt: skip
    for name in args.only or [*LOGIT_LOSSES, *FEATURE_LOSSES, "simkd"]:
        command = [sys.executable, __file__, "--measure", name, "--rounds", str(args.rounds)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        rows[name] = json.loads(done.stdout.splitlines()[-1])
        print(f"{name:20} {100 * rows[name]['ratio']:6.1f} %   {rows[name]['objective_mb']:6.0f} MB", flush=True)
    TABLE.write_text(json.dumps(rows, indent=1) + "\n")
    lines = [
        "Time and memory of each loss over those of the student's own forward and backward pass: ResNet-18, "
        "64x64, batch 64, one thread; features of ResNet-34. `python benchmarks/losses.py`",
        "",
        "| loss | time | memory | parameters further learned parameters |",
        "| --- | --- | --- | --- |",
    ]
    for name, r in sorted(rows.items(), key=lambda item: -item[1]["ratio"]):
        memory = f"{r['objective_mb']:.0f} MB ({r['objective_mb'] / r['student_mb']:.0%})"
        lines.append(f"| `{name}` | {r['ratio']:.1%} | {memory} | {r['learned']:,} |")
    TABLE.with_suffix(".md").write_text("\n".join(lines) + "\n")
    above = [n for n, r in rows.items() if r["ratio"] > BOUND and n not in FREE]
    raise SystemExit(f"above {BOUND:.0%}: {', '.join(above)}" if above else 0)


if __name__ == "__main__":
    main()
