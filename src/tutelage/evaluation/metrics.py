"""Metrics for each kind of label, accumulated as sums over positions and processes."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from tutelage.data.batch import IGNORE, Batch
from tutelage.losses.logits import divergence, weighted

BINS = 15
"""Bins of the reliability diagram and of the calibration error (Guo et al., 2017)."""
VOCABULARY = 1_000
"""More classes are a vocabulary, as are the tokens of an output head: no per-class figures, and a perplexity."""
CONFUSED = 200
"""Up to so many classes, a confusion matrix is accumulated, for F1 and Matthews' coefficient."""
NEIGHBOURS = 10
MOST = 4_000
"""The maximum number of embeddings that are compared pairwise."""


class Metrics:
    """Accumulates the metrics of a model, as sums on ``device``."""

    names: tuple[str, ...] = ()
    """Of the sums."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = device
        self.sums = {k: torch.zeros((), dtype=torch.float64, device=device) for k in self.names}

    def add(self, logits: Tensor, batch: Batch, teacher: Tensor | None, rows: tuple[int, int, int]) -> None:
        """Add rows of a batch.

        Args:
            logits: ``[B, ..., C]``.
            batch: those rows.
            teacher: the teacher's logits for them.
            rows: their position in the full batch: start, stop and the full batch's length.
        """
        raise NotImplementedError

    def reduce(self, over_processes: Callable[[Tensor], Tensor]) -> Self:
        """The sums over all processes."""
        self.sums = {k: over_processes(v) for k, v in self.sums.items()}
        return self

    def result(self) -> dict[str, Any]:
        """The metrics by name."""
        raise NotImplementedError

    def numbers(self) -> dict[str, float]:
        """The sums that are scalars."""
        return {k: float(self.sums[k]) for k in self.names}


class Scores(Metrics):
    """Running sums of every metric of a classifier."""

    names = ("n", "correct", "nll", "seen", "agree", "kl")

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__(device)
        self.sums["bins"] = torch.zeros(3, BINS, dtype=torch.float64, device=device)
        self.classes, self.has_tokens = 0, False

    @property
    def of_vocabulary(self) -> bool:
        """Whether the classes are tokens of a vocabulary."""
        return self.has_tokens or self.classes > VOCABULARY

    def add(self, logits: Tensor, batch: Batch, teacher: Tensor | None, rows: tuple[int, int, int]) -> None:
        """Add positions."""
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
        self.sums["bins"].index_add_(1, which, ones)
        self.classes = classes = logits.shape[-1]
        zeros = partial(torch.zeros, dtype=torch.float64, device=logits.device)
        if not self.of_vocabulary:
            per_class = self.sums.setdefault("per_class", zeros(2, classes))
            per_class.index_add_(1, targets, torch.stack([torch.ones_like(confidence), right.double()]))
        if classes <= CONFUSED and not self.of_vocabulary:
            confused = self.sums.setdefault("confused", zeros(classes * classes))
            confused.index_add_(0, targets * classes + predicted, torch.ones_like(confidence))
        if teacher is not None:
            mine, theirs = logits[counted], teacher.flatten(0, -2)[counted]
            log_q, log_t = F.log_softmax(mine, dim=-1), F.log_softmax(theirs, dim=-1)
            self.sums["seen"] += counted.sum()
            self.sums["agree"] += (mine.argmax(-1) == theirs.argmax(-1)).sum()
            self.sums["kl"] += divergence(log_t, log_q).sum()

    def result(self) -> dict[str, Any]:
        """Accuracy, loss (nats), ECE, reliability bins, F1 and Matthews' coefficient; perplexity for a vocabulary.

        F1 is that of class 1 for two classes, else the mean over classes. With a teacher: agreement and KL (nats).
        """
        s = self.numbers()
        n = max(s["n"], 1.0)
        count, confidence, right = self.sums["bins"].cpu()
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
        if self.of_vocabulary:
            out["perplexity"] = math.exp(min(out["loss"], 700.0))
        if "per_class" in self.sums and self.classes <= 100:
            total, hits = self.sums["per_class"].cpu()
            out["per_class"] = (hits / total.clamp(min=1)).tolist()
        if "confused" in self.sums:
            out |= confusion_metrics(self.sums["confused"].cpu())
        return out | _against_teacher(s)


def _against_teacher(sums: dict[str, float]) -> dict[str, float]:
    return {name: sums[part] / sums["seen"] for name, part in (("agreement", "agree"), ("kl", "kl")) if sums["seen"]}


def confusion_metrics(counts: Tensor) -> dict[str, float]:
    """F1 and Matthews' coefficient from ``[C * C]`` counts, label first.

    Reference: Gorodkin, Comparing two K-category assignments by a K-category correlation coefficient (2004).
    """
    classes = round(len(counts) ** 0.5)
    table = counts.view(classes, classes)
    right, true, predicted, n = table.diagonal(), table.sum(1), table.sum(0), table.sum()
    each = 2 * right / (true + predicted).clamp(min=1)
    present = (true + predicted) > 0
    f1 = each[1] if classes == 2 else each[present].mean() if bool(present.any()) else torch.zeros(())
    spread = (n * n - predicted @ predicted) * (n * n - true @ true)
    matthews = (n * right.sum() - predicted @ true) / spread.sqrt() if spread > 0 else torch.zeros(())
    return {"f1": float(f1), "matthews": float(matthews)}


class LabelScores(Metrics):
    """Multi-label metrics: micro F1 over all decisions, the share of right decisions, and the loss."""

    names = ("n", "decisions", "right", "true", "predicted", "hit", "nll", "seen", "agree", "kl")

    def add(self, logits: Tensor, batch: Batch, teacher: Tensor | None, rows: tuple[int, int, int]) -> None:
        """Add rows."""
        assert batch.targets is not None
        has, counted = batch.labelled(), batch.counted()
        scores, targets = logits[has].float(), batch.targets[has]
        predicted, true = scores > 0, targets > 0.5
        for name, value in (
            ("n", has.sum()), ("decisions", predicted.numel()), ("right", (predicted == true).sum()),
            ("true", true.sum()), ("predicted", predicted.sum()), ("hit", (predicted & true).sum()),
            ("nll", F.binary_cross_entropy_with_logits(scores, targets, reduction="sum")),
        ):  # fmt: skip
            self.sums[name] += value
        if teacher is not None:
            mine, theirs = logits[counted].float(), teacher[counted].float()
            self.sums["seen"] += mine.numel()
            self.sums["agree"] += ((mine > 0) == (theirs > 0)).sum()
            p = theirs.sigmoid()
            yes, no = F.logsigmoid(theirs) - F.logsigmoid(mine), F.logsigmoid(-theirs) - F.logsigmoid(-mine)
            self.sums["kl"] += (weighted(p, yes) + weighted(1 - p, no)).sum()

    def result(self) -> dict[str, Any]:
        """``f1``, ``accuracy`` and ``loss`` (nats a row); with a teacher, agreement and KL (nats a label)."""
        s = self.numbers()
        out = {
            "n": int(s["n"]), "accuracy": s["right"] / max(s["decisions"], 1),
            "f1": 2 * s["hit"] / max(s["true"] + s["predicted"], 1), "loss": s["nll"] / max(s["n"], 1),
        }  # fmt: skip
        return out | _against_teacher(s)


class _AllRows(Metrics):
    """The rows of every process, for metrics that are not sums."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__(device)
        self.parts: dict[str, list[Tensor]] = {}

    def store(self, name: str, values: Tensor, rows: tuple[int, int, int]) -> None:
        start, stop, total = rows
        rows_of_all = torch.zeros(total, *values.shape[1:], dtype=torch.float64, device=values.device)
        if start < stop:
            rows_of_all[start:stop] = values.double()
        self.parts.setdefault(name, []).append(rows_of_all)

    def reduce(self, over_processes: Callable[[Tensor], Tensor]) -> Self:
        """The rows of all processes."""
        self.parts = {name: [over_processes(part) for part in parts] for name, parts in self.parts.items()}
        return self

    def all(self, name: str) -> Tensor | None:
        return torch.cat(self.parts[name]).cpu() if name in self.parts else None


