"""The sections of a recipe but for its method, and the recipe itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from tutelage.config.base import Count, Misfit, NotNegative, Positive, Section, Seed
from tutelage.config.data import TAUGHT_ONLY, Augments, DataConfig, TextDataConfig
from tutelage.config.generate import Generations
from tutelage.config.judge import JudgeConfig
from tutelage.config.methods import (
    METHOD_KINDS,
    ByotConfig,
    CrossTokenizerConfig,
    EmbeddingConfig,
    FeatureConfig,
    LogitConfig,
    MinilmConfig,
    MutualConfig,
    OnPolicyConfig,
    PatientConfig,
    SequenceConfig,
    SimkdConfig,
    SupervisedConfig,
    TeacherFreeConfig,
    TinybertConfig,
    TokenConfig,
    TripleConfig,
)
from tutelage.config.models import ModelConfig, ModelName, StudentConfig
from tutelage.config.samples import SamplesConfig
from tutelage.config.search import SearchConfig
from tutelage.config.workflows import AssistantChainConfig, BornAgainConfig
from tutelage.errors import ConfigError, suggest

OPTIMIZERS: dict[str, tuple[str, ...]] = {
    "adadelta": ("rho", "eps"),
    "adafactor": ("beta2_decay", "eps", "d"),
    "adagrad": ("lr_decay", "initial_accumulator_value", "eps"),
    "adam": ("betas", "eps", "amsgrad", "fused"),
    "adamax": ("betas", "eps"),
    "adamw": ("betas", "eps", "amsgrad", "fused"),
    "asgd": ("lambd", "alpha", "t0"),
    "nadam": ("betas", "eps", "momentum_decay", "decoupled_weight_decay"),
    "radam": ("betas", "eps", "decoupled_weight_decay"),
    "rmsprop": ("alpha", "eps", "momentum", "centered"),
    "sgd": ("momentum", "dampening", "nesterov", "fused"),
}
"""torch's optimizers by name, each with the options it takes beside ``lr`` and ``weight_decay``."""

SCHEDULES: dict[str, tuple[str, ...]] = {
    "constant": (),
    "cosine": ("final",),
    "exponential": ("gamma",),
    "linear": ("final",),
    "multistep": ("milestones", "gamma"),
    "onecycle": ("rise",),
    "polynomial": ("power",),
    "step": ("every", "gamma"),
}
"""Learning-rate schedules by name, each with its options. All are stepped once an optimizer step."""

TRACKERS = (
    "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb",
)  # fmt: skip
"""Experiment trackers by the names that accelerate gives them."""


class OptimizerConfig(Section):
    """A torch optimizer."""

    model_config = ConfigDict(extra="allow", strict=True)
    kind: str = "adamw"
    lr: Positive = 1e-3
    weight_decay: NotNegative = 0.0
    decay_vectors: bool = False
    """Decay biases and norms too, as torch does and most CIFAR and ImageNet recipes."""

    @model_validator(mode="after")
    def _known(self) -> OptimizerConfig:
        check_options("optimizer", self.kind, self.options, OPTIMIZERS)
        return self

    @property
    def options(self) -> dict[str, Any]:
        """What goes to the constructor beside ``lr`` and ``weight_decay``."""
        return dict(self.model_extra or {})


class ScheduleConfig(Section):
    """A learning-rate schedule, with a linear warm-up before it."""

    model_config = ConfigDict(extra="allow", strict=True)
    kind: str = "cosine"
    warmup: NotNegative = 0.0
    """Below 1: share of all steps; from 1 on: number of steps."""

    @model_validator(mode="after")
    def _known(self) -> ScheduleConfig:
        check_options("schedule", self.kind, self.options, SCHEDULES)
        if self.kind == "onecycle" and self.warmup:
            raise Misfit("onecycle rises by itself, for the share 'rise' of all steps; leave 'warmup' out", "warmup")
        return self

    @property
    def options(self) -> dict[str, Any]:
        """The schedule's own options."""
        return dict(self.model_extra or {})


