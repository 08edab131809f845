"""Students that are trained as they are used in eight bits: what is rounded, what learns, what is saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from support import exported
from tutelage.config import build_recipe
from tutelage.data import SequentialBatches
from tutelage.errors import ConfigError, ModelError
from tutelage.evaluation import evaluate
from tutelage.experiment.run_artifacts import find
from tutelage.models import load_model
from tutelage.models.small import ConvNet
from tutelage.students import add_fake_quantisers, is_quantisation_aware, to_float_model

pytest.importorskip("torchao")


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 5))


def test_weights_are_rounded_to_the_nearest_of_256_steps_of_their_row() -> None:
    model = nn.Sequential(nn.Linear(6, 3))
    whole = model[0].weight.detach().clone()
    bias = model[0].bias.detach().clone()
    made = add_fake_quantisers(model)
    seen = (made(torch.eye(6)) - bias).T  # a one-hot row is not changed by rounding
    step = whole.abs().amax(1, keepdim=True) / 127.5
    assert not torch.equal(seen, whole)
    assert torch.allclose(seen / step, (seen / step).round(), atol=1e-3)
    assert bool(((seen - whole).abs() <= 0.501 * step).all())


def test_a_convolution_is_rounded_as_the_linear_layer_that_does_the_same() -> None:
    torch.manual_seed(1)
    conv = nn.Conv2d(3, 4, 1)
    linear = nn.Linear(3, 4)
    linear.load_state_dict({"weight": conv.weight.flatten(1), "bias": conv.bias})
    x = torch.randn(5, 3, 1, 1)
    ours, theirs = (
        add_fake_quantisers(nn.Sequential(conv))(x),
        add_fake_quantisers(nn.Sequential(linear))(x.flatten(1)),
    )
    assert torch.allclose(ours.flatten(1), theirs, atol=1e-6)
    assert not torch.allclose(ours, to_float_model(nn.Sequential(conv))(x), atol=1e-5)


def test_gradients_go_through_to_weights_that_are_not_rounded() -> None:
    model = add_fake_quantisers(small())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model(torch.randn(3, 2, 4, 4)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().sum()) > 0, name
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_rounded_model_has_the_names_of_a_plain_one_and_becomes_it_again() -> None:
    whole = small()
    state, x = {k: v.clone() for k, v in whole.state_dict().items()}, torch.randn(3, 2, 4, 4)
    expected = whole(x)
    draw = torch.get_rng_state()
    made = add_fake_quantisers(whole)
    assert torch.equal(draw, torch.get_rng_state())  # what is drawn after it is what would be without it
    assert is_quantisation_aware(made)
    assert made.state_dict().keys() == state.keys()
    assert not torch.equal(made(x), expected)
    back = to_float_model(made)
    assert not is_quantisation_aware(back)
    assert [type(m) for m in back] == [nn.Conv2d, nn.ReLU, nn.Flatten, nn.Linear]
    assert torch.equal(back(x), expected)


def test_what_cannot_be_rounded_is_said() -> None:
    with pytest.raises(ModelError, match="no linear layer and no convolution"):
        add_fake_quantisers(nn.Sequential(nn.ReLU()))
    recipe: dict[str, Any] = {
        "data": "digits", "teacher": None, "method": "supervised",
        "student": {"model": "mlp", "qat": "int8", "lora": 4},
    }  # fmt: skip
    with pytest.raises(ConfigError, match="with 'lora' these are frozen"):
        build_recipe(recipe, name="recipe")


def test_a_run_measures_the_rounded_student_and_saves_a_plain_one(tmp_path: Path) -> None:
    run = exported.images(tmp_path, qat="int8")
    summary = json.loads((run / "summary.json").read_text())
    student = load_model(run / "student")
    assert type(student) is ConvNet
    assert not is_quantisation_aware(student)
    found = find(run, exported.QUIET)
    data = found.data()
    assert data is not None
    held = SequentialBatches(data.test)
    device = torch.device("cpu")
    whole = evaluate(student, held, device)
    as_rounded = evaluate(add_fake_quantisers(student), held, device)
    said = summary["students"]["distilled"]["best"]
    assert as_rounded["loss"] == pytest.approx(said["loss"]["mean"], abs=1e-5)
    assert whole["loss"] != pytest.approx(said["loss"]["mean"], abs=1e-7)  # the two are not the same thing
    assert said["accuracy"]["mean"] > 0.3  # far above chance, a tenth
    teacher: Any = load_model(run / "models" / "teacher")
    assert not is_quantisation_aware(teacher)
