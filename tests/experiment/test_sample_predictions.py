"""What a run keeps of single samples: where teacher and student disagree, and what language models write."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

import tutelage
from support import language_worlds as worlds
from support import text_worlds
from tutelage.config import build_recipe
from tutelage.data import IGNORE, Batch
from tutelage.data.tokens import tokenize
from tutelage.experiment.sample_predictions import (
    PIXELS,
    Samples,
    collect_samples,
    describe_image,
    generate_continuations,
    opening,
    png,
    select_rows,
)
from tutelage.models import ModelSpec, build

DIGITS: dict[str, Any] = {
    "name": "tiny", "data": {"source": "digits", "labels": 200},
    "teacher": {"model": "mlp", "options": {"hidden": [32]}, "train": {"steps": 60}},
    "student": {"model": "mlp", "options": {"hidden": [4]}}, "method": "logit",
    "train": {"steps": 20, "batch_size": 64}, "seeds": [0, 1],
}  # fmt: skip


def recipe(**changes: Any) -> Any:
    return build_recipe({**DIGITS, **changes}, name="tiny")


def kept(path: Path, kind: str = "test") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "samples" / f"{kind}.json").read_text())
    return found


def decoded(uri: str) -> torch.Tensor:
    """``[H, W, C]`` of a PNG as :func:`png` writes it, read without it."""
    data = base64.b64decode(uri.partition("base64,")[2])
    assert data.startswith(b"\x89PNG")
    at, parts = 8, {}
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0] == zlib.crc32(kind + body)
        parts[kind] = body
        at += 12 + size
    width, height, depth, colour = struct.unpack(">IIBB", parts[b"IHDR"][:10])
    assert depth == 8
    lines = torch.tensor(list(zlib.decompress(parts[b"IDAT"]))).view(height, -1)
    assert bool((lines[:, 0] == 0).all())
    return lines[:, 1:].reshape(height, width, {0: 1, 2: 3}[colour])


def test_counts_by_hand() -> None:
    """Four rows: both right, the teacher alone, the baseline student, no label and another answer."""
    teacher = torch.tensor([[5.0, 0, 0], [0, 5, 0], [5, 0, 0], [0, 0, 9]])
    student = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0]])
    batch = Batch(torch.zeros(4, 1), torch.tensor([0, 1, 1, IGNORE]))
    samples = Samples("teacher", "distilled", 10)
    samples.add(batch, {"teacher": teacher, "distilled": student})
    found = samples.as_json(lambda batch: {})
    assert found["right"] == {"both": 1, "reference": 1, "student": 1, "neither": 0}
    assert (found["n"], found["labelled"], found["agree"]) == (4, 3, {"distilled": 1})
    assert found["by_class"] == {"n": [1, 2, 0], "distilled": [1, 0, 0]}
    assert found["pairs"] == [[0, 1, 1], [1, 0, 1], [2, 1, 1]]
    assert [one["row"] for one in found["samples"]] == [3, 1, 2, 0], "the furthest apart first, then what agrees"
    assert found["samples"][0]["label"] is None
    assert found["samples"][1]["logits"] == {"teacher": [0, 5, 0], "distilled": [1, 0, 0]}


def test_what_is_kept_does_not_depend_on_the_batches() -> None:
    torch.manual_seed(0)
    teacher, student, labels = torch.randn(300, 5), torch.randn(300, 5), torch.randint(5, (300,))
    found = []
    for size in (300, 7):
        samples = Samples("teacher", "distilled", 12)
        for rows in torch.arange(300).split(size):
            samples.add(
                Batch(rows[:, None].float(), labels[rows]), {"teacher": teacher[rows], "distilled": student[rows]}
            )
        found.append(samples.as_json(lambda batch: {"text": str(batch.inputs)}))
    assert found[0] == found[1]
    rows = [one["row"] for one in found[0]["samples"]]
    apart = (teacher.argmax(1) != student.argmax(1))[rows]
    assert apart.tolist() == [True] * 8 + [False] * 4
    assert rows[8:] == sorted(rows[8:])
    assert max(rows[8:]) > 150, "what they agree on comes from all over the split"


def test_without_a_teacher_the_students_are_compared() -> None:
    torch.manual_seed(0)
    students = {"baseline": torch.nn.Linear(3, 4), "distilled": torch.nn.Linear(3, 4)}
    batch = Batch(torch.randn(20, 3), torch.randint(4, (20,)))
    found = collect_samples([batch], None, students, 5, torch.device("cpu")).as_json(describe_image)
    assert (found["reference"], found["student"]) == ("baseline", "distilled")
    assert set(found["samples"][0]["logits"]) == {"baseline", "distilled"}
    assert "image" not in found["samples"][0]


def test_a_picture_holds_its_pixels() -> None:
    image = torch.arange(24).view(3, 2, 4) / 23
    assert decoded(png(image)).equal((image * 255).round().permute(1, 2, 0).long())
    assert decoded(png(torch.rand(1, 200, 100))).shape == (PIXELS, PIXELS // 2, 1)
    assert decoded(describe_image(Batch(torch.randn(1, 1, 5, 5), torch.zeros(1)))["image"]).aminmax() == (0, 255)


def test_a_run_keeps_samples_and_a_resumed_one_the_same(tmp_path: Path) -> None:
    run = tutelage.run(recipe(), out=tmp_path / "run")
    found = kept(run.path)
    assert found["exported"] == run.summary["exported"]
    assert 0 < len(found["samples"]) <= 60
    teacher = [max(range(10), key=one["logits"]["teacher"].__getitem__) for one in found["samples"]]
    student = [max(range(10), key=one["logits"]["distilled"].__getitem__) for one in found["samples"]]
    apart = [a != b for a, b in zip(teacher, student, strict=True)]
    assert apart == sorted(apart, reverse=True)
    seed = int(found["exported"].removeprefix("distilled-seed"))
    agreement = run.summary["students"]["distilled"]["best"]["agreement"]["values"][seed]
    assert found["agree"]["distilled"] / found["n"] == pytest.approx(agreement)
    assert decoded(found["samples"][0]["image"]).shape == (8, 8, 1)
    before = (run.path / "samples" / "test.json").read_bytes()
    (run.path / "samples" / "test.json").unlink()
    (run.path / "summary.json").unlink()
    tutelage.run(recipe(), out=run.path, resume=True)
    assert (run.path / "samples" / "test.json").read_bytes() == before


def test_none_are_kept_where_none_are_asked_for(tmp_path: Path) -> None:
    run = tutelage.run(recipe(samples={"predictions": 0}, seeds=[0]), out=tmp_path / "run")
    assert not (run.path / "samples").exists()
    (run.path / "summary.json").unlink()
    tutelage.run(recipe(samples={"predictions": 3}, seeds=[0]), out=run.path, resume=True)
    assert len(kept(run.path)["samples"]) == 3, "what the page shows may change when a run goes on"


def test_of_texts_the_text_is_kept(tmp_path: Path) -> None:
    encoder = text_worlds.encoder(tmp_path / "encoder")
    rows = text_worlds.sentences(90)
    path = text_worlds.table(tmp_path / "rows.jsonl", rows)
    found = build_recipe(
        {
            "name": "texts", "data": {"source": "table", "path": str(path), "label": "label", "max_length": 32},
            "teacher": {"model": f"hf:{encoder}", "train": {"steps": 4}},
            "student": {"model": "teacher", "layers": 1}, "method": "logit", "train": {"steps": 2, "batch_size": 8},
        },
        name="texts",
    )  # fmt: skip
    one = kept(tutelage.run(found, out=tmp_path / "run").path)["samples"][0]
    assert one["text"] in {row["text"] for row in rows}


# What language models write ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return worlds.llama(tmp_path_factory.mktemp("models") / "teacher", layers=2)


def rows_of(texts: list[Any], **options: Any) -> list[Batch]:
    cutter = worlds.tokenizer()
    tokens = tokenize([texts], cutter, max_length=96, learn="answers", **options)
    places = torch.arange(len(tokens)).numpy()
    labels = tokens.next_tokens(places)
    whole = Batch(tokens.inputs(places), labels, mask=labels != IGNORE)
    return [whole.rows(i, i + 1) for i in range(len(whole))]


def test_a_prompt_ends_where_the_last_answer_begins() -> None:
    cutter = worlds.tokenizer()
    turns = [
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "1 and 2?"}, {"role": "assistant", "content": "It is 3."},
    ]  # fmt: skip
    for packed in (False, True):
        found = opening(rows_of([turns, "Ann has 3"], pack=packed)[0])
        assert found is not None
        asked = cutter.apply_chat_template(turns[:3], add_generation_prompt=True, tokenize=False)
        assert cutter.decode(found.prompt) == asked
        assert cutter.decode(found.rest) == "It is 3.<|im_end|>"


def test_of_a_text_the_first_tokens_are_gone_on_with() -> None:
    cutter = worlds.tokenizer()
    text = "Ann has 3 plums and finds 4: that makes 7."
    found = opening(rows_of([text, "Ben"])[0])
    assert found is not None
    assert cutter.decode(torch.cat([found.prompt, found.rest])) == text + "<|im_end|>"
    assert 1 <= len(found.prompt) < len(found.rest)
    nothing = [{"role": "user", "content": "x" * 400}, {"role": "assistant", "content": "Yes."}]
    assert opening(rows_of([nothing])[0]) is None
    assert len(select_rows(rows_of([nothing, text, "Ben has"]), 8)) == 2


def test_models_write_their_likeliest_tokens(model: Path) -> None:
    network: Any = build(ModelSpec(f"hf:{model}", task="causal")).eval()
    cutter = worlds.tokenizer()
    rows = select_rows(rows_of(worlds.texts(20)), 3)
    found = generate_continuations(
        {"teacher": (network, cutter), "distilled": (network, cutter)}, rows, 5, torch.device("cpu")
    )
    assert len(found) == 3
    for row, text in zip(rows, found, strict=True):
        one = opening(row)
        assert one is not None
        ids = one.prompt
        for _ in range(5):
            ids = torch.cat([ids, network(input_ids=ids[None]).logits[0, -1].argmax()[None]])
            if ids[-1] == cutter.eos_token_id:
                break
        assert (
            text["distilled"]
            == text["teacher"]
            == cutter.decode(ids[len(one.prompt) :], skip_special_tokens=True).strip()
        )
        assert text["prompt"] == cutter.decode(one.prompt).strip()
        assert text["data"] == cutter.decode(one.rest[:5], skip_special_tokens=True).strip()


@pytest.mark.parametrize("pack", [False, True])
def test_a_run_of_language_models_keeps_what_they_write(model: Path, tmp_path: Path, pack: bool) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in worlds.conversations(40)))
    found = build_recipe(
        {
            "name": "causal", "data": {"source": "table", "path": str(path), "task": "causal", "text": "messages",
                     "pack": pack, "max_length": 64},
            "teacher": f"hf:{model}", "student": {"model": "teacher", "layers": 1}, "method": "token",
            "train": {"steps": 2, "batch_size": 4}, "samples": {"generations": 3, "max_new_tokens": 4},
        },
        name="causal",
    )  # fmt: skip
    run = tutelage.run(found, out=tmp_path / "run")
    written = kept(run.path, "written")
    assert written["models"] == ["teacher", "baseline", "distilled"]
    assert len(written["texts"]) == 3
    assert all(set(text) == {"prompt", "data", "teacher", "baseline", "distilled"} for text in written["texts"])
    assert all("What is" in text["prompt"] for text in written["texts"])
    assert not (run.path / "samples" / "test.json").exists()
