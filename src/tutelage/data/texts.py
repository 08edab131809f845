"""Texts: splits that give batches of token ids, padded to the longest of each batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tutelage.data.alignment import NOWHERE, align_predicted
from tutelage.data.batch import IGNORE, LABELS, Batch, TextTask
from tutelage.data.chat import Learn
from tutelage.data.images import stratified_split
from tutelage.data.masking import Masking, build_masking
from tutelage.data.text_labels import encode_labels, resolve_class_names
from tutelage.data.text_sources import Paths, RawTextData, RawTextSplit, open_texts
from tutelage.data.tokens import Progress, Tokens, tokenize, tokenizer_fingerprint
from tutelage.data.views import view_seeds
from tutelage.errors import DataError


@dataclass(frozen=True)
class TextSet:
    """One split. Rows are fetched together and padded to the longest of them.

    Attributes:
        tokens: of what the student sees; of a ranking, of query, answer and other answer.
        rows: ``[N]``, the place of each of the split's texts among those.
        ids: ``[N]``, one stable number a text.
        labels: ``[N]`` class indices; 0 where ``targets`` has them, -100 where there is none.
        task: what is done with them.
        targets: ``[N, C]``, of several labels or numbers.
        tags: of ``tokens``: the class of each word, one text after another, with ``offsets``.
        masking: of ``mlm``.
        teacher_tokens: of what the teacher sees, where that is something else.
        route: ``[N]``, what says which member of an ensemble teaches a text.
    """

    tokens: tuple[Tokens, ...]
    rows: Tensor
    ids: Tensor
    labels: Tensor
    task: TextTask
    targets: Tensor | None = None
    tags: Sequence[Sequence[int]] | None = None
    masking: Masking | None = None
    teacher_tokens: tuple[Tokens, ...] = ()
    route: Tensor | None = None
    mix_augments: Sequence[Any] = ()
    """None: a text is not mixed with others."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def is_augmented(self) -> bool:
        """Whether a view depends on its seed."""
        return self.masking is not None

    @property
    def lengths(self) -> Tensor:
        """``[N]`` tokens of each text, by which batches are put together."""
        return torch.from_numpy(self.tokens[0].lengths)[self.rows]

    def select(self, rows: Tensor) -> TextSet:
        """The set with only the given rows."""
        kept: dict[str, Any] = {k: getattr(self, k)[rows] for k in ("rows", "ids", "labels")}
        for name in ("targets", "route"):
            value = getattr(self, name)
            kept[name] = None if value is None else value[rows]
        return replace(self, **kept)

    def fetch(self, rows: Tensor, views: Tensor | None = None) -> Batch:
        """The given rows; of ``mlm`` masked from the seeds ``views``, or always the same way without."""
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
            labels, mask = self._tagged(places), _counted(self.tokens[0], places)
        taught = _inputs(self.teacher_tokens, places) if self.teacher_tokens else None
        theirs, spans = self._aligned(places, labels)
        return Batch(
            inputs, labels, mask=mask, ids=self.ids[rows], views=views if self.is_augmented else None,
            route=None if self.route is None else self.route[rows], task=LABELS[self.task],
            targets=None if self.targets is None else self.targets[rows], teacher_inputs=taught,
            teacher_labels=theirs, spans=spans,
        )  # fmt: skip

    def _aligned(self, places: Any, labels: Tensor) -> tuple[Tensor | None, dict[str, Tensor] | None]:
        """The labels of a teacher's own tokens, and which of them go with which of the student's."""
        if self.task != "causal" or not self.teacher_tokens:
            return None, None
        mine, theirs = self.tokens[0], self.teacher_tokens[0]
        assert mine.ends is not None
        assert theirs.ends is not None
        told = theirs.next_tokens(places)
        ends = [side.padded(side.ends, places, NOWHERE) for side in (mine, theirs)]  # type: ignore[arg-type]
        return told, align_predicted(ends[0], ends[1], labels, told)

    def _tagged(self, places: Any) -> Tensor:
        """The class of each word at its first token."""
        tokens = self.tokens[0]
        assert tokens.words is not None
        assert self.tags is not None
        words = tokens.padded(tokens.words, places, -1)
        out = np.full(words.shape, IGNORE, np.int64)
        for i, place in enumerate(places):
            first = (words[i] >= 0) & (words[i] != np.concatenate([[-1], words[i][:-1]]))
            out[i][first] = np.asarray(self.tags[place], np.int64)[words[i][first]]
        return torch.from_numpy(out)


