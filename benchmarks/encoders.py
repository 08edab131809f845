"""What a finished run of a text classifier is worth: how much is kept, how fast, and the same outside of torch.

    python benchmarks/encoders.py runs/classify-text

Retention is the student's accuracy over the teacher's, with Student's interval over seeds. Times are of teacher and
student in turn, sequences of 128 tokens, batches of 1 and 32, in torch and in ONNX Runtime (extra ``export``).
Ratios are medians over rounds of the teacher's time over the student's. Puts all into ``results/encoders.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tutelage.evaluation.statistics import paired_difference
from tutelage.models import load_model

RESULTS = Path("results/encoders.json")
LENGTH = 128


class Logits(nn.Module):
    """A model of transformers as a function of tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """Logits ``[B, C]``."""
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        logits: Tensor = self.model(**given).logits
        return logits


def inputs(rows: int, vocabulary: int, length: int = LENGTH) -> dict[str, Tensor]:
    """Texts of ``length`` tokens."""
    torch.manual_seed(rows)
    ids = torch.randint(1_000, vocabulary, (rows, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}


def session(model: nn.Module, vocabulary: int, folder: Path) -> Any:
    """The model in ONNX Runtime, batch and length free."""
    import onnxruntime

    path, example = folder / "model.onnx", inputs(2, vocabulary)
    axes = {0: torch.export.Dim("batch", min=1, max=4096), 1: torch.export.Dim("length", min=2, max=512)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Logits(model).eval(), tuple(example.values()), path, input_names=list(example), output_names=["logits"],
            dynamic_shapes=(axes,) * 3, dynamo=True, verbose=False,
        )  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def timed(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each, in turn."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(1_000 * (time.perf_counter() - start))
    return times


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--teacher", type=Path, help="its folder, where the run did not train it")
    args = parser.parse_args()
    summary = json.loads((args.run / "summary.json").read_text())
    teacher = args.teacher or args.run / "models" / "teacher"
    models = {"teacher": load_model(teacher), "student": load_model(args.run / "student")}
    found: dict[str, Any] = {"parameters": summary["parameters"], "seeds": summary["seeds"]}
    scores = summary["teacher"]["accuracy"]
    for which in ("best", "last"):
        arms = {arm: row[which]["accuracy"]["values"] for arm, row in summary["students"].items()}
        kept = paired_difference([v / scores for v in arms["distilled"]], [0.0] * len(arms["distilled"]))
        found[which] = {"accuracy": arms, "retention": kept, "gain": summary.get("gain", {}).get(which)}
    found["teacher"] = {"test": scores, "validation": summary["teacher"]["validation"]["accuracy"]}
    sizes = {name: model.get_input_embeddings().weight.shape[0] for name, model in models.items()}  # type: ignore[operator]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        found["latency"], found["onnx_gap"] = {}, {}
        sessions = {}
        for name, model in models.items():
            (Path(folder) / name).mkdir()
            sessions[name] = session(model, sizes[name], Path(folder) / name)
            gaps = []
            for rows, length in ((1, 128), (32, 128), (5, 37)):
                given = inputs(rows, sizes[name], length)
                theirs = sessions[name].run(None, {k: v.numpy() for k, v in given.items()})[0]
                gaps.append(float(np.abs(theirs - model(**given).logits.numpy()).max()))
            found["onnx_gap"][name] = max(gaps)
        for rows in (1, 32):
            given = {name: inputs(rows, size) for name, size in sizes.items()}
            arrays = {name: {k: v.numpy() for k, v in x.items()} for name, x in given.items()}
            runs: dict[str, Callable[[], Any]] = {}
            for name, model in models.items():
                runs[f"{name} torch"] = lambda m=model, x=given[name]: m(**x)
                runs[f"{name} onnx"] = lambda s=sessions[name], x=arrays[name]: s.run(None, x)
            times = timed(runs, args.rounds if rows == 1 else max(args.rounds // 3, 5))
            for kind in ("torch", "onnx"):
                pairs = zip(times[f"teacher {kind}"], times[f"student {kind}"], strict=True)
                found["latency"][f"{kind}, batch {rows}"] = {
                    "teacher_ms": statistics.median(times[f"teacher {kind}"]),
                    "student_ms": statistics.median(times[f"student {kind}"]),
                    "times_faster": statistics.median(t / s for t, s in pairs),
                }
    print(json.dumps(found, indent=1))
    kept_results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(kept_results | {summary["name"]: found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
