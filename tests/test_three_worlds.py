"""One signal, method, engine and run directory for a CNN, a BERT and a Llama."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tutelage
from support.worlds import WORLDS, Shuffled, World, teacher_for
from tutelage.config import OptimizerConfig, TrainConfig
from tutelage.data import Batch, LoaderBatches
from tutelage.engine import RunDirectory, Training, build_accelerator, fit
from tutelage.errors import Interrupted
from tutelage.methods import LogitMethod, Method, Term
from tutelage.taps import Needs, Observation, output_head
from tutelage.teachers import LiveTeacher, Signal


@pytest.fixture(params=list(WORLDS))
def world(request: pytest.FixtureRequest) -> World:
    return WORLDS[request.param]()


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def distil(world: World, out: Path, die_at: int | None = None, **options: Any) -> tutelage.DistillResult:
    torch.manual_seed(7)
    return tutelage.distill(
        teacher_for(world),
        world.make(8),
        Shuffled(world.train, die_at),
        eval_data=world.held,
        validation=world.held,
        method=LogitMethod(temperature=2.0, alpha=0.7),
        epochs=4,
        lr=5e-3,
        train={"accumulate": world.accumulate, "log_every": 2, "clip": 1.0, "ema": 0.9, "checkpoint_every": 3},
        to_batch=world.to_batch,
        out=out,
        verbose=False,
        **options,
    )


def test_train_checkpoint_resume_export_report(world: World, tmp_path: Path) -> None:
    whole = distil(world, tmp_path / "whole")
    with pytest.raises(Interrupted):
        distil(world, tmp_path / "cut", die_at=len(world.train) * 6 + 2)  # inside the distilled training
    resumed = distil(world, tmp_path / "cut", resume=True)

    weights = "student/model.safetensors"
    assert sha(tmp_path / "whole" / weights) == sha(tmp_path / "cut" / weights)
    assert type(resumed.student) is type(world.make(8))
    assert not resumed.student.training
    for file in ("config.yaml", "metrics.jsonl", "summary.json", "report.html", "student/model.json"):
        assert (tmp_path / "cut" / file).stat().st_size > 0
    lines = [(tmp_path / run / "metrics.jsonl").read_text().splitlines() for run in ("whole", "cut")]
    assert [json.loads(a) for a in lines[0]] == [json.loads(b) for b in lines[1]]
    assert set(whole.summary["students"]) == {"baseline", "distilled"}
    assert whole.summary["students"]["distilled"]["best"]["agreement"]["mean"] > 0


def test_teacher_bit_identical_and_in_no_checkpoint(world: World, tmp_path: Path) -> None:
    teacher = teacher_for(world).train()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    tutelage.distill(
        teacher, world.make(8), world.train, eval_data=world.held, epochs=2, baseline=False,
        to_batch=world.to_batch, out=tmp_path / "run", verbose=False,
    )  # fmt: skip
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    from safetensors.torch import load_file

    checkpoint = next((tmp_path / "run" / "checkpoints" / "distilled-seed0").glob("step-*"))
    saved = load_file(str(checkpoint / "tensors.safetensors"))
    sizes = {v.numel() for k, v in saved.items() if v.is_floating_point()}
    largest = max(p.numel() for p in teacher.parameters())
    assert largest > max(p.numel() for p in world.make(8).parameters())
    assert largest not in sizes


class HeadMethod(Method):
    """KL from what goes into the output heads, a few rows at a time, as chunked token losses work."""

    needs = Needs(logits=False, head=True)
    student_needs = Needs(logits=False, head=True)

    def __init__(self, chunk: int = 5) -> None:
        super().__init__()
        self.chunk, self.weights = chunk, {"kd": 1.0}

    def counts(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {"kd": batch.counted().sum()}

    def forward(self, student: Observation, batch: Batch, signal: Signal) -> dict[str, Term]:
        assert signal is not None
        assert signal.logits is None
        assert student.logits is None
        rows = batch.counted().flatten().nonzero().flatten()
        total = torch.zeros(())
        for chunk in rows.split(self.chunk):
            q, p = (
                F.linear(h.inputs.flatten(0, -2)[chunk], h.weight, h.bias).log_softmax(-1)
                for h in (student.head, signal.head)
                if h is not None
            )
            total = total + F.kl_div(q, p, reduction="sum", log_target=True)
        return {"kd": Term(total, batch.counted().sum())}


def gradients(world: World, method: Method, out: Path) -> dict[str, torch.Tensor]:
    torch.manual_seed(11)
    student = world.make(8)
    start = {k: v.detach().clone() for k, v in student.named_parameters()}
    config = TrainConfig(
        steps=1, accumulate=world.accumulate, optimizer=OptimizerConfig(kind="sgd", lr=1.0),
        schedule={"kind": "constant"},
    )  # fmt: skip
    # A batch norm in training mode would make micro-batches differ; the point here is the contract.
    fit(
        Training("t", student, method, LoaderBatches([world.train[0]], 0, world.to_batch), config,
                 RunDirectory(out), teacher=LiveTeacher(teacher_for(world, 5))),
        build_accelerator(),
    )  # fmt: skip
    return {k: start[k] - v.detach() for k, v in student.named_parameters()}


def test_a_method_of_hidden_states_and_head_fits_the_same_contract(world: World, tmp_path: Path) -> None:
    from_head = gradients(world, HeadMethod(), tmp_path / "a")
    from_logits = gradients(world, LogitMethod(temperature=1.0, alpha=1.0), tmp_path / "b")
    for name, gradient in from_logits.items():
        torch.testing.assert_close(from_head[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    assert any(g.abs().max() > 1e-4 for g in from_head.values())


def test_head_is_not_run_when_logits_are_not_needed(world: World) -> None:
    model = world.make(8).eval()
    ran: list[Any] = []
    head = output_head(model)
    original = F.linear

    def counting(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if weight is head.weight:
            ran.append(x.shape)
        return original(x, weight, bias)

    from tutelage.taps import observe

    inputs = world.to_batch(world.held[0]).inputs
    observe(model, inputs, Needs(logits=False, head=True))  # the first pass compares the head with the logits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "linear", counting)
        seen = observe(model, inputs, Needs(logits=False, head=True))
        assert not ran
        whole = observe(model, inputs, Needs(head=True))
        assert ran
    assert seen.head is not None
    assert whole.head is not None
    torch.testing.assert_close(seen.head.inputs, whole.head.inputs)
    torch.testing.assert_close(original(whole.head.inputs, head.weight, head.bias), whole.logits)
