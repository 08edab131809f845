"""Gradient boosting into a network: scikit-learn's histogram version as the teacher of a small MLP, on two tables.

``python benchmarks/trees.py`` writes ``results/trees.json``: accuracy of teacher, student alone and distilled student
over five seeds, the paired gain with its 95 % interval, and predictions a second on one thread, the two models taking
turns.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits, make_classification
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import tutelage
from tutelage.methods import LogitMethod

RESULTS = Path(__file__).resolve().parent.parent / "results" / "trees.json"
SEEDS = (0, 1, 2, 3, 4)
ROUNDS = 15


def tables() -> dict[str, tuple[Any, Any, int]]:
    """Features, labels and epochs of each table."""
    digits = load_digits()
    table, labels = make_classification(
        50_000, n_features=20, n_informative=12, n_classes=5, n_clusters_per_class=3, class_sep=0.8, flip_y=0.1,
        random_state=0,
    )  # fmt: skip
    return {"digits": (digits.data, digits.target, 40), "table": (table, labels, 8)}


def per_second(predict: dict[str, Callable[[], object]], rows: int) -> dict[str, float]:
    """Rows a second of each model: the median over rounds in which the models take turns."""
    times: dict[str, list[float]] = {name: [] for name in predict}
    for _ in range(ROUNDS):
        for name, run in predict.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: round(rows / statistics.median(each)) for name, each in times.items()}


def measure(x: Any, y: Any, epochs: int, folder: Path) -> dict[str, Any]:
    """The figures of one table."""
    x, x_test, y, y_test = train_test_split(x, y, test_size=0.25, random_state=0, stratify=y)
    scaler = StandardScaler().fit(x)
    x, x_test = (scaler.transform(part).astype(np.float32) for part in (x, x_test))
    trees = HistGradientBoostingClassifier(random_state=0).fit(x, y)
    classes = int(y.max()) + 1

    def student() -> nn.Module:
        return nn.Sequential(nn.Linear(x.shape[1], 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(),
                             nn.Linear(128, classes))  # fmt: skip

    train, test = (TensorDataset(torch.from_numpy(a), torch.from_numpy(b)) for a, b in ((x, y), (x_test, y_test)))
    done = tutelage.distill(
        trees, student, DataLoader(train, batch_size=64 if len(x) < 5_000 else 512, shuffle=True),
        eval_data=DataLoader(test, batch_size=1_000), method=LogitMethod(temperature=2.0, alpha=0.7), epochs=epochs,
        lr=3e-3, seeds=SEEDS, out=folder, verbose=False,
    )  # fmt: skip
    network, rows = done.student.eval(), torch.from_numpy(x_test)
    with torch.no_grad():
        rates = per_second(
            {"trees": lambda: trees.predict_proba(x_test), "network": lambda: network(rows).softmax(1)}, len(rows)
        )
    summary = done.summary
    return {
        "rows": {"train": len(x), "test": len(x_test)},
        "epochs": epochs,
        "teacher": summary["teacher"]["accuracy"],
        **{arm: summary["students"][arm]["last"]["accuracy"] for arm in ("baseline", "distilled")},
        "gain": summary["gain"]["last"],
        "rows_per_second": rates | {"ratio": round(rates["network"] / rates["trees"], 1)},
    }


def main() -> None:
    """Measure both tables."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        results = {name: measure(*given, Path(folder) / name) for name, given in tables().items()}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
