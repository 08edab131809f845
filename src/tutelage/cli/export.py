"""The commands that make a finished student ready for use, and use it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from tutelage.cli.base import say
from tutelage.errors import ConfigError, DataError

FORMATS = ("safetensors", "hf", "onnx", "int8", "torch-export")


def export(
    source: Annotated[
        Path, typer.Argument(metavar="RUN|MODEL", help="A run, or a folder with a model.", show_default=False)
    ],
    to: Annotated[str, typer.Option(metavar="FORMAT", help=f"{', '.join(FORMATS)}.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="The folder. Default: export/FORMAT in the run's.", show_default=False)
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="RECIPE", help="Whose data a model without a run is checked on.", show_default=False),
    ] = None,
) -> None:
    """Write a finished student in a format that runs elsewhere, and check there that it answers as before."""
    from tutelage.experiment.export_student import export_student

    made = export_student(source, to, out=out, data=data)
    check = made.manifest["check"]
    if "tolerance" in check:
        said = f"differs from the student by at most {check['max_difference']:.2g} (allowed {check['tolerance']:g})"
    else:
        said = f"{check['agreement']:.2%} like the student"
    say(f"export: {made.path}, {made.manifest['bytes']:,} bytes")
    say(f"check:  {said} on {check['rows']} inputs, {check['inputs']}")
    measured = made.manifest.get("measured")
    for key in ("accuracy", "f1", "spearman", "perplexity"):
        if measured and key in measured["source"] and key in measured["export"]:
            say(f"{key}: {measured['source'][key]:.4g} before, {measured['export'][key]:.4g} rounded")
            break
    example = "IMAGE" if made.manifest["task"] == "images" else "TEXT"
    say(f"card:   {made.path / 'README.md'}\nask it: tutelage predict {made.path} {example}")


def predict(
    source: Annotated[
        Path, typer.Argument(metavar="EXPORT", help="An export, a model's folder or a run.", show_default=False)
    ],
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[INPUT]...", show_default=False,
            help="Image files and folders, or texts; - reads texts from standard input, one a line.",
        ),
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="A file of texts, or of paths of images, one a line.", show_default=False)
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Labels for each.")] = 5,
    tokens: Annotated[int, typer.Option(min=1, help="Most that a language model writes.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:  # fmt: skip
    """Ask an exported model about images or texts."""
    given = list(_inputs(inputs or [], file))
    from tutelage.export.inference import iter_predictions
    from tutelage.export.runtimes import open_export

    for found in iter_predictions(open_export(source), given, top=top, tokens=tokens):
        say(json.dumps(found, ensure_ascii=False) if as_json else _said(found))


def _inputs(given: list[str], file: Path | None) -> Iterator[str]:
    for text in given:
        if text == "-":
            yield from (line.rstrip("\n") for line in sys.stdin if line.strip())
        else:
            yield text
    if file is not None:
        try:
            yield from (line for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise DataError(f"cannot be read: {reason}", where=str(file), remedy="give a text file") from None
    elif not given:
        raise ConfigError("there is nothing to ask about", remedy="give images or texts, --file FILE, or -")


def _said(found: dict[str, Any]) -> str:
    """One answer as a person reads it."""
    lines = [found["input"]]
    if "labels" in found:
        lines += [f"  {100 * one['probability']:6.2f} %  {one['label']}" for one in found["labels"]]
    elif "values" in found:
        lines += [f"  {name}: {value:.4g}" for name, value in found["values"].items()]
    elif "words" in found:
        lines += [f"  {one['word']}: {one['label']}  {100 * one['probability']:.2f} %" for one in found["words"]]
    elif "masks" in found:
        for place in found["masks"]:
            lines.append("  " + ", ".join(f"{one['label']} {100 * one['probability']:.2f} %" for one in place))
    elif "embedding" in found:
        shown = ", ".join(f"{x:.4f}" for x in found["embedding"][:6])
        lines.append(f"  {len(found['embedding'])} numbers: {shown} ... (--json prints all)")
    else:
        lines.append(f"  {found['text']}")
    return "\n".join(lines)


def bench(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN|MODEL...", show_default=False,
            help="Runs, of which teacher and student are measured; folders of models; models as recipes name them.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="The JSON file; a page goes beside it. Default: bench.json in the first run.",
                     show_default=False),
    ] = None,
    batches: Annotated[str, typer.Option(metavar="N,N...", help="Rows of a batch.")] = "1,8,32",
    rounds: Annotated[int, typer.Option(min=1, help="Timed calls of each.")] = 20,
    columns: Annotated[
        str, typer.Option(metavar="NAME,NAME...", help="Ways to run a model.")
    ] = "eager,compiled,onnx,int8",
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Peak memory, each in a process.")] = True,
) -> None:  # fmt: skip
    """Measure models side by side: size, operations, latency, throughput, memory, quality."""
    try:
        sizes = [int(n) for n in batches.split(",")]
    except ValueError:
        raise ConfigError(f"--batches {batches}", remedy="give numbers with commas between them: 1,8,32") from None
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from tutelage.cli.bench_models import bench as measure
    from tutelage.reports.bench import notes, table, verdict, write_bench

    found = measure(sources, out=out, batch_sizes=sizes, rounds=rounds, columns=columns.split(","), memory=memory)
    head, rows = table(found)
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    shown = Table(box=box.SIMPLE_HEAD)
    for i, title in enumerate(head):
        shown.add_column(title, justify="right" if i > 1 else "left", overflow="fold")
    for row in rows:
        shown.add_row(*row)
    console.print(shown, markup=False)
    for note in notes(found):
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    path = Path(found["path"])
    page = write_bench(found, path.with_suffix(".html"))
    say(f"\n{verdict(found)}\nfigures: {path}\npage:    {page}")
