"""Every code block of the documentation does what it says: Python and commands run, YAML is read.

The blocks of a page share a folder and, if they are Python, their names, as for a reader who follows it. Commands
that train get small settings added. A block of text is what commands print: its lines, in order, where ``...`` stands
for anything. What cannot run here is said so on the page, and counted.
"""

from __future__ import annotations

import json
import random
import re
import shlex
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml

import tutelage
from support import language_worlds, served_worlds, text_worlds
from support.closed_teacher import Closed, said
from tutelage import cli
from tutelage.config.lines import parse_yaml

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *(p for p in sorted((ROOT / "docs").rglob("*.md")) if "api" not in p.parts)]
BLOCK = re.compile(r"(?:^<!-- (not run: [^\n]+) -->\n)?^```(\w*)([^\n]*)\n(.*?)^```$", re.M | re.S)

NOT_RUN = {
    "README.md": 2,
    "tutorials/language-models.md": 1,
    "how-to/larger-models.md": 2,
    "how-to/served-teacher.md": 1,
}
"""Blocks that only say what to type, by page."""

ELSEWHERE = {"README.md": ("python", "yaml"), "methods.md": ("yaml",)}
"""What :mod:`test_examples` runs and reads."""

SMALL = {
    "run": ["train.epochs=1", "seed=0"],
    "search": ["train.epochs=2", "seed=0"],
}
"""Added to commands that train."""

SMALL_TEACHER = "teacher.train.epochs=2"
"""Added where they train the teacher of the digits."""

EXTRAS = {
    "README.md": ["onnxruntime", "onnxscript", "PIL"],
    "how-to/bench.md": ["onnxruntime", "onnxscript"],
    "how-to/export.md": ["onnxruntime", "onnxscript"],
    "how-to/quantise.md": ["onnxruntime", "onnxscript", "torchao"],
    "how-to/search.md": ["optuna"],
    "how-to/trainers.md": ["lightning"],
}
"""What must be installed for a page, beside the rest."""


def name_of(page: Path) -> str:
    """Below ``docs``, or of the project."""
    return page.relative_to(ROOT / "docs" if "docs" in page.relative_to(ROOT).parts else ROOT).as_posix()


def blocks(page: Path) -> list[tuple[str, str, str, str]]:
    """Why it is not run, language, options and text of each block."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def classifier(folder: Path) -> None:
    """A fine-tuned encoder in ``my-bert``, and the texts that it was tuned to, in ``reviews.csv``."""
    import pyarrow as pa
    from pyarrow import csv
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    rows = [
        row for row in text_worlds.sentences(70) if "theorem" not in row["text"]
    ]  # a word that only the model knows
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


def held_out(folder: Path) -> None:
    """Conversations that nobody learned from."""
    text_worlds.table(folder / "held-out.jsonl", language_worlds.conversations(20, seed=1))


def finished(folder: Path) -> None:
    """The quickstart's recipe, and a run of it that learned something."""
    shutil.copy(ROOT / "recipes" / "digits.yaml", folder)
    tutelage.run("digits.yaml", ["train.epochs=20", SMALL_TEACHER, "seed=0"], out="runs/digits")


def pictures(folder: Path) -> None:
    """Flowers by their colour in ``data/flowers``, and two to ask about in ``pictures``."""
    from PIL import Image

    draw = random.Random(0)
    for place, count in (("data/flowers/{}", 16), ("pictures", 1)):
        for number, name in enumerate(("red", "green", "blue")):
            (folder / place.format(name)).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                colour = [draw.randrange(120) for _ in range(3)]
                colour[number] += 120
                Image.new("RGB", (20 + i, 24), tuple(colour)).save(folder / place.format(name) / f"{name}-{i}.png")


NEEDS = {
    "README.md": [pictures],
    "tutorials/encoders.md": [classifier],
    "tutorials/language-models.md": [language_model],
    "tutorials/closed-teachers.md": [language_model],
    "how-to/smaller-encoder.md": [classifier],
    "how-to/larger-models.md": [language_model],
    "how-to/served-teacher.md": [language_model],
    "how-to/generate.md": [language_model],
    "how-to/judge.md": [language_model, held_out],
    "how-to/bench.md": [finished],
    "how-to/export.md": [finished],
    "how-to/quantise.md": [finished],
}
"""What a page takes for granted."""


PREPARED: dict[Callable[[Path], None], Path] = {}
"""What several pages take for granted is made once."""