NAMES = {1: ("",), 2: ("positive_", "negative_"), 3: ("", "positive_", "negative_")}
"""What comes before ``input_ids`` and the like where a row has several texts: answer and other answer, each with its
query or beside it."""


def _inputs(tokens: tuple[Tokens, ...], places: Any) -> dict[str, Tensor]:
    names = NAMES[len(tokens)]
    return {f"{name}{k}": v for name, t in zip(names, tokens, strict=True) for k, v in t.inputs(places).items()}


def _counted(tokens: Tokens, places: Any) -> Tensor:
    """``[B, L]``: neither padding nor added by the tokenizer."""
    return torch.from_numpy(~tokens.padded(tokens.special, places, True))


@dataclass(frozen=True)
class TextData:
    """Three splits of texts that share classes and tokenizer, and never a sample."""

    name: str
    train: TextSet
    validation: TextSet
    test: TextSet
    classes: list[str]
    for_teacher: TextSet
    """The training texts with all their labels, as the teacher sees them."""
    task: TextTask
    tokenizer: Any
    max_length: int
    settings: dict[str, Any]
    """What the tokens depend on, for caches."""
    route_names: list[str] = field(default_factory=list)
    teacher_token_ids: Tensor | None = None
    """``[K]``, the teacher's id of each token, where the tokenizer has a part of the teacher's vocabulary."""
    teacher_tokenizer: Any = None
    """The teacher's, where tokens of both are aligned."""

    @property
    def spec(self) -> dict[str, Any]:
        """What a model is built for."""
        return {"classes": len(self.classes), "task": self.task}

    def provenance(self) -> dict[str, Any]:
        """What a batch depends on beside its views, as JSON."""
        return self.settings

    def summary(self) -> str:
        """In a few words."""
        lengths = self.train.lengths.float()
        known = f", {len(self.classes)} classes" if self.classes else ""
        return f"{self.task}, {lengths.mean():.0f} tokens a text, at most {int(lengths.max())}{known}"

    def preprocessing(self) -> dict[str, Any]:
        """What a user of the student must know to cut a text as it was."""
        return {"max_length": self.max_length, "tokenizer": tokenizer_fingerprint(self.tokenizer)}


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
    raw: RawTextData | None = None,
    progress: Progress = lambda blocks, _: blocks,
) -> TextData:
    """Load texts, cut them into tokens once, and keep their splits apart.

    The arguments are those of a recipe's ``data``, which describes them, but for:

    Args:
        tokenizer: the student's, of transformers.
        teacher_tokenizer: the teacher's, where it is another.
        align: of ``causal``, whether a teacher with another tokenizer will do, whose tokens are aligned with the
            student's.
        raw: what :func:`read_texts` read already.
        progress: wraps the iteration over blocks of texts.

    Raises:
        DataError: missing, broken, empty or contradictory data; names the file and the row.
        ConfigError: an unknown source.
    """
    columns, wanted = as_list(text), as_list(label)
    theirs = columns if teacher_text is None else as_list(teacher_text)
    if raw is None:
        raw = read_texts(
            source, path=path, options=options, text=text, teacher_text=teacher_text, label=label, route=route
        )
    raw = _without_empty(raw, dict.fromkeys([*columns, *theirs]), empty)
    names = resolve_class_names(raw, wanted, task, classes)
    key = "" if not raw.digest else f"{raw.digest} {[(s, r.length) for s, r in raw.splits.items()]}"
    other = teacher_tokenizer if teacher_tokenizer is not None else tokenizer
    differs = theirs != columns or tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer)
    align = align and differs and task == "causal" and theirs == columns
    if differs and task in ("mlm", "causal", "tokens") and not align:
        other_way = ", or method kind: cross-tokenizer" if task == "causal" and theirs == columns else ""
        raise DataError(
            f"teacher and student cut texts into other tokens, and {task} compares them token by token",
            where="tokenizer",
            remedy=f"take a student with the teacher's tokenizer{other_way}, or a task of whole texts",
        )
    if align and pack:
        raise DataError(
            "rows that are packed hold other texts for the teacher than for the student, whose tokens are longer or "
            "shorter",
            where="data.pack",
            remedy="leave pack out: batches are of texts of like lengths anyway",
        )
    routes = _numbers([r.columns[route] for r in raw.splits.values()]) if route else ([], [])
    sets: dict[str, TextSet] = {}
    for i, (split, rows) in enumerate(raw.splits.items()):

        def tokens(
            groups: Sequence[Sequence[str]], by: Any, what: str, rows: RawTextSplit = rows, split: str = split
        ) -> tuple[Tokens, ...]:
            return tuple(
                tokenize(
                    [rows.columns[n] for n in group],
                    by,
                    max_length=max_length,
                    pack=pack,
                    words=task == "tokens",
                    learn=learn if task == "causal" else None,
                    ends=align,
                    key=key and f"{key} {split} {list(group)}",
                    progress=progress,
                    what=f"{split} {what}",
                )
                for group in groups
            )

        ranks = task == "ranking"  # the student reads each text by itself, the teacher an answer with its query
        found = tokens([[c] for c in columns] if ranks else [columns], tokenizer, "texts")
        given, targets, tags = encode_labels(raw, rows, wanted, task, names, split)
        count = len(found[0])
        packed = pack and task in ("mlm", "causal")
        sets[split] = TextSet(
            found,
            torch.arange(count),
            torch.arange(count) + sum(len(s) for s in sets.values()) if packed else rows.ids,
            torch.full((count,), IGNORE) if packed else given,
            task,
            targets,
            tags,
            build_masking(tokenizer, mask) if task == "mlm" else None,
            tokens([[theirs[0], c] for c in theirs[1:]] if ranks else [theirs], other, "teacher's texts")
            if differs or ranks
            else (),
            torch.tensor(routes[1][i]) if route else None,
        )
    data = _split(sets, task, validation, test, limit, split_seed)
    train = data["train"]
    if align:
        _check_aligned(train)
    teacher = replace(train, tokens=train.teacher_tokens, teacher_tokens=()) if train.teacher_tokens else train
    if labels is not None:
        chosen, rest = _drawn(train, labels, split_seed, "data.labels")
        hidden = train.labels.clone()
        hidden[rest] = IGNORE
        train = train.select(chosen) if unlabeled == "drop" else replace(train, labels=hidden)
    settings = {
        "columns": [columns, theirs], "max_length": max_length, "pack": pack, "mask": mask if task == "mlm" else None,
        "tokenizers": [tokenizer_fingerprint(tokenizer), tokenizer_fingerprint(other)], "content": raw.digest,
        "learn": learn if task == "causal" else None,
    }  # fmt: skip
    return TextData(
        raw.name, train, _by_length(data["validation"]), _by_length(data["test"]), names, teacher, task, tokenizer,
        max_length, settings, routes[0], teacher_tokenizer=other if align else None,
    )  # fmt: skip