class TrainConfig(Section):
    """How a model is trained. The teacher's own training starts from the student's settings."""

    epochs: Count | None = None
    """Passes over the training images. Give this or ``steps``; default 10 epochs."""
    steps: Count | None = None
    """Optimizer steps, in place of ``epochs``."""
    batch_size: Count = 128
    """Examples of one optimizer step, over all processes and micro-batches together."""
    accumulate: Count = 1
    """Micro-batches that each process cuts its share of a batch into. The gradient stays the same."""
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    clip: Positive | None = None
    """Largest norm of the gradient. Default: no clipping."""
    precision: Literal["auto", "no", "bf16", "fp16"] | None = None
    """Mixed precision; ``auto`` is ``bf16`` where the hardware computes in it, else none. Default: what
    ``accelerate launch`` says, else none."""
    compile: bool = False
    """``torch.compile`` the student."""
    gradient_checkpointing: bool = False
    """Compute the student's layers once more in the backward pass, in place of keeping what is between them: a third
    more time, for far less memory. For models of transformers."""
    ema: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Decay of an exponential moving average of the weights, which then is evaluated and exported."""
    evaluate_every: Count | None = None
    """Steps between evaluations on the validation split. Default: one epoch, or a hundredth of all steps."""
    early_stop: Count | None = None
    """Stop after this many evaluations without a better validation accuracy. Default: never."""
    checkpoint_every: Count | None = None
    """Steps between checkpoints. Default: at evaluations, at most every 20 seconds."""
    keep: Count = 2
    """Newest checkpoints kept. Each holds the weights of the best validation so far besides."""
    log_every: Count = 50
    """Steps between lines of ``metrics.jsonl``."""
    trackers: list[Literal[TRACKERS]] = Field(default_factory=list)  # type: ignore[valid-type]
    """Experiment trackers that the metrics also go to."""

    @model_validator(mode="after")
    def _budget(self) -> TrainConfig:
        if self.epochs is not None and self.steps is not None:
            raise Misfit(f"both 'epochs' ({self.epochs}) and 'steps' ({self.steps}) are given; give one", "steps")
        if self.epochs is None and self.steps is None:
            self.epochs = 10
        return self


class CacheConfig(Section):
    """The teacher's word on disk: written in the first epoch or by ``tutelage cache``, then read."""

    path: str | None = None
    """Its folder. Default: ``runs/cache/`` and a name made of all that it depends on, so that runs with the same
    teacher, data and views share one, and others do not meet."""
    keep: Literal["dense", "topk", "sampled", "rounded", "hidden"] = "dense"
    """Of the logits: all; the ``k`` largest, with the mass of the others; an unbiased sample: ``sampled`` draws, and
    ``rounded`` rounds ``draws`` times each probability by chance, which tells most a byte; these three at the
    method's temperature only. Or all, as what goes into the output head, whose weights are kept once (``hidden``):
    less than logits where there are more classes than hidden units, as in language models."""
    dtype: Literal["bf16", "fp16", "fp32"] = "fp16"
    """Of the numbers that are kept."""
    k: Count = 8
    """Classes a row, of ``topk``."""
    draws: Annotated[int, Field(ge=1, le=65_535)] = 64
    """Draws a row, of ``sampled`` and ``rounded``."""
    head: Annotated[int, Field(ge=0)] = 0
    """Of ``sampled``: this many of the largest classes are kept exactly, and the draws are from the others."""
    power: Positive = 1.0
    """Of ``sampled``: draws are from p^power, with weights that make up for it. Other than 1 has more variance."""
    temperatures: list[Positive] = Field(default_factory=list)
    """At which ``topk``, ``sampled`` and ``rounded`` keep the distribution. Default: the method's."""


def cache_section(given: Any) -> Any:
    """What ``true``, ``false``, a folder or a section means, as a section; ``None`` for no cache."""
    if isinstance(given, bool):
        return {} if given else None
    return {"path": given} if isinstance(given, str) else given


class SpeedConfig(Section):
    """How a teacher runs. What it says stays the same but for rounding; its figures are of it as it runs."""

    dtype: Literal["bf16", "fp16", "int8"] | None = None
    """Numbers that a copy of it computes in, whatever ``train.precision``: ``int8`` quantises linear layers, on CPUs;
    ``fp16`` is slow on most CPUs. Default: its own."""
    compile: bool | None = None
    """``torch.compile`` it. Default: no."""
    batch_size: Count | None = None
    """Most images that it takes at once; a longer batch is cut for it. Default: the student's batch."""
    device: str | None = None
    """Where it runs, such as ``cpu`` or ``cuda:1``. Default: where the student does."""


