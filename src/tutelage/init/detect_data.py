"""Detect the kind of a user's data: images by class, a table and its columns, conversations, or plain text."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tutelage.errors import ConfigError, DataError, did_you_mean, shorten, suggest

TASKS = ("images", "classes", "multi-label", "regression", "tokens", "mlm", "causal", "embedding")
"""Values of ``--task``: image classification, or a text task."""

LABELLED = ("classes", "multi-label", "regression", "tokens")
"""Text tasks with labels."""

KINDS = {
    "causal": "a causal language model", "mlm": "a masked language model", "embedding": "a sentence encoder",
    "classifier": "a classifier", "seq2seq": "a sequence-to-sequence model",
}  # fmt: skip
"""What a teacher of texts may be. The first three name the task of texts without labels."""

NAMED = {"digits": (1_797, 8, ("train",)), "fashion-mnist": (70_000, 28, ("train", "test"))}
"""Named image sources: number of images, side in pixels, and splits."""

CLASSES_OF_NAMED = 10

TEXT_NAMES = ("text", "sentence", "review", "content", "body", "document", "message", "comment", "title", "question")
LABEL_NAMES = ("label", "labels", "class", "category", "target", "tags", "ner_tags", "sentiment", "score", "rating",
               "intent", "topic", "y")  # fmt: skip
TEXT_PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("text_a", "text_b"))
WORDS = ("tokens", "words")
PROMPTS = ("prompt", "instruction", "question", "input", "query")
ANSWERS = ("response", "output", "answer", "completion", "reply")
MOST_CLASSES = 200
LEAST = 3
"""Minimum of samples per class: one for each split."""


@dataclass(frozen=True)
class DataDescription:
    """The kind of the data, and its size.

    Attributes:
        task: one of :data:`TASKS`.
        source: ``data.source`` of a recipe.
        path: ``data.path`` of a recipe.
        rows: number of samples; ``None`` if it is unknown before a download.
        splits: the splits that the data has: train, validation and test, or some of them.
        classes: number of training samples of each class; ``None`` if there are no classes or they are unknown.
        size: median of the images' shorter sides, in pixels.
        channels: channels of the images.
        text: columns of the texts.
        label: column of the labels, or several columns.
        separator: what separates the labels in a cell.
        length: 95th percentile of the texts' lengths, in characters.
    """

    task: str
    source: str
    path: str | dict[str, str] | None = None
    rows: int | None = None
    splits: tuple[str, ...] = ("train",)
    classes: dict[str, int] | None = None
    size: int | None = None
    channels: int = 3
    text: str | list[str] = "text"
    label: str | list[str] | None = None
    separator: str | None = None
    length: int | None = None
    note: str | None = None
    """One line on what a folder contains and is not read, or what has no label."""

    def summary(self) -> str:
        """The description in one line."""
        many = "an unknown number of" if self.rows is None else f"{self.rows:,}"
        kinds = f" of {len(self.classes)} classes" if self.classes else ""
        if self.task == "images":
            side = f", {self.size} pixels on the shorter side" if self.size else ""
            return f"{many} images{kinds}{side}"
        of = "" if self.source == "plain" else f" in column {_one_name(self.text)}"
        labels = f", labels in column {_one_name(self.label)}" if self.label else ""
        return f"{many} texts{kinds}{of}{labels}: task {self.task}"


def describe_data(
    data: str,
    *,
    task: str | None = None,
    text: Sequence[str] | None = None,
    label: str | Sequence[str] | None = None,
    teacher: str | None = None,
) -> DataDescription:
    """Detect the kind of ``data``: a path, or a ``data.source`` such as ``digits`` or ``hf:ID``.

    Without ``task``, ``text`` and ``label`` the task and the columns of texts and labels are detected. ``teacher``,
    one of :data:`KINDS`, names the task of texts without labels.

    Raises:
        DataError: there is no data, or no task for it.
        ConfigError: an argument does not fit the data, or is missing; the remedy names the flag.
    """
    if task is not None and task not in TASKS:
        raise ConfigError(
            f"--task: unknown task {task!r}" + suggest(task, TASKS), remedy=f"allowed: {', '.join(TASKS)}"
        )
    label = [label] if isinstance(label, str) else label
    kind, colon, name = data.partition(":")
    if data in NAMED or (colon and name and kind in ("hf", "torchvision")):
        description = _named(data, task, text, label)
    elif not (path := Path(data)).exists():
        otherwise = f"give a folder of images by class, a table, a folder of .txt files, or {', '.join(NAMED)}, hf:ID"
        remedy = did_you_mean(path, otherwise, NAMED)
        raise DataError("no such file or folder", where=str(path), remedy=remedy)
    elif path.is_file():
        description = _table({"train": path}, data, task, text, label, teacher)
    else:
        description = _folder(path, task, text, label, teacher)
    if description.task == "images" and (text or label):
        flag = "--text" if text else "--label"
        raise ConfigError(f"{flag} is for texts, but {data} contains images", remedy=f"remove {flag}")
    if classes := description.classes:
        name, count = min(classes.items(), key=lambda item: item[1])
        if count < LEAST and "test" not in description.splits:
            raise DataError(
                f"class {name!r} has {count} {'images' if description.task == 'images' else 'texts'}",
                where=data,
                remedy=f"give at least {LEAST} of every class (for train, validation and test), or remove the class",
            )
        if len(classes) == 1:
            raise DataError(f"has only one class, {name!r}", where=data, remedy="give two classes or more")
    return description


def _named(data: str, task: str | None, text: Sequence[str] | None, label: Sequence[str] | None) -> DataDescription:
    is_images = not data.startswith("hf:")
    if is_images and task not in (None, "images"):
        raise ConfigError(f"--task {task} is for texts, but {data} contains images", remedy="remove --task")
    if data in NAMED:
        rows, size, splits = NAMED[data]
        counts = {str(i): rows // CLASSES_OF_NAMED for i in range(CLASSES_OF_NAMED)}
        return DataDescription("images", data, None, rows, splits, counts, size, 1)
    if is_images or task == "images":
        return DataDescription("images", data)
    if task is None:
        raise ConfigError(
            f"the task of {data} cannot be detected before it is downloaded",
            remedy=f"give --task, one of {', '.join(TASKS)}",
        )
    labels = _one_or_list(label or ["label"]) if task in LABELLED else None
    return DataDescription(task, data, text=_one_or_list(text or ["text"]), label=labels)


def _one_name(columns: str | list[str]) -> str:
    return columns if isinstance(columns, str) else " and ".join(columns)


def _one_or_list(columns: Sequence[str]) -> str | list[str]:
    return columns[0] if len(columns) == 1 else list(columns)


def _folder(
    path: Path, task: str | None, text: Sequence[str] | None, label: Sequence[str] | None, teacher: str | None
) -> DataDescription:
    from tutelage.data.image_files import IMAGE_EXTENSIONS
    from tutelage.data.raw_images import SPLIT_NAMES
    from tutelage.data.table_files import SAVED_SPLITS, TABLES, is_saved_dataset

    if is_saved_dataset(path):
        return _table({"train": path}, str(path), task, text, label, teacher)
    saved = (path / SAVED_SPLITS).is_file()
    tables = {
        split: file
        for split, names in SPLIT_NAMES.items()
        for file in sorted(p for p in path.iterdir() if (saved or p.suffix in TABLES) and p.stem.lower() in names)[:1]
    }
    every = sorted(p for p in path.iterdir() if p.suffix in TABLES)
    if "train" in tables:
        return _table(tables, str(path), task, text, label, teacher)
    if len(every) == 1:
        return _table({"train": every[0]}, str(every[0]), task, text, label, teacher)
    suffixes = Counter(p.suffix.lower() for p in path.rglob("*") if p.is_file())
    images = sum(suffixes[s] for s in IMAGE_EXTENSIONS)
    if images and images >= suffixes[".txt"]:
        if task not in (None, "images"):
            raise ConfigError(f"--task {task} is for texts, but {path} contains images", remedy="remove --task")
        return _images(path)
    if suffixes[".txt"]:
        return _plain(path, task, text, teacher)
    endings = ", ".join(f"{n} with {s or 'no suffix'}" for s, n in suffixes.most_common(4)) or "none"
    raise DataError(
        f"contains no images, tables or texts; files: {endings}",
        where=str(path),
        remedy="put images into one sub-folder per class, or give a table: " + ", ".join(TABLES),
    )


def _images(path: Path) -> DataDescription:
    from tutelage.data.batch import IGNORE
    from tutelage.data.image_folder import read_image_folder

    raw = read_image_folder(path, None)
    train = raw.splits["train"]
    labels = train.labels[train.labels != IGNORE]
    counts = labels.bincount(minlength=len(raw.classes)).tolist()
    assert train.open is not None
    step = max(1, len(train.labels) // 20)
    sides = [min(train.open(row).size) for row in range(0, len(train.labels), step)]
    rows = sum(len(s.labels) for s in raw.splits.values())
    classes = dict(zip(raw.classes, counts, strict=True))
    unlabeled = f"note: {len(train) - len(labels):,} training images have no label" * (len(labels) < len(train))
    return DataDescription(
        "images", "imagefolder", str(path), rows, tuple(raw.splits), classes, int(median(sides)),
        note="\n".join(filter(None, (raw.note, unlabeled))) or None,
    )  # fmt: skip


def _plain(path: Path, task: str | None, text: Sequence[str] | None, teacher: str | None) -> DataDescription:
    from tutelage.data.text_sources import read_texts

    note = None if task else _reason(teacher)
    task = task or _task_without_labels(teacher, str(path)) or "causal"
    if task in (*LABELLED, "images"):
        raise ConfigError(
            f"--task {task} does not fit {path}, which contains plain text without labels",
            remedy="use causal, mlm or embedding",
        )
    if text:
        raise ConfigError("--text names a column, but plain text has no columns", remedy="remove --text")
    rows = read_texts("plain", path=str(path), options=None, columns=["text"]).splits["train"]
    return DataDescription(task, "plain", str(path), len(rows), length=_long(rows.columns["text"]), note=note)


def _task_without_labels(teacher: str | None, where: str) -> str | None:
    """The task of texts without labels that a teacher names; ``None`` if it names none.

    Raises:
        ConfigError: the teacher needs labels, or learns no texts without them.
    """
    if teacher in ("classifier", "seq2seq"):
        needs = "needs labels" if teacher == "classifier" else "cannot be distilled without labels"
        other = "; for a cross-encoder write a recipe of task ranking" if teacher == "classifier" else ""
        raise ConfigError(
            f"no column of labels is found, and the teacher, {KINDS[teacher]}, {needs}",
            where=where,
            remedy=f"name the column: --label COLUMN; or give another --teacher{other}",
        )
    return teacher


def _reason(teacher: str | None) -> str | None:
    """One line on a task that the teacher names."""
    if teacher is None:
        return None
    return f"note: task {teacher}, because the teacher is {KINDS[teacher]}; use --task to change it"


def _table(
    files: dict[str, Path], data: str, task: str | None, text: Sequence[str] | None,
    given: Sequence[str] | None, teacher: str | None,
) -> DataDescription:  # fmt: skip
    from tutelage.data.label_cells import find_separator
    from tutelage.data.table_files import read_table
    from tutelage.data.text_checks import is_missing
    from tutelage.data.text_sources import check_columns

    if task == "images":
        raise ConfigError(
            f"--task images does not fit {data}, a table", remedy="give a folder of images, or another --task"
        )
    tables = {split: read_table(file) for split, file in files.items()}
    table = tables["train"]
    if not table.num_rows:
        raise DataError("has no rows", where=str(files["train"]), remedy="give a file with texts")
    check_columns([*(text or ()), *(given or ())], table.column_names, str(files["train"]))
    columns = {name: table[name].to_pylist() for name in table.column_names}
    texts, are_conversations = _text_columns(columns, text, given, str(files["train"]))
    rest = {
        name: [None if is_missing(value) else value for value in values]
        for name, values in columns.items() if name not in texts
    }  # fmt: skip
    note = None
    if are_conversations and task not in (None, "causal"):
        raise ConfigError(
            f"--task {task} does not fit column {texts[0]}, which contains conversations",
            remedy="remove --task, or name another column: --text COLUMN",
        )
    if are_conversations or task not in (None, *LABELLED):
        task = task or "causal"
        label: str | list[str] | None = None
        if given:
            raise ConfigError(f"--label {_one_name(list(given))}: task {task} has no labels", remedy="remove --label")
    elif task is None and not given and teacher and not _has_labels(rest, teacher):
        task, note, label = _task_without_labels(teacher, data) or "causal", _reason(teacher), None
    elif given and len(given) > 1:
        task, label = _task_of_several(rest, task, given, data), list(given)
    else:
        task, label = _labels(rest, task, given[0] if given else None, data, columns[texts[0]])
    classes = separator = None
    if task == "multi-label" and isinstance(label, str) and _all(rest[label], str):
        separator = find_separator([v for v in rest[label] if v is not None], is_known=True)
        note = (
            f"note: labels in column {label} are separated by {separator!r}; if each cell is one label, use "
            "--task classes"
        )
    if task == "classes":
        assert isinstance(label, str)
        classes = {str(k): n for k, n in Counter(v for v in rest[label] if v is not None).items()}
    path = str(files["train"]) if len(files) == 1 else {split: str(file) for split, file in files.items()}
    rows = sum(t.num_rows for t in tables.values())
    return DataDescription(
        task, "table", path, rows, tuple(files), classes, text=_one_or_list(texts), label=label,
        separator=separator, length=_long(columns[texts[0]]), note=note,
    )  # fmt: skip


def _has_labels(rest: dict[str, list[Any]], teacher: str) -> bool:
    """Whether a column is named as labels are and has some, or may be one and the teacher learns no texts alone."""
    named = any(name.lower() in LABEL_NAMES and any(v is not None for v in values) for name, values in rest.items())
    return named or (teacher in ("classifier", "seq2seq") and any(_may_be_label(values) for values in rest.values()))


def _may_be_label(values: list[Any]) -> bool:
    return 2 <= _kinds(values) <= min(MOST_CLASSES, max(2, len(values) // 3))


def _text_columns(
    columns: dict[str, list[Any]], given: Sequence[str] | None, label: Sequence[str] | None, where: str
) -> tuple[Sequence[str], bool]:
    """The columns of the texts, and whether they contain conversations."""
    if given:
        return given, len(given) == 1 and _are_conversations(columns[given[0]])
    for name, values in columns.items():
        if _are_conversations(values):
            return [name], True
    lower = {name.lower(): name for name in columns}
    strings = {n: v for n, v in columns.items() if n not in (label or ()) and _all(v, str)}
    if not label:
        prompt = next((lower[n] for n in PROMPTS if n in lower and lower[n] in strings), None)
        answer = next((lower[n] for n in ANSWERS if n in lower and lower[n] in strings), None)
        if prompt and answer:
            return [prompt, answer], True
    for a, b in TEXT_PAIRS:
        if a in lower and b in lower:
            return [lower[a], lower[b]], False
    lists = [n for n, v in columns.items() if n not in (label or ()) and _all(v, list)]
    words = next((n for n in lists if n.lower() in WORDS or (not strings and n.lower() in TEXT_NAMES)), None)
    if words is not None:
        return [words], False
    named = next((lower[n] for n in TEXT_NAMES if n in lower and lower[n] in strings), None)
    if named is None and strings:
        named = max(strings, key=lambda n: sum(len(v or "") for v in strings[n]))
    if named is None:
        raise DataError(
            f"has no column of texts, only {', '.join(columns)}", where=where, remedy="name it: --text COLUMN"
        )
    return [named], False


def _task_of_several(rest: dict[str, list[Any]], task: str | None, label: Sequence[str], data: str) -> str:
    """The task of several columns of labels: yes and no in each is multi-label, other numbers are regression."""
    if task not in (None, "multi-label", "regression"):
        raise ConfigError(
            f"--label is given {len(label)} times, but task {task} has one column of labels",
            remedy="give --label once",
        )
    for name in label:
        if not all(isinstance(v, (int, float)) for v in rest.get(name, [""]) if v is not None):
            raise ConfigError(
                f"column {name!r} is one of several columns of labels and does not hold numbers",
                where=data,
                remedy="give columns of numbers, or one --label",
            )
    is_table = all(v in (None, 0, 1) for name in label for v in rest[name])
    return task or ("multi-label" if is_table else "regression")


def _labels(
    rest: dict[str, list[Any]], task: str | None, label: str | None, data: str, texts: list[Any]
) -> tuple[str, str]:
    """The task, and the column of the labels."""
    from tutelage.data.label_cells import SEPARATORS, find_separator

    lower = {name.lower(): name for name in rest}
    if label is None:
        label = next((lower[n] for n in LABEL_NAMES if n in lower), None)
    if label is None:
        few = [n for n, v in rest.items() if _may_be_label(v)]
        if len(few) != 1:
            raise ConfigError(
                f"several columns may be the label: {', '.join(few)}" if few else "no column of labels is found",
                where=data,
                remedy="name it: --label COLUMN; or use --task causal (language model), mlm (masked language model) "
                "or embedding (sentence embeddings), which need no labels",
            )
        label = few[0]
    values = [v for v in rest[label] if v is not None]
    if not values:
        raise DataError(f"column {label!r} is empty", where=data, remedy="name another: --label COLUMN")
    if task in (None, "multi-label") and _all(values, str):
        if find_separator(values, is_known=task is not None):
            return "multi-label", label
        if task is not None:
            raise ConfigError(
                f"column {label!r} holds texts such as {shorten(values[0])} without a separator of labels",
                where=data,
                remedy=f"separate labels by one of {' '.join(SEPARATORS)}, give lists, or use --task classes",
            )
    if task is not None:
        return task, label
    if _all(values, list):
        flat = [each for value in values for each in value]
        if any(isinstance(each, float) and not each.is_integer() for each in flat):
            return "regression", label
        return ("tokens" if isinstance(texts[0], list) else "multi-label"), label
    numbers = all(isinstance(v, (int, float)) for v in values)
    if numbers and not all(float(v).is_integer() for v in values):
        return "regression", label
    if _kinds(values) > min(MOST_CLASSES, max(2, len(values) // 3)):
        if numbers:
            return "regression", label
        raise DataError(
            f"column {label!r} has {_kinds(values):,} different values in {len(values):,} rows, too many for classes",
            where=data,
            remedy="name another: --label COLUMN",
        )
    return "classes", label


def _kinds(values: list[Any]) -> int:
    """Number of different values; 0 for lists and dicts."""
    known = [v for v in values if v is not None]
    return len(set(known)) if all(isinstance(v, (str, int, float, bool)) for v in known) else 0


def _all(values: list[Any], kind: type) -> bool:
    known = [v for v in values if v is not None]
    return bool(known) and all(isinstance(v, kind) for v in known)


def _are_conversations(values: list[Any]) -> bool:
    return _all(values, list) and all(
        isinstance(m, dict) and {"role", "content"} <= m.keys() for v in values for m in (v or [])
    )


def _long(texts: Sequence[Any]) -> int:
    """The 95th percentile of the lengths in characters."""

    def size(value: Any) -> int:
        if isinstance(value, str):
            return len(value)
        return sum(len(x) + 1 if isinstance(x, str) else len(str(x.get("content", ""))) + 20 for x in value)

    sizes = sorted(size(t) for t in texts if t is not None)
    return sizes[min(len(sizes) - 1, int(0.95 * len(sizes)))] if sizes else 0
