"""The commands that take a trained model: ``tutelage export``, ``predict`` and ``bench``."""

import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from tutelage.cli.base import argument, grid, option, say, wide_console
from tutelage.errors import ConfigError, DataError

FORMATS = ("safetensors", "hf", "onnx", "int8", "torch-export")


def export(
    source: Annotated[Path, argument(metavar="RUN|MODEL", help="A run directory, or the folder of a model.")],
    to: Annotated[str, option(metavar="FORMAT", help=f"{', '.join(FORMATS)}.")],
    out: Annotated[Path | None, option(help="The folder. Default: export/FORMAT in the run directory.")] = None,
    data: Annotated[
        Path | None, option(metavar="RECIPE", help="A recipe with data to check a model that belongs to no run.")
    ] = None,
) -> None:
    """Write a trained student in another format, and check that its outputs stay the same."""
    from tutelage.experiment.export_student import export_student

    result = export_student(source, to, out=out, data=data)
    check, measured = result.manifest["check"], result.manifest.get("measured")
    if "tolerance" in check:
        outcome = (
            f"differs from the student by at most {check['max_difference']:.2g} (allowed {check['tolerance']:g})"
        )
    else:
        outcome = f"{check['agreement']:.2%} agreement with the student"
    say(f"export: {result.path}, {result.manifest['bytes']:,} bytes")
    say(f"check:  {outcome} on {check['rows']} inputs, {check['inputs']}")
    if check.get("time_ratio", 0) > 1:
        say(f"note: on this machine the export takes {check['time_ratio']:.2g} times the time of the float32 student")
    for key in ("accuracy", "f1", "spearman", "perplexity"):
        if measured and key in measured["source"] and key in measured["export"]:
            say(f"{key}: {measured['source'][key]:.4g} before, {measured['export'][key]:.4g} quantised")
            break
    if (how := result.manifest.get("how", {}).get("image_processor")) is not None:
        say(f"note: image processor: {how}")
    example = "IMAGE" if result.manifest["task"] == "images" else "TEXT"
    say(f"card:   {result.path / 'README.md'}\nuse it: tutelage predict {result.path} {example}")


def predict(
    source: Annotated[Path, argument(metavar="EXPORT", help="An export, the folder of a model, or a run.")],
    inputs: Annotated[
        list[str] | None,
        argument(
            metavar="[INPUT]...",
            help="Image files and folders, or texts; - reads texts from standard input, one per line.",
        ),
    ] = None,
    file: Annotated[Path | None, option(help="A file of texts, or of paths of images, one per line.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Labels to print for each input.")] = 5,
    tokens: Annotated[int, typer.Option(min=1, help="Maximum of tokens that a language model generates.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per line.")] = False,
) -> None:
    """Run an exported model on images or texts."""
    given = list(_inputs(inputs or [], file))
    from tutelage.export.inference import iter_predictions
    from tutelage.export.runtimes import open_export

    note = partial(typer.echo, err=True)
    for prediction in iter_predictions(open_export(source), given, top=top, tokens=tokens, say=note):
        say(json.dumps(prediction, ensure_ascii=False) if as_json else _format(prediction))


def bench(
    sources: Annotated[
        list[str],
        argument(
            metavar="RUN|MODEL...",
            help="Runs (their teacher and student are measured), folders of models, or models as recipes name them.",
        ),
    ],
    out: Annotated[
        Path | None,
        option(help="The JSON file; the HTML page gets the same name. Default: bench.json in the first run."),
    ] = None,
    batches: Annotated[str, typer.Option(metavar="N,N...", help="Batch sizes.")] = "1,8,32",
    rounds: Annotated[int, typer.Option(min=1, help="Timed calls of each model, runtime and batch size.")] = 20,
    columns: Annotated[
        str, typer.Option(metavar="NAME,NAME...", help="Runtimes to measure.")
    ] = "eager,compiled,onnx,int8",
    memory: Annotated[
        bool, typer.Option("--memory/--no-memory", help="Measure peak memory, in one process per model.")
    ] = True,
) -> None:
    """Measure models side by side: size, operations, latency, throughput, memory, quality."""
    try:
        sizes = [int(n) for n in batches.split(",")]
    except ValueError:
        raise ConfigError(
            f"--batches {batches} is not a list of numbers", remedy="separate numbers by commas: 1,8,32"
        ) from None
    from tutelage.cli.bench_models import bench as measure
    from tutelage.reports.bench import notes, table, verdict, write_bench

    result = measure(sources, out=out, batch_sizes=sizes, rounds=rounds, columns=columns.split(","), memory=memory)
    head, rows = table(result)
    console = wide_console(160)
    console.print(grid([head, *rows], 2, overflow="fold"), markup=False)
    for note in notes(result):
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    path = Path(result["path"])
    page = write_bench(result, path.with_suffix(".html"))
    say(f"\n{verdict(result)}\nfigures: {path}\npage:    {page}")


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
        raise ConfigError("there is no input", remedy="give images or texts, --file FILE, or -")


def _format(prediction: dict[str, Any]) -> str:
    """A prediction as lines of text."""
    lines = [prediction["input"]]
    if "labels" in prediction:
        lines += [f"  {100 * one['probability']:6.2f} %  {one['label']}" for one in prediction["labels"]]
    elif "values" in prediction:
        lines += [f"  {name}: {value:.4g}" for name, value in prediction["values"].items()]
    elif "words" in prediction:
        lines += [f"  {one['word']}: {one['label']}  {100 * one['probability']:.2f} %" for one in prediction["words"]]
    elif "masks" in prediction:
        for mask in prediction["masks"]:
            lines.append("  " + ", ".join(f"{one['label']} {100 * one['probability']:.2f} %" for one in mask))
    elif "embedding" in prediction:
        numbers = ", ".join(f"{x:.4f}" for x in prediction["embedding"][:6])
        lines.append(f"  {len(prediction['embedding'])} numbers: {numbers} ... (--json prints all)")
    else:
        lines.append(f"  {prediction['text']}")
    return "\n".join(lines)
