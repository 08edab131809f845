"""Data sets of texts; batches of token ids are padded to their longest row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tutelage.data.alignment import NOWHERE, align_predicted
from tutelage.data.batch import IGNORE, LABELS, WINDOW_IDS, Batch, TextTask
from tutelage.data.chat import Learn
from tutelage.data.images import check_labelled, choose_labelled, choose_rows, complete_splits, hide_labels
from tutelage.data.label_cells import expand_targets, split_labels
from tutelage.data.targets import TargetScale, target_scale
from tutelage.data.text_checks import check_label_values, check_routes, check_text_values
from tutelage.data.text_sources import (
    Paths,
    RawTextData,
    RawTextSplit,
    encode_labels,
    read_texts,
    resolve_class_names,
)
from tutelage.data.tokens import Progress, Tokens, tokenize, tokenizer_fingerprint
from tutelage.data.views import Masking, build_masking, view_seeds
from tutelage.errors import DataError, shorten

Prompts = tuple[Sequence[str], Sequence[str]]
"""Texts that the student, and the teacher, read before the texts of each group of columns."""


@dataclass(frozen=True)
class TextSet:
    """One split. :meth:`fetch` pads rows to the longest of them.

    Attributes:
        tokens: the student's tokens; for ranking those of query, positive answer and negative answer.
        rows: ``[N]``, index of each text in ``tokens``.
        ids: ``[N]``, a stable number for each text.
        labels: ``[N]`` class indices; 0 if the label is in ``targets``, -100 without label.
        task: the text task.
        targets: ``[N, C]``, multi-label or regression targets.
        tags: for the task ``tokens``: the class of each word of each text.
        tag_names: the names of these classes.
        masking: for the task ``mlm``.
        teacher_tokens: the teacher's tokens, if they differ.
        route: ``[N]``, index of the route, which selects members of an ensemble.
        mix_augments: always empty; texts are not mixed.
    """

    tokens: tuple[Tokens, ...]
    rows: Tensor
    ids: Tensor
    labels: Tensor
    task: TextTask
    targets: Tensor | None = None
    tags: Sequence[Sequence[int]] | None = None
    tag_names: Sequence[str] = ()
    masking: Masking | None = None
    teacher_tokens: tuple[Tokens, ...] = ()
    route: Tensor | None = None
    mix_augments: Sequence[Any] = ()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def is_augmented(self) -> bool:
        """Whether a view depends on its seed."""
        return self.masking is not None

    @property
    def lengths(self) -> Tensor:
        """``[N]`` number of tokens of each text, for bucketing."""
        return torch.from_numpy(self.tokens[0].lengths)[self.rows]

    def select(self, rows: Tensor) -> TextSet:
        """The set with only the given rows."""
        names = [k for k in ("rows", "ids", "labels", "targets", "route") if getattr(self, k) is not None]
        chosen: dict[str, Any] = {k: getattr(self, k)[rows] for k in names}
        return replace(self, **chosen)

    def fetch(self, rows: Tensor, views: Tensor | None = None) -> Batch:
        """The given rows; with ``mlm`` masked from the seeds ``views``, or from fixed seeds without ``views``."""
        places = self.rows[rows].numpy()
        inputs = _inputs(self.tokens, places)
        labels, mask = self.labels[rows], None
        if self.masking is not None:
            seeds = view_seeds(0, 0, self.ids[rows]) if views is None else views
            mask = _counted(self.tokens[0], places)
            inputs["input_ids"], labels = self.masking(inputs["input_ids"], mask, seeds)
        elif self.task == "causal":
            labels = self.tokens[0].next_tokens(places)
            mask = labels != IGNORE
        elif self.tags is not None:
            labels, mask = self._word_labels(places), _counted(self.tokens[0], places)
        teacher_inputs = _inputs(self.teacher_tokens, places) if self.teacher_tokens else None
        teacher_labels, spans = self._align(places, labels)
        return Batch(
            inputs, labels, mask=mask, ids=self.ids[rows], views=views if self.is_augmented else None,
            route=None if self.route is None else self.route[rows], task=LABELS[self.task],
            targets=None if self.targets is None else self.targets[rows], teacher_inputs=teacher_inputs,
            teacher_labels=teacher_labels, spans=spans,
        )  # fmt: skip

    def _align(self, places: Any, labels: Tensor) -> tuple[Tensor | None, dict[str, Tensor] | None]:
        """The labels of the teacher's tokens, and the spans, if the tokenizers differ."""
        if self.task != "causal" or not self.teacher_tokens:
            return None, None
        mine, theirs = self.tokens[0], self.teacher_tokens[0]
        assert mine.ends is not None
        assert theirs.ends is not None
        teacher_labels = theirs.next_tokens(places)
        ends = [side.padded(side.ends, places, NOWHERE) for side in (mine, theirs)]  # type: ignore[arg-type]
        return teacher_labels, align_predicted(ends[0], ends[1], labels, teacher_labels)

    def _word_labels(self, places: Any) -> Tensor:
        """The class of each word, at its first token."""
        tokens = self.tokens[0]
        assert tokens.words is not None
        assert self.tags is not None
        assert tokens.texts is not None
        words, counts = tokens.padded(tokens.words, places, -1), ~tokens.padded(tokens.special, places, True)
        out = np.full(words.shape, IGNORE, np.int64)
        for i, place in enumerate(places):
            first = counts[i] & (words[i] != np.concatenate([[-1], words[i][:-1]]))
            if tags := self.tags[tokens.texts[place]]:  # else the text has no label
                out[i][first] = np.asarray(tags, np.int64)[words[i][first]]
        return torch.from_numpy(out)


