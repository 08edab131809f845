"""How good a model is, and how like its teacher: sums over positions, never means of means."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tutelage.data.batch import IGNORE, Batch, spans
from tutelage.data.loader import Share
from tutelage.errors import CapabilityError
from tutelage.taps import Needs, observe
from tutelage.teachers.signal import Teacher

BINS = 15
"""Bins of the reliability diagram and of the calibration error (Guo et al., 2017)."""


class Scores:
    """Running sums of every metric of a classifier.

    Args:
        device: where the sums live.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        names = ("n", "correct", "nll", "seen", "agree", "kl")
        self.sums = {k: torch.zeros((), dtype=torch.float64, device=device) for k in names}
        self.bins = torch.zeros(3, BINS, dtype=torch.float64, device=device)
        self.per_class: Tensor | None = None

    def add(self, logits: Tensor, labels: Tensor, counted: Tensor, teacher: Tensor | None = None) -> None:
        """Add positions: logits ``[N, C]``, labels ``[N]``, ``counted`` ``[N]``, teacher logits ``[N, C]``."""
        has = (labels != IGNORE) & counted
        scores, targets = logits[has], labels[has]
        log_p = F.log_softmax(scores, dim=-1)
        confidence, predicted = log_p.max(dim=-1)
        right = predicted == targets
        self.sums["n"] += has.sum()
        self.sums["correct"] += right.sum()
        self.sums["nll"] += F.nll_loss(log_p, targets, reduction="sum")
        confidence = confidence.exp().double()
        which = (confidence * BINS).ceil().sub(1).clamp(0, BINS - 1).long()
        ones = torch.stack([torch.ones_like(confidence), confidence, right.double()])
        self.bins.index_add_(1, which, ones)
        classes = logits.shape[-1]
        if classes <= 1000:
            if self.per_class is None:
                self.per_class = torch.zeros(2, classes, dtype=torch.float64, device=logits.device)
            self.per_class.index_add_(1, targets, torch.stack([torch.ones_like(confidence), right.double()]))
        if teacher is not None:
            mine, theirs = logits[counted], teacher[counted]
            log_q, log_t = F.log_softmax(mine, dim=-1), F.log_softmax(theirs, dim=-1)
            self.sums["seen"] += counted.sum()
            self.sums["agree"] += (mine.argmax(-1) == theirs.argmax(-1)).sum()
            self.sums["kl"] += F.kl_div(log_q, log_t, reduction="sum", log_target=True)

    def reduce(self, over_processes: Callable[[Tensor], Tensor]) -> Scores:
        """These sums, added up over processes."""
        self.sums = {k: over_processes(v) for k, v in self.sums.items()}
        self.bins = over_processes(self.bins)
        self.per_class = None if self.per_class is None else over_processes(self.per_class)
        return self

    def result(self) -> dict[str, Any]:
        """Accuracy, loss (nats), ECE and the reliability bins; with a teacher, agreement and KL (nats)."""
        s = {k: float(v) for k, v in self.sums.items()}
        n = max(s["n"], 1.0)
        count, confidence, right = self.bins.cpu()
        out: dict[str, Any] = {
            "n": int(s["n"]),
            "accuracy": s["correct"] / n,
            "loss": s["nll"] / n,
            "ece": float((confidence - right).abs().sum() / n),
            "reliability": {
                "count": count.tolist(),
                "confidence": (confidence / count.clamp(min=1)).tolist(),
                "accuracy": (right / count.clamp(min=1)).tolist(),
            },
        }
        if self.per_class is not None and self.per_class.shape[1] <= 100:
            total, hits = self.per_class.cpu()
            out["per_class"] = (hits / total.clamp(min=1)).tolist()
        if s["seen"]:
            out["agreement"] = s["agree"] / s["seen"]
            out["kl"] = s["kl"] / s["seen"]
        return out


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    device: torch.device,
    teacher: Iterable[Tensor] | None = None,
    share: Share = Share(),  # noqa: B008 - frozen
    reduce: Callable[[Tensor], Tensor] = lambda x: x,
    watch: Callable[[Tensor], object] | None = None,
) -> dict[str, Any]:
    """Metrics of ``model`` over ``batches``; the model's mode is left as it was.

    Args:
        model: any module that gives logits.
        batches: unaugmented.
        device: where the model is.
        teacher: the teacher's logits for each batch, ``[B, ..., C]``, in the same order.
        share: which rows of every batch this process evaluates.
        reduce: sums a tensor over processes.
        watch: is shown the logits of the positions that count, ``[N, C]``, batch after batch.
    """

    def ask(batch: Batch) -> Tensor:
        with torch.no_grad():
            logits = observe(model, batch.inputs, Needs()).logits
        assert logits is not None
        return logits

    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        return _scored(ask, type(model).__name__, batches, device, teacher, share, watch).reduce(reduce).result()
    finally:
        for module in training:
            module.training = True


def evaluate_teacher(
    teacher: Teacher,
    batches: Iterable[Batch],
    device: torch.device,
    said: Iterable[Tensor] | None = None,
    watch: Callable[[Tensor], object] | None = None,
) -> dict[str, Any]:
    """Metrics of a teacher by what it says, in its own numbers and by its own routes.

    Args:
        teacher: is asked for its logits.
        batches: unaugmented.
        device: where it is asked.
        said: its logits for each batch, where it was asked already.
        watch: as in :func:`evaluate`.
    """
    known = None if said is None else iter(said)

    def ask(batch: Batch) -> Tensor:
        return teacher.signal(batch, Needs()).dense() if known is None else next(known).to(device)

    return _scored(ask, "teacher", batches, device, watch=watch).result()


def _scored(
    ask: Callable[[Batch], Tensor],
    who: str,
    batches: Iterable[Batch],
    device: torch.device,
    teacher: Iterable[Tensor] | None = None,
    share: Share = Share(),  # noqa: B008 - frozen
    watch: Callable[[Tensor], object] | None = None,
) -> Scores:
    scores = Scores(device)
    theirs = iter(teacher) if teacher is not None else None
    for batch in batches:
        start, stop = spans(len(batch), share.world)[share.rank]
        highest = int(batch.labels.max()) if batch.labels.numel() else 0
        mine = batch.rows(start, stop).to(device)
        logits = ask(mine)
        if highest >= logits.shape[-1]:
            raise CapabilityError(
                f"the data has a label {highest}, the {who} scores classes 0 to {logits.shape[-1] - 1}",
                remedy="set its number of classes",
            )
        reference = None
        if theirs is not None:
            rows = next(theirs)
            reference = (rows[start:stop] if start < stop else rows[:1]).to(device).flatten(0, -2)
        flat, counted = logits.flatten(0, -2).float(), mine.counted().flatten()
        scores.add(flat, mine.labels.flatten(), counted, reference)
        if watch is not None:
            watch(flat[counted])
    return scores
