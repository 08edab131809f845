"""The ImageNet recipe, whose full run nobody waits for, must not rot: a few steps of it on generated image files."""

from pathlib import Path

import pytest
import torch

from tutelage import api
from tutelage.config import load_recipe
from tutelage.experiment.recipe_source import load_data
from tutelage.models import load_model
from tutelage.progress import Terminal
from tutelage.taps import Needs, observe

RECIPE = Path(__file__).parents[2] / "recipes" / "imagenet-resnet34-resnet18.yaml"
SMALL = [
    "data.size=32", "data.workers=0", "data.validation=0.2",
    "train.steps=2", "train.batch_size=8", "train.schedule=constant",
    "teacher.options.weights=null", "teacher.train.steps=30", "teacher.train.optimizer={kind: adam, lr: 0.001}",
]  # fmt: skip


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The recipe cut down to a folder of three colours, which thirty steps are enough to tell apart."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("imagenet")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 20), ("test", 6)):
        for channel, name in enumerate(("blue-first", "green-second", "red-third")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(0, 60, (40 + i, 48, 3), generator=generator, dtype=torch.uint8)
                pixels[..., channel] += 190
                Image.fromarray(pixels.numpy()).save(folder / split / name / f"{i}.png")
    return [f"data.path={folder}", *SMALL]


def test_hyperparameters_are_those_that_were_published() -> None:
    recipe = load_recipe(RECIPE)
    train = recipe.train
    assert (train.epochs, train.batch_size, train.accumulate) == (100, 256, 1)
    assert (train.optimizer.kind, train.optimizer.lr, train.optimizer.weight_decay) == ("sgd", 0.1, 1e-4)
    assert train.optimizer.options == {"momentum": 0.9}
    assert (train.schedule.kind, train.schedule.options) == ("multistep", {"milestones": [30, 60, 90], "gamma": 0.1})
    assert (recipe.method.temperature, recipe.method.alpha) == (1.0, 0.5)
    assert recipe.teacher.train is None, "a teacher with published weights must not be trained again"


def test_students_learn_from_augmented_views_and_are_tested_on_plain_ones(overrides: list[str]) -> None:
    data = load_data(load_recipe(RECIPE, overrides), Terminal(speaks=False))
    assert data.train.is_augmented
    assert data.for_teacher.is_augmented
    assert not data.validation.is_augmented
    assert not data.test.is_augmented
    rows = torch.tensor([0])
    views = [data.train.fetch(rows, torch.tensor([seed])).inputs for seed in (1, 2, 1)]
    assert not torch.equal(views[0], views[1]), "another seed must give another view"
    assert torch.equal(views[0], views[2]), "the same seed must give the same view"


def test_a_few_steps_run_through_to_an_exported_student(overrides: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    finished = api.run(RECIPE, overrides, out=out, terminal=Terminal(speaks=False))
    assert finished.summary["classes"] == ["blue-first", "green-second", "red-third"]
    assert finished.summary["teacher"]["accuracy"] > 1 / 3
    assert set(finished.summary["students"]) == {"baseline", "distilled"}
    assert (out / "report.html").stat().st_size > 10_000
    student = load_model(out / "student")
    assert type(student).__name__ == "ResNet"
    assert sum(p.numel() for p in student.parameters()) == finished.summary["parameters"]["student"]
    logits = observe(student, torch.zeros(1, 3, 32, 32), Needs()).logits
    assert logits is not None
    assert logits.shape == (1, 3)