def same_tokens(mine: Sequence[Tokens], theirs: Sequence[Tokens], teacher_ids: Tensor | None) -> bool:
    """Whether all texts are cut into the same tokens; ``teacher_ids`` has the teacher's id of each of ours."""
    table = None if teacher_ids is None else teacher_ids.numpy()
    return len(mine) == len(theirs) and all(
        np.array_equal(a.offsets, b.offsets) and np.array_equal(a.ids if table is None else table[a.ids], b.ids)
        for a, b in zip(mine, theirs, strict=True)
    )


def _with_windows(texts: TextSet) -> TextSet:
    """The set with every window of its texts in place of the texts."""
    numbers = texts.tokens[0].texts
    if numbers is None:
        return texts
    begins, ends = (np.searchsorted(numbers, texts.rows.numpy(), side) for side in ("left", "right"))
    counts = torch.from_numpy(ends - begins)
    index = torch.arange(len(texts)).repeat_interleave(counts)
    number = torch.arange(len(index)) - (counts.cumsum(0) - counts)[index]
    chosen = texts.select(index)
    return replace(
        chosen, rows=torch.from_numpy(begins)[index] + number, ids=chosen.ids + WINDOW_IDS * number,
    )  # fmt: skip


NAMES = {1: ("",), 2: ("positive_", "negative_"), 3: ("", "positive_", "negative_")}
"""Prefixes of the input names by the number of texts in a row: answers with their query, or query and answers."""


def _inputs(tokens: tuple[Tokens, ...], places: Any) -> dict[str, Tensor]:
    names = NAMES[len(tokens)]
    return {f"{name}{k}": v for name, t in zip(names, tokens, strict=True) for k, v in t.inputs(places).items()}


def _counted(tokens: Tokens, places: Any) -> Tensor:
    """``[B, L]``: neither padding nor special tokens."""
    return torch.from_numpy(~tokens.padded(tokens.special, places, True))


