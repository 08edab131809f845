"""The texts of a recipe, with their tokenizers and prompts, and students that are cut from their teacher."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from tutelage.config import TEACHER_ONLY_TASKS, Recipe, StudentConfig, TextDataConfig
from tutelage.data import Data, PlannedBatches, RankSlice, TextData, load_texts, read_texts
from tutelage.data.text_sources import RawTextData
from tutelage.data.texts import as_list
from tutelage.errors import ConfigError, ModelError, shorten
from tutelage.models import load_tokenizer, read_class_names
from tutelage.models.pretrained import BiEncoder, SentenceEncoder, resolve_source
from tutelage.models.sentence_modules import find_prompt, ranking_prompts, read_prompt_settings
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
    unused = {"kind", "metric", "tokenizer", "views", "workers", "classes", "prompt", "teacher_prompt"}
    fields = config.model_dump(exclude=unused)
    classes = config.classes or _known(recipe)
    load = partial(
        load_texts, **fields, classes=classes, teacher_tokenizer=theirs, progress=terminal.iterate,
        align=recipe.method.cross_tokenizer, prompts=_prompts(recipe),
    )  # fmt: skip
    if recipe.student.vocabulary is None:
        return load(tokenizer=mine, say=terminal.say)
    columns = [config.text, config.teacher_text, config.label, config.route]
    needed = [name for names in columns for name in as_list(names)]
    text_columns = [*as_list(config.text), *as_list(config.teacher_text)]
    raw = read_texts(config.source, path=config.path, options=config.options, columns=needed, texts=text_columns)
    whole = load(tokenizer=mine, raw=raw)
    texts = training_texts(raw, whole, as_list(config.text))
    terminal.say(f"vocabulary: trimmed to {len(texts):,} training texts")
    trimmed, token_ids = trim_tokenizer(mine, texts)
    terminal.say(f"vocabulary: {len(token_ids):,} of {len(mine):,} tokens are kept")
    return replace(load(tokenizer=trimmed, raw=raw, say=terminal.say), teacher_token_ids=token_ids)


def prompt_names(recipe: Recipe) -> tuple[str | None, str | None]:
    """The names of the student's and of the teacher's prompt; ``None``: the default of its folder."""
    data = recipe.data
    if not isinstance(data, TextDataConfig) or data.task != "embedding":
        return None, None
    theirs = data.prompt if data.teacher_prompt is None else data.teacher_prompt
    return theirs if data.prompt is None and recipe.student.model == "teacher" else data.prompt, theirs


def _prompts(recipe: Recipe) -> tuple[list[str], list[str]]:
    """What student and teacher read before each text; for ranking, the student before each column.

    Raises:
        ConfigError: members of an ensemble have different prompts.
    """
    task, (mine, theirs) = recipe.data.task, prompt_names(recipe)
    if task not in TEACHER_ONLY_TASKS:
        return [], []
    teachers = [] if recipe.teacher is None else [m.model or "" for m in recipe.teacher.each]
    own = teachers[0] if recipe.student.model == "teacher" and teachers else recipe.student.model
    if task == "ranking":
        return ranking_prompts(_prompt_settings(own)), []
    known = {_find_prompt(model, theirs, "data.teacher_prompt") for model in teachers}
    if len(known) > 1:
        raise ConfigError(
            f"the members have different prompts: {shorten(', '.join(sorted(known)))}; all read the same texts",
            where="data.teacher_prompt",
            remedy='set it to a prompt that they share, or to ""',
        )
    return [_find_prompt(own, mine, "data.prompt")], list(known) or [""]


def _find_prompt(model: str, name: str | None, where: str) -> str:
    try:
        return find_prompt(_prompt_settings(model), name)
    except ModelError as error:
        error.where = where
        raise


def _prompt_settings(model: str) -> dict[str, Any]:
    return read_prompt_settings(resolve_source(model)[0]) if model.partition(":")[0] in ("hf", "package") else {}


def use_prompt(model: nn.Module, name: str | None, data: Data) -> None:
    """Make a sentence encoder read its texts with the prompt of this name, which is saved with it."""
    if isinstance(model, SentenceEncoder) and not isinstance(model, BiEncoder):
        assert isinstance(data, TextData)
        model.after.use_prompt(name, data.tokenizer)


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
    return with_tokenizer(teacher.with_encoder(part) if isinstance(teacher, SentenceEncoder) else part, data)


def _bare(teacher: nn.Module) -> nn.Module:
    return teacher.model if isinstance(teacher, SentenceEncoder) else teacher


def as_the_teacher_reads(data: TextData) -> TextData:
    """``data`` with the tokenizer that a teacher is saved with."""
    return data if data.teacher_tokenizer is None else replace(data, tokenizer=data.teacher_tokenizer)


def with_tokenizer(model: nn.Module, data: TextData) -> nn.Module:
    """``model``, which is saved with the tokenizer of its texts."""
    model.tokenizer = data.tokenizer
    return model
