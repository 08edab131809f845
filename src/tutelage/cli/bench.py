"""``tutelage bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tutelage.cli.base import argument, grid, option, say, wide_console
from tutelage.errors import ConfigError


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
        raise ConfigError(f"--batches {batches}", remedy="give numbers with commas between them: 1,8,32") from None
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
