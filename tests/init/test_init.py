"""What a newcomer types first: `tutelage init` on data of each kind, `tutelage recipes`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from support import language_worlds, text_worlds
from tutelage import api, cli
from tutelage.config import load_recipe
from tutelage.errors import ConfigError, DataError
from tutelage.init import TASKS, describe_data, draft_recipe, list_recipes, read_recipe
from tutelage.progress import Terminal

ROOT = Path(__file__).parents[2]


def pictures(folder: Path, count: int = 12, side: int = 12, splits: tuple[str, ...] = ("",)) -> Path:
    """Noisy images of three colours."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for split in splits:
        for channel, name in enumerate(("red: warm", "green", "blue")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(0, 80, (side + i, side + 2, 3), generator=generator, dtype=torch.uint8)
                pixels[..., channel] += 150
                Image.fromarray(pixels.numpy()).save(folder / split / name / f"{i}.png")
    return folder


def init(*words: str) -> int:
    """`tutelage init` with these words; its exit code."""
    try:
        cli.main(["init", *words])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def carry_out(recipe: Path, out: Path, *overrides: str) -> dict[str, Any]:
    return api.run(recipe, overrides, out=out, terminal=Terminal(speaks=False)).summary


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_worlds.encoder(tmp_path_factory.mktemp("bert"))


def test_images_run_from_the_recipe_as_it_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, recipe = pictures(tmp_path / "my pictures"), tmp_path / "my.yaml"
    assert init("--data", str(folder), "--out", str(recipe)) == 0
    assert "36 images of 3 classes" in capsys.readouterr().out
    loaded = load_recipe(recipe)
    assert loaded.data.source == "imagefolder"
    assert loaded.seeds == [0, 1, 2]
    summary = carry_out(recipe, tmp_path / "run", "seed=0")  # one seed in place of three is all that differs
    assert summary["classes"] == ["blue", "green", "red: warm"]
    assert summary["teacher"]["accuracy"] > 0.9
    assert set(summary["students"]) == {"baseline", "distilled"}
    assert summary["parameters"]["student"] < summary["parameters"]["teacher"] / 4


def test_a_table_of_texts_runs_from_the_recipe_as_it_is_written(tmp_path: Path, bert: Path) -> None:
    import pyarrow as pa
    from pyarrow import csv

    rows, recipe = text_worlds.sentences(60), tmp_path / "my.yaml"
    csv.write_csv(pa.Table.from_pylist(rows), tmp_path / "mine.csv")
    assert init("--data", str(tmp_path / "mine.csv"), "--teacher", str(bert), "--out", str(recipe)) == 0
    loaded = load_recipe(recipe)
    assert (loaded.data.task, loaded.data.text, loaded.data.label) == ("classes", "text", "label")
    assert loaded.student.model == "teacher"
    assert loaded.student.layers == 1
    summary = carry_out(recipe, tmp_path / "run", "seed=0", "teacher.train.optimizer.lr=3e-3")
    assert summary["classes"] == sorted(text_worlds.WORDS)


CHAT = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "This."}]
TABLES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "named": ({"id": "a", "review": "good film", "stars": 4, "label": "yes"}, {"text": "review", "label": "label"}),
    "longest": ({"uid": "u1", "what": "a much longer text", "kind": "b"}, {"text": "what", "label": "kind"}),
    "numbers": ({"text": "some words", "score": 0.5}, {"task": "regression", "label": "score"}),
    "lists": ({"text": "some words", "labels": ["a", "b"]}, {"task": "multi-label"}),
    "targets": ({"text": "some words", "labels": [0.5, 2.0]}, {"task": "regression", "label": "labels"}),
    "words": ({"tokens": ["some", "words"], "ner_tags": ["O", "B"]}, {"task": "tokens", "text": "tokens"}),
    "pairs": ({"premise": "a b", "hypothesis": "c d", "label": 1}, {"text": ["premise", "hypothesis"]}),
    "chat": ({"id": 3, "messages": CHAT}, {"task": "causal", "text": "messages", "label": None}),
    "answers": ({"instruction": "say", "output": "said"}, {"task": "causal", "text": ["instruction", "output"]}),
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_columns_are_found(tmp_path: Path, name: str, ending: str) -> None:
    row, expected = TABLES[name]
    rows = [{**row, **{k: f"{row[k]}{i % 2}" for k in ("kind",) if k in row}} for i in range(12)]
    if "label" in row:
        rows = [{**r, "label": f"{r['label']}{i % 2}" if isinstance(r["label"], str) else i % 2}
                for i, r in enumerate(rows)]  # fmt: skip
    rows = [{k: v + i / 8 if k == "score" else v for k, v in r.items()} for i, r in enumerate(rows)]
    path = tmp_path / f"mine.{ending}"
    if ending == "jsonl":
        text_worlds.table(path, rows)
    else:
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(rows), path)
    found = describe_data(str(path))
    for key, value in expected.items():
        assert getattr(found, key) == value, key
    assert found.rows == 12


