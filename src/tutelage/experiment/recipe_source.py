"""From a recipe and its data to an experiment's specification and the models that it names."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.config import (
    TEACHER_ONLY_TASKS,
    UNLABELLED,
    MemberConfig,
    ModelConfig,
    Recipe,
    StudentConfig,
    TeacherConfig,
    TextDataConfig,
)
from tutelage.data import (
    Batch,
    Data,
    ImageData,
    PlannedBatches,
    RankSlice,
    SequentialBatches,
    TextData,
    load_texts,
    read_texts,
)
from tutelage.data.batch import IGNORE, LABELS
from tutelage.data.targets import TargetScale
from tutelage.data.text_sources import RawTextData
from tutelage.data.texts import as_list
from tutelage.errors import ConfigError, ModelError, at_key, shorten
from tutelage.evaluation.harness import harness
from tutelage.experiment.caching import open_recipe_cache
from tutelage.experiment.image_inputs import files_of_models, load_recipe_images
from tutelage.experiment.prepare import all_methods
from tutelage.experiment.sample_predictions import decoded_text, normalised_image
from tutelage.experiment.spec import (
    Arm,
    EnsembleSpec,
    EvaluationSpec,
    ExperimentSpec,
    MemberSpec,
    ModelTeacher,
    RunContext,
    TeacherSpec,
    TeacherTraining,
)
from tutelage.experiment.teacher_setup import live_options, prefetch_mode, resolve_routes
from tutelage.methods import METHODS, MaskedMethod, Method, SequenceMethod, SupervisedMethod
from tutelage.models import MODEL_CARD, ModelSpec, build, load_tokenizer, load_weights, read_class_names
from tutelage.models.files import read_card
from tutelage.models.pretrained import BiEncoder, CrossEncoder, SentenceEncoder, resolve_source
from tutelage.models.sentence_modules import find_prompt, ranking_prompts, read_prompt_settings
from tutelage.progress import Terminal
from tutelage.students import (
    add_fake_quantisers,
    add_lora,
    block_influence,
    prune,
    scale_outputs,
    trim_embeddings,
    trim_tokenizer,
)
from tutelage.teachers import CachedTeacher, RemoteTeacher

ONE_VIEW = (
    "with data.views: 1 every epoch has the same augmented view of each image. Distillation works better with many "
    "views (Beyer et al., 2022): set data.views to 10 or more"
)


def load_data(recipe: Recipe, terminal: Terminal) -> Data:
    """The data of a recipe."""
    if recipe.data.kind == "texts":
        with at_key("data.source" if recipe.data.path is None else "data.path"):
            return load_text_data(recipe, terminal)
    if recipe.data.views == 1:
        terminal.say(f"note: {ONE_VIEW}")
    return load_recipe_images(recipe, terminal)


def data_key(recipe: Recipe) -> str:
    """What the data of a recipe depends on; recipes with the same key can share loaded data."""
    members = [] if recipe.teacher is None else recipe.teacher.each
    if recipe.data.kind == "texts":
        own: list[Any] = [recipe.student.model, recipe.student.vocabulary, recipe.method.cross_tokenizer]
        read_by = [member.model for member in members] + own
    else:
        files = [files and files.preprocessing.to_dict() for files in files_of_models(recipe)]
        read_by = [*files, None if recipe.teacher is None else recipe.teacher.augment]
    return json.dumps([recipe.data.model_dump(mode="json"), read_by])


def recipe_spec(recipe: Recipe, data: Data) -> ExperimentSpec:
    """The experiment that a recipe describes, on its data."""
    workers, card = evaluation_workers(recipe, data), data_card(data)
    if recipe.student.model != "teacher":
        card = {"spec": model_spec(recipe.student, data).to_dict(), **card}
    tokenizers = None
    if isinstance(data, TextData):
        describe = decoded_text(data.tokenizer)
        if data.task == "causal":
            tokenizers = (data.tokenizer, as_the_teacher_reads(data).tokenizer)
    else:
        describe = normalised_image(data.test.preprocessing)
    return ExperimentSpec(
        name=recipe.name,
        source=RecipeSource(recipe, data),
        train=recipe.train,
        evaluation=EvaluationSpec(
            test=SequentialBatches(data.test, workers=workers),
            validation=SequentialBatches(data.validation, workers=workers),
            metric=str(recipe.data.metric),
            classes=data.classes,
            by_teacher=data.task in TEACHER_ONLY_TASKS,
            samples=recipe.samples,
            describe=describe,
            tokenizers=tokenizers,
            harness=None if recipe.evaluate is None else harness(recipe.evaluate, getattr(data, "tokenizer", None)),
        ),
        teacher=None if recipe.teacher is None else teacher_spec(recipe, recipe.teacher, data),
        seeds=recipe.seeds,
        baseline=recipe.baseline,
        student_card=card,
        unaugmented=None if data.train.is_augmented else SequentialBatches(data.train, workers=workers),
        training_rows=len(data.train),
    )


def teacher_spec(recipe: Recipe, teacher: TeacherConfig, data: Data) -> TeacherSpec:
    """The teacher that a recipe describes."""
    if teacher.endpoint is not None:
        return TeacherSpec(cache=teacher.cache)
    ensemble = None
    if teacher.members is not None:
        route = None if teacher.route is None else resolve_routes(teacher.route, data.route_names)
        ensemble = EnsembleSpec(
            teacher.combine or "probabilities", teacher.weights, teacher.average_temperature or 1.0, route
        )
    members = tuple(_member_spec(recipe, teacher, number, data) for number in range(len(teacher.each)))
    return TeacherSpec(members, teacher.mode, ensemble, prefetch_mode(teacher.inference), teacher.cache)


def _member_spec(recipe: Recipe, teacher: TeacherConfig, number: int, data: Data) -> MemberSpec:
    config = teacher.each[number]
    training = None
    if config.train is not None:
        seed = _member_seed(recipe, config, number)
        rows = data.training_of(number) if isinstance(data, ImageData) else data.for_teacher
        batches = PlannedBatches(rows, config.train.batch_size, seed, recipe.data.workers)
        training = TeacherTraining(config.train, batches, seed)
    name = "teacher" if teacher.members is None else f"teacher.members.{number}"
    with at_key(f"{name}.checkpoint"):
        card = {"spec": model_spec(config, data, number).to_dict(), "loaded_classes": _checkpoint_classes(config)}
    trainable = config.trainable or ("head" if data.task == "mlm" else "all")
    return MemberSpec(
        f"teacher-{number}" if teacher.members is not None else "teacher", training, card | data_card(data, number),
        live_options(teacher.inference, config.inference), trainable == "head",
    )  # fmt: skip


def _member_seed(recipe: Recipe, config: MemberConfig, number: int) -> int:
    """The seed of a teacher's member; members of the same architecture differ."""
    return recipe.seeds[0] + number if config.seed is None else config.seed


