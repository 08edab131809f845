"""Reading what a run keeps of single samples, and what a judge said of answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tutelage.errors import DataError, RunDirectoryError

JUDGED = "judged.json"
"""The file that makes a folder one of a judgement."""


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class Sample(_Part):
    """A row of the test split, with the scores of every model."""

    row: int
    label: int | None = None
    image: str | None = Field(default=None, pattern=r"^data:image/png;base64,[A-Za-z0-9+/=]+$")
    text: str | None = None
    logits: dict[str, list[float]]


class Samples(_Part):
    """``samples/test.json``."""

    exported: str
    n: int
    reference: str
    student: str
    labelled: int
    agree: dict[str, int]
    right: dict[Literal["both", "reference", "student", "neither"], int]
    by_class: dict[str, list[int]]
    pairs: list[tuple[int, int, int]]
    samples: list[Sample]

    @model_validator(mode="before")
    @classmethod
    def _tuples(cls, given: Any) -> Any:
        if isinstance(given, dict) and isinstance(given.get("pairs"), list):
            given = {**given, "pairs": [tuple(p) if isinstance(p, list) else p for p in given["pairs"]]}
        return given

    @model_validator(mode="after")
    def _whole(self) -> Samples:
        widths = {len(row) for one in self.samples for row in one.logits.values()}
        classes = len(self.by_class.get("n", []))
        if len(widths) > 1 or (widths and widths != {classes}):
            raise ValueError(f"scores are not all of {classes} classes")
        if any({self.reference, self.student} - one.logits.keys() for one in self.samples):
            raise ValueError(f"a sample lacks the scores of {self.reference} or {self.student}")
        if any(len(each) != classes for each in self.by_class.values()):
            raise ValueError(f"a count is not of {classes} classes")
        at = [*(one.label for one in self.samples if one.label is not None), *(i for p in self.pairs for i in p[:2])]
        if not all(0 <= i < classes for i in at):
            raise ValueError(f"a class is not among {classes}")
        return self


class Written(_Part):
    """``samples/written.json``."""

    exported: str
    tokens: int
    models: list[str]
    texts: list[dict[str, str]]

    @model_validator(mode="after")
    def _whole(self) -> Written:
        wanted = {"prompt", "data", *self.models}
        if any(wanted - text.keys() for text in self.texts):
            raise ValueError(f"a text lacks one of {', '.join(sorted(wanted))}")
        return self


class Compared(_Part):
    """Two sides before a judge."""

    pair: tuple[str, str]
    prompts: int
    judged: int
    wins: int
    ties: int
    losses: int
    rate: float | None = None
    low: float | None = None
    high: float | None = None
    opposed: int
    first_place: float | None = None
    without_verdict: int

    @model_validator(mode="before")
    @classmethod
    def _tuple(cls, given: Any) -> Any:
        if isinstance(given, dict) and isinstance(given.get("pair"), list):
            given = {**given, "pair": tuple(given["pair"])}
        return given


class Answered(_Part):
    """A prompt, its answers, and what the judge said of each pair in both orders."""

    messages: list[dict[str, str]]
    answers: dict[str, str]
    verdicts: dict[str, list[Literal["win", "tie", "loss"] | None]]


class Judged(_Part):
    """``judged.json``, and ``judged/NAME.json`` of a run."""

    name: str
    judge: str
    prompts: int
    roles: dict[str, Literal["teacher", "baseline", "distilled"]]
    held_out_loss: dict[str, float]
    pairs: list[Compared]
    samples: list[Answered]


P = TypeVar("P", bound=BaseModel)


def read_part(file: Path, kind: type[P], what: str) -> dict[str, Any]:
    """A file as a ``kind`` of part.

    Raises:
        RunDirectoryError: it cannot be read.
        DataError: it is not what a run writes.
    """
    remedy = f"remove the file: the page then does without {what}"
    try:
        found = kind.model_validate_json(file.read_text(encoding="utf-8"))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(k) for k in first["loc"]) or "the file"
        raise DataError(
            f"is not what tutelage writes ({key}: {first['msg']})", where=str(file), remedy=remedy
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(f"is not UTF-8 text ({error.reason})", where=str(file), remedy=remedy) from None
    except OSError as error:
        raise RunDirectoryError(
            f"cannot be read: {error.strerror}", where=str(file), remedy="check the file and its permissions"
        ) from error
    return found.model_dump()


def samples_of(run: Path) -> dict[str, Any] | None:
    """What a run kept of classes; ``None`` where it kept nothing."""
    file = run / "samples" / "test.json"
    return read_part(file, Samples, "single samples") if file.is_file() else None


def written_of(run: Path) -> dict[str, Any] | None:
    """What the models of a run wrote; ``None`` where they did not."""
    file = run / "samples" / "written.json"
    return read_part(file, Written, "what the models write") if file.is_file() else None


def judged_of(run: Path) -> list[dict[str, Any]]:
    """What judges said of a run's student, by the names of the files."""
    files = sorted((run / "judged").glob("[!.]*.json"))
    return [read_part(file, Judged, "this judgement") for file in files]


def judgement_of(folder: Path) -> dict[str, Any]:
    """What ``tutelage judge`` left in a folder."""
    return read_part(folder / JUDGED, Judged, "this judgement")
