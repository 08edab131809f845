"""Prompts: the files that they and other texts are read from, and the recipe's Jinja templates."""

import csv
import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, UndefinedError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tutelage.errors import ConfigError, DataError, refusal, suggest
from tutelage.generation.requests import canonical_json

PromptRow = dict[str, Any]


SUFFIXES = (".csv", ".json", ".jsonl", ".parquet", ".txt")


def _read(path: Path) -> list[PromptRow]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        import pyarrow.parquet

        rows: list[PromptRow] = pyarrow.parquet.read_table(path).to_pylist()
        return rows
    if suffix == ".csv":
        with open(path, encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    text = path.read_text(encoding="utf-8")
    if suffix == ".json":
        rows = json.loads(text)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise DataError("the file is not a list of JSON objects", where=str(path), remedy="write [{...}, {...}]")
        return rows
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if suffix == ".txt":
        return [{"prompt": line} for _, line in lines]
    return [_parse_object(line, f"{path}:{number}") for number, line in lines]


def _parse_object(line: str, where: str) -> PromptRow:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise DataError("the line is not a JSON object", where=where, remedy="write one object on each line")
    return row


def read_rows(file: str, what: str) -> list[PromptRow]:
    """The rows of a file; raises :class:`DataError` if it is empty or unreadable. Messages name ``what`` it holds."""
    path = Path(file)
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(
            f"cannot read {what} from a file of this type", where=file,
            remedy=f"give a file whose name ends with one of: {', '.join(SUFFIXES)}",
        )  # fmt: skip
    try:
        rows = _read(path)
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001  (pyarrow, csv and json each have errors of their own)
        reason = refusal(error) if isinstance(error, OSError) else " ".join(str(error).split())[:200]
        raise DataError(f"cannot be read: {reason}", where=file, remedy=f"give a file of {what}") from None
    if not rows:
        raise DataError(f"holds no {what}", where=file, remedy="give a file that is not empty")
    return rows


def row_names(rows: list[PromptRow], file: str) -> list[str]:
    """The name of each row: its column ``id``, or its number. Raises :class:`DataError` for two equal names."""
    names = [str(row["id"]) if row.get("id") is not None else str(i) for i, row in enumerate(rows)]
    if len(set(names)) != len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise DataError(
            f"two rows have the id {twice!r}", where=file,
            remedy="give each row another id, or remove the column 'id'",
        )  # fmt: skip
    return names


def read_tasks(file: str | None) -> list[str]:
    """Seed tasks from a file, whose rows need an ``instruction``. Default: the seed tasks of this package."""
    file = file or str(Path(__file__).with_name("seeds.jsonl"))
    tasks = []
    for number, row in enumerate(read_rows(file, "tasks"), 1):
        task, more = row.get("instruction", row.get("prompt")), row.get("input")
        if not isinstance(task, str) or not task.strip():
            raise DataError(
                f"row {number} has no instruction", where=file, remedy="each row needs a column 'instruction'"
            )
        tasks.append(task.strip() + (f"\n\n{more.strip()}" if isinstance(more, str) and more.strip() else ""))
    return tasks


Key = tuple[str | int, ...]

PromptTemplate = Callable[[Mapping[str, Any], str], str]
"""Renders values, which the second argument names in messages; raises :class:`DataError` if they do not fit."""


class PromptTemplates:
    """The templates of a recipe; ``where`` gives file and line of a key."""

    def __init__(self, where: Callable[[Key], str]) -> None:
        self.where = where
        self.texts: dict[str, str] = {}
        self._environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, autoescape=False)

    def add(self, key: Key, text: str, names: Collection[str]) -> PromptTemplate:
        """Compile the template of a key such as ``("generate", "user")``, which can use ``names``."""
        self.texts[".".join(str(part) for part in key)] = text
        try:
            tree = self._environment.parse(text)
            template = self._environment.from_string(text)
        except TemplateSyntaxError as error:
            raise ConfigError(
                f"is not a Jinja template: {error.message}", where=self._line(key, text, error.lineno),
                remedy="see https://jinja.palletsprojects.com for the syntax",
            ) from None  # fmt: skip
        unknown = sorted(meta.find_undeclared_variables(tree) - set(names))
        if unknown:
            line = next(n for n, row in enumerate(text.splitlines(), 1) if unknown[0] in row)
            raise ConfigError(
                f"unknown placeholder {unknown[0]!r}" + suggest(unknown[0], list(names)),
                where=self._line(key, text, line), remedy=f"the template can use: {', '.join(names)}",
            )  # fmt: skip
        place = self.where(key)

        def fill(values: Mapping[str, Any], what: str) -> str:
            remedy = "correct the template or the value"
            try:
                return template.render(values).strip()
            except UndefinedError as error:
                problem, remedy = error.message, "add the value, or write {{ name|default('') }}"
            except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, OverflowError) as error:
                problem = f"the template fails: {error}"
            raise DataError(f"{what}: {problem}", where=place, remedy=remedy)

        return fill

    def _line(self, key: Key, text: str, number: int) -> str:
        """File and line of a line of a template; a text of several lines begins below its key."""
        place = self.where(key)
        name, _, line = place.rpartition(":")
        if line.isdecimal():
            first = int(line) + ("\n" in text)
            place = f"{name}:{first + number - 1}"
        return f"{place}: {'.'.join(str(part) for part in key)}"

    @property
    def version(self) -> str:
        """A hash of all templates: data from other templates has another version."""
        return hashlib.sha256(canonical_json(self.texts)).hexdigest()[:12]
