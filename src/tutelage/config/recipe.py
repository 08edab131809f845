"""The recipe itself, and which of its sections go together."""

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from tutelage.config.base import LocatedSection, RecipeName, Seed
from tutelage.config.data import TEACHER_ONLY_TASKS, DataConfig, TextDataConfig
from tutelage.config.evaluate import EvaluateConfig, SamplesConfig
from tutelage.config.generate import Generations
from tutelage.config.judge import JudgeConfig
from tutelage.config.methods import METHOD_KINDS, AnyMethod
from tutelage.config.methods.feature import FeatureOptions
from tutelage.config.methods.language import TokenOptions
from tutelage.config.models import StudentConfig
from tutelage.config.multistage import AssistantChainConfig, BornAgainConfig
from tutelage.config.search import SearchConfig
from tutelage.config.teachers import CacheConfig, TeacherConfig
from tutelage.config.train import TrainConfig
from tutelage.errors import ConfigError, shorten


class Recipe(LocatedSection):
    """One comparison: a baseline student and a distilled one, usually with a teacher."""

    name: RecipeName
    data: Annotated[DataConfig | TextDataConfig, Field(discriminator="kind")]
    workflow: Annotated[BornAgainConfig | AssistantChainConfig, Field(discriminator="kind")] | None = None
    """Several trainings in a row: born-again generations or a chain of assistants. Default: one comparison."""
    teacher: TeacherConfig | None = None
    """See below. Optional for methods that need no teacher, whose students are then only compared with it. Left out
    for ``workflow: born-again``."""
    student: StudentConfig
    method: Annotated[AnyMethod, Field(discriminator="kind")]
    train: TrainConfig = Field(default_factory=TrainConfig)
    seeds: Annotated[list[Seed], Field(min_length=1)] = Field(default_factory=lambda: [0])
    """Seeds of initialisation, order and views; each trains its own students. The teacher is trained once."""
    baseline: bool = True
    """Also train the baseline student, with the same budget, for the comparison."""
    samples: SamplesConfig = Field(default_factory=SamplesConfig)
    """Predictions and generations for single test samples, which the page shows. See below."""
    evaluate: EvaluateConfig | None = None
    """Tasks that score the final language models, in addition to the test split. See below."""
    search: SearchConfig | None = None
    """Search space and trials of ``tutelage search``. See below."""
    generate: Annotated[Generations, Field(discriminator="kind")] | None = None
    """Settings of ``tutelage generate``. A recipe with only this section needs no other key. See below."""
    judge: JudgeConfig | None = None
    """Settings of ``tutelage judge``. A recipe with only this section needs no other key. See below."""

    def misfits(self) -> Iterator[tuple[str, str]]:
        """Sections that do not go together."""
        data, teacher, student, workflow = self.data, self.teacher, self.student, self.workflow
        if len(set(self.seeds)) != len(self.seeds):
            yield "seeds", f"{shorten(self.seeds)} has a seed twice; remove one"
        if isinstance(workflow, BornAgainConfig):
            if teacher is not None:
                yield "teacher", "in workflow born-again each generation teaches the next; remove 'teacher'"
        elif teacher is None:
            if workflow is not None:
                yield "workflow", "an assistant-chain starts from a teacher; add 'teacher'"
            if self.method.needs_teacher:
                without = ", ".join(kind for kind, config in METHOD_KINDS.items() if not config.needs_teacher)
                what = (
                    f"{self.method.kind} needs a teacher, and there is none; add 'teacher', or take a method without "
                    f"one: {without}"
                )
                yield "method", what
            if data.route is not None:
                yield "data.route", "is given, and there is no teacher; remove it"
        if student.model == "teacher":
            yield from self._misfits_of_pruned_student()
        if self.evaluate is not None and data.task != "causal":
            what = f"evaluate.tasks are for causal language models, and the task is {data.task!r}; remove it"
            yield "evaluate", what
        if self.baseline and data.task in TEACHER_ONLY_TASKS:
            yield "baseline", f"task {data.task!r} has no labels to train a baseline on; remove 'baseline'"
        if workflow is not None:
            if data.task != "classes":
                yield "workflow", f"workflows are for classes, and the task is {data.task!r}; remove it"
            if data.metric != "accuracy":
                yield "data.metric", f"workflows compare accuracy, and the metric is {data.metric!r}; remove it"
            if self.method.kind == "simkd":
                what = (
                    "simkd exports the teacher's classifier with the student, and the next student would lack it; "
                    "use another method"
                )
                yield "method", what
        if teacher is not None:
            yield from self._misfits_of_teacher(teacher)

    @property
    def required_teacher(self) -> TeacherConfig:
        """The teacher; raises :class:`ConfigError` if there is none."""
        if self.teacher is None:
            raise ConfigError("the recipe has no teacher", where="teacher", remedy="use a recipe that has one")
        return self.teacher

    def _misfits_of_pruned_student(self) -> Iterator[tuple[str, str]]:
        """Sections that do not go with a student that is cut out of its teacher."""
        teacher = self.teacher
        if teacher is None or teacher.model is None:
            what = "no teacher" if teacher is None else "a remote one" if teacher.endpoint else "several"
            yield "student", f"the student is cut out of its teacher, and there is {what}; name a model"
        if isinstance(self.data, DataConfig):
            what = (
                "model: teacher cuts layers out of a transformers model of texts, and this data is images; "
                "name a model"
            )
            yield "student", what
        elif self.data.tokenizer is not None:
            yield "data.tokenizer", "a student cut out of its teacher has the teacher's tokenizer; remove 'tokenizer'"
        if self.workflow is not None:
            what = (
                f"a student cut out of its teacher is for one comparison, not workflow {self.workflow.kind}; "
                "name a model"
            )
            yield "student", what

    def _misfits_of_teacher(self, teacher: TeacherConfig) -> Iterator[tuple[str, str]]:
        """Sections that do not go with the teacher."""
        data, method = self.data, self.method
        if teacher.augment is not None and isinstance(data, TextDataConfig):
            yield "teacher.augment", "'augment' of the teacher is for images, and this data is texts; remove it"
        for i, member in enumerate(teacher.each):
            where = "teacher" if teacher.members is None else f"teacher.members.{i}"
            if member.train is None:
                if member.trainable is not None:
                    yield f"{where}.trainable", "needs a training, and there is none; add 'train'"
                continue
            if data.task in TEACHER_ONLY_TASKS:
                yield "teacher", f"task {data.task!r} has nothing to train {where} on; give one with weights"
            for key in ("precision", "trackers"):
                own, shared = getattr(member.train, key), getattr(self.train, key)
                if own != shared:
                    what = f"is {own!r}, and train.{key} is {shared!r}, for the whole run; set train.{key} alone"
                    yield f"{where}.train.{key}", what
        if teacher.endpoint is not None:
            yield from self._misfits_of_remote_teacher(teacher)
        if teacher.route is not None and data.route is None:
            yield "teacher.route", "needs 'data.route'; name its column there"
        if data.route is not None and teacher.route is None:
            yield "data.route", "needs 'teacher.route'; remove it, or add one"
        mixed = [n for n in ("cutmix", "mixup") if any(n in entry for entry in data.augment)]
        if data.route is not None and mixed:
            what = (
                f"{mixed[0]} mixes images of different routes, and no member teaches both; "
                "remove it, or 'data.route' and 'teacher.route'"
            )
            yield "data.augment", what
        if teacher.members is not None and method.kind == "simkd":
            what = "simkd takes over one teacher's classifier, and there are several; use another method"
            yield "method", what
        if teacher.members is not None and isinstance(method, FeatureOptions):
            if method.pairs is None:
                what = (
                    "'pairs: auto' is ambiguous with several teachers; "
                    "list the pairs, as in {student: stages.1, teacher: 0.stages.1}"
                )
                yield "method.pairs", what
            if teacher.route is not None:
                what = "'pairs' need members that teach all samples, and 'route' gives each a part; use kind: logit"
                yield "method.pairs", what
        if teacher.cache is not None and data.augment and data.views is None:
            what = (
                "teacher.cache with data.augment would store new rows in every epoch and never read one; "
                "set data.views, such as 10: epochs then cycle through 10 stored views of each image"
            )
            yield "teacher.cache", what
        if teacher.cache is not None and teacher.mode != "eval":
            what = (
                f"teacher.cache with teacher.mode {teacher.mode!r}: the cached outputs would depend on the "
                "first batch of an image; use mode: eval"
            )
            yield "teacher.mode", what

    def _misfits_of_remote_teacher(self, teacher: TeacherConfig) -> Iterator[tuple[str, str]]:
        """What a teacher behind a server does not offer."""
        cache, default, method = teacher.cache or CacheConfig(), CacheConfig(), self.method
        for key in ("keep", "k", "draws", "head", "power", "temperatures"):
            if getattr(cache, key) != getattr(default, key):
                what = "a cache of a teacher behind a server stores its teacher.endpoint.k most probable tokens"
                yield f"teacher.cache.{key}", f"{what}; remove {key!r}"
        if method.needs_teacher and not method.accepts_remote_teacher:
            able = ", ".join(kind for kind, config in METHOD_KINDS.items() if config.accepts_remote_teacher)
            what = (
                f"a teacher behind a server returns some next tokens, and {method.kind} needs more; allowed: {able}"
            )
            yield "method", what
        if self.data.task != "causal":
            what = f"a teacher behind a server predicts next tokens, not {self.data.task!r}; set it to causal"
            yield "data", what
        required = {"hidden": 0, "temperature": 1, "divergence": "kl"} if isinstance(method, TokenOptions) else {}
        for key, value in required.items():
            if getattr(method, key) != value:
                what = (
                    f"a teacher behind a server returns some tokens at T = 1, and {key}: {getattr(method, key)} "
                    f"needs more; set it to {value}"
                )
                yield f"method.{key}", what
