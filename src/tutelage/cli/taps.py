"""``tutelage taps``: what there is to compare in a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tutelage.errors import ConfigError

if TYPE_CHECKING:
    from tutelage.cli.taps_survey import Survey


def taps(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A recipe, a model as recipes name it (resnet, timm:resnet18), or a folder that a run exported.",
            show_default=False,
        ),
    ],
    of: Annotated[
        str | None, typer.Option(help="Of a recipe: student or teacher; default both.", show_default=False)
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(help="Of one example, such as 3x64x64, or 16 tokens. Default: the model's.", show_default=False),
    ] = None,
    classes: Annotated[int | None, typer.Option(help="Number of classes. Default: 10.", show_default=False)] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "-o", "--option", metavar="KEY=VALUE", show_default=False,
            help="An option of the model, or a key of the recipe to override; repeatable.",
        ),
    ] = None,
    depth: Annotated[
        int | None, typer.Option(help="Levels of modules to show. Default: all.", show_default=False, min=1)
    ] = None,
) -> None:  # fmt: skip
    """Print a model's modules with their output shapes: what a method's pairs can name."""
    from tutelage.config import load_recipe

    if Path(model).is_file() or model.endswith((".yaml", ".yml")):
        refused = [key for key, given in (("--shape", shape), ("--classes", classes)) if given is not None]
        if refused:
            raise ConfigError(f"{refused[0]} is for a model; a recipe's data decides", remedy="leave it out")
        if of not in (None, "student", "teacher"):
            raise ConfigError(f"--of {of}: a recipe has no such model", remedy="allowed: student, teacher")
        recipe = load_recipe(model, option or [])
        from tutelage.cli.taps_survey import survey_recipe
        from tutelage.multistage.workflows import first_stage

        surveys = survey_recipe(first_stage(recipe), (of,) if of else ("student", "teacher"))
    else:
        if of is not None:
            raise ConfigError(f"--of {of} is for recipes, and {model} is none", remedy="leave it out")
        size, options = _size(shape), _options(option or [])
        from tutelage.cli.taps_survey import survey_model

        surveys = [survey_model(model, size=size, classes=classes, options=options)]
    _show_taps(surveys, depth)


def _size(shape: str | None) -> tuple[int, ...] | None:
    if shape is None:
        return None
    parts = shape.lower().split("x")
    if len(parts) not in (1, 3) or not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise ConfigError(
            f"--shape {shape} is no shape of one example",
            remedy="CHANNELSxHEIGHTxWIDTH of an image, such as 3x64x64, or a number of tokens, such as 16",
        )
    return tuple(int(p) for p in parts)


def _options(given: list[str]) -> dict[str, Any]:
    from tutelage.config.lines import parse_yaml

    options: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise ConfigError("not of the form key=value", where=f"-o {text}", remedy="for example -o blocks=3")
        options |= parse_yaml(f"{key}: {value}", f"-o {text}")[0]
    return options


def _show_taps(surveys: list[Survey], depth: int | None) -> None:
    from rich.console import Console
    from rich.text import Text
    from rich.tree import Tree

    console = Console(soft_wrap=True)
    for survey in surveys:
        auto = {path: size for size, path in survey.stages.items()}
        trees: dict[str, Tree] = {}
        console.print(Text.assemble((survey.title, "bold"), f"  on {survey.inputs}"))
        for node in survey.nodes:
            parent, _, name = node.path.rpartition(".")
            level = node.path.count(".") + 1 if node.path else 0
            if depth is not None and level > depth:
                continue
            ran = node.calls > 0
            plain = len(node.outputs) == 1 and not node.outputs[0][0]
            line = Text.assemble((name or "(the model)", "bold" if ran else "dim"), ("  " + node.kind, "dim"))
            if plain:
                line.append("  " + node.outputs[0][1], "cyan")
            if node.calls > 1:
                line.append(f"  x{node.calls}", "yellow")
            if node.parameters:
                line.append(f"  {node.parameters:,}", "dim")
            if not ran:
                line.append("  did not run", "dim yellow")
            if level == depth and node.inside:
                line.append(f"  +{node.inside} inside", "dim")
            if node.path in auto:
                line.append("  auto {}x{}".format(*auto[node.path]), "green")
            tree = trees[parent].add(line) if node.path else Tree(line, guide_style="dim")
            trees[node.path] = tree
            for key, text in () if plain else node.outputs:
                tree.add(Text.assemble((key, "magenta"), ("  " + text, "cyan")))
        console.print(trees[""])
        found = ", ".join("{} ({}x{})".format(path, *size) for path, size in auto.items())
        console.print(
            Text(
                f"pairs: auto would take {found}"
                if found
                else "pairs: auto finds no feature maps here: name the taps"
            )
        )
        console.print()
    if len(surveys) == 2:
        both = [size for size in surveys[0].stages if size in surveys[1].stages]
        found = ", ".join("{} with {} ({}x{})".format(*(s.stages[size] for s in surveys), *size) for size in both)
        console.print(
            Text(f"pairs: auto would pair {found}" if found else "pairs: auto would find no resolution in both")
        )
