"""Every code block of the documentation does what it says: Python and commands run, YAML is read.

The blocks of a page share a folder and, if they are Python, their names, as for a reader who follows it. Commands
that train get small settings added. What cannot run here is said so on the page, and counted.
"""

from __future__ import annotations

import json
import re
import shlex
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml

import language_worlds
import text_worlds
import tutelage
from closed_teacher import Closed
from tutelage import cli
from tutelage.config.lines import parse_yaml

ROOT = Path(__file__).parents[1]
PAGES = [p for p in sorted((ROOT / "docs").rglob("*.md")) if "api" not in p.parts]
BLOCK = re.compile(r"(?:^(Not run in the tests: [^\n]+)\n\n)?^```(\w*)([^\n]*)\n(.*?)^```$", re.M | re.S)

NOT_RUN = {"tutorials/language-models.md": 1, "how-to.md": 1}
"""Blocks of commands that only say what to type, by page."""

SMALL = {
    "run": ["train.epochs=1", "seed=0"],
    "search": ["train.epochs=2", "seed=0"],
}
"""Added to commands that train."""


def name_of(page: Path) -> str:
    return page.relative_to(ROOT / "docs").as_posix()


def blocks(page: Path) -> list[tuple[str, str, str, str]]:
    """Why it is not run, language, options and text of each block."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def classifier(folder: Path) -> None:
    """A fine-tuned encoder in ``my-bert``, and the texts that it was tuned to, in ``reviews.csv``."""
    import pyarrow as pa
    from pyarrow import csv
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    rows = text_worlds.sentences(60)
    names = sorted({row["label"] for row in rows})
    known = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    place = text_worlds.encoder(folder / "my-bert", "BertForSequenceClassification", **known)
    model = AutoModelForSequenceClassification.from_pretrained(place)
    cut = AutoTokenizer.from_pretrained(place)([r["text"] for r in rows], padding=True, return_tensors="pt")
    labels = torch.tensor([names.index(r["label"]) for r in rows])
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(30):
        torch.nn.functional.cross_entropy(model(**cut).logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(place)
    csv.write_csv(pa.Table.from_pylist(rows), folder / "reviews.csv")


def language_model(folder: Path) -> None:
    """A small language model that answers a little in ``my-llm``, conversations in ``chat.jsonl``, prompts."""
    language_worlds.llama(folder / "blank", layers=2)
    rows = language_worlds.conversations(60)
    text_worlds.table(folder / "chat.jsonl", rows)
    recipe = {
        "data": {"source": "table", "path": "chat.jsonl", "task": "causal", "text": "messages"}, "teacher": None,
        "student": {"model": "hf:blank"}, "method": "sequence", "baseline": False,
        "train": {"steps": 20, "batch_size": 16, "optimizer": {"kind": "adamw", "lr": 0.01}},
    }  # fmt: skip
    (folder / "known.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    tutelage.run("known.yaml", out="runs/known")
    (folder / "runs" / "known" / "student").rename(folder / "my-llm")
    prompts = [{"prompt": f"What are {n} and {n + 1}?"} for n in range(20)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts), encoding="utf-8")


NEEDS = {
    "tutorials/encoders.md": [classifier],
    "tutorials/language-models.md": [language_model],
    "tutorials/closed-teachers.md": [language_model],
}
"""What a page takes for granted."""


def command(line: str) -> None:
    """A line of a shell block, in this process."""
    words = shlex.split(line, comments=True)
    assert words[0] == "tutelage", f"cannot run {line!r}: mark the block, `Not run in the tests: ...`"
    code: Any = 0
    try:
        cli.main([*words[1:], *SMALL.get(words[1], [])])
    except SystemExit as end:
        code = end.code
    assert code in (0, None), line


def parsed(line: str) -> None:
    """Raise where a command has no such name, argument or option; nothing runs."""
    words = shlex.split(line, comments=True)[1:]
    group: Any = typer.main.get_command(cli.app)
    context = group.make_context("tutelage", list(words), resilient_parsing=True)
    if words[0].startswith("-"):
        return
    found = group.get_command(context, words[0])
    assert found is not None, f"there is no command {words[0]!r}"
    found.make_context(words[0], words[1:])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = blocks(page)
    assert sum(bool(why) for why, *_ in found) == NOT_RUN.get(name_of(page), 0)
    if not any(language in ("python", "sh") for _, language, *_ in found):
        for _, language, _, text in found:
            if language == "yaml":
                parse_yaml(text, page.name)
        return
    if "lightning" in page.read_text(encoding="utf-8"):
        pytest.importorskip("lightning", reason="needs the extra lightning")
    monkeypatch.chdir(tmp_path)
    for prepare in NEEDS.get(name_of(page), []):
        prepare(tmp_path)
    server = Closed(rate=0.0, model="teacher")
    names: dict[str, Any] = {}
    with server, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        warnings.filterwarnings("ignore", message=r".*LeafSpec.*|.*does not have many workers.*|.*'pin_memory'.*")
        for why, language, options, text in found:
            text = text.replace("http://127.0.0.1:8000/v1", server.url)
            if why:
                continue
            if language == "python":
                exec(compile(text, name_of(page), "exec"), names)
            elif language == "sh":
                for line in text.replace("\\\n", " ").splitlines():
                    if line.strip() and not line.startswith("#"):
                        command(line)
            elif language == "yaml":
                raw, _ = parse_yaml(text, page.name)
                assert raw
                if title := re.search(r'title="([^"]+)"', options):
                    (tmp_path / title[1]).write_text(text, encoding="utf-8")
            else:
                raise AssertionError(f"a block of {language or 'no language'}: say python, sh or yaml")


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda p: p.name)
def test_every_command_that_is_named_exists_with_its_options(page: Path) -> None:
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^(?:    )?(tutelage [^\n]+)$", text, re.M)
    for line in lines:
        parsed(line)
    assert lines or page.name != "README.md"
