"""A type that makes a model slower on this machine is said, from a measurement."""

from typing import Any

import pytest
import torch
from torch import nn

from tutelage.config import build_recipe
from tutelage.experiment import quantised_speed
from tutelage.experiment.quantised_speed import CONVERSIONS, slow_types, time_ratio
from tutelage.experiment.recipe_source import load_data, recipe_spec
from tutelage.progress import Terminal
from tutelage.students.lora import NF4Linear


def spec_of(**teacher: Any) -> Any:
    raw = {
        "name": "x", "data": {"source": "digits"}, "method": {"kind": "logit"}, "student": {"model": "mlp"},
        "teacher": {"model": "mlp", "train": {"epochs": 1}, **teacher}, "train": {"epochs": 1},
    }  # fmt: skip
    recipe = build_recipe(raw)
    return recipe_spec(recipe, load_data(recipe, Terminal(speaks=False)))


def test_the_layer_is_timed_in_its_type_and_in_float32() -> None:
    plain = nn.Linear(64, 48)
    for convert in CONVERSIONS.values():
        assert 0 < time_ratio(convert(plain), plain) < float("inf")
    pytest.importorskip("bitsandbytes")
    assert 0 < time_ratio(NF4Linear(plain), NF4Linear(plain).dequantise()) < float("inf")


def test_teacher_and_student_in_slower_types_get_a_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[tuple[str, int]] = []

    def ratio(converted: nn.Module, plain: nn.Linear) -> float:
        timed.append((type(converted).__name__, plain.in_features))
        return 5.0

    monkeypatch.setattr(quantised_speed, "time_ratio", ratio)
    cpu, student = torch.device("cpu"), nn.Sequential(nn.Linear(8, 8))
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 400), nn.Linear(400, 2))
    (line,) = slow_types(spec_of(inference={"dtype": "int8"}), model, student, cpu)
    assert line.startswith("the teacher in int8 is slower than in float32 on this machine")
    assert "5 times" in line
    assert timed == [("Int8Linear", 4)]
    assert list(slow_types(spec_of(), model, student, cpu)) == []
    assert list(slow_types(spec_of(inference={"dtype": "int8"}), None, student, cpu)) == []
    pytest.importorskip("bitsandbytes")
    packed = nn.Sequential(NF4Linear(nn.Linear(64, 64)), nn.Linear(64, 300))
    (line,) = slow_types(spec_of(), model, packed, cpu)
    assert line.startswith("the student with 4-bit weights is slower")
    assert "student.lora.bits" in line
    monkeypatch.setattr(quantised_speed, "time_ratio", lambda *_: 0.9)
    assert list(slow_types(spec_of(inference={"dtype": "int8"}), model, packed, cpu)) == []
