"""The commands a newcomer starts with: ``tutelage init`` and ``tutelage recipes``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tutelage.cli.base import say
from tutelage.errors import ConfigError

if TYPE_CHECKING:
    from tutelage.init import DataDescription

Force = Annotated[bool, typer.Option("--force", help="Overwrite the file where it is there already.")]


def init(
    data: Annotated[
        str | None,
        typer.Option(
            metavar="PATH|NAME", show_default=False,
            help="A folder of images by class, a table (CSV, TSV, JSON lines, Parquet), a folder of .txt files, "
            "or a source by name: digits, fashion-mnist, hf:ID.",
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            show_default=False,
            help="images, classes, multi-label, regression, tokens, mlm, causal, embedding. Default: as the data is.",
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN", show_default=False, help="Column of the texts; twice for pairs."),
    ] = None,
    label: Annotated[
        str | None, typer.Option(metavar="COLUMN", show_default=False, help="Column of the labels.")
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(show_default=False, help="As recipes name it (timm:resnet50, hf:ID), or a folder with a model."),
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(metavar="PATH", show_default=False, help="The teacher's weights.")
    ] = None,
    student: Annotated[str | None, typer.Option(show_default=False, help="The same of the student.")] = None,
    out: Annotated[Path | None, typer.Option(show_default=False, help="The recipe. Default: my.yaml.")] = None,
    force: Force = False,
) -> None:  # fmt: skip
    """Write a commented recipe for your data; asks what is not said where there is somebody to ask."""
    from tutelage.init import describe_data, draft_recipe

    asks = sys.stdin.isatty() and sys.stdout.isatty()
    if data is None:
        if not asks:
            raise ConfigError(
                "init: no data is named", remedy="tutelage init --data PATH, a folder of images by class or a table"
            )
        data = str(typer.prompt("Data: a folder of images by class, a table, or a source such as digits"))
    target = out or Path("my.yaml")
    if asks and out is None:
        target = Path(typer.prompt("Recipe to write", default=str(target)))
    _free(target, force)
    found = describe_data(data, task=task, text=text, label=label)
    say(f"found:  {found.words()}")
    if asks:
        teacher, student = _asked(found, teacher, student)
    _write(target, draft_recipe(found, teacher=teacher, student=student, checkpoint=checkpoint))
    say(f"recipe: {target}\nnext:   tutelage run {target}")


def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", show_default=False, help="One to print.")] = None,
    out: Annotated[
        Path | None, typer.Option(show_default=False, help="Write it to this file in place of printing it.")
    ] = None,
    force: Force = False,
) -> None:
    """List the recipes that ship, or print one."""
    from tutelage.init import list_recipes, read_recipe

    if name is None:
        if out is not None:
            raise ConfigError("--out is for one recipe", remedy="name it: tutelage recipes digits --out my.yaml")
        known = list_recipes()
        width = max(map(len, known))
        for each, about in known.items():
            say(f"{each:<{width}}  {about}")
        return
    text = read_recipe(name)
    if out is None:
        sys.stdout.write(text)
        return
    _free(out, force)
    _write(out, text)
    say(f"recipe: {out}")


def _asked(found: DataDescription, teacher: str | None, student: str | None) -> tuple[str | None, str | None]:
    """Teacher and student, asked for where they are not given; an empty answer leaves the choice to us."""
    hint = "a name such as timm:resnet50, or a folder" if found.task == "images" else "hf:ID, or a folder"
    if teacher is None:
        teacher = str(typer.prompt(f"Teacher ({hint}; empty: one that fits)", default="", show_default=False)) or None
    if student is None:
        student = (
            str(typer.prompt("Student (the same; empty: one that fits)", default="", show_default=False)) or None
        )
    return teacher, student


def _free(path: Path, force: bool) -> None:
    if path.is_dir():
        raise ConfigError("is a folder", where=str(path), remedy="give the name of a file, as in --out my.yaml")
    if path.exists() and not force:
        raise ConfigError(
            "is there already", where=str(path), remedy="choose another --out, or overwrite it: --force"
        )


def _write(path: Path, text: str) -> None:
    from tutelage.files import write_text

    write_text(path, text)
