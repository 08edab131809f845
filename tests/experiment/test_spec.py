"""The experiment is data: small frozen classes, and one protocol with two implementations."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil

import tutelage.experiment
from tutelage.experiment.module_source import ModuleSource
from tutelage.experiment.recipe_source import RecipeSource
from tutelage.experiment.spec import (
    EnsembleSpec,
    EvaluationSpec,
    ExperimentSource,
    ExperimentSpec,
    MemberSpec,
    TeacherSpec,
)

MOST_FIELDS = 12


def test_no_class_of_an_experiment_has_more_than_twelve_fields() -> None:
    large = {}
    for module in pkgutil.iter_modules(tutelage.experiment.__path__, "tutelage.experiment."):
        for name, cls in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            if cls.__module__ == module.name and dataclasses.is_dataclass(cls):
                count = len(dataclasses.fields(cls))
                if count > MOST_FIELDS:
                    large[name] = count
    assert not large


def test_a_specification_is_immutable() -> None:
    for cls in (ExperimentSpec, EvaluationSpec, TeacherSpec, EnsembleSpec, MemberSpec):
        assert cls.__dataclass_params__.frozen, cls  # type: ignore[attr-defined]


def test_recipes_and_modules_are_sources_of_the_same_parts() -> None:
    parts = {name for name in vars(ExperimentSource) if not name.startswith("_")}
    for source in (RecipeSource, ModuleSource):
        assert parts <= set(dir(source)), source