class TeacherSpeedConfig(SpeedConfig):
    """How the teacher runs; of an ensemble, what its members leave out."""

    overlap: bool = False
    """Compute the next batch's signal while the student trains on this one: on a GPU on a stream of its own, else in
    a thread, for which a core should be free. Without use where the teacher's word is remembered."""
    process: bool = False
    """The same from a process of its own, for a teacher whose Python holds the student up. Batches are copied."""

    @model_validator(mode="after")
    def _one(self) -> TeacherSpeedConfig:
        if self.overlap and self.process:
            raise Misfit("a process of its own overlaps anyway; remove 'overlap'", "overlap")
        return self


class MemberConfig(ModelConfig):
    """A member of an ensemble: a teacher of its own, trained first where it has no weights."""

    trained: bool | None = None
    """Whether the model comes with its weights. Default: with a ``checkpoint``, an ``hf:`` id, timm's
    ``pretrained`` or torchvision's ``weights`` it does."""
    seed: Seed | None = None
    """Of its weights and its order of images, where it is trained. Default: the first of ``seeds``, and each member
    of an ensemble the next."""
    learn: Literal["all", "head"] | None = None
    """What of it is trained: ``head`` is what did not come with its weights, such as a new output layer. Default:
    all; of task ``mlm`` the head, which ties to embeddings that stay."""
    train: TrainConfig | None = None
    """Its own training, or fine-tuning where it has weights. What it leaves out is taken from the recipe's ``train``.
    Default: none with weights, the recipe's ``train`` without."""
    speed: SpeedConfig | None = None
    """How it runs."""

    @model_validator(mode="after")
    def _trained_once(self) -> MemberConfig:
        if self.train is not None and self.checkpoint is not None:
            raise Misfit(
                "teacher has both 'checkpoint' and 'train', and one with weights is not trained again; remove one",
                "checkpoint",
            )
        return self


Weights = list[NotNegative] | Literal["learned"]


class EnsembleConfig(Section):
    """How the members of an ensemble become one."""

    combine: Literal["probabilities", "logits"] | None = None
    """What of the members is averaged. Default: ``probabilities``."""
    weights: Weights | None = None
    """One for each member, or ``learned``: fitted on the validation split, by the cross-entropy of the ensemble with
    its labels. Default: all the same."""
    average_at: Positive | None = None
    """T at which probabilities are averaged. At the method's own T, the student gets the mean of what each member
    says at T. Default: 1."""


class ServedConfig(Section):
    """A teacher behind a server: the likeliest next tokens of each token that counts, by token ids. Its tokenizer is
    the student's, which ``data.tokenizer`` or the student brings; T is 1 and the divergence kl."""

    url: Annotated[str, Field(pattern=r"^https?://[^\s?#@]+$")]
    """Where it is: of vLLM with ``/v1`` at its end, as ``http://127.0.0.1:8000/v1``."""
    kind: Literal["vllm", "llama.cpp"] = "vllm"
    """``vllm``: all of a text in one request. ``llama.cpp``: its server says nothing of a prompt, so it is asked for
    one token after each beginning of a text; for small sets, or once for a cache."""
    model: str | None = None
    """Its name there. Default: the first that it serves."""
    k: Count = 20
    """How many of the likeliest tokens; all others are one outcome. vLLM gives 20 at most unless it is started with
    ``--max-logprobs``."""
    key_env: str | None = None
    """Name of the environment variable that holds the key, which never stands in a recipe. Default: none is sent."""
    concurrency: Count = 8
    """The most texts that are asked about at once."""
    timeout: Positive = 120.0
    """Seconds that one request may take."""
    patience: Positive = 300.0
    """Seconds after which a server that does not answer is given up; what is in a cache by then is kept."""


