"""Language models, batches and a recipe for tests of the methods of language models."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

import tutelage
from support import language_worlds as worlds
from tutelage.data import IGNORE, Batch
from tutelage.data.tokens import tokenize
from tutelage.methods import DistillationModule, Method, OnPolicyMethod, Term, prepare_method
from tutelage.models import ModelSpec, build
from tutelage.teachers import LiveTeacher
from tutelage.teachers.signal import Signal

TURNS = [
    {"role": "user", "content": "Hi  there"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "1 and 2?"},
    {"role": "assistant", "content": "It is 3."},
]


def model(folder: Path, layers: int | None = None) -> Any:
    found: Any = build(ModelSpec(f"hf:{folder}", task="causal"))
    if layers is not None:
        found = tutelage.students.prune(found, layers=layers).model
    return found


def causal(cutter: Any, rows: list[Any], **options: Any) -> tuple[Any, Batch]:
    """Tokens, and a batch of all rows."""
    tokens = tokenize([rows], cutter, max_length=options.pop("max_length", 64), learn="answers", **options)
    places = torch.arange(len(tokens)).numpy()
    labels = tokens.next_tokens(places)
    return tokens, Batch(tokens.inputs(places), labels, mask=labels != IGNORE)


def passed(student: Any, method: Method, batch: Batch, signal: Signal | None) -> dict[str, Term]:
    """The terms of a batch."""
    with closing(DistillationModule(student, method)) as module:
        module.open()
        terms: dict[str, Term] = module(batch, signal)
    return terms


def total(student: Any, method: Method, batch: Batch, signal: Signal | None) -> torch.Tensor:
    """The loss of a batch: its weighted terms, each over what counts."""
    terms = passed(student, method, batch, signal)
    return torch.stack([method.weights[n] * t.sum / t.count.clamp(min=1) for n, t in terms.items()]).sum()


def gradients(student: Any, teacher: Any, method: Method, batches: list[Batch]) -> dict[str, torch.Tensor]:
    """Of all batches together, as of one."""
    student.zero_grad()
    counts = {n: sum(int(method.counts(b)[n]) for b in batches) for n in method.weights}
    said = LiveTeacher(teacher)
    for batch in batches:
        terms = passed(student, method, batch, None if method.needs is None else said.signal(batch, method.needs))
        torch.stack([method.weights[n] * t.sum / counts[n] for n, t in terms.items()]).sum().backward()
    return {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}


@pytest.fixture
def recipe(tmp_path: Path, cutter: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    folder = worlds.llama(tmp_path / "teacher", cutter=cutter, vocabulary=1024)  # padded, as those of real models
    rows = worlds.conversations(80)
    Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {
        "name": "language",
        "data": {"source": "table", "path": "chats.jsonl", "task": "causal", "text": "messages", "max_length": 64,
                 "pack": True},
        "teacher": {"model": f"hf:{folder}"},
        "student": {"model": "teacher", "layers": 2, "map": "every-other"},
        "method": {"kind": "token", "hidden": 0.1},
        "train": {"steps": 6, "batch_size": 4, "optimizer": {"kind": "adamw", "lr": 3e-3}},
    }  # fmt: skip


def ready(student: Any, teacher: Any, batch: Batch, **options: Any) -> OnPolicyMethod:
    method = prepare_method(
        OnPolicyMethod(**{"lmbda": 1.0, "max_new_tokens": 6, **options}), student, teacher, batch, seed=0
    )
    assert isinstance(method, OnPolicyMethod)
    return method