@dataclass(frozen=True)
class TextData:
    """Three disjoint splits of texts with the same classes and tokenizer."""

    name: str
    train: TextSet
    validation: TextSet
    test: TextSet
    classes: list[str]
    for_teacher: TextSet
    """The training texts with all their labels and the teacher's tokens."""
    task: TextTask
    tokenizer: Any
    max_length: int
    settings: dict[str, Any]
    """All that the tokens depend on, for cache keys."""
    route_names: list[str] = field(default_factory=list)
    teacher_token_ids: Tensor | None = None
    """``[K]``, the teacher's id of each token, if the tokenizer has a part of the teacher's vocabulary."""
    teacher_tokenizer: Any = None
    """The teacher's tokenizer, if it is another."""
    prompts: Prompts = ((), ())
    """What student and teacher read before each text, by column."""

    @property
    def spec(self) -> dict[str, Any]:
        """Arguments of the model that fits the data."""
        return {"classes": len(self.classes), "task": self.task}

    @cached_property
    def target_scale(self) -> TargetScale | None:
        """The scale of the training targets of ``regression``; ``None`` for other tasks."""
        return target_scale(self.train.targets, self.train.labels) if self.task == "regression" else None

    def summary(self) -> str:
        """The data in a few words."""
        lengths = self.train.lengths.float()
        what = "targets" if self.task == "regression" else "classes"
        known = f", {len(self.classes)} {what}: {shorten(self.classes)}" if self.classes else ""
        return f"{self.task}, {lengths.mean():.0f} tokens per text, at most {int(lengths.max())}{known}"

    def preprocessing(self) -> dict[str, Any]:
        """The preprocessing that a user of the student must apply."""
        known = {"max_length": self.max_length, "tokenizer": tokenizer_fingerprint(self.tokenizer)}
        return known | ({"prompts": list(self.prompts[0])} if any(self.prompts[0]) else {})


def load_texts(
    source: str,
    *,
    tokenizer: Any,
    teacher_tokenizer: Any = None,
    path: Paths | None = None,
    options: dict[str, Any] | None = None,
    text: str | Sequence[str] = "text",
    teacher_text: str | Sequence[str] | None = None,
    label: str | Sequence[str] | None = None,
    separator: str | None = None,
    route: str | None = None,
    task: TextTask = "classes",
    classes: Sequence[str] | None = None,
    max_length: int = 128,
    pack: bool = False,
    learn: Learn = "answers",
    align: bool = False,
    mask: float = 0.15,
    empty: Literal["error", "drop"] = "error",
    labels: int | None = None,
    unlabeled: str = "keep",
    limit: int | None = None,
    validation: float = 0.1,
    test: float = 0.2,
    split_seed: int = 0,
    prompts: Prompts = ((), ()),
    raw: RawTextData | None = None,
    progress: Progress = lambda blocks, _: blocks,
    say: Callable[[str], None] = lambda _: None,
) -> TextData:
    """Load, split and tokenise texts.

    The arguments are the keys of a recipe's ``data``, and:

    Args:
        tokenizer: the student's tokenizer, of transformers.
        teacher_tokenizer: the teacher's tokenizer, if it differs.
        align: for ``causal``: align the tokens of a teacher with another tokenizer.
        prompts: what student and teacher read before each text; for ``ranking`` one for each column.
        raw: the columns of the source, if :func:`read_texts` has read them before.
        progress: wraps the iteration over blocks of texts.
        say: receives a line if texts have no label.

    Raises:
        DataError: data is missing, broken, empty or contradictory; names the file and the row.
        ConfigError: the source is unknown.
    """
    columns, label_columns = as_list(text), as_list(label)
    teacher_columns = columns if teacher_text is None else as_list(teacher_text)
    if raw is None:
        needed = [*columns, *teacher_columns, *label_columns, *as_list(route)]
        texts = [*columns, *teacher_columns]
        raw = read_texts(source, path=path, options=options, columns=needed, texts=texts)
    if separator is not None:
        raw = split_labels(raw, label_columns[0], separator)
    if task == "regression":
        raw, label_columns = expand_targets(raw, label_columns)
    _check_values(raw, task, (columns, teacher_columns), label_columns, route)
    raw = _without_empty(raw, dict.fromkeys([*columns, *teacher_columns]), empty)
    classes = None if classes is None else [str(name) for name in classes]
    names = resolve_class_names(raw, label_columns, task, classes)
    tokenizers = tokenizer, teacher_tokenizer if teacher_tokenizer is not None else tokenizer
    fingerprints = [tokenizer_fingerprint(one) for one in tokenizers]
    differs, align = _compare_inputs(task, tokenizers, (columns, teacher_columns), prompts, align=align, pack=pack)
    route_names = sorted({str(v) for rows in raw.splits.values() for v in rows.columns[route]}) if route else []
    masking = build_masking(tokenizer, mask) if task == "mlm" else None
    sets = _tokenize_splits(
        raw, task, columns, (teacher_columns, differs), (label_columns, names), (route, route_names),
        tokenizers, prompts, masking,
        max_length=max_length, pack=pack, learn=learn if task == "causal" else None, ends=align, progress=progress,
    )  # fmt: skip
    if label_columns:
        sets = check_labelled(sets, raw.name, "texts", say, drop=unlabeled == "drop")
    data = complete_splits(
        sets, validation, test, limit, lambda texts, count, key: _choose(texts, count, split_seed, key)
    )
    train = data["train"]
    if align:
        _check_aligned(train)
    teacher = replace(train, tokens=train.teacher_tokens, teacher_tokens=()) if train.teacher_tokens else train
    if labels is not None:
        chosen = choose_labelled(train, labels, "data.labels", lambda rows, n, key: _choose(rows, n, split_seed, key))
        train = hide_labels(train, chosen, drop=unlabeled == "drop")
    settings = {
        "columns": [columns, teacher_columns], "max_length": max_length, "pack": pack,
        "mask": mask if task == "mlm" else None, "tokenizers": fingerprints, "content": raw.digest,
        "learn": learn if task == "causal" else None, "prompts": [*map(list, prompts)],
    }  # fmt: skip
    return TextData(
        raw.name, _with_windows(train), _by_length(data["validation"]), _by_length(data["test"]), names,
        _with_windows(teacher), task, tokenizer, max_length, settings, route_names, prompts=prompts,
        teacher_tokenizer=None if fingerprints[0] == fingerprints[1] else tokenizers[1],
    )  # fmt: skip