@dataclass(frozen=True)
class RecipeSource:
    """Builds the parts of an experiment from a recipe; see :class:`ExperimentSource`.

    Attributes:
        teacher: the model that a pruned student is cut from. Default: the teacher before any training.
        influence: the importance of the teacher's layers, if it decides which layers a student keeps.
    """

    recipe: Recipe
    data: Data
    teacher: nn.Module | None = None
    influence: Tensor | None = None

    @property
    def _is_cut(self) -> bool:
        return self.recipe.student.model == "teacher"

    @property
    def target_scale(self) -> TargetScale | None:
        return self.data.target_scale if isinstance(self.data, TextData) else None

    def with_teacher(self, teacher: nn.Module | None) -> RecipeSource:
        if not self._is_cut or teacher is None:
            return self
        if isinstance(teacher, CrossEncoder):
            raise ConfigError(
                "a student for ranking encodes query and answers separately, and a part of a cross-encoder cannot",
                where="student.model",
                remedy="name an encoder: hf:ID",
            )
        assert isinstance(self.data, TextData)
        influence = measure_block_influence(teacher, self.data) if self.recipe.student.map == "influence" else None
        return replace(self, teacher=teacher, influence=influence)

    def build_student(self, seed: int) -> nn.Module:
        config, data = self.recipe.student, self.data
        if self._is_cut and self.teacher is None:
            return self.with_teacher(self.build_teacher(0)).build_student(seed)
        if self.teacher is not None:
            assert isinstance(data, TextData)
            student = prune_student(config, data, self.teacher, self.influence, seed)
            student.fresh = []  # type: ignore[assignment]
        else:
            student = build_model(config, data, seed)
        use_prompt(student, _prompt_names(self.recipe)[0], data)
        student = scale_outputs(student, self.target_scale)
        if config.lora is not None:
            student = add_lora(student, **config.lora.model_dump(), seed=seed)
        return student if config.qat is None else add_fake_quantisers(student)

    def build_peer(self, options: ModelConfig | None, seed: int) -> nn.Module:
        return build_model(options or self.recipe.student, self.data, seed, where="method.peers")

    def peer_card(self, options: ModelConfig | None) -> dict[str, Any]:
        return {"spec": model_spec(options or self.recipe.student, self.data).to_dict()}

    def build_teacher(self, number: int) -> nn.Module:
        teacher = self.recipe.required_teacher
        config = teacher.each[number]
        data = as_the_teacher_reads(self.data) if isinstance(self.data, TextData) else self.data
        where = "teacher" if teacher.members is None else f"teacher.members.{number}"
        seed = _member_seed(self.recipe, config, number)
        model = build_model(config, data, seed, where, model_spec(config, self.data, number))
        use_prompt(model, _prompt_names(self.recipe)[1], data)
        return model

    def build_method(self) -> Method:
        options = self.recipe.method
        method = METHODS[options.kind](options, task=LABELS[self.recipe.data.task])
        for each in all_methods(method):
            each.target_scale = self.target_scale
        return method

    def build_baseline_method(self) -> Method:
        if self.data.task in ("mlm", "causal"):
            return MaskedMethod() if self.data.task == "mlm" else SequenceMethod()
        method = SupervisedMethod(task=LABELS[self.data.task])
        method.target_scale = self.target_scale
        return method

    def training_batches(self, arm: Arm, seed: int) -> PlannedBatches:
        """See :class:`ExperimentSource`; the baseline has the labelled samples."""
        recipe, labelled = self.recipe, arm == "baseline" and self.data.task not in UNLABELLED
        rows = self._labelled_rows if labelled else self.data.train
        return PlannedBatches(rows, recipe.train.batch_size, seed, recipe.data.workers, recipe.data.views)

    @cached_property
    def _labelled_rows(self) -> Any:
        rows: Any = self.data.train
        return replace(rows, mix_augments=()).select((rows.labels != IGNORE).nonzero().flatten())

    def connect_teacher(self, classes: int) -> RemoteTeacher:
        """See :class:`ExperimentSource`; returns when the server has answered."""
        endpoint, data = self.recipe.required_teacher.endpoint, self.data
        assert endpoint is not None
        assert isinstance(data, TextData)
        options = endpoint.model_dump(exclude={"kind"})
        return RemoteTeacher(
            **options, server=endpoint.kind, classes=classes, tokenizer=data.tokenizer, longest=data.max_length
        )

    def reads_same_tokens(self, batch: Batch) -> bool:
        if batch.teacher_inputs is None:
            return True
        assert isinstance(self.data, TextData)
        assert isinstance(batch.inputs, dict)
        assert isinstance(batch.teacher_inputs, dict)
        own, theirs = batch.inputs["input_ids"], batch.teacher_inputs["input_ids"]
        table = self.data.teacher_token_ids
        own = own if table is None else table.to(own.device)[own]
        counts = batch.inputs["attention_mask"].bool()
        if self.data.task == "mlm":  # masked for the student
            counts = counts & (batch.labels == IGNORE)
        return own.shape == theirs.shape and torch.equal(own[counts], theirs[counts])

    def open_cache(
        self, teacher: ModelTeacher | RemoteTeacher, classes: int, method: Method, ctx: RunContext
    ) -> CachedTeacher:
        return open_recipe_cache(self.recipe, self.data, teacher, classes, method, ctx.accelerator)


