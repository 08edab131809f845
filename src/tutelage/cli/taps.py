"""``tutelage taps``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tutelage.cli.base import argument, option
from tutelage.errors import ConfigError

if TYPE_CHECKING:
    from rich.tree import Tree

    from tutelage.cli.taps_survey import Node, Survey


def taps(
    model: Annotated[
        str,
        argument(
            metavar="MODEL",
            help="A recipe, a model as recipes name it (resnet, timm:resnet18), or the folder of an exported model.",
        ),
    ],
    of: Annotated[str | None, option(help="With a recipe: student or teacher. Default: both.")] = None,
    shape: Annotated[
        str | None, option(help="Shape of one example: 3x64x64 for images, 16 for tokens. Default: the model's.")
    ] = None,
    classes: Annotated[int | None, option(help="Number of classes. Default: 10.")] = None,
    option_: Annotated[
        list[str] | None,
        option(
            "-o",
            "--option",
            metavar="KEY=VALUE",
            help="An option of the model, or an override of the recipe; repeatable.",
        ),
    ] = None,
    depth: Annotated[int | None, option(min=1, help="Levels of modules to print. Default: all.")] = None,
) -> None:
    """Print the modules of a model, which `method.pairs` can name, and the shapes of their outputs."""
    from tutelage.config import load_recipe

    if Path(model).is_file() or model.endswith((".yaml", ".yml")):
        for key, given in (("--shape", shape), ("--classes", classes)):
            if given is not None:
                raise ConfigError(f"{key} is for models; the data of a recipe determine it", remedy="leave it out")
        if of not in (None, "student", "teacher"):
            raise ConfigError(f"--of {of}: a recipe has no such model", remedy="allowed: student, teacher")
        recipe = load_recipe(model, option_ or [])
        from tutelage.cli.taps_survey import survey_recipe
        from tutelage.multistage.run import first_stage

        with recipe.locating():
            surveys = survey_recipe(first_stage(recipe), (of,) if of else ("student", "teacher"))
    else:
        if of is not None:
            raise ConfigError(f"--of {of} needs a recipe, and {model} is a model", remedy="leave it out")
        size, options = _size(shape), _options(option_ or [])
        from tutelage.cli.taps_survey import survey_model

        surveys = [survey_model(model, size=size, classes=classes, options=options)]
    _print(surveys, depth)


def _size(shape: str | None) -> tuple[int, ...] | None:
    if shape is None:
        return None
    parts = shape.lower().split("x")
    if len(parts) not in (1, 3) or not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise ConfigError(
            f"--shape {shape} is not the shape of one example",
            remedy="give CHANNELSxHEIGHTxWIDTH for images, as in 3x64x64, or a number of tokens, as in 16",
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


def _print(surveys: list[Survey], depth: int | None) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True)
    for survey in surveys:
        console.print(Text.assemble((survey.title, "bold"), f"  on {survey.inputs}"))
        auto = {path: size for size, path in survey.stages.items()}
        console.print(_tree(survey.nodes, auto, depth))
        paths = ", ".join("{} ({}x{})".format(path, *size) for path, size in auto.items())
        none = "pairs: auto finds no feature maps; name taps in method.pairs"
        console.print(Text(f"pairs: auto would take {paths}" if paths else none))
        console.print()
    if len(surveys) == 2:
        both = [size for size in surveys[0].stages if size in surveys[1].stages]
        pairs = ", ".join("{} with {} ({}x{})".format(*(s.stages[size] for s in surveys), *size) for size in both)
        console.print(
            Text(f"pairs: auto would pair {pairs}" if pairs else "pairs: auto would find no resolution in both")
        )


def _tree(nodes: list[Node], auto: dict[str, tuple[int, int]], depth: int | None) -> Tree:
    """The modules down to ``depth``; ``auto`` has the sizes of the feature maps that ``pairs: auto`` takes."""
    from rich.text import Text
    from rich.tree import Tree

    trees: dict[str, Tree] = {}
    for node in nodes:
        parent, _, name = node.path.rpartition(".")
        level = node.path.count(".") + 1 if node.path else 0
        if depth is not None and level > depth:
            continue
        ran = node.calls > 0
        single = len(node.outputs) == 1 and not node.outputs[0][0]
        line = Text.assemble((name or "(the model)", "bold" if ran else "dim"), ("  " + node.kind, "dim"))
        if single:
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
        trees[node.path] = trees[parent].add(line) if node.path else Tree(line, guide_style="dim")
        for key, text in () if single else node.outputs:
            trees[node.path].add(Text.assemble((key, "magenta"), ("  " + text, "cyan")))
    return trees[""]
