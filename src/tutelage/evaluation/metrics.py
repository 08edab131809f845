"""Running metrics by what labels are: sums over positions, never means of means."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from tutelage.data.batch import IGNORE, Batch

BINS = 15
"""Bins of the reliability diagram and of the calibration error (Guo et al., 2017)."""
VOCABULARY = 1_000
"""More classes than these are a vocabulary: not counted one by one, and the loss is a perplexity too."""
CONFUSED = 200
"""Most classes of which every pair of label and answer is counted, for F1 and Matthews."""
NEIGHBOURS = 10
MOST = 4_000
"""Most embeddings that are compared pair by pair."""


class Metrics(Protocol):
    """What a model's answers add up to."""

    def add(self, logits: Tensor, batch: Batch, teacher: Tensor | None, rows: tuple[int, int, int]) -> None:
        """Add rows of a batch.

        Args:
            logits: ``[B, ..., C]``.
            batch: those rows.
            teacher: the teacher's logits of them.
            rows: which they are of the whole batch: start, stop, and how many that has.
        """
        ...

    def reduce(self, over_processes: Callable[[Tensor], Tensor]) -> Metrics:
        """These sums, added up over processes."""
        ...

    def result(self) -> dict[str, Any]:
        """The metrics by name."""
        ...


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
        self.confused: Tensor | None = None
        self.classes = 0

    def add(self, logits: Tensor, batch: Batch, teacher: Tensor | None, rows: tuple[int, int, int]) -> None:
        """Add positions."""
        del rows
        labels, counted = batch.labels.flatten(), batch.counted().flatten()
        logits = logits.flatten(0, -2).float()
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
        self.classes = classes
        if classes <= VOCABULARY:
            if self.per_class is None:
                self.per_class = torch.zeros(2, classes, dtype=torch.float64, device=logits.device)
            self.per_class.index_add_(1, targets, torch.stack([torch.ones_like(confidence), right.double()]))
        if classes <= CONFUSED:
            if self.confused is None:
                self.confused = torch.zeros(classes * classes, dtype=torch.float64, device=logits.device)
            self.confused.index_add_(0, targets * classes + predicted, torch.ones_like(confidence))
        if teacher is not None:
            mine, theirs = logits[counted], teacher.flatten(0, -2)[counted]
            log_q, log_t = F.log_softmax(mine, dim=-1), F.log_softmax(theirs, dim=-1)
            self.sums["seen"] += counted.sum()
            self.sums["agree"] += (mine.argmax(-1) == theirs.argmax(-1)).sum()
            self.sums["kl"] += F.kl_div(log_q, log_t, reduction="sum", log_target=True)

    def reduce(self, over_processes: Callable[[Tensor], Tensor]) -> Scores:
        """These sums, added up over processes."""
        self.sums = {k: over_processes(v) for k, v in self.sums.items()}
        self.bins = over_processes(self.bins)
        self.per_class = None if self.per_class is None else over_processes(self.per_class)
        self.confused = None if self.confused is None else over_processes(self.confused)
        return self

    def result(self) -> dict[str, Any]:
        """Accuracy, loss (nats), ECE and the reliability bins; of a vocabulary the perplexity; F1 (of class 1 where
        there are two, else the mean over classes) and Matthews' coefficient; with a teacher, agreement and KL (nats).
        """
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
        if self.classes > VOCABULARY:
            out["perplexity"] = math.exp(min(out["loss"], 700.0))
        if self.per_class is not None and self.per_class.shape[1] <= 100:
            total, hits = self.per_class.cpu()
            out["per_class"] = (hits / total.clamp(min=1)).tolist()
        if self.confused is not None:
            out |= of_confusion(self.confused.cpu())
        if s["seen"]:
            out["agreement"] = s["agree"] / s["seen"]
            out["kl"] = s["kl"] / s["seen"]
        return out


def of_confusion(counts: Tensor) -> dict[str, float]:
    """F1 and Matthews' coefficient of ``[C * C]`` counts, label first.

    Reference: Gorodkin, Comparing two K-category assignments by a K-category correlation coefficient (2004).
    """
    classes = round(len(counts) ** 0.5)
    table = counts.view(classes, classes)
    right, given, said, n = table.diagonal(), table.sum(1), table.sum(0), table.sum()
    each = 2 * right / (given + said).clamp(min=1)
    present = (given + said) > 0
    f1 = each[1] if classes == 2 else each[present].mean() if bool(present.any()) else torch.zeros(())
    spread = (n * n - said @ said) * (n * n - given @ given)
    matthews = (n * right.sum() - said @ given) / spread.sqrt() if spread > 0 else torch.zeros(())
    return {"f1": float(f1), "matthews": float(matthews)}


