"""Texts: cut once, bucketed by length, masked by seed; labels matched by name; recipes of every task."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.normalizers import NFC
from transformers import AutoTokenizer

from support.text_worlds import sentences, table, tokenizer
from tutelage.data import PlannedBatches, RankSlice, TextData, load_texts
from tutelage.data import tokens as tokens_module
from tutelage.data.text_sources import read_texts
from tutelage.data.tokens import tokenizer_fingerprint
from tutelage.errors import DataError


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(rows: list[dict[str, Any]], **more: Any) -> TextData:
    return load_texts(
        "table", tokenizer=tokenizer(), path=str(table(Path("data.jsonl"), rows)), label="label", **more
    )


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_every_kind_of_file_gives_the_same_texts(suffix: str) -> None:
    import pandas

    rows = sentences(60)
    rows[3]["text"] = 'a "tool",\nwith\ta tab'
    frame, path = pandas.DataFrame(rows), Path(f"data.{suffix}")
    if suffix == "parquet":
        frame.to_parquet(path)
    elif suffix == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_csv(path, index=False, sep="," if suffix == "csv" else "\t")
    data = load_texts("table", tokenizer=tokenizer(), path=str(path), label="label")
    reference = load(rows)
    whole = torch.arange(len(data.train))
    assert torch.equal(data.train.ids, reference.train.ids)
    assert torch.equal(data.train.fetch(whole).inputs["input_ids"], reference.train.fetch(whole).inputs["input_ids"])
    assert data.classes == ["math", "net", "sound"]


def test_tokens_are_those_of_the_tokenizer_and_are_cut_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, cutter = sentences(50), tokenizer()
    data = load(rows)
    batch = data.test.fetch(torch.arange(6))
    expected = cutter([rows[i]["text"] for i in batch.ids.tolist()], padding=True, return_tensors="pt")
    assert batch.inputs.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(batch.inputs[name], value)
    assert [data.classes[i] for i in batch.labels] == [rows[i]["label"] for i in batch.ids.tolist()]
    files = list(Path("runs/tokens").iterdir())
    assert len(files) == 1
    assert files[0].suffix == ".safetensors"
    with monkeypatch.context() as broken:
        broken.setattr(tokens_module, "_tokenize_block", None)  # a second tokenisation fails
        again = load(rows).test.fetch(torch.arange(6))
    assert torch.equal(again.inputs["input_ids"], batch.inputs["input_ids"])
    rows[0]["text"] += " prime"
    assert len(load(rows).train) == len(data.train)
    assert len(list(Path("runs/tokens").iterdir())) == 2, "other texts under the same name"
    files[0].write_bytes(files[0].read_bytes()[:-9])
    assert torch.equal(load(sentences(50)).test.fetch(torch.arange(6)).inputs["input_ids"], batch.inputs["input_ids"])


CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
TALK = [[{"role": "user", "content": "song"}, {"role": "assistant", "content": "chord"}]]

FLIPS: dict[str, tuple[Any, dict[str, Any]]] = {
    "eos_token": ("radio", {}),
    "bos_token": ("[CLS]", {}),
    "sep_token": ("radio", {"task": "mlm", "pack": True}),
    "mask_token": ("radio", {"task": "mlm"}),
    "unk_token": ("[SEP]", {"task": "mlm"}),
    "cls_token": ("radio", {"task": "mlm"}),
    "pad_token": ("radio", {"task": "classes", "max_length": 32}),
    "padding_side": ("left", {"task": "classes", "max_length": 32}),
    "truncation_side": ("left", {"task": "classes"}),
    "model_input_names": (["input_ids", "attention_mask"], {"task": "classes"}),
    "chat_template": (CHAT.replace(": ", " says "), {"text": "talk"}),
}
"""A new value of each field of a tokenizer that is read, and the options of data whose batches it changes."""


@pytest.mark.parametrize("field", FLIPS)
def test_a_changed_tokenizer_reads_no_old_file(field: str) -> None:
    value, options = FLIPS[field]
    rows = [{**row, "talk": TALK[0]} for row in sentences(40)]
    first = tokenizer()
    first.eos_token, first.bos_token, first.chat_template = "[SEP]", "radio", CHAT
    second = copy.deepcopy(first)
    setattr(second, field, value)
    options = {"task": "causal", "learn": "all", "max_length": 8} | options
    if options["task"] == "classes":
        options |= {"label": "label"}
    table(Path("d.jsonl"), rows)

    def batch(cutter: Any) -> list[Any]:
        data = load_texts("table", path="d.jsonl", tokenizer=cutter, **options)
        one = data.train.fetch(torch.arange(8))
        return [data.preprocessing()["tokenizer"], one.inputs, one.labels, data.train.tokens[0].special.tolist()]

    keep = [batch(first), batch(second)]
    assert keep[0][0] != keep[1][0], "the key of a teacher cache"
    shutil.rmtree("runs")
    fresh = batch(second)
    assert str(keep[1]) == str(fresh), "as without a file"
    if field not in ("unk_token", "cls_token"):  # these are in the vocabulary's file
        assert str(keep[0][1:]) != str(fresh[1:]), "the field counts"


def test_a_setting_that_changes_no_token_keeps_the_key() -> None:
    one, other = tokenizer(), tokenizer()
    other.model_max_length = 9
    other("a b", truncation=True, max_length=4, padding="max_length")
    assert tokenizer_fingerprint(one) == tokenizer_fingerprint(other)
    other.save_pretrained("saved")
    assert tokenizer_fingerprint(one) == tokenizer_fingerprint(AutoTokenizer.from_pretrained("saved"))
    expected = load(sentences(60)).train.tokens[0].ids.tolist()
    data = load_texts("table", tokenizer=other, path="data.jsonl", label="label")
    assert data.train.tokens[0].ids.tolist() == expected


@pytest.mark.parametrize("change", ["added", "normalizer", "split"])
def test_what_a_tokenizer_does_to_texts_is_in_its_key(change: str) -> None:
    one, other = tokenizer(), tokenizer()
    if change == "added":
        other.add_tokens(["song chord"])
    elif change == "normalizer":
        other.backend_tokenizer.normalizer = NFC()
    else:
        other.split_special_tokens = True
    assert tokenizer_fingerprint(one) != tokenizer_fingerprint(other)
    assert tokenizer_fingerprint(one, ids_only=True) != tokenizer_fingerprint(other, ids_only=True)


def test_texts_that_another_setting_chooses_read_no_old_file() -> None:
    """Rows of two columns are dropped where either is empty, so the same column has other texts."""
    rows = [{"text": f"song {w}", "b": w, "c": w, "label": w} for w in ("radio", "audio", "mixer", "volume") * 20]
    rows[1]["b"] = rows[2]["c"] = ""
    table(Path("d.jsonl"), rows)
    for teacher_text in ("b", "c", "b"):
        data = load_texts(
            "table", path="d.jsonl", tokenizer=tokenizer(), label="label", teacher_text=teacher_text, empty="drop"
        )
        batch = data.train.fetch(torch.arange(len(data.train)))
        for i, row in enumerate(batch.ids.tolist()):
            ids = tokenizer()(rows[row]["text"])["input_ids"]
            assert batch.inputs["input_ids"][i, : len(ids)].tolist() == ids


def test_files_of_other_texts_have_another_digest() -> None:
    digests = set()
    for name, first, second in (("one", "song", "radio"), ("two", "songra", "dio"), ("three", "songradio", "")):
        Path(name).mkdir()
        for file, text in (("a.txt", first), ("b.txt", second)):
            (Path(name) / file).write_text(text)
        digests.add(read_texts("plain", path=name, options=None, columns=["text"]).digest)
    assert len(digests) == 3
    table(Path("d.csv"), [])
    for name in ("d.csv", "d.tsv"):
        Path(name).write_text("text\na\n")
        digests.add(read_texts("table", path=name, options=None, columns=["text"]).digest)
    assert len(digests) == 5


def test_a_student_without_token_types_gets_its_own_inputs() -> None:
    """DistilBERT's tokenizer is BERT's without token types, which BERT needs for pairs."""
    student, teacher = tokenizer(), tokenizer()
    student.model_input_names = ["input_ids", "attention_mask"]
    table(Path("d.jsonl"), [{**row, "other": "radio song"} for row in sentences(60)])
    options = {"path": "d.jsonl", "tokenizer": student, "teacher_tokenizer": teacher}
    batch = load_texts("table", text=["text", "other"], label="label", **options).train.fetch(torch.arange(4))
    assert "token_type_ids" not in batch.inputs
    assert batch.for_teacher().inputs["token_type_ids"].any()
    assert load_texts("table", task="mlm", **options).train.fetch(torch.arange(4)).teacher_inputs is None, "one cut"


def test_bucketing_pads_little_and_loses_nothing() -> None:
    data = load(sentences(2_000))
    plan = PlannedBatches(data.train, 16, seed=3)
    seen, padding, total = [], 0, 0
    for (batch,) in plan.epoch(0, RankSlice()):
        seen += batch.ids.tolist()
        attention = batch.inputs["attention_mask"]
        padding, total = padding + int((attention == 0).sum()), total + attention.numel()
    assert sorted(seen) == sorted(data.train.ids.tolist())
    assert padding / total < 0.08
    sizes = [float(data.train.lengths[rows].float().mean()) for rows in plan.plan(0)]
    assert sizes != sorted(sizes), "the batches themselves are shuffled"
    assert [r.tolist() for r in plan.plan(1)] != [r.tolist() for r in plan.plan(0)]
    assert [r.tolist() for r in plan.plan(1)] == [r.tolist() for r in PlannedBatches(data.train, 16, 3).plan(1)]
    assert len(plan.plan(0)) == plan.steps_per_epoch


def test_masks_are_a_function_of_the_view_and_never_hide_special_tokens() -> None:
    data = load_texts("table", tokenizer=tokenizer(), path=str(table(Path("d.jsonl"), sentences(400))), task="mlm")
    rows = torch.arange(200)
    one = data.train.fetch(rows, torch.arange(200))
    again, other = data.train.fetch(rows, torch.arange(200)), data.train.fetch(rows, torch.arange(200) + 1)
    assert torch.equal(one.inputs["input_ids"], again.inputs["input_ids"])
    assert not torch.equal(one.labels, other.labels)
    alone = data.train.fetch(rows[7:8], torch.tensor([7]))  # another padding, the same masks
    assert torch.equal(alone.labels[0], one.labels[7, : alone.labels.shape[1]])
    plain = data.train.tokens[0].inputs(data.train.rows[rows].numpy())["input_ids"]
    guessed = one.labels != -100
    assert one.mask is not None
    assert bool((guessed <= one.mask).all())
    assert bool((plain[~one.mask] < 5).all())
    assert torch.equal(one.labels[guessed], plain[guessed])
    assert torch.equal(one.inputs["input_ids"][~guessed], plain[~guessed])
    assert bool(guessed.any(1).all()), "every text teaches something"
    share = float(guessed.sum() / one.mask.sum())
    assert 0.13 < share < 0.24
    said = one.inputs["input_ids"][guessed]
    assert float((said == 4).float().mean()) == pytest.approx(0.8, abs=0.06)
    assert float((said == plain[guessed]).float().mean()) == pytest.approx(0.1, abs=0.05)


def test_packed_rows_are_full_and_hold_every_token() -> None:
    texts = sentences(60)
    Path("texts").mkdir()
    Path("texts/a.txt").write_text("\n\n".join(row["text"] for row in texts), encoding="utf-8")
    cutter = tokenizer()
    data = load_texts("plain", tokenizer=cutter, path="texts", task="mlm", pack=True, max_length=32, test=0.1)
    sets = (data.train, data.validation, data.test)
    ids = sorted(i for s in sets for i in s.ids.tolist())
    assert ids == list(range(len(ids)))
    lengths = torch.cat([s.lengths for s in sets])
    assert sorted(lengths.tolist())[1:] == [32] * (len(ids) - 1)
    plain = {int(i): s.tokens[0].row(s.tokens[0].ids, int(i)) for s in sets for i in s.rows}
    stream = [t for i in range(len(ids)) for t in plain[i][1:-1].tolist()]
    whole = [t for row in texts for t in [*cutter(row["text"], add_special_tokens=False)["input_ids"], 3]]
    assert stream == whole[:-1]


def test_classes_are_matched_by_name() -> None:
    rows = sentences(60)
    numbers = load(rows, classes=["sound", "math", "net"])
    batch = numbers.test.fetch(torch.arange(5))
    assert [["sound", "math", "net"][i] for i in batch.labels] == [rows[i]["label"] for i in batch.ids.tolist()]
    ordered = load([{**row, "label": int(row["row"]) % 12} for row in sentences(240)])
    assert ordered.classes == [str(i) for i in range(12)]


@pytest.mark.parametrize(("change", "more", "says"), [
    ({"text": "  "}, {}, ["1 of 60 texts of the train split are empty", "rows [7]", "empty: drop"]),
    ({"text": None}, {}, ["empty", "rows [7]"]),
    ({}, {"text": "txt"}, ["no column 'txt'", "did you mean 'text'", "its columns: text, label, row"]),
    ({"label": "musik"}, {"classes": ["sound", "net", "math"]}, ["'musik'", "matched by name", "sound, net, math"]),
    ({}, {"text": "row"}, ["row 0", "column 'row'", "a value of type int, not a text"]),
    ({"label": "x"}, {"task": "regression"}, ["row 0", "train split, column 'label'", "'sound' is not a number"]),
    ({}, {"limit": 10_000}, ["data.limit: 10000 texts are requested"]),
])  # fmt: skip
def test_wrong_data_is_named(change: dict[str, Any], more: dict[str, Any], says: list[str]) -> None:
    rows = sentences(60)
    rows[7] |= change
    with pytest.raises(DataError) as error:
        load(rows, **more)
    assert all(part in str(error.value) for part in says), error.value


def test_a_data_set_of_the_hub_numbers_its_own_classes() -> None:
    import datasets

    rows = sentences(60)
    names = ["sound", "math", "net"]
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    columns = {"text": [r["text"] for r in rows], "label": [r["label"] for r in rows]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet("train.parquet")
    given: dict[str, Any] = {"tokenizer": tokenizer(), "options": {"data_files": {"train": "train.parquet"}}}
    data = load_texts("hf:parquet", **given, label="label")
    assert data.classes == names
    batch = data.train.fetch(torch.arange(20))
    assert [names[i] for i in batch.labels] == [rows[i]["label"] for i in batch.ids.tolist()]
    other = load_texts("hf:parquet", **given, label="label", classes=["net", "sound", "math"])
    batch = other.train.fetch(torch.arange(20))
    assert [other.classes[i] for i in batch.labels] == [rows[i]["label"] for i in batch.ids.tolist()]
    with pytest.raises(DataError, match=r"no column 'labels' \(did you mean 'label'\?\)"):
        load_texts("hf:parquet", **given, label="labels")


def test_broken_files_are_named() -> None:
    import pandas

    pandas.DataFrame(sentences(300)).to_parquet("whole.parquet")
    Path("half.parquet").write_bytes(Path("whole.parquet").read_bytes()[:900])
    Path("bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    for path, says in (("half.parquet", "cannot be read as parquet"), ("bad.jsonl", "cannot be read as jsonl"),
                       ("whole.parquett", "did you mean whole.parquet"), ("notes.doc", "no such file")):  # fmt: skip
        with pytest.raises(DataError, match=says):
            load_texts("table", tokenizer=tokenizer(), path=path, task="mlm")


@pytest.mark.parametrize("megabytes", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_a_line_of_megabytes_is_read_and_loses_its_end(megabytes: int) -> None:
    rows = sentences(40)
    rows[3]["text"] = "music " * (megabytes * 175_000)
    data = load(rows, max_length=16)
    assert int(max(s.lengths.max() for s in (data.train, data.validation, data.test))) == 16


def test_several_labels_and_numbers() -> None:
    rows = [{"text": r["text"], "topics": [r["label"], "fast"] if "fast" in r["text"] else [r["label"]],
             "size": len(r["text"]) if i != 4 else None} for i, r in enumerate(sentences(90))]  # fmt: skip
    path = str(table(Path("d.jsonl"), rows))
    several = load_texts("table", tokenizer=tokenizer(), path=path, label="topics", task="multi-label")
    assert several.classes == ["fast", "math", "net", "sound"]
    batch = several.train.fetch(torch.arange(9))
    assert batch.targets is not None
    for row, i in enumerate(batch.ids.tolist()):
        assert [several.classes[c] for c in batch.targets[row].nonzero().flatten()] == sorted(rows[i]["topics"])
    numbers = load_texts("table", tokenizer=tokenizer(), path=path, label="size", task="regression")
    whole = numbers.train.fetch(torch.arange(len(numbers.train)))
    found = dict(
        zip(whole.ids.tolist(), zip(whole.labels.tolist(), whole.targets.tolist(), strict=True), strict=True)
    )
    assert all(found[i] == ((-100, [0.0]) if i == 4 else (0, [rows[i]["size"]])) for i in found)


def test_tags_stand_at_the_first_token_of_each_word() -> None:
    rows = [{"words": r["text"].split(), "tags": [w[0] for w in r["text"].split()]} for r in sentences(40)]
    rows[0]["words"][0], rows[0]["tags"][0] = "zzap", "z"
    data = load_texts("table", tokenizer=tokenizer(), path=str(table(Path("d.jsonl"), rows)), text="words",
                      label="tags", task="tokens", max_length=64)  # fmt: skip
    for split in (data.train, data.validation, data.test):
        for i in range(len(split)):
            batch = split.fetch(torch.tensor([i]))
            tags = [data.classes[t] for t in batch.labels[0] if t != -100]
            assert tags == rows[int(batch.ids[0])]["tags"]
            assert batch.mask is not None
            assert not bool(batch.mask[0, [0, -1]].any())


@pytest.mark.parametrize("max_length", [12, 16, 50])
def test_each_word_of_a_long_text_is_learned_once_with_words_on_both_sides(max_length: int) -> None:
    words = [w for r in sentences(40) for w in r["text"].split()]
    rows = [{"words": words[i : i + 4 + 9 * i], "tags": [w[0] for w in words[i : i + 4 + 9 * i]]} for i in range(12)]
    path = str(table(Path("d.jsonl"), rows))
    data = load_texts("table", tokenizer=tokenizer(), path=path, text="words", label="tags", task="tokens",
                      max_length=max_length)  # fmt: skip
    found: dict[int, list[str]] = {}
    splits: dict[int, set[str]] = {}
    for name in ("train", "validation", "test"):
        split = getattr(data, name)
        order = split.ids.argsort()
        batch = split.fetch(order)
        assert batch.inputs["input_ids"].shape[1] <= max_length
        assert (batch.inputs["input_ids"][:, 0] == tokenizer().cls_token_id).all()
        assert bool(batch.mask[batch.labels != -100].all())
        for i, labels in zip(batch.ids.tolist(), batch.labels, strict=True):
            found.setdefault(i % 2**40, []).extend(data.classes[t] for t in labels if t != -100)
            splits.setdefault(i % 2**40, set()).add(name)
            if i >= 2**40:  # not the first window: the words at its start are counted in the one before
                assert int((labels != -100).nonzero()[0]) > 1
    assert all(sorted(found[i]) == sorted(row["tags"]) for i, row in enumerate(rows))
    assert all(len(names) == 1 for names in splits.values()), "the windows of a text are in one split"