class TeacherConfig(MemberConfig, EnsembleConfig):
    """The teacher, or the members of an ensemble: each trained first where it has no weights of its own."""

    model: ModelName | None = None  # type: ignore[assignment]
    """``mlp``, ``convnet``, ``resnet``, ``timm:NAME``, ``torchvision:NAME``, ``hf:ID`` or ``pkg.module:callable``; or
    none, and ``members``."""
    endpoint: ServedConfig | None = None
    """In the place of ``model``: one behind a server. See below."""
    members: Annotated[list[MemberConfig], Field(min_length=2)] | None = None
    """Teachers that speak as one. Those without weights are trained first, each with a seed of its own; what their
    ``train`` leaves out is taken from ``teacher.train``, then from ``train``."""
    route: dict[str, int | list[int]] | None = None
    """For each value of the column ``data.route`` the member that teaches such images, numbered from 0, or a list of
    several. Default: all teach all."""
    speed: TeacherSpeedConfig | None = None
    """How it runs."""
    augment: Augments | None = None
    """Augmentations of its own training. Default: those of ``data``."""
    cache: Annotated[CacheConfig | None, BeforeValidator(cache_section)] = None
    """Keep the teacher's word on disk: ``true``, a folder, or a section. See below."""
    mode: Literal["eval", "train_bn"] = "eval"
    """``train_bn``: normalise by the statistics of the batch, without moving the running ones."""

    @model_validator(mode="after")
    def _one_or_many(self) -> TeacherConfig:
        given = [key for key in ("model", "members", "endpoint") if getattr(self, key) is not None]
        if len(given) != 1:
            what = f"both {given[0]!r} and {given[1]!r}" if given else "neither 'model' nor 'members' nor 'endpoint'"
            raise Misfit(f"the teacher has {what}; give one", given[1] if given else "model")
        if self.endpoint is not None:
            for key in ("options", "checkpoint", "trained", "train", "seed", "learn", "speed", "augment"):
                if getattr(self, key) not in (None, {}):
                    raise Misfit(f"{key!r} is of a model in this process, and this one is behind a server", key)
            if self.mode != "eval":
                raise Misfit("'mode' is of a model in this process, and this one is behind a server", "mode")
        if self.cache is not None and self.speed is not None and (self.speed.overlap or self.speed.process):
            key = "process" if self.speed.process else "overlap"
            raise Misfit(f"a teacher whose word is read from disk is not asked ahead; remove {key!r}", "speed")
        if self.members is None:
            for key in ("combine", "weights", "average_at", "route"):
                if getattr(self, key) is not None:
                    raise Misfit(f"{key!r} is for an ensemble, and there are no 'members'; remove it", key)
            return self
        for key in ("options", "checkpoint", "trained", "train", "seed"):
            if getattr(self, key) not in (None, {}):
                raise Misfit(f"{key!r} is of a single teacher; give it to each of 'members'", key)
        many = len(self.members)
        if isinstance(self.weights, list):
            if len(self.weights) != many:
                raise Misfit(f"{len(self.weights)} weights for {many} members; give one for each", "weights")
            if not sum(self.weights):
                raise Misfit("all weights are 0; at least one must be above", "weights")
        if self.average_at is not None and self.combine == "logits":
            raise Misfit("logits are averaged as they are; remove 'average_at'", "average_at")
        if self.route is not None:
            self._routed(self.route, many)
        return self

    def _routed(self, route: dict[str, int | list[int]], many: int) -> None:
        if self.weights == "learned":
            raise Misfit(
                "weights are learned of members that teach all images; remove 'route' or 'weights'", "weights"
            )
        if self.mode == "train_bn":
            raise Misfit("a routed member sees parts of batches only, and train_bn needs all; use mode: eval", "mode")
        taught = {value: [those] if isinstance(those, int) else those for value, those in route.items()}
        for value, those in taught.items():
            if not those or not all(0 <= m < many for m in those):
                raise Misfit(f"route {value!r} names {those or 'no member'}; allowed: 0 to {many - 1}", "route")
            if isinstance(self.weights, list) and not any(self.weights[m] for m in those):
                raise Misfit(f"no member with a weight above 0 teaches route {value!r}; give one", "route")
        idle = sorted(set(range(many)) - {m for those in taught.values() for m in those})
        if idle:
            raise Misfit(f"no route leads to member {idle[0]}; give it one, or remove it", "route")

    @property
    def each(self) -> list[MemberConfig]:
        """The members; a single teacher is its only one."""
        return [self] if self.members is None else self.members


