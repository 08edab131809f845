"""Seeds whose students are equal to the bit are one seed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, TensorDataset

import tutelage
from tutelage.data import LoaderBatches, RankSlice
from tutelage.reports import verdict
from tutelage.reports.results import final_table


def data() -> TensorDataset:
    g = torch.Generator().manual_seed(0)
    y = torch.arange(48) % 4
    x = torch.randn(48, 8, generator=g)
    x[torch.arange(48), y] += 4
    return TensorDataset(x, y)


@pytest.mark.parametrize("shuffle", [False, True])
def test_equal_seeds_have_no_interval(shuffle: bool, tmp_path: Path) -> None:
    test = DataLoader(data(), batch_size=16)
    teacher = nn.Linear(8, 4, bias=False)
    with torch.no_grad():
        teacher.weight.copy_(torch.eye(4, 8))
    run = tutelage.distill(
        teacher, nn.Linear(8, 4), DataLoader(data(), batch_size=16, shuffle=shuffle), eval_data=test, epochs=2,
        seeds=(0, 1), out=tmp_path / "run", verbose=False,
    )  # fmt: skip
    gain, text = run.summary["gain"]["best"], verdict(run.summary)
    if shuffle:
        assert run.summary["seeds"] == [0, 1]
        assert gain["low"] is not None
        assert "2 seeds" in text
    else:
        assert (run.summary["seeds"], run.summary["repeated_seeds"]) == ([0], [1])
        assert gain["low"] is None
        assert "one seed: no interval; seed 1 gave identical weights" in text
        assert "±" not in str(final_table(run.summary))


def test_a_seed_reaches_samplers_of_batches_and_of_processes() -> None:
    rows = TensorDataset(torch.arange(32.0)[:, None], torch.zeros(32, dtype=torch.long))
    own = RandomSampler(rows, generator=torch.Generator())
    loaders = [
        DataLoader(rows, batch_sampler=BatchSampler(own, 8, False)),
        DataLoader(rows, batch_size=8, sampler=DistributedSampler(rows, num_replicas=1, rank=0)),
    ]
    for loader in loaders:
        orders = {
            (seed, epoch): torch.cat([b.inputs for (b,) in LoaderBatches(loader, seed).epoch(epoch, RankSlice())])  # type: ignore[misc]
            for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0))
        }
        again = torch.cat([b.inputs for (b,) in LoaderBatches(loader, 0).epoch(0, RankSlice())])  # type: ignore[misc]
        assert torch.equal(orders[0, 0], again)
        assert not torch.equal(orders[0, 0], orders[0, 1])
        assert not torch.equal(orders[0, 0], orders[1, 0])


def test_a_correlation_is_no_percentage_and_no_ratio() -> None:
    def arm(value: float) -> dict[str, object]:
        return {"best": {"spearman": {"mean": value}}, "last": {"spearman": {"mean": value}}}

    summary = {
        "metric": "spearman", "uses_teacher": True, "teacher": {"spearman": -0.196}, "capacity_ratio": 0.5,
        "students": {"baseline": arm(-0.2), "distilled": arm(-0.186)}, "seeds": [0],
        "gain": {"best": {"mean": 0.014, "low": None, "high": None}},
    }  # fmt: skip
    text = verdict(summary)
    assert "%" not in text
    assert "keeps" not in text
    assert text.startswith("Distilled Spearman, x100 -18.6 against baseline Spearman, x100 -20.0: +1.4 points")
    assert "the teacher has -19.6" in text