def model_spec(config: ModelConfig, data: Data, member: int | None = None) -> ModelSpec:
    """A recipe's model, sized for the data as the student reads it, or as a member of the teacher does."""
    facts = data.spec if member is None or not isinstance(data, ImageData) else data.teacher_spec(member)
    return ModelSpec(config.model, config.options, **facts)


def build_model(
    config: ModelConfig, data: Data, seed: int, where: str = "student", spec: ModelSpec | None = None
) -> nn.Module:
    """A recipe's model, with its checkpoint's weights if it has one; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(spec or model_spec(config, data), data.classes, where=f"{where}.model")
    if config.checkpoint is not None:
        with at_key(f"{where}.checkpoint"):
            load_weights(model, Path(config.checkpoint))
        model.fresh = []  # type: ignore[assignment]
    if not isinstance(data, TextData):
        return model
    limit = model.after.max_length if isinstance(model, SentenceEncoder) else None
    if limit is not None and limit < data.max_length:
        raise ConfigError(
            f"texts of {data.max_length} tokens, and {config.model} reads {limit} (as its folder's files limit it)",
            where="data.max_length",
            remedy=f"set data.max_length={limit}",
        )
    return with_tokenizer(model, data)


def evaluation_workers(recipe: Recipe, data: Data) -> int:
    """Processes that load evaluation data; none for images that are in memory."""
    return recipe.data.workers if isinstance(data, TextData) or data.test.pixels is None else 0


def data_card(data: Data, member: int | None = None) -> dict[str, Any]:
    """The entries of a model's ``model.json`` about its data: the student's, or those of a member of the teacher."""
    kind = (
        {"kind": "image-classifier"} if isinstance(data, ImageData) else {"kind": KINDS[data.task], "task": data.task}
    )
    own = data.preprocessing()
    if member is not None and isinstance(data, ImageData):
        own = data.teacher(member).to_dict()
    return {"classes": data.classes, "preprocessing": own, **kind}


def _checkpoint_classes(config: MemberConfig) -> list[str] | None:
    """The class names in the ``model.json`` beside a checkpoint, if there is one."""
    if config.checkpoint is None:
        return None
    path = Path(config.checkpoint)
    folder = path if path.is_dir() else path.parent
    names: list[str] | None = read_card(folder).get("classes") if (folder / MODEL_CARD).exists() else None
    return names


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


def _prompt_names(recipe: Recipe) -> tuple[str | None, str | None]:
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
    task, (mine, theirs) = recipe.data.task, _prompt_names(recipe)
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


KINDS = {
    "classes": "text-classifier", "multi-label": "text-classifier", "regression": "text-regressor",
    "tokens": "token-classifier", "mlm": "masked-language-model", "causal": "language-model",
    "embedding": "sentence-encoder", "ranking": "bi-encoder",
}  # fmt: skip
"""What a model for a task is called."""