class EvaluateConfig(Section):
    """Tasks of lm-evaluation-harness that the models of a finished run are scored by (``pip install
    'tutelage[lm-eval]'``); the scores go to ``tasks`` in ``summary.json``. For causal language models."""

    tasks: Annotated[list[str], Field(min_length=1)]
    """Their names, such as ``[arc_easy, hellaswag]``."""
    include: str | None = None
    """A folder with task files of your own."""
    shots: Annotated[int, Field(ge=0)] | None = None
    """Examples in front of each question. Default: what the task says."""
    limit: Count | None = None
    """Questions of each task. Default: all."""
    batch_size: Count = 8
    """Of texts that are scored at a time."""
    chat: bool = False
    """Whether questions are put into the chat template."""


class Recipe(Section):
    """One comparison: a student alone, and by a method, most often with a teacher."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    data: Annotated[DataConfig | TextDataConfig, Field(discriminator="kind")]
    workflow: Annotated[BornAgainConfig | AssistantChainConfig, Field(discriminator="kind")] | None = None
    """What trains more than once. Default: one comparison."""
    teacher: TeacherConfig | None = None
    """See below. ``null``, or left out, for a method that needs none, where students are compared with a teacher all
    the same if there is one; and for ``workflow: born-again``."""
    student: StudentConfig
    method: Annotated[
        LogitConfig
        | ByotConfig
        | CrossTokenizerConfig
        | EmbeddingConfig
        | FeatureConfig
        | MinilmConfig
        | MutualConfig
        | OnPolicyConfig
        | PatientConfig
        | SimkdConfig
        | SupervisedConfig
        | TeacherFreeConfig
        | SequenceConfig
        | TinybertConfig
        | TokenConfig
        | TripleConfig,
        Field(discriminator="kind"),
    ]
    train: TrainConfig = Field(default_factory=TrainConfig)
    seeds: Annotated[list[Seed], Field(min_length=1)] = Field(default_factory=lambda: [0])
    """Seeds of initialisation, order and views; each trains its own students. The teacher is trained once."""
    baseline: bool = True
    """Train the student alone too, with the same budget, for the comparison."""
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
    def _consistent(self) -> Recipe:
        if len(set(self.seeds)) != len(self.seeds):
            raise Misfit(f"{self.seeds} holds a seed twice, and a copy adds no evidence; remove it", "seeds")
        if isinstance(self.workflow, BornAgainConfig):
            if self.teacher is not None:
                raise Misfit(
                    "in workflow born-again each generation teaches the next; remove 'teacher'",
                    "teacher",
                )
        elif self.teacher is None:
            if isinstance(self.workflow, AssistantChainConfig):
                raise Misfit("an assistant-chain starts from a teacher; add 'teacher'", "workflow")
            if self.method.taught:
                without = ", ".join(kind for kind, config in METHOD_KINDS.items() if not config.taught)
                raise Misfit(
                    f"{self.method.kind} needs a teacher, and there is none; add 'teacher', or take a method without "
                    f"one: {without}",
                    "method",
                )
            if self.data.route is not None:
                raise Misfit("'data.route' is given, and there is no teacher to go by it; remove it", "data")
        if self.student.model == "teacher":
            if self.teacher is None or self.teacher.model is None:
                what = "no teacher" if self.teacher is None else "none here" if self.teacher.endpoint else "several"
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
        if self.baseline and self.data.task in TAUGHT_ONLY:
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
        return self if self.teacher is None else self._with_teacher(self.teacher)

    @property
    def required_teacher(self) -> TeacherConfig:
        """The teacher, where one is needed.

        Raises:
            ConfigError: there is none.
        """
        if self.teacher is None:
            raise ConfigError("the recipe has no teacher", where="teacher", remedy="use a recipe that has one")
        return self.teacher

    def _with_teacher(self, teacher: TeacherConfig) -> Recipe:
        if teacher.augment is not None and isinstance(self.data, TextDataConfig):
            raise Misfit("'augment' of the teacher is for images, and this data is texts; remove it", "teacher")
        for i, member in enumerate(teacher.each):
            where = "teacher" if teacher.members is None else f"teacher.members.{i}"
            if member.train is not None and self.data.task in TAUGHT_ONLY:
                raise Misfit(
                    f"task {self.data.task!r} has nothing to train {where} on; give one with weights", "teacher"
                )
            if member.learn is not None and member.train is None:
                raise Misfit(f"{where}.learn says what is trained, and it is not; add 'train'", "teacher")
            for key in ("precision", "trackers") if member.train is not None else ():
                own, shared = getattr(member.train, key), getattr(self.train, key)
                if own != shared:
                    raise Misfit(
                        f"{where}.train.{key} is {own!r} and train.{key} {shared!r}: it is one for the whole run; "
                        f"set train.{key} alone",
                        "teacher",
                    )
        if teacher.endpoint is not None:
            self._served()
        if teacher.route is not None and self.data.route is None:
            raise Misfit("teacher.route goes by a column, and there is no 'data.route'; name it", "teacher")
        if self.data.route is not None and teacher.route is None:
            raise Misfit("'data.route' is given, and no 'teacher.route' goes by it; remove it, or add one", "data")
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
        if teacher.members is not None and isinstance(self.method, FeatureConfig):
            self._of_members(self.method, teacher)
        if teacher.cache is not None and self.data.augment and self.data.views is None:
            raise Misfit(
                "teacher.cache with data.augment would keep a row for every image of every epoch and never read one; "
                "set data.views, such as 10: so many views of each image are kept, and epochs go round them",
                "teacher",
            )
        if teacher.cache is not None and teacher.mode != "eval":
            raise Misfit(
                f"teacher.cache with teacher.mode {teacher.mode!r}: what the teacher says of an image would "
                "depend on the batch that it first came in; use mode: eval",
                "teacher",
            )
        return self

    def _served(self) -> None:
        cache, usual = self.required_teacher.cache or CacheConfig(), CacheConfig()
        keys = ("keep", "k", "draws", "head", "power", "temperatures")
        odd = [key for key in keys if getattr(cache, key) != getattr(usual, key)]
        if odd:
            raise Misfit(
                f"a cache of a teacher behind a server keeps what it says, as many as teacher.endpoint.k; remove "
                f"{odd[0]!r}",
                "teacher",
            )
        if self.method.taught and not self.method.served:
            able = ", ".join(kind for kind, config in METHOD_KINDS.items() if config.served)
            raise Misfit(
                f"a teacher behind a server says the likeliest next tokens, and {self.method.kind} needs more; "
                f"allowed: {able}",
                "method",
            )
        if self.data.task != "causal":
            raise Misfit(f"a teacher behind a server says next tokens, and the task is {self.data.task!r}", "data")
        method = self.method
        if isinstance(method, TokenConfig):
            for key, value, right in (
                ("hidden", method.hidden, 0), ("temperature", method.temperature, 1),
                ("divergence", method.divergence, "kl"),
            ):  # fmt: skip
                if value != right:
                    raise Misfit(
                        f"a teacher behind a server gives the likeliest tokens at T = 1, and {key}: {value} asks for "
                        f"more; set it to {right}",
                        "method",
                    )

    def _of_members(self, method: FeatureConfig, teacher: TeacherConfig) -> None:
        if method.pairs is None:
            raise Misfit(
                "which member's features are meant by 'pairs: auto' is not said; "
                "list the pairs, as in {student: stages.1, teacher: 0.stages.1}",
                "method",
            )
        if teacher.route is not None:
            raise Misfit("features of members that each teach some images only; use kind: logit", "method")


def check_options(what: str, kind: str, given: Mapping[str, Any], known: Mapping[str, tuple[str, ...]]) -> None:
    """Raise ``ValueError`` unless ``kind`` is known and takes every option ``given``."""
    if kind not in known:
        raise Misfit(f"unknown {what} {kind!r}{suggest(kind, known)}; allowed: {', '.join(known)}", "kind")
    for key in given:
        if key not in known[kind]:
            allowed = [
                "kind",
                *(["lr", "weight_decay", "decay_vectors"] if what == "optimizer" else ["warmup"]),
                *known[kind],
            ]
            raise Misfit(
                f"{what} {kind!r} has no option {key!r}{suggest(key, allowed)}; allowed: {', '.join(allowed)}", key
            )
