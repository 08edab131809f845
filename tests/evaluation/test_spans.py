"""Spans of words are scored as seqeval does, whatever windows and processes the texts were cut into."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tutelage.data import Batch
from tutelage.data.batch import IGNORE, WINDOW_IDS
from tutelage.evaluation.spans import SpanScores, are_span_tags

seqeval = pytest.importorskip("seqeval.metrics.sequence_labeling")
NAMES = ["O", "B-A", "I-A", "B-C", "I-C"]


def test_which_tags_are_of_spans() -> None:
    assert are_span_tags(NAMES)
    assert are_span_tags(["B-A", "I-A", "L-A", "U-A", "O"])
    assert not are_span_tags(["NOUN", "VERB"])
    assert not are_span_tags(["B-A", "NOUN"])
    assert not are_span_tags(["O", "I-A"])
    assert not are_span_tags([])


def test_spans_over_the_edges_of_windows_and_processes_count_once() -> None:
    generator = torch.Generator().manual_seed(0)
    true = torch.randint(0, 5, (6, 12), generator=generator)
    predicted = torch.where(torch.rand(6, 12, generator=generator) < 0.6, true, true.roll(1, 1))
    expected = seqeval.precision_recall_fscore_support(
        *([[NAMES[i] for i in row] for row in side.tolist()] for side in (true, predicted)), average="micro"
    )
    ids = torch.arange(6)
    windows = [(true[:, :7], predicted[:, :7], ids), (true[:, 7:], predicted[:, 7:], ids + WINDOW_IDS)]
    scores = [SpanScores("cpu", NAMES), SpanScores("cpu", NAMES)]  # of two processes
    for labels, found, numbers in reversed(windows):
        padded = F.pad(labels, (1, 2), value=IGNORE)
        logits = F.one_hot(F.pad(found, (1, 2)), 5) * 9.0
        batch = Batch(inputs=logits, labels=padded, ids=numbers)
        for process, (start, stop) in enumerate(((0, 4), (4, 6))):
            part = batch.rows(start, stop)
            scores[process].add(logits[start:stop], part, None, (start, stop, 6))
    others = iter([*scores[1].sums.values(), *scores[1].parts])
    result = scores[0].reduce(lambda mine: mine + next(others)).result()
    assert (result["span_precision"], result["span_recall"], result["f1"]) == pytest.approx(expected[:3])
    assert result["accuracy"] == pytest.approx(float((true == predicted).double().mean()))
    assert 0 < result["f1"] < result["accuracy"]


def test_predictions_without_a_span_score_zero_without_a_warning() -> None:
    scores = SpanScores("cpu", NAMES)
    labels = torch.zeros(2, 3, dtype=torch.long)
    scores.add(torch.eye(5)[labels], Batch(inputs=labels, labels=labels), None, (0, 2, 2))
    assert scores.result()["f1"] == 0