class NumberScores(_AllRows):
    """Regression metrics: correlations, errors and the explained share of the variance, means over targets."""

    def add(self, logits: Tensor, batch: Batch, teacher: Tensor | None, rows: tuple[int, int, int]) -> None:
        """Add rows."""
        assert batch.targets is not None
        for name, values in (("predicted", logits), ("true", batch.targets), ("has", batch.labelled()[:, None])):
            self.store(name, values, rows)
        if teacher is not None:
            self.store("teacher", teacher, rows)

    def result(self) -> dict[str, Any]:
        """``spearman``, ``pearson``, ``rmse``, ``mae``, ``r2`` and ``loss``, the mean squared error, over labels.

        Errors are in the targets' units. ``r2`` is 1 - error / variance, 0 for a constant target. With a teacher
        there is ``agreement``, the rank correlation with it. With several targets ``per_target`` has the figures of
        each.
        """
        predicted, true, has = self.all("predicted"), self.all("true"), self.all("has")
        if predicted is None or true is None or has is None or not bool((has > 0).any()):
            return {"n": 0, **dict.fromkeys(("spearman", "pearson", "rmse", "mae", "r2", "loss"), 0.0)}
        known = has[:, 0] > 0
        x, y = predicted[known], true[known]
        each = regression_figures(x, y)
        out: dict[str, Any] = {"n": len(x), **{name: float(value.mean()) for name, value in each.items()}}
        out["loss"] = float((x - y).square().mean())
        if x.shape[1] > 1:
            out["per_target"] = {name: value.tolist() for name, value in each.items()}
        theirs = self.all("teacher")
        if theirs is not None:
            out["agreement"] = correlation(ranks(predicted), ranks(theirs))
        return out


