"""The losses of other libraries on fixed tensors, as JSON on standard output.

Started as a script in a process of its own, with the other libraries on ``PYTHONPATH``. Each value has a row in
``docs/coming-from.md``.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

T = 2.0


def wave(*shape: int, speed: float) -> Tensor:
    """Numbers between -3 and 3 that are the same on every machine and in every version of torch."""
    count = torch.Size(shape).numel()
    return (3 * torch.sin(speed * torch.arange(1, count + 1, dtype=torch.float64))).reshape(shape).float()


STUDENT, TEACHER = wave(4, 5, speed=0.7), wave(4, 5, speed=1.3)
LABELS = torch.tensor([0, 3, 1, 4])
STUDENT_TOKENS, TEACHER_TOKENS = wave(2, 3, 5, speed=0.7), wave(2, 3, 5, speed=1.3)
"""Logits of 2 texts of 3 tokens over a vocabulary of 5."""

TOKEN_LABELS = torch.tensor([[0, 3, -100], [-100, 1, 4]])
STUDENT_FEATURES, TEACHER_FEATURES = wave(4, 6, speed=0.9), wave(4, 6, speed=1.7)
STUDENT_MAPS, TEACHER_MAPS = wave(2, 3, 4, 4, speed=0.9), wave(2, 3, 4, 4, speed=1.7)
STUDENT_HIDDEN, TEACHER_HIDDEN = wave(6, 3, speed=0.9), wave(6, 4, speed=1.7)
STUDENT_HEAD, TEACHER_HEAD = wave(5, 3, speed=0.5), wave(5, 4, speed=1.1)
PADDED_HEAD = torch.cat([TEACHER_HEAD, wave(2, 4, speed=0.3)])


def torchdistill() -> dict[str, Any]:
    """Losses of torchdistill 1.1.5."""
    from torchdistill.losses import mid_level

    path = ("logits", "output", "logits", "output")

    def call(loss: Any, student: Tensor, teacher: Tensor, targets: Tensor | None = None) -> Any:
        return loss({"logits": {"output": student}}, {"logits": {"output": teacher}}, targets)

    def kd(alpha: float) -> Any:
        return mid_level.KDLoss(*path, temperature=T, alpha=alpha)

    maps = {"path": "logits", "io": "output"}
    attention = mid_level.ATLoss({"pair": {"student": maps, "teacher": maps}})
    return {
        "KDLoss": call(kd(0.3), STUDENT, TEACHER, LABELS),
        "KDLoss, alpha 0": call(kd(0.0), STUDENT, TEACHER, LABELS),
        "KDLoss, tokens": call(kd(0.0), STUDENT_TOKENS, TEACHER_TOKENS),
        "LogitStdKDLoss": call(mid_level.LogitStdKDLoss(*path, temperature=T, alpha=0.3), STUDENT, TEACHER, LABELS),
        "DISTLoss": call(mid_level.DISTLoss(*path, tau=T), STUDENT, TEACHER),
        "ATLoss": call(attention, STUDENT_MAPS, TEACHER_MAPS),
        "PKTLoss": call(mid_level.PKTLoss(*path), STUDENT_FEATURES, TEACHER_FEATURES),
        "SPKDLoss": call(mid_level.SPKDLoss("logits", "logits", "batchmean"), STUDENT_FEATURES, TEACHER_FEATURES),
        "RKDLoss": call(
            mid_level.RKDLoss("logits", "logits", 25.0, 50.0, reduction="mean"), STUDENT_FEATURES, TEACHER_FEATURES
        ),
    }


def modelopt() -> dict[str, Any]:
    """Losses of ModelOpt 0.47.0."""
    from modelopt.torch.distill import LogitsDistillationLoss

    def call(reduction: str) -> Any:
        return LogitsDistillationLoss(temperature=T, reduction=reduction)(STUDENT_TOKENS, TEACHER_TOKENS)

    return {
        "LogitsDistillationLoss": call("mean"),
        "LogitsDistillationLoss, batchmean": call("batchmean"),
        "LogitsDistillationLoss, none": call("none").sum(),
    }


def trl() -> dict[str, Any]:
    """Losses of TRL 1.16.0."""
    from trl.experimental.gkd.gkd_trainer import GKDTrainer
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    def gkd(beta: float, labels: Tensor | None = TOKEN_LABELS) -> Any:
        loss = GKDTrainer.generalized_jsd_loss
        return loss(STUDENT_TOKENS, TEACHER_TOKENS, labels=labels, beta=beta, temperature=T)

    distillation = _chunked_divergence_loss(
        STUDENT_HIDDEN[None], TEACHER_HIDDEN[None], STUDENT_HEAD, TEACHER_HEAD,
        TOKEN_LABELS.reshape(1, -1) != -100, beta=0.5, temperature=T,
    )  # fmt: skip
    return {
        "GKDTrainer, beta 0.5": gkd(0.5),
        "GKDTrainer, beta 0": gkd(0.0),
        "GKDTrainer, beta 1": gkd(1.0),
        "GKDTrainer, no labels": gkd(0.5, None),
        "DistillationTrainer": distillation[0],
    }


def liger() -> dict[str, Any]:
    """Losses of Liger Kernel 0.8.5."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    def call(teacher_head: Tensor) -> Any:
        loss = LigerFusedLinearJSDLoss(0.25, 0.75, beta=0.5, temperature=T, compiled=False)
        return loss(STUDENT_HIDDEN, STUDENT_HEAD, TEACHER_HIDDEN, teacher_head, TOKEN_LABELS.reshape(-1))

    return {"LigerFusedLinearJSDLoss": call(TEACHER_HEAD), "LigerFusedLinearJSDLoss, padded": call(PADDED_HEAD)}


def textbrewer() -> dict[str, Any]:
    """Losses of TextBrewer 0.2.1.post1."""
    from textbrewer import losses

    return {
        "kd_ce_loss": losses.kd_ce_loss(STUDENT, TEACHER, T),
        "kd_mse_loss": losses.kd_mse_loss(STUDENT, TEACHER, T),
        "hid_mse_loss": losses.hid_mse_loss(STUDENT_TOKENS, TEACHER_TOKENS, TOKEN_LABELS != -100),
        "cos_loss": losses.cos_loss(STUDENT_TOKENS, TEACHER_TOKENS, TOKEN_LABELS != -100),
    }


def main() -> None:
    values: dict[str, Any] = {}
    for library in (torchdistill, modelopt, trl, liger, textbrewer):
        values |= {f"{library.__name__}: {name}": float(value) for name, value in library().items()}
    print(json.dumps(values))


if __name__ == "__main__":
    main()
