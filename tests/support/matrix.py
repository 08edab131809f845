"""Loaders, students and teachers of many kinds: each combination trained by ``distill`` and by a loop by hand.

``python tests/support/matrix.py`` (with ``src`` and ``tests`` on the path) writes ``results/own-modules.json`` and
the table of ``docs/how-to/own-modules.md``; with numbers, those of these loaders alone.
"""

from __future__ import annotations

import gc
import json
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.matrix_loaders import (
    BATCH,
    LOADERS,
    RATE,
    TEMPERATURE,
    Loader,
)
from support.matrix_students import STUDENTS
from support.matrix_teachers import TEACHERS, Teacher, count_outputs
from tutelage.data import as_batch
from tutelage.errors import TutelageError
from tutelage.experiment.distill import distill
from tutelage.methods import LogitMethod

MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
ROOT = Path(__file__).parents[2]
RESULTS, PAGE = ROOT / "results" / "own-modules.json", ROOT / "docs" / "how-to" / "own-modules.md"


def by_hand(student: nn.Module, read: Callable[[Any], Tensor], data: Loader, scores: list[Tensor]) -> nn.Module:
    student.train()
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=RATE)
    for (inputs, labels), teacher in zip(data.plain, scores, strict=True):
        z = read(student(**inputs) if data.keywords else student(*inputs.values()))
        if data.task == "classes":
            t = TEMPERATURE
            soft = F.kl_div((z / t).log_softmax(1), (teacher / t).softmax(1), reduction="batchmean") * t * t
            loss = soft if labels is None else 0.5 * soft + 0.5 * F.cross_entropy(z, labels)
        elif data.task == "regression":
            assert labels is not None
            z = z.view(-1)
            loss = 0.5 * F.mse_loss(z, teacher[:, 0]) + 0.5 * F.mse_loss(z, labels)
        else:
            assert labels is not None
            soft = two_sided(z / TEMPERATURE, teacher / TEMPERATURE) * TEMPERATURE**2
            loss = 0.5 * soft + 0.5 * F.binary_cross_entropy_with_logits(z, labels, reduction="sum") / len(z)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return student


def two_sided(z: Tensor, t: Tensor) -> Tensor:
    """KL of independent labels, summed over labels, mean over rows."""
    p = t.sigmoid()
    entropy = p * F.logsigmoid(t) + (1 - p) * F.logsigmoid(-t)
    return (entropy - p * F.logsigmoid(z) - (1 - p) * F.logsigmoid(-z)).sum(1).mean()


def with_probabilities(data: Loader, scores: list[Tensor]) -> Loader:
    """The loader with the probabilities of the teacher: a key of a mapping, or another place, by ``to_batch``."""
    names = data.options.get("batch")
    items = [(as_named(raw, names), s.softmax(-1)) for raw, s in zip(data.items, scores, strict=True)]

    def convert(pair: Any) -> Any:
        return replace(as_batch(pair[0], data.task), teacher_inputs=pair[1])  # type: ignore[arg-type]

    test = None
    if data.evaluation is not None:
        test = [(raw, s.softmax(-1)) for raw, s in zip(data.evaluation, scores, strict=True)]
    options = {k: v for k, v in data.options.items() if k != "batch"} | {"to_batch": convert}
    return replace(data, items=items, loader=None, evaluation=test, options=options)


def as_named(raw: Any, names: Any) -> Any:
    if names is None:
        return raw
    named = dict(zip(names, raw, strict=True))
    named["labels"] = named.pop("y")
    return named


