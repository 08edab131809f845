"""Recipes of every task of text encoders."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch.nn import functional as F

import tutelage
from support import python
from support.text_worlds import FILLER, WORDS, encoder, sentences, table, tokenizer
from tutelage import api
from tutelage.cli.doctor_checks import examine
from tutelage.config import LOGIT_LOSSES, SOFT_OF_TASK, Recipe, build_recipe, load_recipe
from tutelage.data import Batch, load_texts
from tutelage.errors import CapabilityError, ConfigError, TutelageError
from tutelage.experiment.recipe_source import load_data, recipe_spec
from tutelage.experiment.recipe_texts import load_text_data
from tutelage.integrations import Distiller
from tutelage.methods.label_losses import LABEL_LOSSES
from tutelage.methods.minilm import MinilmMethod
from tutelage.models import load_model
from tutelage.progress import Terminal
from tutelage.search.search import search_recipe
from tutelage.students import to_float_model

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def recipe(data: dict[str, Any], **more: Any) -> Recipe:
    raw: dict[str, Any] = {
        "name": "t",
        "data": {"source": "table", "path": "d.jsonl", "max_length": 32, **data},
        "teacher": {"model": f"hf:{Path('encoder').resolve()}", "train": {"epochs": 2}},
        "student": {"model": "teacher", "layers": 1},
        "method": {"kind": "logit", "temperature": 2},
        "train": {"epochs": 2, "batch_size": 16, "optimizer": {"kind": "adamw", "lr": 0.003}},
    }
    return build_recipe(raw | more)


LONGER: dict[str, Any] = {
    "teacher": {"model": "hf:encoder", "train": {"epochs": 8}},
    "train": {"epochs": 4, "batch_size": 16, "optimizer": {"kind": "adamw", "lr": 0.003}},
}
"""Enough for a student that knows the labels."""


def run(r: Recipe, out: str = "out") -> dict[str, Any]:
    return api.run(r, out=out, terminal=Terminal(speaks=False)).summary


def test_a_run_cuts_the_student_and_leaves_a_model_of_transformers() -> None:
    encoder(Path("encoder"))
    rows = sentences(240)
    table(Path("d.jsonl"), rows)
    summary = run(recipe({"label": "label"}, **LONGER))
    assert summary["teacher"]["accuracy"] > 0.8
    assert summary["students"]["distilled"]["best"]["accuracy"]["mean"] > 0.8
    assert 0 < summary["capacity_ratio"] < 1
    text = "a simple tool for audio with stereo mixer"
    outside = (
        "import sys, json, transformers; sys.modules['tutelage'] = None;"
        f"print(json.dumps(transformers.pipeline('text-classification', 'out/student', top_k=None)({text!r})))"
    )
    done = python.run(["-c", outside])
    assert done.returncode == 0, done.stderr
    said = {s["label"]: s["score"] for s in json.loads(done.stdout.splitlines()[-1])[0]}
    cutter, model = transformers.AutoTokenizer.from_pretrained("out/student"), load_model("out/student")
    with torch.no_grad():
        scores = F.softmax(model(**cutter(text, return_tensors="pt")).logits, -1)[0]
    assert said == {
        name: pytest.approx(float(p), abs=1e-5) for name, p in zip(["math", "net", "sound"], scores, strict=True)
    }
    assert max(said, key=said.__getitem__) == "sound"
    assert "accuracy" in Path("out/report.html").read_text()


def test_a_teacher_that_a_run_trains_is_saved_with_its_own_tokenizer() -> None:
    encoder(Path("encoder"))
    encoder(Path("small"), cutter=tokenizer(drop=WORDS["math"].split()))
    table(Path("d.jsonl"), sentences(60))
    run(recipe({"label": "label"}, student={"model": "hf:small"}, baseline=False))
    for saved, own in (("models/teacher", "encoder"), ("student", "small")):
        cutter = transformers.AutoTokenizer.from_pretrained(f"out/{saved}")
        assert cutter.get_vocab() == transformers.AutoTokenizer.from_pretrained(own).get_vocab()


TASKS: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("multi-label", {"label": "topics"}, {}, "f1"),
    ("regression", {"label": "size"}, {"method": {"kind": "logit"}}, "spearman"),
    ("regression", {"label": "sizes"}, {"method": {"kind": "logit"}}, "spearman"),
    ("tokens", {"text": "words", "label": "tags"}, {}, "accuracy"),
    ("mlm", {}, {"method": {"kind": "triple"}}, "accuracy"),
    ("embedding", {}, {"method": {"kind": "embedding"},
                       "teacher": {"model": "hf:encoder"}}, "spearman"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("task", "data", "more", "metric"), TASKS, ids=["-".join((t[0], *map(str, t[1].values()))) for t in TASKS]
)
def test_every_task_trains_and_is_measured(
    task: str, data: dict[str, Any], more: dict[str, Any], metric: str
) -> None:
    encoder(Path("encoder"))
    rows = [{**r, "topics": [r["label"]], "size": len(r["text"]) / 50,
             "sizes": [len(r["text"]) / 50, r["row"] % 3], "words": r["text"].split(),
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


def sizes(count: int) -> list[dict[str, Any]]:
    """Texts with two targets of their kind, of mean 400,000 and 0.02."""
    kinds = {"math": (300_000.0, 0.011), "net": (400_000.0, 0.02), "sound": (500_000.0, 0.035)}
    rows = [{**r, **dict(zip(("price", "rate"), kinds[r["label"]], strict=True))} for r in sentences(count)]
    return [{**r, "price": r["price"] + 1_000 * (len(r["text"]) % 7)} for r in rows]


@pytest.mark.parametrize("student", [{}, {"lora": {"rank": 4}}], ids=["all weights", "lora"])
def test_targets_of_any_size_are_learned_and_the_student_answers_in_their_units(student: dict[str, Any]) -> None:
    encoder(Path("encoder"))
    table(Path("d.jsonl"), sizes(240))
    data = {"task": "regression", "label": ["price", "rate"]}
    more = {**LONGER, "method": {"kind": "logit"}, "student": {"model": "teacher", "layers": 1, **student}}
    summary = run(recipe(data, **more))
    teacher, best = summary["teacher"], summary["students"]["distilled"]["best"]
    assert teacher["r2"] > 0.7
    assert best["r2"]["mean"] > 0.5
    assert teacher["per_target"]["rmse"][0] == pytest.approx(
        80_000 * (1 - teacher["per_target"]["r2"][0]) ** 0.5, rel=0.2
    )
    assert best["rmse"]["mean"] > best["mae"]["mean"] > 1_000
    cutter = transformers.AutoTokenizer.from_pretrained("out/student")
    model = transformers.AutoModelForSequenceClassification.from_pretrained("out/student").eval()
    assert type(model.classifier) is torch.nn.Linear
    with torch.no_grad():
        price, rate = model(**cutter("a simple tool for audio with stereo mixer", return_tensors="pt")).logits[0]
    assert 420_000 < price < 560_000
    assert 0.02 < rate < 0.05
    page = Path("out/report.html").read_text()
    assert "RMSE" in page
    assert "distilled student, price" in page


def test_spans_of_long_texts_are_scored_whole() -> None:
    encoder(Path("encoder"))
    words = [w for r in sentences(240) for w in r["text"].split()]
    texts = [words[i : i + 30] for i in range(0, len(words) - 30, 30)]
    rows = [{"words": t, "tags": ["B-T" if w in ("audio", "matrix") else "O" for w in t]} for t in texts]
    table(Path("d.jsonl"), rows)
    summary = run(recipe({"task": "tokens", "text": "words", "label": "tags", "max_length": 16}, **LONGER))
    best = summary["students"]["distilled"]["best"]
    assert summary["teacher"]["n"] == 30 * round(0.2 * len(rows)), "all words of the test split"
    assert best["f1"] == best["span_f1"]
    assert best["span_f1"]["mean"] > 0.5
    assert "Spans" in Path("out/report.html").read_text()


def test_a_teacher_in_the_targets_units_is_as_good_as_its_own_student_at_first() -> None:
    encoder(Path("encoder"))
    table(Path("d.jsonl"), sizes(120))
    data = {"task": "regression", "label": "price"}
    first = recipe(data, **LONGER, method={"kind": "logit"})
    run(first)
    given = {"model": f"hf:{Path('out/student').resolve()}"}
    r = recipe(data, teacher=given, method={"kind": "logit"}, student={"model": "teacher"})
    source = recipe_spec(r, load_data(r, Terminal(speaks=False))).source
    teacher, student = source.build_teacher(0).eval(), source.with_teacher(source.build_teacher(0)).build_student(0)
    ids = torch.randint(5, 20, (4, 12))
    with torch.no_grad():
        torch.testing.assert_close(student.eval()(ids).logits, teacher(ids).logits, rtol=1e-4, atol=1)
        torch.testing.assert_close(to_float_model(student)(ids).logits, teacher(ids).logits, rtol=1e-4, atol=1)


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
        "train": LONGER["train"],
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
    table(Path("d.jsonl"), sentences(90))
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


PAIRS = {"kind": "feature", "pairs": [{"student": "bert.encoder.layer.1", "teacher": "bert.encoder.layer.1"}]}


@pytest.mark.parametrize("method", ["minilm", "tinybert"])
def test_methods_that_compare_tokens_need_one_tokenizer(method: str) -> None:
    encoder(Path("encoder"), cutter=tokenizer())
    encoder(Path("other"), cutter=tokenizer(drop=["song", "packet", "matrix", "theorem"]))
    table(Path("d.jsonl"), sentences(120))
    student = {"model": "hf:other"}
    given = recipe({"label": "label"}, student=student, method=method, train={"steps": 2, "batch_size": 16})
    with pytest.raises(CapabilityError, match=r"compares token by token.*\n.*data\.tokenizer"):
        run(given)
    assert any(one.topic == "tokens" and one.level == "bad" for one in examine(given, Terminal(speaks=False)))
    other = recipe({"label": "label"}, student=student, method="logit")
    assert not any(one.level == "bad" for one in examine(other, Terminal(speaks=False)))


@pytest.mark.parametrize("method", ["minilm", PAIRS, {**PAIRS, "stage1_fraction": 0.3}])
def test_tokens_are_compared_in_all_training_texts(method: Any) -> None:
    """Tokenizers that differ in one rare word, of the same number of pieces, so that positions match."""
    encoder(Path("encoder"), cutter=tokenizer())
    other = tokenizer()
    description = json.loads(other.backend_tokenizer.to_str())
    description["normalizer"] = {"type": "Replace", "pattern": {"String": "stereo"}, "content": "mixer"}
    encoder(Path("other"), cutter=transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(description)), **other.special_tokens_map,
    ))  # fmt: skip
    rows = [{**row, "text": row["text"].replace("stereo", "mixer")} for row in sentences(120)]
    rows[60]["text"] += " stereo"
    table(Path("d.jsonl"), rows)
    given = recipe({"label": "label", "test": 0.1}, student={"model": "hf:other"}, method=method)
    assert any(one.topic == "tokens" and one.level == "bad" for one in examine(given, Terminal(speaks=False)))
    with pytest.raises(CapabilityError, match="compares token by token"):
        run(given)


def test_python_users_are_told_of_other_tokens() -> None:
    encoder(Path("encoder"), "BertForSequenceClassification", num_labels=2)
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    ids = torch.randint(5, 30, (8, 6), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    same = Batch(inputs, torch.tensor([0, 1] * 4), teacher_inputs=dict(inputs))
    other = replace(same, teacher_inputs={**inputs, "input_ids": ids.flip(1)})
    masked = replace(other, labels=ids.flip(1))
    assert [one.reads_same_tokens() for one in (same, other, masked)] == [True, False, True]
    teacher, method = load("encoder"), MinilmMethod()
    Distiller(load("encoder"), teacher, MinilmMethod(), example=same, to_batch=lambda batch: batch)
    with pytest.raises(CapabilityError, match="different tokens"):
        Distiller(load("encoder"), teacher, method, example=other, to_batch=lambda batch: batch)
    with pytest.raises(CapabilityError, match="compares token by token"):
        tutelage.distill(
            teacher, load("encoder"), [other], eval_data=[other], method=MinilmMethod(), to_batch=lambda batch: batch,
            out="distilled", verbose=False,
        )  # fmt: skip


def test_a_trimmed_vocabulary_goes_with_its_student() -> None:
    encoder(Path("encoder"))
    rows = [r | {"text": r["text"].replace("prime", "vector")} for r in sentences(150)]
    table(Path("d.jsonl"), rows)
    student = {"model": "teacher", "layers": 1, "vocabulary": "corpus"}
    summary = run(recipe({"label": "label"}, student=student, **LONGER))
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
    with pytest.raises(ConfigError, match="a search maximises accuracy, and the recipe's metric is f1"):
        search_recipe(recipe({"label": "label", "metric": "f1"}), trials=2, out="s")
    chain = {"teacher": None, "workflow": {"kind": "born-again"}, "student": {"model": "hf:encoder"}}
    with pytest.raises(ConfigError, match="workflows compare accuracy, and the metric is 'f1'"):
        recipe({"label": "label", "metric": "f1"}, **chain)


def test_every_task_has_a_loss_of_labels_and_a_default_loss_on_logits() -> None:
    assert LABEL_LOSSES.keys() == SOFT_OF_TASK.keys()
    assert all(task in LOGIT_LOSSES[name].tasks for task, name in SOFT_OF_TASK.items())


@pytest.mark.parametrize(("more", "says"), [
    ({"student": {"model": "teacher", "layers": 9}}, "9"),
    ({"student": {"model": "hf:other"}, "data": {"task": "mlm"}, "method": {"kind": "triple"}},
     "have different tokens"),
    ({"teacher": {"model": "mlp"}}, "has a tokenizer"),
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
