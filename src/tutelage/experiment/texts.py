"""Texts in a recipe: tokenizers, class names, and students that are cut from their teachers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from tutelage.config import Recipe, StudentConfig, TextDataConfig
from tutelage.data import PlannedBatches, RankSlice, TextData, load_texts, read_texts
from tutelage.data.text_sources import RawTextData
from tutelage.data.texts import as_list
from tutelage.errors import ConfigError
from tutelage.models import load_tokenizer, read_class_names
from tutelage.models.pretrained import SentenceEncoder
from tutelage.progress import Terminal
from tutelage.students import block_influence, prune, trim_embeddings, trim_tokenizer

RANKED_ON = 256
"""Training texts on which the influence of layers is measured."""


def load_text_data(recipe: Recipe, terminal: Terminal) -> TextData:
    """The texts of a recipe, cut by the student's tokenizer, and by the teacher's where that is another."""
    config = recipe.data
    assert isinstance(config, TextDataConfig)
    named = [] if recipe.teacher is None else [m.model or "" for m in recipe.teacher.each]
    own = next((name for name in named if name.partition(":")[0] in ("hf", "package")), None)
    theirs = None if own is None else load_tokenizer(own)
    mine = _student_tokenizer(recipe, theirs)
    fields = config.model_dump(exclude={"kind", "metric", "tokenizer", "views", "workers", "classes"})
    classes = config.classes or _known(recipe)
    load = partial(
        load_texts, **fields, classes=classes, teacher_tokenizer=theirs, progress=terminal.iterate,
        align=recipe.method.cross_tokenizer,
    )  # fmt: skip
    if recipe.student.vocabulary is None:
        return load(tokenizer=mine)
    columns = [config.text, config.teacher_text, config.label, config.route]
    needed = [name for names in columns for name in as_list(names)]
    raw = read_texts(config.source, path=config.path, options=config.options, columns=needed)
    whole = load(tokenizer=mine, raw=raw)
    texts = training_texts(raw, whole, as_list(config.text))
    terminal.say(f"vocabulary: trimmed to {len(texts):,} training texts")
    trimmed, token_ids = trim_tokenizer(mine, texts)
    terminal.say(f"vocabulary: {len(token_ids):,} of {len(mine):,} tokens are kept")
    return replace(load(tokenizer=trimmed, raw=raw), teacher_token_ids=token_ids)


def training_texts(raw: RawTextData, data: TextData, columns: Sequence[str]) -> list[str]:
    """The texts that are trained on, once the others are cut off; of lists of words, joined."""
    known, rows = set(data.for_teacher.ids.tolist()), raw.splits["train"]
    rows_used = [i for i, each in enumerate(rows.ids.tolist()) if each in known]
    texts = [rows.columns[c][i] for c in columns for i in rows_used]
    return [text if isinstance(text, str) else " ".join(text) for text in texts]


def _student_tokenizer(recipe: Recipe, theirs: Any) -> Any:
    data, student = recipe.data, recipe.student
    assert isinstance(data, TextDataConfig)
    if data.tokenizer is not None:
        return load_tokenizer(data.tokenizer)
    if student.model.partition(":")[0] in ("hf", "package"):
        return load_tokenizer(student.model)
    if theirs is None:
        raise ConfigError(
            "neither teacher nor student has a tokenizer",
            where="data.tokenizer",
            remedy="name one: data.tokenizer: hf:ID",
        )
    return copy.deepcopy(theirs)


def _known(recipe: Recipe) -> list[str] | None:
    """The class names of a teacher that comes with its output layer, in its order."""
    teacher = recipe.teacher
    if teacher is None or teacher.members is not None or teacher.train is not None or teacher.model is None:
        return None
    if recipe.data.task not in ("classes", "multi-label", "tokens"):
        return None
    return read_class_names(teacher.model, teacher.checkpoint)


def measure_block_influence(teacher: nn.Module, data: TextData) -> Any:
    """The importance of the teacher's layers on a few training texts."""
    rows = data.for_teacher.select(torch.arange(min(RANKED_ON, len(data.for_teacher))))
    batches = [batch for (batch,) in PlannedBatches(rows, 32, 0).epoch(0, RankSlice())]
    return block_influence(_bare(teacher), batches)


def prune_student(config: StudentConfig, data: TextData, teacher: nn.Module, importance: Any, seed: int) -> nn.Module:
    """A student cut from its teacher, as the recipe's section says; the same seed gives the same weights."""
    options = {k: getattr(config, k) for k in ("layers", "map", "width", "heads", "intermediate", "embedding")}
    part: Any = prune(_bare(teacher), **options, importance=importance, initial=config.initial, seed=seed).model
    if data.teacher_token_ids is not None:
        part = trim_embeddings(part, data.teacher_token_ids)
    part.requires_grad_(True)
    return with_tokenizer(type(teacher)(part) if isinstance(teacher, SentenceEncoder) else part, data)


def _bare(teacher: nn.Module) -> nn.Module:
    return teacher.model if isinstance(teacher, SentenceEncoder) else teacher


def as_the_teacher_reads(data: TextData) -> TextData:
    """``data`` with the tokenizer that a teacher is saved with."""
    return data if data.teacher_tokenizer is None else replace(data, tokenizer=data.teacher_tokenizer)


def with_tokenizer(model: nn.Module, data: TextData) -> nn.Module:
    """``model``, which is saved with the tokenizer of its texts."""
    model.tokenizer = data.tokenizer
    return model


def text_card(data: TextData) -> dict[str, Any]:
    """The entries of a text model's ``model.json`` about its data."""
    kind = {"kind": KINDS[data.task], "task": data.task}
    return {"classes": data.classes, "preprocessing": data.preprocessing(), **kind}


KINDS = {
    "classes": "text-classifier", "multi-label": "text-classifier", "regression": "text-regressor",
    "tokens": "token-classifier", "mlm": "masked-language-model", "causal": "language-model",
    "embedding": "sentence-encoder", "ranking": "bi-encoder",
}  # fmt: skip
"""What a model for a task is called."""
