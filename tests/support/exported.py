"""Three finished runs of small models that have learned something: images, texts, conversations."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support import language_worlds, text_worlds
from tutelage import api
from tutelage.config import build_recipe
from tutelage.progress import Terminal

QUIET = Terminal(speaks=False)


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Where ``runs/tokens`` goes."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def carried_out(folder: Path, recipe: dict[str, Any]) -> Path:
    """The run directory of a recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    with inside(folder):
        return api.run(build_recipe({"seeds": [0], **recipe}, name="recipe"), out=folder / "run", terminal=QUIET).path


def images(folder: Path, **student: Any) -> Path:
    """A small CNN that a larger one taught digits; a few steps bring it far above chance."""
    train = {"steps": 60, "batch_size": 64, "optimizer": {"kind": "adamw", "lr": 0.01}}
    return carried_out(
        folder,
        {
            "name": "small-digits",
            "data": {"source": "digits"},
            "teacher": {"model": "convnet", "options": {"widths": [16, 32], "depth": 1}, "train": train},
            "student": {"model": "convnet", "options": {"widths": [8, 16], "depth": 1}, **student},
            "method": "logit",
            "train": train,
        },
    )


def texts(folder: Path, count: int = 1290) -> Path:
    """A BERT of random weights that has learned three topics."""
    folder.mkdir(parents=True, exist_ok=True)
    model = text_worlds.encoder(folder / "model", layers=2)
    table = text_worlds.table(folder / "texts.jsonl", text_worlds.sentences(count))
    return carried_out(
        folder,
        {
            "name": "topics",
            "data": {"source": "table", "path": str(table), "label": "label", "max_length": 32},
            "teacher": None,
            "student": {"model": f"hf:{model}"},
            "method": "supervised",
            "train": {"steps": 60, "batch_size": 32, "optimizer": {"kind": "adamw", "lr": 0.005}},
            "baseline": False,
        },
    )


def conversations(folder: Path, count: int = 1290) -> Path:
    """A causal language model of random weights that has seen a few sums."""
    folder.mkdir(parents=True, exist_ok=True)
    model = language_worlds.llama(folder / "model", layers=2)
    table = text_worlds.table(folder / "sums.jsonl", language_worlds.conversations(count))
    return carried_out(
        folder,
        {
            "name": "sums",
            "data": {"source": "table", "path": str(table), "text": "messages", "task": "causal", "max_length": 96},
            "teacher": None,
            "student": {"model": f"hf:{model}"},
            "method": {"kind": "sequence"},
            "train": {"steps": 40, "batch_size": 32, "optimizer": {"kind": "adamw", "lr": 0.01}},
            "baseline": False,
        },
    )
