"""Columns of tables of texts are read as what the file holds; what does not fit names row and column."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from support import language_worlds
from support.text_worlds import sentences, table, tokenizer
from tutelage.config.data import TextDataConfig
from tutelage.data import TextData, load_texts
from tutelage.data.batch import IGNORE
from tutelage.data.chat import as_conversation
from tutelage.data.text_sources import read_texts
from tutelage.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(rows: Sequence[dict[str, Any]], **more: Any) -> tuple[TextData, list[str]]:
    lines: list[str] = []
    path = str(table(Path("data.jsonl"), list(rows)))
    options = {"tokenizer": tokenizer(), "path": path, "label": "label", "say": lines.append}
    return load_texts("table", **options | more), lines


def cells(text: str, suffix: str = "csv") -> dict[str, list[Any]]:
    """The columns ``text`` and ``label`` of a file."""
    Path(f"x.{suffix}").write_text(text)
    raw = read_texts("table", path=f"x.{suffix}", options=None, columns=["text", "label"], texts=["text"])
    return {name: list(values) for name, values in raw.splits["train"].columns.items()}


@pytest.mark.parametrize("values", [
    ["2024-01-02", "2024-01-03"], ["2024-01-02 10:00", "2024-01-03T10:00Z"], ["10:00", "11:30"], ["007", "7"],
])  # fmt: skip
def test_a_csv_keeps_dates_times_and_leading_zeros_as_they_are_written(values: list[str]) -> None:
    read = cells("text,label\n" + "".join(f"{v},{v}\n" for v in values))
    assert read == {"text": values, "label": values}


def test_texts_of_a_csv_are_texts_and_numbers_are_numbers() -> None:
    assert cells("text,label\n12,1\nNA,2\n1.50,\n") == {"text": ["12", "NA", "1.50"], "label": [1, 2, None]}


def test_json_lines_keep_dates_as_they_are_written() -> None:
    rows = [{"text": "2024-01-02", "label": [{"day": "2024-01-03 10:00:00"}]}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    assert cells(text, "jsonl") == {"text": ["2024-01-02"], "label": [[{"day": "2024-01-03 10:00:00"}]]}


@pytest.mark.parametrize("empty", ["", "  ", None])
def test_an_empty_label_is_no_label(empty: str | None) -> None:
    rows = sentences(60)
    for row in rows[:9]:
        row["label"] = empty
    data, lines = load(rows)
    assert data.classes == ["math", "net", "sound"]
    assert int((data.train.labels == IGNORE).sum()) == 9
    assert not (torch.cat([data.validation.labels, data.test.labels]) == IGNORE).any()
    assert lines == ["note: 9 of 60 texts of the train split have no label; the student learns them from the teacher"]
    dropped, _ = load(rows, unlabeled="drop")
    assert not (dropped.train.labels == IGNORE).any()


def test_a_number_that_is_not_one_is_no_label() -> None:
    import pandas

    rows = [row | {"label": float(i % 3) if i > 5 else float("nan")} for i, row in enumerate(sentences(60))]
    pandas.DataFrame(rows).to_parquet("d.parquet")
    data, _ = load(rows, path="d.parquet")
    assert data.classes == ["0", "1", "2"]


def test_labels_chosen_among_texts_of_which_some_have_none() -> None:
    rows = sentences(60)
    for row in rows[:9]:
        row["label"] = None
    data, _ = load(rows, labels=6)
    assert int((data.train.labels != IGNORE).sum()) == 6


@pytest.mark.parametrize(("change", "more", "says"), [
    ({"label": ["a"]}, {}, ["row 7 (the first is 0) of the train split, column 'label'", "type list, not one label"]),
    ({"label": "a"}, {"task": "multi-label"}, ["row 7", "'label'", "'a'", "type str, not a list of labels"]),
    ({"label": 3}, {"text": "row", "label": "label"}, ["row 0", "column 'row'", "type int, not a text"]),
])  # fmt: skip
def test_a_value_of_another_type_names_row_and_column(
    change: dict[str, Any], more: dict[str, Any], says: list[str]
) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    rows = sentences(60)
    lists = "list" in says[-1] or isinstance(change["label"], list)
    if lists:  # Arrow has one type for a column, the hub and Parquet files too
        rows = [row | {"label": [row["label"]]} for row in rows]
        if isinstance(change["label"], str):
            rows = [row | {"label": None if i < 7 else "a"} for i, row in enumerate(rows)]
        else:
            rows = [row | ({"label": None} if i < 7 else {}) for i, row in enumerate(rows)]
    parquet.write_table(pa.Table.from_pylist(rows), "d.parquet")
    with pytest.raises(DataError) as error:
        load(rows, path="d.parquet", **more)
    assert all(part in str(error.value) for part in says), error.value


def test_words_and_their_labels_are_equally_many() -> None:
    rows = [{"text": r["text"].split(), "label": ["x"] * len(r["text"].split())} for r in sentences(40)]
    rows[5]["label"] = rows[5]["label"][:-1]
    with pytest.raises(DataError, match=r"row 5 .*column 'label': \d+ labels for \d+ words"):
        load(rows, task="tokens")


def test_words_without_labels_are_no_labels() -> None:
    rows = [
        {"text": ["music", "two"], "label": ["A", None] if i > 3 else [None, None] if i else None} for i in range(40)
    ]
    data, lines = load(rows, task="tokens")
    assert lines == ["note: 4 of 40 texts of the train split have no label; the student learns them from the teacher"]
    batch = data.train.fetch(torch.arange(len(data.train)))
    assert set(batch.labels.flatten().tolist()) == {0, IGNORE}
    assert int((batch.labels == 0).any(1).sum()) == len(data.train) - 4


@pytest.mark.parametrize(("task", "label"), [("classes", None), ("regression", None), ("tokens", [None])])
def test_all_rows_without_label_are_refused(task: str, label: Any) -> None:
    rows = [row | {"label": label} for row in sentences(40)]
    if task == "tokens":
        rows = [row | {"text": ["music"]} for row in rows]
    with pytest.raises(DataError, match=r"has no labels|has a label"):
        load(rows, task=task)


def test_a_test_file_without_labels_is_refused_and_a_hidden_one_of_the_hub_left_out() -> None:
    import datasets

    table(Path("train.jsonl"), sentences(60))
    table(Path("test.jsonl"), [row | {"label": None} for row in sentences(9)])
    paths = {"train": "train.jsonl", "test": "test.jsonl"}
    with pytest.raises(DataError, match="no text of the test split has a label"):
        load([], path=paths)
    names = datasets.ClassLabel(names=["sound", "math", "net"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    for split, count in (("train", 60), ("test", 9)):
        rows = sentences(count)
        labels = [r["label"] if split == "train" else -1 for r in rows]
        columns = {"text": [r["text"] for r in rows], "label": labels}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(f"{split}.parquet")
    lines: list[str] = []
    files = {"data_files": {split: f"{split}.parquet" for split in ("train", "test")}}
    data = load_texts("hf:parquet", tokenizer=tokenizer(), options=files, label="label", say=lines.append)
    assert len(data.test) == 12
    assert lines == ["note: the test split has no labels, so it is taken from the training texts"]


@pytest.mark.parametrize("label", [None, [None]])
def test_rows_without_their_list_of_labels_are_no_labels(label: Any) -> None:
    rows = [row | {"label": [row["label"]] if i > 8 else label} for i, row in enumerate(sentences(60))]
    rows[9]["label"] = []
    data, lines = load(rows, task="multi-label")
    assert lines == ["note: 9 of 60 texts of the train split have no label; the student learns them from the teacher"]
    assert int((data.for_teacher.labels == IGNORE).sum()) == 9
    assert data.classes == ["math", "net", "sound"]


@pytest.mark.parametrize("task", ["multi-label", "regression"])
def test_one_empty_cell_of_several_is_named(task: str) -> None:
    rows = [
        row | {"a": 1, "b": i % 2} if i > 8 else row | {"a": None, "b": None} for i, row in enumerate(sentences(60))
    ]
    data, _ = load(rows, task=task, label=["a", "b"])
    assert int((data.train.labels == IGNORE).sum()) == 9
    rows[12]["b"] = None
    with pytest.raises(DataError, match=r"row 12 .*column 'b': is empty, but column 'a' of the row is not"):
        load(rows, task=task, label=["a", "b"])


def test_an_empty_value_in_a_list_of_labels_is_named() -> None:
    rows = [row | {"label": [row["label"], None if i == 7 else "fast"]} for i, row in enumerate(sentences(60))]
    with pytest.raises(DataError, match=r"row 7 .*column 'label': value 1 .* of the list is empty"):
        load(rows, task="multi-label")


def test_a_column_of_yes_and_no_holds_no_other_number() -> None:
    rows = [row | {"a": 1, "b": 3 if i == 4 else 0} for i, row in enumerate(sentences(60))]
    with pytest.raises(DataError, match=r"row 4 .*column 'b': 3 is not between 0 and 1"):
        load(rows, task="multi-label", label=["a", "b"])


def test_several_targets_are_a_column_of_lists_or_columns() -> None:
    rows = [row | {"a": 2.5 * i, "b": -i, "label": [2.5 * i, -i]} for i, row in enumerate(sentences(60))]
    for key in ("a", "b", "label"):
        rows[5][key] = None
    lists, _ = load(rows, task="regression")
    columns, _ = load(rows, task="regression", label=["a", "b"])
    assert (lists.classes, columns.classes) == (["label[0]", "label[1]"], ["a", "b"])
    assert lists.train.targets is not None
    assert lists.train.targets.shape == (len(lists.train), 2)
    assert columns.train.targets is not None
    assert torch.equal(lists.train.targets, columns.train.targets)
    assert torch.equal(lists.train.labels, columns.train.labels)
    assert int((lists.train.labels == IGNORE).sum()) == 1


@pytest.mark.parametrize(("value", "says"), [
    ([1.5], r"column 'label': \[1.5\] is not a list of 2 numbers"),
    ([1.5, None], r"column 'label\[1\]': is empty, but column 'label\[0\]' of the row is not"),
    ([1.5, float("nan")], r"column 'label\[1\]': is empty"),
])  # fmt: skip
def test_a_row_with_other_targets_is_named(value: list[Any], says: str) -> None:
    import pandas

    rows = [row | {"label": value if i == 7 else [0.5, i]} for i, row in enumerate(sentences(60))]
    pandas.DataFrame(rows).to_parquet("d.parquet")
    with pytest.raises(DataError, match=f"row 7 .*{says}"):
        load(rows, path="d.parquet", task="regression")


@pytest.mark.parametrize(("value", "says"), [
    ([0.5, 2.0], "set data.task: regression"), ([1, 0, 0], "use a column for each class"),
])  # fmt: skip
def test_lists_of_numbers_that_name_no_labels_are_refused(value: list[Any], says: str) -> None:
    with pytest.raises(DataError, match=f"row 0 .*is not a list of labels(.|\n)*{says}"):
        load([row | {"label": value} for row in sentences(60)], task="multi-label")


@pytest.mark.parametrize("separator", [",", "; "])
def test_separated_labels_are_split(separator: str) -> None:
    rows = [row | {"label": f"{row['label']}{separator} fast{separator}"} for row in sentences(60)]
    rows[3]["label"] = " "
    data, _ = load(rows, task="multi-label", separator=separator)
    assert data.classes == ["fast", "math", "net", "sound"]
    assert "4 classes: ['fast', 'math', 'net', 'sound']" in data.summary()
    assert data.train.targets is not None
    assert set(data.train.targets.sum(1).tolist()) == {0.0, 2.0}
    assert int((data.train.labels == IGNORE).sum()) == 1


def test_separated_labels_need_their_separator() -> None:
    rows = [row | {"label": "red, blue"} for row in sentences(60)]
    with pytest.raises(DataError, match=r"'red, blue' is a value of type str(.|\n)*set data.separator"):
        load(rows, task="multi-label")


@pytest.mark.parametrize(("cell", "remedy"), [("['a', 'b']", "save lists as JSON"), (["a"], "remove data.separator")])
def test_a_list_is_no_cell_of_separated_labels(cell: Any, remedy: str) -> None:
    rows = [row | {"label": cell} for row in sentences(60)]
    with pytest.raises(DataError, match=rf"row 0 .*is a list(.|\n)*{remedy}"):
        load(rows, task="multi-label", separator=",")


@pytest.mark.parametrize("other", [{"task": "classes"}, {"task": "multi-label", "label": ["a", "b"]}])
def test_a_separator_is_for_one_column_of_several_labels(other: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="'separator' needs task multi-label and one column"):
        TextDataConfig(kind="texts", source="table", path="x.csv", separator=",", **other)


def test_a_target_that_overflows_is_named() -> None:
    rows = [row | {"label": 1e39 if i == 7 else 1.5} for i, row in enumerate(sentences(60))]
    with pytest.raises(DataError, match=r"row 7 .*column 'label': 1e\+39 is not a finite number"):
        load(rows, task="regression")


def test_a_row_without_route_is_named() -> None:
    rows = [row | {"who": "a" if i != 4 else None} for i, row in enumerate(sentences(40))]
    with pytest.raises(DataError, match=r"row 4 .*column 'who': no value"):
        load(rows, route="who")


# Conversations ----------------------------------------------------------------------------------------

TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def causal(rows: list[dict[str, Any]], text: Any) -> TextData:
    return load(rows, text=text, task="causal", label=None, tokenizer=language_worlds.tokenizer())[0]


def test_prompt_and_completion_of_messages_are_refused() -> None:
    rows = [{"prompt": TALK[:1], "completion": TALK[1:]} for _ in range(20)]
    with pytest.raises(DataError, match=r"row 0 .*column 'prompt'.*type list, not a text(.|\n)*data.text: messages"):
        causal(rows, ["prompt", "completion"])


def test_a_column_of_tools_is_refused_and_an_empty_one_not() -> None:
    rows = [{"messages": TALK, "tools": [{"name": "search"}] if i == 3 else None} for i in range(20)]
    with pytest.raises(DataError, match="the data has a column 'tools', but"):
        causal(rows, "messages")
    causal([{"messages": TALK, "tools": None} for _ in range(20)], "messages")


def test_a_message_without_text_names_its_row() -> None:
    rows = [{"messages": TALK if i != 5 else [TALK[0], {"role": "assistant", "content": None}]} for i in range(20)]
    with pytest.raises(DataError, match=r"row 5 .*column 'messages'.*not a conversation"):
        causal(rows, "messages")


def test_a_conversation_without_answer_names_its_row() -> None:
    rows = [{"messages": TALK if i != 5 else TALK[:1]} for i in range(20)]
    with pytest.raises(DataError, match=r"row 5 .*column 'messages'.*not a conversation with an answer"):
        causal(rows, "messages")


def test_messages_have_no_keys_that_only_other_rows_have() -> None:
    more = [TALK[0], TALK[1] | {"thinking": "well", "calls": [{"x": 1}, {"y": 2}]}]
    table(Path("d.jsonl"), [{"messages": TALK}, {"messages": more}])
    raw = read_texts("table", path="d.jsonl", options=None, columns=["messages"])
    assert [as_conversation([value]) for value in raw.splits["train"].columns["messages"]] == [TALK, more]