def as_list(columns: str | Sequence[str] | None) -> list[str]:
    """One name, several or none, as a list."""
    return [columns] if isinstance(columns, str) else list(columns or [])


def read_texts(
    source: str,
    *,
    path: Paths | None,
    options: dict[str, Any] | None,
    text: str | Sequence[str],
    teacher_text: str | Sequence[str] | None,
    label: str | Sequence[str] | None,
    route: str | None,
) -> RawTextData:
    """The columns that :func:`load_texts` needs, before any tokenizer.

    The arguments are those of a recipe's ``data``, which describes them.

    Raises:
        DataError: missing or broken data, or no such column.
        ConfigError: an unknown source.
    """
    columns = [*as_list(text), *as_list(teacher_text), *as_list(label), *as_list(route)]
    return open_texts(source, path=path, options=options or {}, columns=list(dict.fromkeys(columns)))


def _without_empty(raw: RawTextData, columns: Mapping[str, None], empty: str) -> RawTextData:
    """The texts, none of them empty or missing."""
    splits = {}
    for split, rows in raw.splits.items():
        wrong = next(
            (
                (c, type(t).__name__) for c in columns for t in rows.columns[c][:1_000]
                if t is not None and not isinstance(t, (str, list))
            ),
            None,
        )  # fmt: skip
        if wrong is not None:
            raise DataError(
                f"column {wrong[0]!r} holds a value of type {wrong[1]}, not text",
                where=raw.name,
                remedy="name the column of texts: data.text",
            )
        bad = [
            i for i in range(rows.length)
            if any(_blank(rows.columns[c][i]) for c in columns)
        ]  # fmt: skip
        if bad and empty == "error":
            raise DataError(
                f"{len(bad)} of {rows.length} texts of the {split} split are empty, rows {bad[:5]}",
                where=raw.name,
                remedy="remove them, or set data.empty: drop",
            )
        if len(bad) == rows.length:
            raise DataError(f"all texts of the {split} split are empty", where=raw.name, remedy="check data.text")
        if bad:
            left = np.setdiff1d(np.arange(rows.length), bad)
            rows = RawTextSplit({c: [v[i] for i in left] for c, v in rows.columns.items()}, len(left), rows.ids[left])
        splits[split] = rows
    return replace(raw, splits=splits)