def _compare_inputs(
    task: TextTask,
    tokenizers: tuple[Any, Any],
    columns: tuple[list[str], list[str]],
    prompts: Prompts,
    *,
    align: bool,
    pack: bool,
) -> tuple[bool, bool]:
    """Whether student and teacher read different tokens, and whether these are aligned.

    Raises:
        DataError: the tokens differ, and the task compares them one by one; or packed rows are to be aligned.
    """
    by_token, same_columns = task in ("mlm", "causal", "tokens"), columns[0] == columns[1]
    cuts = {tokenizer_fingerprint(one, ids_only=by_token) for one in tokenizers}
    differs = not same_columns or len(cuts) > 1 or list(prompts[0]) != list(prompts[1])
    align = align and differs and task == "causal" and same_columns
    if differs and not align and by_token:
        other = ", or method kind: cross-tokenizer" if task == "causal" and same_columns else ""
        raise DataError(
            f"teacher and student have different tokens, and {task} compares them token by token",
            where="tokenizer",
            remedy=f"use a student with the teacher's tokenizer{other}, or a task with one output per text",
        )
    if align and pack:
        raise DataError(
            "teacher and student have different tokens, so their packed rows would hold different texts",
            where="data.pack",
            remedy="leave pack out; batches have texts of similar lengths anyway",
        )
    return differs, align


def _tokenize_splits(
    raw: RawTextData,
    task: TextTask,
    columns: list[str],
    teacher: tuple[list[str], bool],
    labels: tuple[list[str], list[str]],
    route: tuple[str | None, list[str]],
    tokenizers: tuple[Any, Any],
    prompts: Prompts,
    masking: Masking | None,
    *,
    pack: bool,
    **options: Any,
) -> dict[str, TextSet]:
    """The splits of a source, tokenised for student and teacher.

    ``teacher`` is its columns and whether its tokens differ; ``labels`` columns and class names; ``route`` a column
    and its values; ``options`` are for :func:`tokenize`.
    """
    teacher_columns, differs = teacher

    def tokens(split: str, groups: Sequence[Sequence[str]], side: int, what: str) -> tuple[Tokens, ...]:
        values, texts_before = raw.splits[split].columns, [*prompts[side], *[""] * len(groups)]
        return tuple(
            tokenize(
                [[before + text for text in values[group[0]]] if before else values[group[0]],
                 *(values[n] for n in group[1:])],
                tokenizers[side], pack=pack, words=task == "tokens",
                store=bool(raw.digest), what=f"{split} {what}", **options,
            )
            for group, before in zip(groups, texts_before, strict=False)
        )  # fmt: skip

    column, values = route
    ranks = task == "ranking"  # the student reads each text alone, the teacher an answer with its query
    packed = pack and task in ("mlm", "causal")
    sets: dict[str, TextSet] = {}
    for split, rows in raw.splits.items():
        student_tokens = tokens(split, [[c] for c in columns] if ranks else [columns], 0, "texts")
        groups = [[teacher_columns[0], c] for c in teacher_columns[1:]] if ranks else [teacher_columns]
        indices, targets, tags = encode_labels(raw, rows, labels[0], task, labels[1], split)
        count = len(student_tokens[0]) if packed else len(rows)
        sets[split] = TextSet(
            tokens=student_tokens,
            rows=torch.arange(count),
            ids=torch.arange(count) + sum(len(s) for s in sets.values()) if packed else rows.ids,
            labels=torch.full((count,), IGNORE) if packed else indices,
            task=task,
            targets=targets,
            tags=tags,
            tag_names=labels[1] if task == "tokens" else (),
            masking=masking,
            teacher_tokens=tokens(split, groups, 1, "teacher's texts") if differs or ranks else (),
            route=torch.tensor([values.index(str(v)) for v in rows.columns[column]]) if column else None,
        )
    return sets