def regression_figures(predicted: Tensor, true: Tensor) -> dict[str, Tensor]:
    """The figures of each column of ``[N, C]``, ``[C]`` each: correlations, errors in its units, and R^2."""
    error, spread = predicted - true, (true - true.mean(0)).square().mean(0)
    square = error.square().mean(0)
    return {
        "spearman": correlations(ranks(predicted), ranks(true)),
        "pearson": correlations(predicted, true),
        "rmse": square.sqrt(),
        "mae": error.abs().mean(0),
        "r2": torch.where(spread > 0, 1 - square / spread.clamp(min=1e-30), 0.0),
    }


class EmbeddingScores(_AllRows):
    """Embedding metrics against the teacher: order of the similarities, nearest neighbours, similarity error."""

    def add(self, logits: Tensor, batch: Batch, teacher: Tensor | None, rows: tuple[int, int, int]) -> None:
        """Add rows."""
        self.store("mine", logits, rows)
        if teacher is not None:
            self.store("teacher", teacher, rows)

    def result(self) -> dict[str, Any]:
        """Metrics over at most :data:`MOST` texts.

        ``spearman``: correlation of all pairs' cosine similarities with the teacher's. ``recall``: share of a text's
        ten nearest neighbours for the teacher that are among the student's. ``loss``: the mean squared difference of
        the similarities. Without a teacher, the embeddings are compared with themselves.
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


class RankingScores(Metrics):
    """Ranking metrics: how often student and teacher order two answers in the same way."""

    names = ("n", "right", "square")

    def add(self, logits: Tensor, batch: Batch, teacher: Tensor | None, rows: tuple[int, int, int]) -> None:
        """Add rows; without a teacher the first answer is the correct one."""
        counted = batch.counted()
        mine = logits[counted].double()
        theirs = torch.tensor([1.0, 0.0], device=mine.device).expand_as(mine) if teacher is None else teacher[counted]
        gaps = mine[:, 0] - mine[:, 1], theirs[:, 0].double() - theirs[:, 1]
        self.sums["n"] += counted.sum()
        self.sums["right"] += (gaps[0].sign() == gaps[1].sign()).sum()
        self.sums["square"] += (gaps[0] - gaps[1]).square().sum()

    def result(self) -> dict[str, Any]:
        """``accuracy``, and ``loss``: the mean squared difference of the margins."""
        s = self.numbers()
        n = max(s["n"], 1.0)
        return {"n": int(s["n"]), "accuracy": s["right"] / n, "loss": s["square"] / n}


def ranks(x: Tensor) -> Tensor:
    """The rank of every value within its column of ``[N, C]``; equal values share their mean rank."""
    from scipy.stats import rankdata

    return torch.from_numpy(rankdata(x.numpy(), axis=0))


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's correlation of the columns of ``[N, C]``, averaged; 0 for a constant column."""
    return float(correlations(x, y).mean()) if len(x) else 0.0


def correlations(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's correlation of each column of ``[N, C]``; 0 for a constant one."""
    x, y = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    size = (x.square().sum(0) * y.square().sum(0)).sqrt()
    return torch.where(size > 0, (x * y).sum(0) / size.clamp(min=1e-30), 0.0)


METRICS: dict[str, Callable[[torch.device], Metrics]] = {
    "classes": Scores,
    "multi-label": LabelScores,
    "regression": NumberScores,
    "embedding": EmbeddingScores,
    "ranking": RankingScores,
}
"""By the kind of a batch's labels."""