def prepared(make: Callable[[Path], None], factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which ``make`` has been."""
    if make not in PREPARED:
        folder = factory.mktemp(make.__name__)
        monkeypatch.chdir(folder)
        make(folder)
        PREPARED[make] = folder
    return PREPARED[make]


def says(prompt: str) -> str:
    """What the closed model says: an answer, or the judge's verdict for the longer one."""
    first, found, second = prompt.partition("\n\nAnswer B:\n")
    return ("A" if len(first) > len(second) else "B") if found else said(prompt)


@contextmanager
def closed(folder: Path) -> Iterator[str]:
    """Where a closed teacher answers."""
    with Closed(rate=0.0, model="teacher", answer=says) as server:
        yield server.url


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Where vLLM serves the model in ``my-llm``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = folder / "my-llm"
    model, cutter = AutoModelForCausalLM.from_pretrained(place), AutoTokenizer.from_pretrained(place)
    with served_worlds.serving(model, cutter) as server:
        yield f"{server.url}/v1"


SERVERS = {"how-to/served-teacher.md": served}
"""What is behind the address that pages name; else :func:`closed`."""


def command(line: str) -> None:
    """A line of a shell block, in this process."""
    words = shlex.split(line, comments=True)
    assert words[0] == "tutelage", f"cannot run {line!r}: mark the block with `<!-- not run: REASON -->`"
    small = SMALL.get(words[1], [])
    if small and words[2] == "digits.yaml" and "teacher.train=null" not in words:
        small = [*small, SMALL_TEACHER]
    code: Any = 0
    try:
        cli.main([*words[1:], *small])
    except SystemExit as end:
        code = end.code
    expected = re.search(r"# exit code (\d+)$", line)
    assert (code or 0) == (int(expected[1]) if expected else 0), line


def printed(text: str, expected: str) -> None:
    """Each expected line is one of the text's, in order."""
    lines = (" ".join(line.split()) for line in text.splitlines())
    for line in filter(None, (" ".join(line.split()) for line in expected.splitlines())):
        pattern = re.escape(line).replace(r"\.\.\.", ".*")
        assert any(re.match(pattern, one) for one in lines), f"{line!r} is not printed, or not in its place:\n{text}"


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
def test_blocks_of_a_page_run(
    page: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    found, name = blocks(page), name_of(page)
    assert sum(bool(why) for why, *_ in found) == NOT_RUN.get(name, 0)
    if not any(language in ("python", "sh") for _, language, *_ in found):
        for _, language, _, text in found:
            if language == "yaml" and language not in ELSEWHERE.get(name, ()):
                parse_yaml(text, page.name)
        return
    for module in EXTRAS.get(name, []):
        pytest.importorskip(module, reason="needs its extra")
    for prepare in NEEDS.get(name, []):
        shutil.copytree(prepared(prepare, tmp_path_factory, monkeypatch), tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    shown = ""
    with SERVERS.get(name, closed)(tmp_path) as url, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        warnings.filterwarnings("ignore", message=r".*LeafSpec.*|.*does not have many workers.*|.*'pin_memory'.*")
        capsys.readouterr()
        for why, language, options, text in found:
            text = text.replace("http://127.0.0.1:8000/v1", url)
            if why or language in ELSEWHERE.get(name, ()):
                continue
            if language == "python":
                exec(compile(text, name, "exec"), names)
            elif language == "sh":
                for line in text.replace("\\\n", " ").splitlines():
                    if line.strip() and not line.startswith("#"):
                        command(line)
                out, err = capsys.readouterr()
                shown = err + out
            elif language == "text":
                printed(shown, text)
            elif language == "yaml":
                raw, _ = parse_yaml(text, page.name)
                assert raw
                if title := re.search(r'title="([^"]+)"', options):
                    (tmp_path / title[1]).write_text(text, encoding="utf-8")
            else:
                raise AssertionError(f"a block of {language or 'no language'}: say python, sh, text or yaml")


@pytest.mark.parametrize(
    ("expected", "is_there"),
    [("ok   data: 12 ...", True), ("page: a.html", True), ("data: 12 images", False), ("page: b.html", False),
     ("page: a.html\nok data:", False)],
)  # fmt: skip
def test_a_block_of_text_must_have_been_printed(expected: str, is_there: bool) -> None:
    shown = "ok  data: 12 images\n\npage:   a.html\n"
    if is_there:
        printed(shown, expected)
    else:
        with pytest.raises(AssertionError, match="is not printed"):
            printed(shown, expected)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_that_is_named_exists_with_its_options(page: Path) -> None:
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^(?:    )?(tutelage [^\n]+)$", text, re.M)
    for line in lines:
        parsed(line)
    assert lines or page.name != "README.md"