class LabelScores:
    """Of any number of labels each: F1 over all decisions (micro), the share of right decisions, loss.

    Args:
        device: where the sums live.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        names = ("n", "decisions", "right", "true", "said", "hit", "nll", "seen", "agree", "kl")
        self.sums = {k: torch.zeros((), dtype=torch.float64, device=device) for k in names}

    def add(self, logits: Tensor, batch: Batch, teacher: Tensor | None, rows: tuple[int, int, int]) -> None:
        """Add rows."""
        del rows
        assert batch.targets is not None
        has, counted = batch.labelled(), batch.counted()
        scores, targets = logits[has].float(), batch.targets[has]
        said, true = scores > 0, targets > 0.5
        for name, value in (
            ("n", has.sum()), ("decisions", said.numel()), ("right", (said == true).sum()), ("true", true.sum()),
            ("said", said.sum()), ("hit", (said & true).sum()),
            ("nll", F.binary_cross_entropy_with_logits(scores, targets, reduction="sum")),
        ):  # fmt: skip
            self.sums[name] += value
        if teacher is not None:
            mine, theirs = logits[counted].float(), teacher[counted].float()
            self.sums["seen"] += mine.numel()
            self.sums["agree"] += ((mine > 0) == (theirs > 0)).sum()
            p = theirs.sigmoid()
            yes, no = F.logsigmoid(theirs) - F.logsigmoid(mine), F.logsigmoid(-theirs) - F.logsigmoid(-mine)
            self.sums["kl"] += (p * yes + (1 - p) * no).sum()

    def reduce(self, over_processes: Callable[[Tensor], Tensor]) -> LabelScores:
        """These sums, added up over processes."""
        self.sums = {k: over_processes(v) for k, v in self.sums.items()}
        return self

    def result(self) -> dict[str, Any]:
        """``f1``, ``accuracy`` and ``loss`` (nats a row); with a teacher, agreement and KL (nats a label)."""
        s = {k: float(v) for k, v in self.sums.items()}
        out = {
            "n": int(s["n"]), "accuracy": s["right"] / max(s["decisions"], 1),
            "f1": 2 * s["hit"] / max(s["true"] + s["said"], 1), "loss": s["nll"] / max(s["n"], 1),
        }  # fmt: skip
        if s["seen"]:
            out |= {"agreement": s["agree"] / s["seen"], "kl": s["kl"] / s["seen"]}
        return out


class _Kept:
    """Rows of every process, side by side, for metrics that are no sums."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = device
        self.parts: dict[str, list[Tensor]] = {}

    def keep(self, name: str, values: Tensor, rows: tuple[int, int, int]) -> None:
        start, stop, total = rows
        whole = torch.zeros(total, *values.shape[1:], dtype=torch.float64, device=values.device)
        if start < stop:
            whole[start:stop] = values.double()
        self.parts.setdefault(name, []).append(whole)

    def reduced(self, over_processes: Callable[[Tensor], Tensor]) -> None:
        self.parts = {name: [over_processes(part) for part in parts] for name, parts in self.parts.items()}

    def all(self, name: str) -> Tensor | None:
        return torch.cat(self.parts[name]).cpu() if name in self.parts else None


class NumberScores(_Kept):
    """Of numbers: Spearman's and Pearson's correlation, means over columns, and the mean squared error."""

    def add(self, logits: Tensor, batch: Batch, teacher: Tensor | None, rows: tuple[int, int, int]) -> None:
        """Add rows."""
        assert batch.targets is not None
        for name, values in (("said", logits), ("true", batch.targets), ("has", batch.labelled()[:, None])):
            self.keep(name, values, rows)
        if teacher is not None:
            self.keep("teacher", teacher, rows)

    def reduce(self, over_processes: Callable[[Tensor], Tensor]) -> NumberScores:
        """The rows of all processes."""
        self.reduced(over_processes)
        return self

    def result(self) -> dict[str, Any]:
        """``spearman``, ``pearson`` and ``loss``, the mean squared error; with a teacher, ``agreement``."""
        said, true, has = self.all("said"), self.all("true"), self.all("has")
        if said is None or true is None or has is None:
            return {"n": 0, "spearman": 0.0, "pearson": 0.0, "loss": 0.0}
        known = has[:, 0] > 0
        out = {
            "n": int(known.sum()), "spearman": correlation(ranks(said[known]), ranks(true[known])),
            "pearson": correlation(said[known], true[known]),
            "loss": float((said[known] - true[known]).square().sum(-1).mean()) if bool(known.any()) else 0.0,
        }  # fmt: skip
        theirs = self.all("teacher")
        if theirs is not None:
            out["agreement"] = correlation(ranks(said), ranks(theirs))
        return out


