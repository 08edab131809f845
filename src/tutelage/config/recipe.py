"""The recipe itself, and which of its sections go together."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from tutelage.config.base import Section, Seed
from tutelage.config.data import TEACHER_ONLY_TASKS, DataConfig, TextDataConfig
from tutelage.config.evaluate import EvaluateConfig
from tutelage.config.generate import Generations
from tutelage.config.judge import JudgeConfig
from tutelage.config.messages import Misfit
from tutelage.config.methods import (
    METHOD_KINDS,
    ByotOptions,
    CrossTokenizerOptions,
    EmbeddingOptions,
    FeatureOptions,
    LogitOptions,
    MinilmOptions,
    MutualOptions,
    OnPolicyOptions,
    PatientOptions,
    SequenceOptions,
    SimkdOptions,
    SupervisedOptions,
    TeacherFreeOptions,
    TinybertOptions,
    TokenOptions,
    TripleOptions,
)
from tutelage.config.models import StudentConfig
from tutelage.config.multistage import AssistantChainConfig, BornAgainConfig
from tutelage.config.sample_outputs import SamplesConfig
from tutelage.config.search import SearchConfig
from tutelage.config.teachers import CacheConfig, TeacherConfig
from tutelage.config.train import TrainConfig
from tutelage.errors import ConfigError, shorten


class Recipe(Section):
    """One comparison: a baseline student, and by a method, most often with a teacher."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    data: Annotated[DataConfig | TextDataConfig, Field(discriminator="kind")]
    workflow: Annotated[BornAgainConfig | AssistantChainConfig, Field(discriminator="kind")] | None = None
    """What trains more than once. Default: one comparison."""
    teacher: TeacherConfig | None = None
    """See below. ``null``, or left out, for a method that needs none, where students are compared with a teacher all
    the same if there is one; and for ``workflow: born-again``."""
    student: StudentConfig
    method: Annotated[
        LogitOptions
        | ByotOptions
        | CrossTokenizerOptions
        | EmbeddingOptions
        | FeatureOptions
        | MinilmOptions
        | MutualOptions
        | OnPolicyOptions
        | PatientOptions
        | SimkdOptions
        | SupervisedOptions
        | TeacherFreeOptions
        | SequenceOptions
        | TinybertOptions
        | TokenOptions
        | TripleOptions,
        Field(discriminator="kind"),
    ]
    train: TrainConfig = Field(default_factory=TrainConfig)
    seeds: Annotated[list[Seed], Field(min_length=1)] = Field(default_factory=lambda: [0])
    """Seeds of initialisation, order and views; each trains its own students. The teacher is trained once."""
    baseline: bool = True
    """Train the baseline student too, with the same budget, for the comparison."""
    samples: SamplesConfig = Field(default_factory=SamplesConfig)
    """What is kept of the test split, sample by sample, for the page. See below."""
    evaluate: EvaluateConfig | None = None
    """By what language models are scored in the end, beside the test split. See below."""
    search: SearchConfig | None = None
    """What ``tutelage search`` tries. See below."""
    generate: Annotated[Generations, Field(discriminator="kind")] | None = None
    """What ``tutelage generate`` asks an endpoint for. A recipe for that alone needs no other key. See below."""
    judge: JudgeConfig | None = None
    """What ``tutelage judge`` compares. A recipe for that alone needs no other key. See below."""

    @model_validator(mode="after")
    def _check_sections(self) -> Recipe:
        if len(set(self.seeds)) != len(self.seeds):
            raise Misfit(f"{shorten(self.seeds)} has a seed twice; remove one", "seeds")
        if isinstance(self.workflow, BornAgainConfig):
            if self.teacher is not None:
                raise Misfit(
                    "in workflow born-again each generation teaches the next; remove 'teacher'",
                    "teacher",
                )
        elif self.teacher is None:
            if isinstance(self.workflow, AssistantChainConfig):
                raise Misfit("an assistant-chain starts from a teacher; add 'teacher'", "workflow")
            if self.method.needs_teacher:
                without = ", ".join(kind for kind, config in METHOD_KINDS.items() if not config.needs_teacher)
                raise Misfit(
                    f"{self.method.kind} needs a teacher, and there is none; add 'teacher', or take a method without "
                    f"one: {without}",
                    "method",
                )
            if self.data.route is not None:
                raise Misfit("'data.route' is given, and there is no teacher; remove it", "data")
        if self.student.model == "teacher":
            if self.teacher is None or self.teacher.model is None:
                what = (
                    "no teacher" if self.teacher is None else "a remote one" if self.teacher.endpoint else "several"
                )
                raise Misfit(f"the student is cut from its teacher, and there is {what}; name a model", "student")
            if isinstance(self.data, DataConfig):
                raise Misfit(
                    "model: teacher cuts layers out of a transformers model of texts, and this data is images; "
                    "name a model",
                    "student",
                )
            if self.data.tokenizer is not None:
                raise Misfit("a student cut from its teacher has the teacher's tokenizer; remove 'tokenizer'", "data")
            if self.workflow is not None:
                raise Misfit(
                    f"a student cut from its teacher is for one comparison, not workflow {self.workflow.kind}; "
                    "name a model",
                    "student",
                )
        if self.evaluate is not None and self.data.task != "causal":
            raise Misfit(
                f"evaluate.tasks are for causal language models, and the task is {self.data.task!r}; remove it",
                "evaluate",
            )
        if self.baseline and self.data.task in TEACHER_ONLY_TASKS:
            raise Misfit(f"task {self.data.task!r} has no labels to learn from alone; remove 'baseline'", "baseline")
        if self.data.task != "classes" and self.workflow is not None:
            raise Misfit(f"workflows are for classes, and the task is {self.data.task!r}; remove it", "workflow")
        if self.data.metric != "accuracy" and self.workflow is not None:
            raise Misfit(f"workflows compare accuracy, and the metric is {self.data.metric!r}; remove it", "data")
        if self.workflow is not None and self.method.kind == "simkd":
            raise Misfit(
                "simkd exports the teacher's classifier with the student, and the next student would lack it; "
                "use another method",
                "method",
            )
        return self if self.teacher is None else self._check_teacher(self.teacher)

    @property
    def required_teacher(self) -> TeacherConfig:
        """The teacher, where one is needed.

        Raises:
            ConfigError: there is none.
        """
        if self.teacher is None:
            raise ConfigError("the recipe has no teacher", where="teacher", remedy="use a recipe that has one")
        return self.teacher

    def _check_teacher(self, teacher: TeacherConfig) -> Recipe:
        if teacher.augment is not None and isinstance(self.data, TextDataConfig):
            raise Misfit("'augment' of the teacher is for images, and this data is texts; remove it", "teacher")
        for i, member in enumerate(teacher.each):
            where = "teacher" if teacher.members is None else f"teacher.members.{i}"
            if member.train is not None and self.data.task in TEACHER_ONLY_TASKS:
                raise Misfit(
                    f"task {self.data.task!r} has nothing to train {where} on; give one with weights", "teacher"
                )
            if member.trainable is not None and member.train is None:
                raise Misfit(f"{where}.trainable says what is trained, and it is not; add 'train'", "teacher")
            for key in ("precision", "trackers") if member.train is not None else ():
                own, shared = getattr(member.train, key), getattr(self.train, key)
                if own != shared:
                    raise Misfit(
                        f"{where}.train.{key} is {own!r} and train.{key} {shared!r}: it is one for the whole run; "
                        f"set train.{key} alone",
                        "teacher",
                    )
        if teacher.endpoint is not None:
            self._check_remote_teacher()
        if teacher.route is not None and self.data.route is None:
            raise Misfit("teacher.route needs 'data.route'; name its column there", "teacher")
        if self.data.route is not None and teacher.route is None:
            raise Misfit("'data.route' needs 'teacher.route'; remove it, or add one", "data")
        mixed = [n for n in ("cutmix", "mixup") if any(n in entry for entry in self.data.augment)]
        if self.data.route is not None and mixed:
            raise Misfit(
                f"{mixed[0]} mixes images of different routes, and no member teaches both; "
                "remove it, or 'data.route' and 'teacher.route'",
                "data",
            )
        if teacher.members is not None and self.method.kind == "simkd":
            raise Misfit(
                "simkd takes over one teacher's classifier, and there are several; use another method", "method"
            )
        if teacher.members is not None and isinstance(self.method, FeatureOptions):
            self._check_ensemble_features(self.method, teacher)
        if teacher.cache is not None and self.data.augment and self.data.views is None:
            raise Misfit(
                "teacher.cache with data.augment would store new rows in every epoch and never read one; "
                "set data.views, such as 10: epochs then cycle through 10 stored views of each image",
                "teacher",
            )
        if teacher.cache is not None and teacher.mode != "eval":
            raise Misfit(
                f"teacher.cache with teacher.mode {teacher.mode!r}: the cached outputs would depend on the "
                "first batch of an image; use mode: eval",
                "teacher",
            )
        return self

    def _check_remote_teacher(self) -> None:
        cache, usual = self.required_teacher.cache or CacheConfig(), CacheConfig()
        keys = ("keep", "k", "draws", "head", "power", "temperatures")
        odd = [key for key in keys if getattr(cache, key) != getattr(usual, key)]
        if odd:
            raise Misfit(
                f"a cache of a teacher behind a server stores its teacher.endpoint.k most probable tokens; remove "
                f"{odd[0]!r}",
                "teacher",
            )
        if self.method.needs_teacher and not self.method.accepts_remote_teacher:
            able = ", ".join(kind for kind, config in METHOD_KINDS.items() if config.accepts_remote_teacher)
            raise Misfit(
                f"a teacher behind a server returns some next tokens, and {self.method.kind} needs more; "
                f"allowed: {able}",
                "method",
            )
        if self.data.task != "causal":
            raise Misfit(
                f"a teacher behind a server predicts next tokens, not {self.data.task!r}; set it to causal",
                "data",
            )
        method = self.method
        if isinstance(method, TokenOptions):
            for key, value, right in (
                ("hidden", method.hidden, 0), ("temperature", method.temperature, 1),
                ("divergence", method.divergence, "kl"),
            ):  # fmt: skip
                if value != right:
                    raise Misfit(
                        f"a teacher behind a server returns some tokens at T = 1, and {key}: {value} needs "
                        f"more; set it to {right}",
                        "method",
                    )

    def _check_ensemble_features(self, method: FeatureOptions, teacher: TeacherConfig) -> None:
        if method.pairs is None:
            raise Misfit(
                "'pairs: auto' is ambiguous with several teachers; "
                "list the pairs, as in {student: stages.1, teacher: 0.stages.1}",
                "method",
            )
        if teacher.route is not None:
            raise Misfit(
                "'pairs' need members that teach all samples, and 'route' gives each a part; use kind: logit",
                "method",
            )
