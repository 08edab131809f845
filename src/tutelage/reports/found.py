"""Reading the folder of a search, and what it found in words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from tutelage.errors import DataError
from tutelage.reports.read import Pair, Spread, read_text
from tutelage.reports.wording import count, interval, percent, points

FOUND = "search.json"
"""The file that makes a folder one of a search."""

AGAIN = "remove it and go on with --resume: the trials are kept, and the file is written again"


@dataclass(frozen=True)
class Search:
    """What a finished search left.

    Attributes:
        label: the folder's name.
        path: the folder.
        found: of ``search.json``.
        best: the text of ``best.yaml``.
    """

    label: str
    path: Path
    found: dict[str, Any]
    best: str

    @property
    def runs(self) -> list[Path]:
        """The run directories in it that read the test split."""
        names = ["default"] if self.found["same"] else ["default", "chosen"]
        return [self.path / name for name in names]

    @property
    def chosen(self) -> dict[str, Any]:
        """The best trial."""
        trial: dict[str, Any] = next(t for t in self.found["trials"] if t["number"] == self.found["best"])
        return trial


def is_search(path: Path) -> bool:
    """Whether a finished search is in ``path``."""
    return (path / FOUND).is_file()


def read_search(path: Path) -> Search:
    """The search in ``path``.

    Raises:
        RunDirectoryError: a file is missing or cannot be read.
        DataError: a file is not what a search writes.
    """
    file = path / FOUND
    try:
        found: dict[str, Any] = json.loads(read_text(file))
        Found.model_validate(found)
        if not any(t["number"] == found["best"] for t in found["trials"]):
            raise DataError(f"has no trial {found['best']}, its best", where=str(file), remedy=AGAIN)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(k) for k in first["loc"]) or "the file"
        raise DataError(f"{key}: {first['msg']}", where=str(file), remedy=AGAIN) from None
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"is not JSON ({error})", where=str(file), remedy=AGAIN) from None
    return Search(path.resolve().name, path, found, read_text(path / "best.yaml"))


def found_words(found: Mapping[str, Any]) -> str:
    """What a search found, in three sentences of plain text.

    The gain on validation is called what it is: of the best of many, by that very figure. The gain on the test split
    counts as shown only when its interval leaves out zero.
    """
    trials = found["trials"]
    states = [t["state"] for t in trials]
    stopped = "".join(
        f", {count(states.count(state))} {words}"
        for state, words in {"pruned": "given up early", "diverged": "diverged", "failed": "failed"}.items()
        if state in states
    )
    best = next(t for t in trials if t["number"] == found["best"])
    head = f"{count(len(trials))} trials{stopped}"
    test = found["test"]
    if found["same"]:
        return (
            f"{head}: none is better on validation than the recipe as it is, {percent(best['validation'])}. "
            f"Test, read once: {percent(test['default']['last']['mean'])}."
        )
    gain = test["gain"]["last"]
    shown = ""
    if gain["low"] is not None and gain["high"] is not None:
        shown = ", no difference shown" if gain["low"] <= 0 <= gain["high"] else ", worse" if gain["mean"] < 0 else ""
    better, own = found["gain_on_validation"]["mean"], percent(found["default"]["validation"])
    chosen, default = (percent(test[which]["last"]["mean"]) for which in ("chosen", "default"))
    return (
        f"{head}: {setting(best['values'])} has {percent(best['validation'])} on validation, where the recipe as it "
        f"is has {own}: {points(better)} points, of the best of {count(len(trials))}. Test, read once: {chosen} "
        f"against {default}: {points(gain['mean'])} points{shown} ({interval(gain)})."
    )


def setting(values: Mapping[str, Any]) -> str:
    """``method.temperature 2.1, method.alpha 0.7``."""
    return ", ".join(f"{key} {value_words(value)}" for key, value in values.items())


def value_words(value: Any) -> str:
    """A value of a key as it stands in a recipe."""
    if isinstance(value, str):
        return value
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value)


# What a report relies on ---------------------------------------------------------------------------


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class Dimension(_Part):
    """A key and what it may be."""

    key: str
    low: float | None = None
    high: float | None = None
    log: bool = False
    values: list[Any] | None = None
    own: Any = None


class Trial(_Part):
    """A trial."""

    number: int
    state: str
    values: dict[str, Any]
    validation: float | None = None
    seeds: list[float]
    evaluations: list[float]
    seconds: float
    why: str | None = None


class Default(_Part):
    """The recipe as it is."""

    trial: int | None = None
    validation: float
    seeds: list[float]


class Test(_Part):
    """What was read of the test split, once."""

    default: dict[str, Spread]
    chosen: dict[str, Spread]
    gain: dict[str, Pair]


class Found(_Part):
    """``search.json``: what of it a report reads."""

    name: str
    objective: str
    seeds: list[int]
    settings: dict[str, Any]
    space: list[Dimension]
    trials: list[Trial]
    importance: dict[str, float]
    best: int
    default: Default
    same: bool
    gain_on_validation: Pair
    test: Test
    seconds: float