class EmbeddingScores(_Kept):
    """Of embeddings, against the teacher's: order of similarities, neighbours, direction."""

    def add(self, logits: Tensor, batch: Batch, teacher: Tensor | None, rows: tuple[int, int, int]) -> None:
        """Add rows."""
        del batch
        self.keep("mine", logits, rows)
        if teacher is not None:
            self.keep("teacher", teacher, rows)

    def reduce(self, over_processes: Callable[[Tensor], Tensor]) -> EmbeddingScores:
        """The rows of all processes."""
        self.reduced(over_processes)
        return self

    def result(self) -> dict[str, Any]:
        """Metrics of at most :data:`MOST` texts.

        ``spearman`` of the cosine similarities of all pairs with the teacher's, ``recall``: share of the teacher's
        ten nearest neighbours of a text that are among the student's, and ``loss``, the mean squared difference of
        the similarities. Without a teacher each is compared with itself.
        """
        mine = self.all("mine")
        if mine is None:
            return {"n": 0, "spearman": 0.0, "recall": 0.0, "loss": 0.0}
        theirs = self.all("teacher")
        some = torch.linspace(0, len(mine) - 1, min(len(mine), MOST)).long()
        a, b = (F.normalize(x[some], dim=-1) for x in (mine, mine if theirs is None else theirs))
        a, b = a @ a.T, b @ b.T
        pairs = torch.triu_indices(len(some), len(some), 1)
        x, y = a[pairs[0], pairs[1]], b[pairs[0], pairs[1]]
        k = min(NEIGHBOURS, len(some) - 1)
        near = [s.fill_diagonal_(-torch.inf).topk(k).indices if k > 0 else torch.zeros(0, 0) for s in (a, b)]
        same = (near[0][:, :, None] == near[1][:, None, :]).any(-1).double().mean() if k > 0 else torch.zeros(())
        return {
            "n": len(mine), "spearman": correlation(ranks(x[:, None]), ranks(y[:, None])) if len(x) > 1 else 0.0,
            "recall": float(same), "loss": float((x - y).square().mean()) if len(x) else 0.0,
        }  # fmt: skip


class RankingScores:
    """Of the scores of an answer and another, against the teacher's: how often the order is the same.

    Args:
        device: where the sums live.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.sums = {k: torch.zeros((), dtype=torch.float64, device=device) for k in ("n", "right", "square")}

    def add(self, logits: Tensor, batch: Batch, teacher: Tensor | None, rows: tuple[int, int, int]) -> None:
        """Add rows; without a teacher the first answer is the right one."""
        del rows
        counted = batch.counted()
        mine = logits[counted].double()
        theirs = torch.tensor([1.0, 0.0], device=mine.device).expand_as(mine) if teacher is None else teacher[counted]
        gaps = mine[:, 0] - mine[:, 1], theirs[:, 0].double() - theirs[:, 1]
        self.sums["n"] += counted.sum()
        self.sums["right"] += (gaps[0].sign() == gaps[1].sign()).sum()
        self.sums["square"] += (gaps[0] - gaps[1]).square().sum()

    def reduce(self, over_processes: Callable[[Tensor], Tensor]) -> RankingScores:
        """These sums, added up over processes."""
        self.sums = {k: over_processes(v) for k, v in self.sums.items()}
        return self

    def result(self) -> dict[str, Any]:
        """``accuracy``, and ``loss``: the mean squared difference of the margins."""
        n = max(float(self.sums["n"]), 1.0)
        return {
            "n": int(self.sums["n"]), "accuracy": float(self.sums["right"]) / n,
            "loss": float(self.sums["square"]) / n,
        }  # fmt: skip


def ranks(x: Tensor) -> Tensor:
    """Of each column of ``[N, C]``, the rank of every value; equal ones share the mean of theirs."""
    from scipy.stats import rankdata

    return torch.from_numpy(rankdata(x.numpy(), axis=0))


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's correlation of the columns of ``[N, C]``, their mean; 0 where a column is constant."""
    x, y = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    size = (x.square().sum(0) * y.square().sum(0)).sqrt()
    return float(torch.where(size > 0, (x * y).sum(0) / size.clamp(min=1e-30), 0.0).mean()) if len(x) else 0.0


METRICS: dict[str, Callable[[torch.device], Metrics]] = {
    "classes": Scores,
    "multi-label": LabelScores,
    "regression": NumberScores,
    "embedding": EmbeddingScores,
    "ranking": RankingScores,
}
"""By what the labels of a batch are."""
