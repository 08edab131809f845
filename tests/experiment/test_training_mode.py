"""What fails in training mode only is found before training, in one sentence, by run and doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from support.bad_input import call, check_message
from support.bad_input_files import images
from tutelage.api import distill
from tutelage.data import Batch
from tutelage.data.loader import LoaderBatches, PlannedBatches
from tutelage.errors import CapabilityError
from tutelage.experiment.checks import check_training_mode, smallest_batch

RECIPE = """
data: {{source: imagefolder, path: pics, size: {size}, validation: 0.2}}
teacher: {{model: mlp, train: {{steps: 1}}}}
student: {{model: torchvision:{model}}}
method: logit
train: {{steps: 1, batch_size: {batch}, accumulate: {accumulate}}}
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    images(tmp_path / "pics", {"cat": 12, "dog": 12})


@pytest.mark.parametrize(("model", "size", "batch", "accumulate", "says"), [
    ("resnet18", 32, 1, 1, ["ResNet", "batch of 1 sample", "more than 1 value per channel", "batch_size"]),
    ("resnet18", 32, 4, 4, ["ResNet", "batch of 1 sample", "train.accumulate"]),
    ("inception_v3, options: {init_weights: false}", 80, 4, 1, ["Inception", "batch of 2 samples", "data.size"]),
])  # fmt: skip
@pytest.mark.parametrize("command", ["run", "doctor"])
def test_training_mode_is_tried_before_training(
    command: str, model: str, size: int, batch: int, accumulate: int, says: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    Path("r.yaml").write_text(RECIPE.format(model=model, size=size, batch=batch, accumulate=accumulate))
    assert call([command, "r.yaml"]) != 0
    captured = capsys.readouterr()
    if command == "run":
        check_message(captured.err, says)
        assert "epoch" not in captured.out
    else:
        assert "Traceback" not in captured.err
        text = " ".join((captured.out + captured.err).split())
        assert all(part in text for part in says), text


def model() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))


def loader(rows: int, batch: int, **more: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(rows, 4), torch.arange(rows) % 2), batch_size=batch, **more)


def test_a_last_batch_of_one_row_of_a_loader_is_found() -> None:
    with pytest.raises(CapabilityError, match="batch of 1 sample: Expected more than 1 value"):
        distill(model(), model(), loader(9, 4), eval_data=loader(8, 4), epochs=1, verbose=False)
    assert smallest_batch(LoaderBatches(loader(9, 4, drop_last=True), 0), 1) == 2
    assert smallest_batch(LoaderBatches(loader(10, 4), 0), 1) == 2
    assert smallest_batch(LoaderBatches(loader(10, 4), 0), 2) == 1


def test_the_check_changes_neither_the_model_nor_the_random_state() -> None:
    student = model().eval()
    student[2].train()
    before = {name: x.clone() for name, x in student.state_dict().items()}
    batch, batches = Batch(torch.randn(2, 4), torch.zeros(2).long()), LoaderBatches(loader(8, 4), 0)
    state = torch.get_rng_state()
    check_training_mode(student, batch, "student", batches, 1)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(x, before[name]) for name, x in student.state_dict().items())
    assert [module.training for module in student] == [False, False, True, False, False]


def test_evaluation_data_of_one_row_is_no_small_training_batch() -> None:
    result = distill(model(), model(), loader(8, 4), eval_data=loader(1, 1), epochs=1, verbose=False)
    assert result.summary["teacher"]["n"] == 1


def test_planned_batches_join_a_single_last_row() -> None:
    class Rows:
        ids, is_augmented = torch.arange(9), False

        def __len__(self) -> int:
            return 9

        def fetch(self, rows: torch.Tensor, views: torch.Tensor | None = None) -> Batch:
            return Batch(torch.zeros(len(rows), 4), torch.zeros(len(rows)).long())

    assert smallest_batch(PlannedBatches(Rows(), 4, 0), 1) == 2
    assert smallest_batch(PlannedBatches(Rows(), 1, 0), 1) == 1
