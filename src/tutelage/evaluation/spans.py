"""Metrics of tags that mark spans of words, such as names: B-PER, I-PER, O."""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from tutelage.data.batch import IGNORE, WINDOW_IDS, Batch
from tutelage.errors import require
from tutelage.evaluation.metrics import Scores

PREFIXES = ("B", "I", "E", "L", "S", "U")
"""Of the tags of BIO, IOBES and BILOU; ``O`` is a word outside of all spans."""


def are_span_tags(names: Sequence[str]) -> bool:
    """Whether these are tags of spans: ``O``, or a prefix, a hyphen and the type; some begin spans."""
    spans = [name for name in names if name != "O"]
    return any(name.startswith("B-") for name in spans) and all(
        name[:1] in PREFIXES and name[1:2] == "-" for name in spans
    )


class SpanScores(Scores):
    """Those of a classifier of words, and precision, recall and F1 of whole spans. ``f1`` is that of spans.

    The words of a text that was cut into windows are put together again first.
    """

    def __init__(self, device: torch.device | str = "cpu", tag_names: Sequence[str] = ()) -> None:
        super().__init__(device)
        require("seqeval", "text", "the F1 of spans")
        self.tag_names = list(tag_names)
        self.parts: list[Tensor] = []

    def add(self, logits: Tensor, batch: Batch, teacher: Tensor | None, rows: tuple[int, int, int]) -> None:
        """Add the words of texts."""
        super().add(logits, batch, teacher, rows)
        start, stop, total = rows
        of_all = torch.zeros(3, total, batch.labels.shape[1], dtype=torch.float64, device=logits.device)
        if start < stop:
            ids = torch.arange(start, stop, device=logits.device) if batch.ids is None else batch.ids
            of_all[0, start:stop] = ids[:, None].double()
            of_all[1, start:stop] = logits.argmax(-1) + 1.0
            of_all[2, start:stop] = (batch.labels + 1.0).masked_fill(batch.labels == IGNORE, 0)
        self.parts.append(of_all)

    def reduce(self, over_processes: Callable[[Tensor], Tensor]) -> Self:
        """The sums and texts of all processes."""
        super().reduce(over_processes)
        self.parts = [over_processes(part) for part in self.parts]
        return self

    def result(self) -> dict[str, Any]:
        """Those of :class:`Scores`, with ``span_f1``, ``span_precision`` and ``span_recall``, micro-averages.

        Spans are read from tags as conlleval does. Each figure is 0 where there is no span.

        Reference: Tjong Kim Sang, De Meulder, Introduction to the CoNLL-2003 Shared Task (2003), section 4.
        """
        from seqeval.metrics.sequence_labeling import precision_recall_fscore_support

        texts: dict[int, list[tuple[int, list[str], list[str]]]] = {}
        for part in self.parts:
            for ids, predicted, true in part.long().cpu().unbind(1):
                words = true > 0
                if bool(words.any()):
                    window, text = divmod(int(ids[0]), WINDOW_IDS)
                    tags = [[self.tag_names[i - 1] for i in side[words].tolist()] for side in (true, predicted)]
                    texts.setdefault(text, []).append((window, tags[0], tags[1]))
        out = super().result()
        if not texts:
            return out
        ordered = [sorted(windows) for windows in texts.values()]
        true_tags = [[tag for _, tags, _ in windows for tag in tags] for windows in ordered]
        found_tags = [[tag for _, _, tags in windows for tag in tags] for windows in ordered]
        precision, recall, f1, _ = precision_recall_fscore_support(
            true_tags, found_tags, average="micro", zero_division=0
        )
        return out | {
            "f1": float(f1), "span_f1": float(f1), "span_precision": float(precision), "span_recall": float(recall),
        }  # fmt: skip