def _blank(text: Any) -> bool:
    return text is None or not (text.strip() if isinstance(text, str) else text)


def _numbers(columns: Sequence[Sequence[Any]]) -> tuple[list[str], list[list[int]]]:
    """The values that are in any of several columns, sorted, and each column as their numbers."""
    names = sorted({str(v) for column in columns for v in column})
    return names, [[names.index(str(v)) for v in column] for column in columns]


# Splits ------------------------------------------------------------------------------------------------


def _split(
    sets: dict[str, TextSet], task: TextTask, validation: float, test: float, limit: int | None, seed: int
) -> dict[str, TextSet]:
    """With what is missing cut off from the training texts."""
    for name, share in (("test", test), ("validation", validation)):
        if name not in sets:
            train = sets["train"]
            held, rest = _drawn(train, max(1, round(len(train) * share)), seed, f"data.{name}")
            sets[name], sets["train"] = train.select(held), train.select(rest)
    if limit is not None:
        sets["train"] = sets["train"].select(_drawn(sets["train"], limit, seed, "data.limit")[0])
    return sets


def _drawn(texts: TextSet, count: int, seed: int, what: str) -> tuple[Tensor, Tensor]:
    """``count`` rows and the others, in ascending order; of classes with each one's share kept."""
    if texts.task == "classes" and bool((texts.labels != IGNORE).all()):
        return stratified_split(texts.labels, count, seed, what, "texts")
    if count > len(texts):
        raise DataError(f"{what}: {count} texts are asked for, there are {len(texts)}", remedy="lower it")
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
    return order[:count].sort().values, order[count:].sort().values


def _check_aligned(texts: TextSet) -> None:
    """Raise :class:`DataError` where hardly any token of some texts belongs to a span."""
    batch = texts.fetch(torch.arange(min(len(texts), ALIGNED_ON)))
    assert batch.spans is not None
    share = float((batch.spans["student"] >= 0).sum() / (batch.labels != IGNORE).sum().clamp(min=1))
    if share < 0.1:
        raise DataError(
            f"only {share:.1%} of the student's tokens can be aligned with the teacher's",
            where="tokenizer",
            remedy="check both tokenizers and chat templates: they must be of the same kind of text",
        )


ALIGNED_ON = 64
"""Training texts on which it is seen whether tokens can be aligned."""


def _by_length(texts: TextSet) -> TextSet:
    """For evaluation: in the order of their lengths, so that little is padded."""
    return texts.select(texts.lengths.argsort(stable=True, descending=True))