def as_list(columns: str | Sequence[str] | None) -> list[str]:
    """Columns of a recipe as a list: one name, several names or none."""
    return [columns] if isinstance(columns, str) else list(columns or [])


def _check_values(
    raw: RawTextData, task: TextTask, texts: tuple[list[str], list[str]], labels: list[str], route: str | None
) -> None:
    """Raise :class:`DataError` if a value in a column is not what the task reads there."""
    for split, rows in raw.splits.items():
        for columns in texts if texts[0] != texts[1] else texts[:1]:
            check_text_values(rows.columns, columns, task, split, raw.name)
        check_label_values(rows.columns, labels, task, texts[0][0], split, raw.name)
        if route is not None:
            check_routes(rows.columns, route, split, raw.name)
        if raw.has_tools and task == "causal" and any(isinstance(v, list) for v in rows.columns[texts[0][0]]):
            raise DataError(
                "the data has a column 'tools', but chat templates are rendered without tools",
                where=raw.name,
                remedy="remove the column; answers are then learned without the tools",
            )


def _without_empty(raw: RawTextData, columns: Mapping[str, None], empty: str) -> RawTextData:
    """Drop rows with empty texts, or raise :class:`DataError`."""
    splits = {}
    for split, rows in raw.splits.items():
        bad = [i for i in range(len(rows)) if any(_is_blank(rows.columns[c][i]) for c in columns)]
        if bad and empty == "error":
            raise DataError(
                f"{len(bad)} of {len(rows)} texts of the {split} split are empty, rows {bad[:5]}",
                where=raw.name,
                remedy="remove them, or set data.empty: drop",
            )
        if len(bad) == len(rows):
            raise DataError(f"all texts of the {split} split are empty", where=raw.name, remedy="check data.text")
        if bad:
            left = np.setdiff1d(np.arange(len(rows)), bad)
            rows = RawTextSplit({c: [v[i] for i in left] for c, v in rows.columns.items()}, rows.ids[left])
        splits[split] = rows
    return replace(raw, splits=splits)


def _is_blank(text: Any) -> bool:
    return text is None or not (text.strip() if isinstance(text, str) else text)


def _choose(texts: TextSet, count: int, seed: int, key: str) -> tuple[Tensor, Tensor]:
    """:func:`choose_rows`, stratified if texts have a class."""
    return choose_rows(texts.labels, count, seed, key, things="texts", stratify=texts.task == "classes")


def _check_aligned(texts: TextSet) -> None:
    """Raise :class:`DataError` if almost no token of the first texts belongs to a span."""
    batch = texts.fetch(torch.arange(min(len(texts), ALIGNED_ON)))
    assert batch.spans is not None
    share = float((batch.spans["student"] >= 0).sum() / (batch.labels != IGNORE).sum().clamp(min=1))
    if share < 0.1:
        raise DataError(
            f"only {share:.1%} of the student's tokens can be aligned with the teacher's",
            where="tokenizer",
            remedy="check both tokenizers and chat templates: they must fit the same kind of text",
        )


ALIGNED_ON = 64
"""Number of training texts for the check of the alignment."""


def _by_length(texts: TextSet) -> TextSet:
    """The texts, or their windows, sorted by length, which reduces padding in evaluation."""
    texts = _with_windows(texts)
    return texts.select(texts.lengths.argsort(stable=True, descending=True))
