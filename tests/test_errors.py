"""The package's own exceptions."""

from __future__ import annotations

import json

import pytest

from tutelage import errors
from tutelage.errors import (
    CapabilityError,
    CheckpointError,
    ConfigError,
    DataError,
    MissingDependencyError,
    ModelError,
    NumericsError,
    RunDirectoryError,
)


def test_the_message_of_each_error() -> None:
    for kind in (ConfigError, DataError, ModelError, CheckpointError, CapabilityError, NumericsError,
                 RunDirectoryError, MissingDependencyError):  # fmt: skip
        error = kind("what", where="where", remedy="remedy")
        assert str(error) == "where: what\n  -> remedy"
        assert json.dumps([error.what, error.where, error.remedy]) == '["what", "where", "remedy"]'


def _kinds(cls: type) -> list[type]:
    return [cls, *(k for sub in cls.__subclasses__() for k in _kinds(sub))]


@pytest.mark.parametrize("kind", _kinds(errors.TutelageError), ids=lambda k: k.__name__)
def test_an_error_survives_the_way_between_processes(kind: type) -> None:
    import pickle

    error = pickle.loads(pickle.dumps(kind("what", where="where", remedy="remedy")))
    assert type(error) is kind
    assert str(error) == "where: what\n  -> remedy"
