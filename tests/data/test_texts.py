"""Texts: cut once, bucketed by length, masked by seed; labels matched by name; recipes of every task."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from support.text_worlds import FILLER, encoder, sentences, table, tokenizer
from tutelage import api
from tutelage.config import SOFT_OF_TASK, Recipe, build_recipe, load_recipe
from tutelage.data import PlannedBatches, RankSlice, TextData, load_texts
from tutelage.data import tokens as tokens_module
from tutelage.errors import ConfigError, DataError, TutelageError
from tutelage.evaluation.metrics import of_confusion
from tutelage.experiment.texts import load_text_data
from tutelage.methods.label_losses import HARD
from tutelage.models import load_model
from tutelage.progress import Terminal
from tutelage.search.search import search

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(rows: list[dict[str, Any]], **more: Any) -> TextData:
    return load_texts(
        "table", tokenizer=tokenizer(), path=str(table(Path("data.jsonl"), rows)), label="label", **more
    )


# Reading and cutting -----------------------------------------------------------------------------------


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
    assert files[0].suffix == ".arrow"
    with monkeypatch.context() as broken:
        broken.setattr(tokens_module, "_block", None)  # whatever cuts again fails
        again = load(rows).test.fetch(torch.arange(6))
    assert torch.equal(again.inputs["input_ids"], batch.inputs["input_ids"])
    rows[0]["text"] += " prime"
    assert len(load(rows).train) == len(data.train)
    assert len(list(Path("runs/tokens").iterdir())) == 2, "other texts under the same name"
    files[0].write_bytes(files[0].read_bytes()[:-9])
    assert torch.equal(load(sentences(50)).test.fetch(torch.arange(6)).inputs["input_ids"], batch.inputs["input_ids"])


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
    ({}, {"text": "row"}, ["column 'row' holds a value of type int, not text"]),
    ({"label": "x"}, {"task": "regression"}, ["column 'label' of the train split holds", "not a number"]),
    ({}, {"limit": 10_000}, ["data.limit: 10000 texts are asked for"]),
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


def test_a_line_of_ten_megabytes_is_read_and_loses_its_end() -> None:
    rows = sentences(40)
    rows[3]["text"] = "music " * 1_700_000
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


def test_metrics_of_a_confusion_are_those_of_scikit_learn() -> None:
    from sklearn.metrics import f1_score, matthews_corrcoef

    torch.manual_seed(1)
    for classes in (2, 5):
        labels, said = torch.randint(classes, (80,)), torch.randint(classes, (80,))
        said[:40] = labels[:40]
        found = of_confusion(torch.bincount(labels * classes + said, minlength=classes**2).double())
        average = "binary" if classes == 2 else "macro"
        assert found["f1"] == pytest.approx(f1_score(labels, said, average=average))
        assert found["matthews"] == pytest.approx(matthews_corrcoef(labels, said))


# Recipes -----------------------------------------------------------------------------------------------


def recipe(data: dict[str, Any], **more: Any) -> Recipe:
    raw: dict[str, Any] = {
        "name": "t",
        "data": {"source": "table", "path": "d.jsonl", "max_length": 32, **data},
        "teacher": {"model": f"hf:{Path('encoder').resolve()}", "train": {"epochs": 12}},
        "student": {"model": "teacher", "layers": 1},
        "method": {"kind": "logit", "temperature": 2},
        "train": {"epochs": 6, "batch_size": 16, "optimizer": {"kind": "adamw", "lr": 0.003}},
    }
    return build_recipe(raw | more)


def run(r: Recipe, out: str = "out") -> dict[str, Any]:
    return api.run(r, out=out, terminal=Terminal(speaks=False)).summary


def test_a_run_cuts_the_student_and_leaves_a_model_of_transformers() -> None:
    encoder(Path("encoder"))
    rows = sentences(240)
    table(Path("d.jsonl"), rows)
    summary = run(recipe({"label": "label"}))
    assert summary["teacher"]["accuracy"] > 0.8
    assert summary["students"]["distilled"]["best"]["accuracy"]["mean"] > 0.8
    assert 0 < summary["capacity_ratio"] < 1
    text = "a simple tool for audio with stereo mixer"
    outside = (
        "import sys, json, transformers; sys.modules['tutelage'] = None;"
        f"print(json.dumps(transformers.pipeline('text-classification', 'out/student', top_k=None)({text!r})))"
    )
    done = subprocess.run([sys.executable, "-c", outside], capture_output=True, text=True, check=True, timeout=120)
    said = {s["label"]: s["score"] for s in json.loads(done.stdout.splitlines()[-1])[0]}
    cutter, model = transformers.AutoTokenizer.from_pretrained("out/student"), load_model("out/student")
    with torch.no_grad():
        scores = F.softmax(model(**cutter(text, return_tensors="pt")).logits, -1)[0]
    assert said == {
        name: pytest.approx(float(p), abs=1e-5) for name, p in zip(["math", "net", "sound"], scores, strict=True)
    }
    assert max(said, key=said.__getitem__) == "sound"
    assert "accuracy" in Path("out/report.html").read_text()


TASKS: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("multi-label", {"label": "topics"}, {}, "f1"),
    ("regression", {"label": "size"}, {"method": {"kind": "logit"}}, "spearman"),
    ("tokens", {"text": "words", "label": "tags"}, {}, "accuracy"),
    ("mlm", {}, {"method": {"kind": "triple"}}, "accuracy"),
    ("embedding", {}, {"method": {"kind": "embedding"},
                       "teacher": {"model": "hf:encoder"}}, "spearman"),
]  # fmt: skip


@pytest.mark.parametrize(("task", "data", "more", "metric"), TASKS, ids=[t[0] for t in TASKS])
def test_every_task_trains_and_is_measured(
    task: str, data: dict[str, Any], more: dict[str, Any], metric: str
) -> None:
    encoder(Path("encoder"))
    rows = [{**r, "topics": [r["label"]], "size": len(r["text"]) / 50, "words": r["text"].split(),
             "tags": [w[0] for w in r["text"].split()]} for r in sentences(120)]  # fmt: skip
    table(Path("d.jsonl"), rows)
    summary = run(recipe({"task": task, **data}, **more))
    assert summary["metric"] == metric
    best = summary["students"]["distilled"]["best"]
    assert 0 <= best[metric]["mean"] <= 1
    assert ("gain" in summary) == (task != "embedding")
    assert load_model("out/student") is not None
    assert Path("out/student/tokenizer.json").exists()
    assert Path("out/report.html").exists()


def test_a_bi_encoder_learns_from_a_cross_encoder() -> None:
    encoder(Path("cross"), "BertForSequenceClassification", num_labels=1)
    encoder(Path("encoder"))
    rows = sentences(120)
    triples = [
        {"query": a["text"], "answer": rows[i - 3]["text"], "other": rows[i - 1]["text"]} for i, a in enumerate(rows)
    ]
    table(Path("d.jsonl"), triples)
    data = {"task": "ranking", "text": ["query", "answer", "other"]}
    more = {
        "teacher": {"model": "hf:cross"},
        "student": {"model": "hf:encoder"},
        "method": {"kind": "logit", "alpha": 1},
    }
    summary = run(recipe(data, **more))
    assert summary["formula"] == "1 * margin_mse + 0 * ce"
    assert summary["metric"] == "accuracy"
    lines = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    losses = [line["validation"]["loss"] for line in lines if "validation" in line]
    assert losses[-1] < losses[0], "margins come closer to the cross-encoder's"
    whole = load_texts(
        "table", tokenizer=tokenizer(), path="d.jsonl", text=["query", "answer", "other"], task="ranking"
    )
    batch = whole.train.fetch(torch.arange(3))
    cutter, first = tokenizer(), triples[int(batch.ids[0])]
    taught = batch.for_teacher().inputs
    assert isinstance(taught, dict)
    pair = cutter(first["query"], first["other"])["input_ids"]
    assert taught["negative_input_ids"][0, : len(pair)].tolist() == pair


def test_a_teacher_of_the_same_classes_in_another_order_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["sound", "math", "net"]
    table(Path("d.jsonl"), sentences(240))
    encoder(Path("encoder"))
    first = recipe({"label": "label", "classes": names}, baseline=False)
    run(first, "first")
    package = Path("site/my_encoders")
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    Path("first/models/teacher").rename(package / "tuned")
    monkeypatch.syspath_prepend(str(Path("site").resolve()))
    summary = run(recipe({"label": "label"}, teacher={"model": "package:my_encoders/tuned"}), "second")
    assert summary["classes"] == names, "the teacher's order, by name"
    assert summary["teacher"]["accuracy"] == json.loads(Path("first/summary.json").read_text())["teacher"]["accuracy"]


def test_a_trimmed_vocabulary_goes_with_its_student() -> None:
    encoder(Path("encoder"))
    rows = [r | {"text": r["text"].replace("prime", "vector")} for r in sentences(150)]
    table(Path("d.jsonl"), rows)
    student = {"model": "teacher", "layers": 1, "vocabulary": "corpus"}
    summary = run(recipe({"label": "label"}, student=student))
    assert summary["students"]["distilled"]["best"]["accuracy"]["mean"] > 0.6
    cutter = transformers.AutoTokenizer.from_pretrained("out/student")
    model = load_model("out/student")
    assert len(cutter) == model.config.vocab_size < len(tokenizer())
    assert "prime" not in cutter.get_vocab()
    assert {"music", "server", "matrix"} <= set(cutter.get_vocab())
    assert "vector" in cutter.get_vocab()


def test_a_vocabulary_is_trimmed_to_what_is_trained_on_alone() -> None:
    encoder(Path("encoder"))
    rows = sentences(150)
    table(Path("d.jsonl"), rows)
    asked = recipe({"label": "label", "limit": 6}, student={"model": "teacher", "layers": 1, "vocabulary": "corpus"})
    data = load_text_data(asked, Terminal(speaks=False))
    trained = {w for i in data.train.ids.tolist() for w in rows[i]["text"].split()}
    held = {w for row in rows for w in row["text"].split()} - trained
    whole_words = {w for w in data.tokenizer.get_vocab() if len(w) > 1 and w[0] not in "#["}
    assert held
    assert whole_words == {w for w in trained if len(w) > 1}
    assert data.teacher_token_ids is not None


def test_a_teacher_with_a_small_vocabulary_is_timed_on_its_own_tokens() -> None:
    encoder(Path("small"), cutter=tokenizer(drop=FILLER.split()))
    encoder(Path("encoder"))
    table(Path("d.jsonl"), sentences(90))
    teacher = {"model": "hf:small", "train": {"epochs": 1}}
    summary = run(recipe({"label": "label"}, teacher=teacher, student={"model": "hf:encoder"}))
    assert set(summary["latency"]) == {"teacher", "student"}


@pytest.mark.parametrize(("data", "more", "says"), [
    ({"label": "label"}, {"teacher": {"model": "hf:encoder", "trainable": "head"}}, "add 'train'"),
    ({"task": "embedding"}, {"teacher": {"model": "hf:encoder", "train": {"epochs": 1}}}, "nothing to train teacher"),
    ({"label": "label"}, {"teacher": {"model": "hf:encoder", "augment": ["flip"]}}, "is for images"),
    ({"task": "mlm", "labels": 10}, {}, "use 'limit'"),
    ({"task": "mlm", "pack": True, "route": "row"}, {}, "of several routes"),
    ({"label": "label", "tokenizer": "hf:other"}, {}, "the teacher's tokenizer"),
])  # fmt: skip
def test_keys_that_would_do_nothing_are_refused(data: dict[str, Any], more: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        recipe(data, **more)


def test_what_goes_by_accuracy_refuses_another_metric() -> None:
    with pytest.raises(ConfigError, match="a search goes by accuracy, and the recipe by f1"):
        search(recipe({"label": "label", "metric": "f1"}), trials=2, out="s")
    chain = {"teacher": None, "workflow": {"kind": "born-again"}, "student": {"model": "hf:encoder"}}
    with pytest.raises(ConfigError, match="workflows compare accuracy, and the metric is 'f1'"):
        recipe({"label": "label", "metric": "f1"}, **chain)


def test_the_objective_of_each_task_is_the_methods_own() -> None:
    assert {task: hard.soft for task, hard in HARD.items()} == SOFT_OF_TASK


@pytest.mark.parametrize(("more", "says"), [
    ({"student": {"model": "teacher", "layers": 9}}, "9"),
    ({"student": {"model": "hf:other"}, "data": {"task": "mlm"}, "method": {"kind": "triple"}},
     "cut texts into other tokens"),
    ({"teacher": {"model": "mlp"}}, "brings a tokenizer"),
    ({"teacher": {"model": "package:no_such_thing/model"}}, "no installed package 'no_such_thing'"),
])  # fmt: skip
def test_models_that_do_not_fit_are_named(more: dict[str, Any], says: str) -> None:
    encoder(Path("encoder"))
    encoder(Path("other"), cutter=tokenizer(drop=["matrix"]))
    table(Path("d.jsonl"), sentences(60))
    data = {"label": "label"} if "data" not in more else more.pop("data")
    with pytest.raises(TutelageError, match=says):
        run(recipe(data, **more))


@pytest.mark.parametrize(("data", "says"), [
    ({"source": "tabel", "text": "text", "path": "x"}, "did you mean 'table'"),
    ({"source": "plain", "path": "x"}, "plain text has no labels"),
    ({"source": "table"}, "needs 'path'"),
    ({"source": "table", "path": "x", "task": "mlm", "label": "y"}, "has no labels"),
    ({"source": "table", "path": "x", "pack": True}, "for task mlm"),
    ({"source": "table", "path": "x", "metric": "spearman"}, "allowed: accuracy, f1, matthews"),
    ({"source": "table", "path": "x", "txt": "a"}, "unknown key 'data.txt', did you mean 'text'"),
])  # fmt: skip
def test_sections_that_contradict_themselves(data: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        build_recipe({"name": "t", "data": data, "teacher": "mlp", "student": "mlp", "method": {}})
    assert says.replace(", did you mean", " (did you mean") in str(error.value) or says in str(error.value)


# Shipped recipes ---------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["classify-text", "distilbert-minilm", "sentence-embedding"])
def test_shipped_recipes_run_in_small(name: str) -> None:
    encoder(Path("encoder"), layers=6)
    table(Path("train.jsonl"), sentences(90))
    table(Path("test.jsonl"), sentences(30, seed=1))
    changes = ["data.path={train: train.jsonl, test: test.jsonl}", "train.epochs=1", "teacher.model=hf:encoder",
               "train.precision=no", "seeds=[0]"]  # fmt: skip
    if name != "sentence-embedding":
        changes.append("teacher.train.epochs=1")
    summary = run(load_recipe(ROOT / "recipes" / f"{name}.yaml", changes))
    assert summary["parameters"]["student"] < summary["parameters"]["teacher"]
    model = load_model("out/student")
    assert model.config.num_hidden_layers == 3  # type: ignore[union-attr]


@pytest.mark.slow
def test_the_published_set_up_of_distilbert_takes_two_steps() -> None:
    torch.manual_seed(0)
    cutter = tokenizer()
    transformers.BertForMaskedLM(transformers.BertConfig()).save_pretrained("base")  # BERT-base, random weights
    cutter.save_pretrained("base")
    table(Path("d.jsonl"), sentences(600))
    changes = [
        "data.source=table", "data.options={}", "data.path=d.jsonl", "data.max_length=64", "teacher.model=hf:base",
        "train.epochs=null", "train.steps=2", "train.batch_size=8", "train.accumulate=2", "train.precision=no",
        "train.evaluate_every=2", "data.test=0.05", "data.validation=0.05",
    ]  # fmt: skip
    summary = run(load_recipe(ROOT / "recipes" / "distilbert-base.yaml", changes))
    assert summary["parameters"]["teacher"] == pytest.approx(110e6, rel=0.01)
    assert summary["parameters"]["student"] == pytest.approx(67e6, rel=0.01)
    assert summary["formula"] == "2 * mlm + 5 * kd(T=2, counted) + 1 * cosine"