def run_cell(loader_name: str, student_name: str, teacher_name: str, folder: Path) -> str:
    """``""`` where both loops give the same weights; else why it is refused, or what went wrong (with an ``!``)."""
    data, student = LOADERS[loader_name](), STUDENTS[student_name]
    teacher = made_teacher(loader_name, teacher_name)
    outputs = count_outputs(data.task)
    if teacher_name == "stored probabilities":
        data = with_probabilities(data, teacher.scores)
    alone = data.plain[0][1] is None
    method = LogitMethod(
        task=data.task,
        alpha=1.0 if alone else 0.5,  # type: ignore[arg-type]
        **({} if data.task == "regression" else {"temperature": TEMPERATURE}),
    )  # type: ignore[arg-type]
    given = (lambda: student.fresh(outputs)) if student.is_function else student.build(outputs)
    loader = data.items if data.loader is None else data.loader
    test = data.evaluation or (data.items if data.loader is None else data.loader)
    options: dict[str, Any] = {**data.options, **student.options}
    is_set = loader_name in ("torch data set", "Hugging Face data set") and data.loader is not None
    options["train"] = {"batch_size": BATCH, **options.get("train", {})} if is_set else options.get("train")
    try:
        with Unshuffled(is_set):
            done = distill(
                teacher.given, given, loader, eval_data=test, method=method, epochs=1, lr=RATE, optimizer="sgd",
                schedule="constant", baseline=False, out=folder, verbose=False, **options,
            )  # fmt: skip
    except TutelageError as error:
        trained = (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").stat().st_size > 0
        return f"{'! after training: ' if trained else ''}{error}" if "\n  -> " in str(error) else f"! {error}"
    except Exception as error:  # noqa: BLE001  # a cell that is neither right nor refused
        return f"! {type(error).__name__}: {error}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    mine = student.build(outputs)
    inputs = {name: x[:2] for name, x in data.plain[0][0].items()}
    if any(nn.parameter.is_lazy(p) for p in mine.parameters()):
        with torch.no_grad():
            mine.eval()(**inputs)
    read = (lambda out: out) if data.task == "regression" and student_name == "one score" else student.read
    by_hand(mine, read, data, teacher.scores)
    return difference(done.student, mine)


def difference(one: nn.Module, other: nn.Module) -> str:
    a, b = ({k.removeprefix("_orig_mod."): v for k, v in m.state_dict().items()} for m in (one, other))
    if set(a) != set(b):
        return f"! other weights: {set(a) ^ set(b)}"
    far = [k for k in a if isinstance(a[k], Tensor) and not torch.allclose(a[k], b[k], rtol=0, atol=1e-6)]
    return f"! {far[0]} differs by {float((a[far[0]] - b[far[0]]).abs().max()):.2g}" if far else ""


@cache
def made_teacher(loader_name: str, teacher_name: str) -> Teacher:
    return TEACHERS[teacher_name](LOADERS[loader_name]())


class Unshuffled:
    """Data sets of the caller are read in order, as in the loop by hand."""

    def __init__(self, active: bool) -> None:
        self.active = active

    def __enter__(self) -> None:
        self.permute = torch.randperm
        if self.active:
            torch.randperm = lambda n, **_: torch.arange(n)  # type: ignore[assignment]

    def __exit__(self, *_: object) -> None:
        torch.randperm = self.permute


Cells = dict[str, dict[str, dict[str, str]]]


def run_all(loaders: list[str] | None = None, say: Callable[[str], object] = lambda text: None) -> Cells:
    """Every cell, by loader, student and teacher."""
    cells: Cells = {}
    gc.collect()
    gc.freeze()  # the collections of accelerate after each training look at the cell's own objects alone
    with tempfile.TemporaryDirectory(dir=MEMORY) as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in loaders or LOADERS:
            cells[name] = {
                student: {teacher: run_cell(name, student, teacher, Path(place) / "run") for teacher in TEACHERS}
                for student in STUDENTS
            }
            every = [text for row in cells[name].values() for text in row.values()]
            say(f"{name}: {sum(not text for text in every)} of {len(every)} train as by hand")
            for text in sorted({text for text in every if text}):
                say(f"   {every.count(text)} x {text[:300]}")
    gc.unfreeze()
    return cells


def table(cells: Cells) -> str:
    """The page's table: of the 12 teachers, how many train each student from each loader."""
    students = list(STUDENTS)
    lines = [
        "| | " + " | ".join(str(i + 1) for i in range(len(students))) + " |",
        "| --- |" + " --- |" * len(students),
    ]
    for name, rows in cells.items():
        lines.append(f"| {name} | " + " | ".join(str(sum(not t for t in rows[s].values())) for s in students) + " |")
    numbers = "; ".join(f"{i + 1} {name}" for i, name in enumerate(students))
    return "\n".join([*lines, "", f"Students: {numbers}.", "", f"Teachers: {', '.join(TEACHERS)}."])


def write(found: Cells) -> None:
    """Add cells to the results, and write the page's table when all are there."""
    known: Cells = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    known = {name: (known | found)[name] for name in LOADERS if name in known | found}
    RESULTS.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if len(known) == len(LOADERS):
        head, _, rest = PAGE.read_text(encoding="utf-8").partition("<!-- matrix -->\n")
        tail = rest.partition("<!-- end of matrix -->")[2]
        PAGE.write_text(f"{head}<!-- matrix -->\n{table(known)}\n<!-- end of matrix -->{tail}", encoding="utf-8")


if __name__ == "__main__":
    for number in map(int, sys.argv[1:] or range(len(LOADERS))):
        write(run_all([list(LOADERS)[number]], print))