@pytest.mark.parametrize(("value", "task"), [(0, "multi-label"), (0.5, "regression")])
def test_several_columns_of_labels(tmp_path: Path, bert: Path, value: float, task: str) -> None:
    rows = [{"text": "some words", "a": i % 2, "b": value, "c": "x"} for i in range(20)]
    path, recipe = text_worlds.table(tmp_path / "mine.jsonl", rows), tmp_path / "my.yaml"
    flags = ["--data", str(path), "--teacher", str(bert), "--label", "a", "--label"]
    assert init(*flags, "b", "--out", str(recipe)) == 0
    data = load_recipe(recipe).data
    assert (data.task, data.label) == (task, ["a", "b"])
    with pytest.raises(ConfigError, match="'c' is one of several columns of labels and does not hold numbers"):
        describe_data(str(path), label=["a", "c"])
    with pytest.raises(ConfigError, match="given 2 times, but task classes has one column"):
        describe_data(str(path), label=["a", "b"], task="classes")


@pytest.mark.parametrize("separator", [",", ";", "|"])
def test_separated_labels_are_found(
    tmp_path: Path, bert: Path, separator: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = ["red", f"red{separator} blue", "blue", f"blue{separator} green", ""]
    rows = [{"text": "some words", "label": cells[i % 5]} for i in range(40)]
    path, recipe = text_worlds.table(tmp_path / "mine.jsonl", rows), tmp_path / "my.yaml"
    assert init("--data", str(path), "--teacher", str(bert), "--out", str(recipe)) == 0
    assert f"labels in column label are separated by {separator!r}" in capsys.readouterr().out
    data = load_recipe(recipe).data
    assert (data.task, data.separator) == ("multi-label", separator)
    assert describe_data(str(path), task="classes").separator is None


@pytest.mark.parametrize("cells", [["Korea, South", "Korea, North"], ["['a', 'b']", "['a']"]])
def test_a_label_with_a_comma_is_one_label(tmp_path: Path, cells: list[str]) -> None:
    rows = [{"text": "some words", "label": cells[i % 2]} for i in range(40)]
    path = str(text_worlds.table(tmp_path / "mine.jsonl", rows))
    found = describe_data(path)
    assert (found.task, found.separator) == ("classes", None)
    table = text_worlds.table(
        tmp_path / "one.jsonl", [{"text": "some words", "label": "ab"[i % 2]} for i in range(40)]
    )
    with pytest.raises(ConfigError, match=r"'a' without a separator of labels"):
        describe_data(str(table), task="multi-label")


@pytest.mark.parametrize("task", [t for t in TASKS if t not in ("images", "causal")])
def test_every_task_of_encoders_gets_a_valid_recipe(tmp_path: Path, bert: Path, task: str) -> None:
    row: dict[str, Any] = {"text": "some words"}
    row |= {"classes": {"label": "a"}, "multi-label": {"label": ["a"]}, "regression": {"label": 0.5}}.get(task, {})
    if task == "tokens":
        row = {"text": ["some", "words"], "label": ["O", "B"]}
    rows = [{**row, **({"label": "ab"[i % 2]} if task == "classes" else {})} for i in range(20)]
    path, recipe = text_worlds.table(tmp_path / "mine.jsonl", rows), tmp_path / "my.yaml"
    found = describe_data(str(path), task=task, label="label" if "label" in row else None)
    recipe.write_text(draft_recipe(found, teacher=str(bert)), encoding="utf-8")
    loaded = load_recipe(recipe)
    assert loaded.data.task == task
    assert loaded.teacher is not None
    assert loaded.teacher.model == f"hf:{bert}"


def test_splits_that_are_there_are_used(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pictures", count=4, splits=("train", "test"))
    assert describe_data(str(folder)).splits == ("train", "test")
    tables = tmp_path / "tables"
    tables.mkdir()
    for split in ("train", "dev"):
        text_worlds.table(tables / f"{split}.jsonl", text_worlds.sentences(12))
    found = describe_data(str(tables))
    assert found.path == {"train": str(tables / "train.jsonl"), "validation": str(tables / "dev.jsonl")}


def test_few_images_get_splits_that_hold_every_class(tmp_path: Path) -> None:
    folder, recipe = pictures(tmp_path / "few", count=5), tmp_path / "my.yaml"
    assert init("--data", str(folder), "--out", str(recipe)) == 0
    from tutelage.experiment.recipe_source import load_data

    data = load_data(load_recipe(recipe), Terminal(speaks=False))
    for split in (data.train, data.validation, data.test):
        assert set(split.labels.tolist()) == {0, 1, 2}


def test_a_student_of_an_earlier_run_is_a_teacher(tmp_path: Path) -> None:
    folder, recipe = tmp_path / "student", tmp_path / "my.yaml"
    folder.mkdir()
    spec = {"model": "mlp", "options": {"hidden": [8]}, "classes": 10, "channels": 1, "size": 8}
    (folder / "model.json").write_text(json.dumps({"spec": spec}), encoding="utf-8")
    assert init("--data", "digits", "--teacher", str(folder), "--out", str(recipe)) == 0
    teacher = load_recipe(recipe).teacher
    assert teacher is not None
    assert (teacher.model, teacher.options, teacher.checkpoint) == ("mlp", {"hidden": [8]}, str(folder))
    assert teacher.train is None, "it has weights and must not be trained again"


def test_a_file_that_is_there_stays_unless_forced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "my.yaml"
    recipe.write_text("mine", encoding="utf-8")
    for words in (["init", "--data", "digits"], ["recipes", "digits"]):
        with pytest.raises(SystemExit) as end:
            cli.main([*words, "--out", str(recipe)])
        assert end.value.code == 2
        assert "--force" in capsys.readouterr().err
        assert recipe.read_text(encoding="utf-8") == "mine"
    assert init("--data", "digits", "--out", str(recipe), "--force") == 0
    assert load_recipe(recipe).data.source == "digits"


def test_nothing_is_asked_where_nobody_can_answer(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tutelage", "init"], cwd=tmp_path, env=environment,
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert "--data" in done.stderr
    assert "Traceback" not in done.stderr


def test_who_sits_before_it_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["digits", str(tmp_path / "asked.yaml"), "", "mlp"])
    monkeypatch.setattr("tutelage.cli.init.typer.prompt", lambda *_, **__: next(answers))
    monkeypatch.setattr("sys.stdin", type("Terminal", (), {"isatty": lambda _: True})())
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert init() == 0
    assert load_recipe(tmp_path / "asked.yaml").student.model == "mlp"
    assert next(answers, None) is None


BAD: dict[str, tuple[list[str], str]] = {
    "no such path": (["--data", "pictres"], "did you mean pictures"),
    "unknown task": (["--data", "pictures", "--task", "clases"], "did you mean 'classes'"),
    "images as texts": (["--data", "pictures", "--task", "classes"], "remove --task"),
    "a text column of images": (["--data", "pictures", "--text", "a"], "--text is for texts"),
    "unknown teacher": (["--data", "pictures", "--teacher", "timm:resnet1"], "nearest"),
    "misspelt model": (["--data", "pictures", "--student", "convnett"], "did you mean 'convnet'"),
    "a folder without a model": (["--data", "pictures", "--teacher", "empty"], "model.json"),
    "an empty folder": (["--data", "empty"], "contains no images, tables or texts"),
    "no such column": (["--data", "t.jsonl", "--text", "txt"], "did you mean 'text'"),
    "no labels": (["--data", "t.jsonl"], "--label"),
    "a network for images": (["--data", "t.jsonl", "--task", "embedding", "--teacher", "mlp"], "is an image model"),
    "a data set nobody knows": (["--data", "hf:some/thing"], "--task"),
    "a class with two images": (["--data", "rare"], "has 2 images"),
    "one class": (["--data", "one"], "one class"),
    "broken table": (["--data", "broken.parquet"], "cannot be read"),
    "a folder as the recipe": (["--data", "pictures", "--out", "empty"], "is a folder"),
}


@pytest.fixture(scope="module")
def mess(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which little is right."""
    folder = tmp_path_factory.mktemp("mess")
    pictures(folder / "pictures", count=4)
    for name in ("rare", "one"):
        pictures(folder / name, count=4)
    for file in sorted((folder / "rare" / "blue").glob("*"))[2:]:
        file.unlink()
    for gone in ("green", "blue"):
        for file in (folder / "one" / gone).glob("*"):
            file.unlink()
        (folder / "one" / gone).rmdir()
    (folder / "empty").mkdir()
    text_worlds.table(folder / "t.jsonl", [{"text": f"words {i}", "n": i} for i in range(9)])
    (folder / "broken.parquet").write_bytes(b"PAR1 not")
    return folder


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_said_with_a_remedy_and_writes_nothing(
    name: str, mess: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, expected = BAD[name]
    monkeypatch.chdir(mess)
    before = sorted(mess.iterdir())
    assert init(*words) == 2
    said = capsys.readouterr().err
    assert expected in said
    assert "\n  -> " in said
    assert sorted(mess.iterdir()) == before


@pytest.mark.parametrize(("kind", "more", "task"), [
    ("LlamaForCausalLM", {}, "causal"), ("GPT2LMHeadModel", {}, "causal"), ("BertForMaskedLM", {}, "mlm"),
    ("modules.json", {}, "embedding"), ("BertForSequenceClassification", {}, "a classifier, needs labels"),
    ("T5ForConditionalGeneration", {"is_encoder_decoder": True}, "a sequence-to-sequence model, cannot be distilled"),
])  # fmt: skip
@pytest.mark.parametrize("source", ["table", "plain", "other column"])
def test_the_teacher_names_the_task_of_texts_without_labels(
    kind: str, more: dict[str, Any], task: str, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    if kind.startswith(("Bert", "modules")):
        text_worlds.encoder(model, "BertForMaskedLM" if kind == "modules.json" else kind)
    else:
        language_worlds.llama(model)
    if kind == "modules.json":
        (model / kind).write_text("[]")
    else:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"architectures": [kind]} | more))
    rows = [{"text": f"some words {i}"} | ({"page": i % 2} if source == "other column" else {}) for i in range(20)]
    data = text_worlds.table(tmp_path / "t.jsonl", rows)
    if source == "plain":
        data = tmp_path / "texts"
        data.mkdir()
        (data / "a.txt").write_text("\n\n".join(f"some words {i}" for i in range(20)))
    out = tmp_path / "r.yaml"
    code = init("--data", str(data), "--teacher", str(model), "--out", str(out))
    printed = capsys.readouterr()
    if " " not in task:
        assert code == 0, printed.err
        assert yaml.safe_load(out.read_text())["data"].get("task") == task
        assert f"note: task {task}, because the teacher is" in printed.out
    elif source != "other column":  # which may be the labels
        assert code == 2
        assert task in " ".join(printed.err.split())
        assert not out.exists()


def test_named_labels_win_over_the_teacher_and_empty_cells_are_none(tmp_path: Path) -> None:
    rows = [{"text": f"some words {i}", "label": ["a", "b", ""][i % 3]} for i in range(30)]
    found = describe_data(str(text_worlds.table(tmp_path / "t.jsonl", rows)), teacher="causal")
    assert (found.task, found.classes) == ("classes", {"a": 10, "b": 10})


def test_conversations_need_a_teacher_with_a_chat_template(tmp_path: Path) -> None:
    folder = text_worlds.encoder(tmp_path / "model", "BertLMHeadModel", is_decoder=True)
    path = text_worlds.table(tmp_path / "chat.jsonl", [{"messages": CHAT}] * 9)
    with pytest.raises(ConfigError, match="chat template"):
        draft_recipe(describe_data(str(path)), teacher=str(folder))


def test_without_a_network_a_missing_teacher_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tutelage.init.recipe_template.find_spec", lambda name: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("tutelage.init.recipe_template._config", lambda named: None)
    path = text_worlds.table(tmp_path / "t.jsonl", text_worlds.sentences(30))
    with pytest.raises(ConfigError, match="is not on this machine"):
        draft_recipe(describe_data(str(path)))


def test_an_empty_label_column_is_an_error(tmp_path: Path) -> None:
    path = text_worlds.table(tmp_path / "t.jsonl", [{"text": "a b", "label": None}] * 6)
    with pytest.raises(DataError, match="is empty"):
        describe_data(str(path))


def test_all_recipes_of_the_project_ship_and_each_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    known = list_recipes()
    assert list(known) == sorted(p.stem for p in (ROOT / "recipes").glob("*.yaml"))
    for name, about in known.items():
        assert 20 < len(about) < 250, name
        assert read_recipe(name) == (ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        cli.main(["recipes"])
    assert end.value.code in (0, None)
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == list(known)


def test_a_shipped_recipe_is_written_out(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["recipes", "recipes/mutual.yaml", "--out", str(tmp_path / "mine.yaml")])
    assert end.value.code in (0, None)
    assert load_recipe(tmp_path / "mine.yaml").method.kind == "mutual"
    with pytest.raises(ConfigError, match="did you mean 'digits'"):
        read_recipe("digitz")
