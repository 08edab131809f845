"""``tutelage init`` and ``tutelage recipes``."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from tutelage.cli.base import argument, option, say
from tutelage.errors import ConfigError

Force = Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")]


def init(
    data: Annotated[
        str | None,
        option(
            metavar="PATH|NAME",
            help="A folder of images by class, a table (CSV, TSV, JSON lines, Parquet), a folder of .txt files, "
            "or a source by name: digits, fashion-mnist, hf:ID.",
        ),
    ] = None,
    task: Annotated[
        str | None,
        option(
            help="images, classes, multi-label, regression, tokens, mlm, causal, embedding. Default: from the data."
        ),
    ] = None,
    text: Annotated[list[str] | None, option(metavar="COLUMN", help="Column of the texts; twice for pairs.")] = None,
    label: Annotated[
        list[str] | None,
        option(metavar="COLUMN", help="Column of the labels. Repeat it for several targets or yes/no columns."),
    ] = None,
    teacher: Annotated[
        str | None, option(help="A model as recipes name it (timm:resnet50, hf:ID), or the folder of a model.")
    ] = None,
    checkpoint: Annotated[str | None, option(metavar="PATH", help="Weights of the teacher.")] = None,
    student: Annotated[str | None, option(help="The student model, in the same form as --teacher.")] = None,
    out: Annotated[Path | None, option(help="The recipe file. Default: my.yaml.")] = None,
    force: Force = False,
) -> None:
    """Write a commented recipe for your data; prompt for missing options when run in a terminal."""
    from tutelage.files import write_text
    from tutelage.init import describe_data, draft_recipe, teacher_kind

    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if data is None:
        if not interactive:
            raise ConfigError(
                "init: --data is missing", remedy="tutelage init --data PATH, a folder of images by class or a table"
            )
        data = str(typer.prompt("Data: a folder of images by class, a table, or a source such as digits"))
    target = out or Path("my.yaml")
    if interactive and out is None:
        target = Path(typer.prompt("Recipe to write", default=str(target)))
    _check_target(target, force)
    kind_of_teacher = teacher_kind(teacher) if teacher and task is None else None
    description = describe_data(data, task=task, text=text, label=label, teacher=kind_of_teacher)
    say(f"data:   {description.summary()}")
    if description.note:
        say(description.note)
    if interactive:
        kind = "a name such as timm:resnet50" if description.task == "images" else "hf:ID"
        teacher = teacher or _prompt(f"Teacher ({kind}, or a folder; empty: a default)")
        student = student or _prompt(f"Student ({kind}, or a folder; empty: a default)")
    write_text(target, draft_recipe(description, teacher=teacher, student=student, checkpoint=checkpoint))
    say(f"recipe: {target}\nnext:   tutelage run {target}")


def recipes(
    name: Annotated[str | None, argument(metavar="[NAME]", help="The recipe to print.")] = None,
    out: Annotated[Path | None, option(help="Write the recipe to this file instead of printing it.")] = None,
    force: Force = False,
) -> None:
    """List the recipes of the package, or print one."""
    from tutelage.files import write_text
    from tutelage.init import list_recipes, read_recipe

    if name is None:
        if out is not None:
            raise ConfigError("--out needs one recipe", remedy="name it: tutelage recipes digits --out my.yaml")
        known = list_recipes()
        width = max(map(len, known))
        for each, about in known.items():
            say(f"{each:<{width}}  {about}")
        return
    text = read_recipe(name)
    if out is None:
        sys.stdout.write(text)
        return
    _check_target(out, force)
    write_text(out, text)
    say(f"recipe: {out}")


def _prompt(question: str) -> str | None:
    return str(typer.prompt(question, default="", show_default=False)) or None


def _check_target(path: Path, force: bool) -> None:
    if path.is_dir():
        raise ConfigError("is a folder", where=str(path), remedy="give the name of a file, as in --out my.yaml")
    if path.exists() and not force:
        raise ConfigError("exists already", where=str(path), remedy="choose another --out, or overwrite it: --force")
