"""Metrics are those of scikit-learn."""

from __future__ import annotations

import pytest
import torch

from tutelage.evaluation.metrics import confusion_metrics


def test_metrics_of_a_confusion_are_those_of_scikit_learn() -> None:
    from sklearn.metrics import f1_score, matthews_corrcoef

    torch.manual_seed(1)
    for classes in (2, 5):
        labels, said = torch.randint(classes, (80,)), torch.randint(classes, (80,))
        said[:40] = labels[:40]
        found = confusion_metrics(torch.bincount(labels * classes + said, minlength=classes**2).double())
        average = "binary" if classes == 2 else "macro"
        assert found["f1"] == pytest.approx(f1_score(labels, said, average=average))
        assert found["matthews"] == pytest.approx(matthews_corrcoef(labels, said))
