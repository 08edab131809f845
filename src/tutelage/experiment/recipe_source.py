"""From a recipe and its data to an experiment's specification and the models that it names."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
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
    TeacherConfig,
)
from tutelage.data import (
    Batch,
    Data,
    ImageData,
    PlannedBatches,
    SequentialBatches,
    TextData,
)
from tutelage.data.batch import IGNORE, LABELS
from tutelage.data.targets import TargetScale
from tutelage.data.texts import TextSet, same_tokens
from tutelage.errors import ConfigError, at_key
from tutelage.evaluation.harness import harness
from tutelage.evaluation.spans import SpanScores, are_span_tags
from tutelage.experiment.caching import open_recipe_cache
from tutelage.experiment.image_inputs import files_of_models, load_recipe_images
from tutelage.experiment.prepare import all_methods
from tutelage.experiment.recipe_texts import (
    as_the_teacher_reads,
    load_text_data,
    measure_block_influence,
    prompt_names,
    prune_student,
    use_prompt,
    with_tokenizer,
)
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
from tutelage.models import MODEL_CARD, ModelSpec, build, load_weights
from tutelage.models.files import read_card
from tutelage.models.pretrained import CrossEncoder, SentenceEncoder, position_limit
from tutelage.progress import Terminal
from tutelage.students import (
    add_fake_quantisers,
    add_lora,
    scale_outputs,
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
    return load_recipe_images(recipe, terminal, terminal.say)


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
        if are_span_tags(data.test.tag_names):
            SpanScores(tag_names=data.test.tag_names)  # a missing seqeval is told before the training
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
        rows = _labelled(rows, data.task)
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
        use_prompt(student, prompt_names(self.recipe)[0], data)
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
        use_prompt(model, prompt_names(self.recipe)[1], data)
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
        recipe = self.recipe
        rows = self._labelled_rows if arm == "baseline" else self.data.train
        return PlannedBatches(rows, recipe.train.batch_size, seed, recipe.data.workers, recipe.data.views)

    @cached_property
    def _labelled_rows(self) -> Any:
        rows: Any = self.data.train
        return rows if self.data.task in UNLABELLED else _labelled(replace(rows, mix_augments=()), self.data.task)

    def connect_teacher(self, classes: int) -> RemoteTeacher:
        """See :class:`ExperimentSource`; returns when the server has answered."""
        endpoint, data = self.recipe.required_teacher.endpoint, self.data
        assert endpoint is not None
        assert isinstance(data, TextData)
        options = endpoint.model_dump(exclude={"kind"})
        return RemoteTeacher(
            **options, server=endpoint.kind, classes=classes, tokenizer=data.tokenizer, longest=data.max_length
        )

    def reads_same_tokens(self, batches: Iterable[Batch]) -> bool:
        """See :class:`ExperimentSource`; all training texts are compared."""
        rows = self.data.train
        if not isinstance(rows, TextSet) or not rows.teacher_tokens:
            return True
        assert isinstance(self.data, TextData)
        return same_tokens(rows.tokens, rows.teacher_tokens, self.data.teacher_token_ids)

    def open_cache(
        self, teacher: ModelTeacher | RemoteTeacher, classes: int, method: Method, ctx: RunContext
    ) -> CachedTeacher:
        return open_recipe_cache(self.recipe, self.data, teacher, classes, method, ctx.accelerator)


def _labelled(rows: Any, task: str) -> Any:
    """The rows with a label; all rows for a task without one label for each."""
    labelled = (rows.labels != IGNORE).nonzero().flatten()
    if task not in UNLABELLED and not len(labelled):
        raise ConfigError(
            "no training sample has a label, so the baseline student and a teacher without weights cannot be trained",
            where="data",
            remedy="set baseline: false and give a trained teacher, or give labels to some samples",
        )
    return rows if task in UNLABELLED or len(labelled) == len(rows) else rows.select(labelled)


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
    longest = max(int(split.lengths.max()) for split in (data.train, data.validation, data.test) if len(split))
    positions = position_limit(model)
    if positions is not None and positions < longest:
        raise ConfigError(
            f"the longest text has {longest} tokens, and {config.model} has {positions} positions",
            where="data.max_length",
            remedy=f"set data.max_length={positions}",
        )
    return with_tokenizer(model, data)


def evaluation_workers(recipe: Recipe, data: Data) -> int:
    """Processes that load evaluation data; none for images that are in memory."""
    return recipe.data.workers if isinstance(data, TextData) or not data.test.is_in_memory else 0


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


KINDS = {
    "classes": "text-classifier", "multi-label": "text-classifier", "regression": "text-regressor",
    "tokens": "token-classifier", "mlm": "masked-language-model", "causal": "language-model",
    "embedding": "sentence-encoder", "ranking": "bi-encoder",
}  # fmt: skip
"""What a model for a task is called."""
