"""Metrics are those of scikit-learn."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from sklearn import metrics

from tutelage.data import Batch
from tutelage.data.batch import IGNORE
from tutelage.evaluation.metrics import NumberScores, confusion_metrics


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


def test_figures_of_regression_are_those_of_scipy_and_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(40, 2, generator=generator, dtype=torch.float64) * torch.tensor([1e5, 1e-3]) + 7
    predicted = true + torch.randn(40, 2, generator=generator, dtype=torch.float64) * torch.tensor([3e4, 1e-3])
    labels = torch.zeros(40, dtype=torch.long)
    labels[::5] = IGNORE
    scores = NumberScores()
    for rows in (slice(0, 25), slice(25, 40)):
        batch = Batch(inputs=predicted[rows], labels=labels[rows], targets=true[rows], task="regression")
        scores.add(predicted[rows], batch, None, (0, len(batch.labels), len(batch.labels)))
    figures, known = scores.result(), labels != IGNORE
    x, y = predicted[known].numpy(), true[known].numpy()
    expected = {
        "spearman": [stats.spearmanr(x[:, i], y[:, i]).statistic for i in (0, 1)],
        "pearson": [stats.pearsonr(x[:, i], y[:, i]).statistic for i in (0, 1)],
        "rmse": (metrics.mean_squared_error(y, x, multioutput="raw_values") ** 0.5).tolist(),
        "mae": metrics.mean_absolute_error(y, x, multioutput="raw_values").tolist(),
        "r2": metrics.r2_score(y, x, multioutput="raw_values").tolist(),
    }
    for name, values in expected.items():
        assert figures["per_target"][name] == pytest.approx(values, rel=1e-9)
        assert figures[name] == pytest.approx(sum(values) / 2, rel=1e-9)
    assert figures["n"] == 32
