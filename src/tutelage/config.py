"""Recipes: YAML in, typed and resolved settings out.

Nothing here imports torch, so that a mistake in a recipe is answered at once. The
keys of each section are the fields of its class; anything else is an error that names
the line, what was given, what is allowed and the nearest spelling.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from tutelage.errors import ConfigError, nearest

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]

SOURCES = ("digits", "fashion-mnist", "imagefolder", "torchvision:NAME", "hf:DATASET_ID")
"""What ``data.source`` can be."""

MODELS = ("convnet", "mlp", "resnet", "timm:NAME", "torchvision:NAME", "hf:ID", "package.module:callable")
"""What ``model`` can be."""

AUGMENTS = (
    "flip", "shift", "auto-augment", "color-jitter", "erase", "grayscale", "rand-augment", "rotate",
    "trivial-augment", "resized-crop",
)  # fmt: skip
"""Augmentations by name."""

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


class Misfit(ValueError):
    """A value that does not fit its section, with the key in the section that is to blame."""

    def __init__(self, what: str, key: str) -> None:
        super().__init__(what)
        self.key = key


class Section(BaseModel):
    """Base of every section: unknown keys are errors, and 'yes' is not a number."""

    model_config = ConfigDict(extra="forbid", strict=True, validate_default=True)


def _source(name: str) -> str:
    kind, _, rest = name.partition(":")
    if name not in SOURCES[:3] and not (rest and kind in ("torchvision", "hf")):
        raise ValueError(f"unknown source {name!r}{_suggest(name, SOURCES)}; allowed: {', '.join(SOURCES)}")
    return name


def _model(name: str) -> str:
    kind, _, rest = name.partition(":")
    if name not in MODELS[:3] and not (kind and rest):
        raise ValueError(f"unknown model {name!r}{_suggest(name, MODELS)}; allowed: {', '.join(MODELS)}")
    return name


def _augment(entry: Any) -> Any:
    """An entry of ``augment``, once its form and its name are known to be right."""
    form = "an augmentation is a name, or one name with its options, as in {shift: 2}"
    names = [entry] if isinstance(entry, str) else list(entry) if isinstance(entry, dict) else []
    if len(names) != 1 or not isinstance(names[0], str):
        raise ValueError(f"{entry!r} is not an augmentation; {form}")
    if names[0] not in AUGMENTS:
        raise ValueError(
            f"unknown augmentation {names[0]!r}{_suggest(names[0], AUGMENTS)}; allowed: {', '.join(AUGMENTS)}"
        )
    return entry


Augments = list[Annotated[Any, AfterValidator(_augment)]]


class DataConfig(Section):
    """What to train and evaluate on."""

    source: Annotated[str, AfterValidator(_source)]
    """``digits``, ``fashion-mnist``, ``imagefolder``, ``torchvision:NAME`` or ``hf:DATASET_ID``."""
    path: str | None = None
    """Folder of an ``imagefolder``, or where downloads go."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Passed to the data set's own constructor (torchvision) or ``load_dataset`` (hf)."""
    image_column: str | None = None
    """Column of the images, of an hf data set. Default: the one of type Image."""
    label_column: str | None = None
    """Column of the labels, of an hf data set. Default: the one of type ClassLabel."""
    size: Annotated[int, Field(ge=4, le=2048)] | None = None
    """Height and width in pixels that images are brought to. Default: as they are, or 224 for files."""
    crop: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of the shorter side that the centre crop of an image file keeps; 0.875 for ImageNet models."""
    classes: list[str] | None = None
    """Class names in the order that the teacher scores them. Default: the source's order; sorted folder names."""
    augment: Augments = Field(default_factory=list)
    """Augmentations of the training images, in order: ``flip``, ``{shift: 2}``, ``resized-crop`` ..."""
    mean: Annotated[list[Fraction], Field(min_length=1)] | None = None
    """Per channel, in [0, 1], subtracted from pixels. Default: of the source, else of the training
    images where these are in memory, else ImageNet's."""
    std: Annotated[list[Fraction], Field(min_length=1)] | None = None
    """Per channel, in [0, 1]. Default: of the source, else of the training
    images where these are in memory, else ImageNet's."""
    labels: Count | None = None
    """Use the labels of only this many training images, stratified by class. Default: of all."""
    unlabeled: Literal["keep", "drop"] = "keep"
    """Images without a label: still taught by the teacher (``keep``), or left out (``drop``)."""
    limit: Count | None = None
    """Use only this many training images at all, stratified by class. Default: all."""
    validation: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Share of the training images cut off for validation where the source has no such split."""
    test: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """Share cut off for the test where the source has no such split."""
    split_seed: Seed = 0
    """Seed of those cuts and of ``labels`` and ``limit``. Not the run's seed: all seeds share the splits."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that decode image files. 0: the main one."""

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        kind = self.source.partition(":")[0]
        if self.options and kind not in ("torchvision", "hf"):
            raise Misfit(f"source {self.source!r} takes no options, given {self.options}; remove them", "options")
        for key in ("image_column", "label_column"):
            if getattr(self, key) is not None and kind != "hf":
                raise Misfit(f"source {self.source!r} has no columns; remove {key!r}", key)
        if self.source == "imagefolder" and self.path is None:
            raise ValueError(
                "source 'imagefolder' needs 'path'; give the folder that has a sub-folder for each class"
            )
        if (self.mean is None) != (self.std is None):
            raise ValueError("'mean' and 'std' go together; give both or neither")
        if self.std is not None and min(self.std, default=1.0) <= 0:
            raise Misfit(f"std {self.std} has a value of 0; every one must be above 0", "std")
        return self


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
    precision: Literal["no", "bf16", "fp16"] | None = None
    """Mixed precision. Default: what ``accelerate launch`` says, else none."""
    compile: bool = False
    """``torch.compile`` the student."""
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


class ModelConfig(Section):
    """A model by name."""

    model: Annotated[str, AfterValidator(_model)]
    """``mlp``, ``convnet``, ``resnet``, ``timm:NAME``, ``torchvision:NAME``, ``hf:ID`` or ``pkg.module:callable``."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Passed to the model's constructor."""
    checkpoint: str | None = None
    """Weights: a safetensors file, a torch file readable with ``weights_only``, or a folder that a run exported."""


class TeacherConfig(ModelConfig):
    """The teacher: trained first where it has no weights of its own."""

    trained: bool | None = None
    """Whether the model comes with its weights. Default: with a ``checkpoint``, an ``hf:`` id, timm's
    ``pretrained`` or torchvision's ``weights`` it does."""
    train: TrainConfig | None = None
    """Its own training, or fine-tuning where it has weights. What it leaves out is taken from the recipe's ``train``.
    Default: none with weights, the recipe's ``train`` without."""
    augment: Augments | None = None
    """Augmentations of its own training. Default: those of ``data``."""
    mode: Literal["eval", "train_bn"] = "eval"
    """``train_bn``: normalise by the statistics of the batch, without moving the running ones."""


class LogitConfig(Section):
    """Soft labels of Hinton et al.: alpha * T^2 * KL(p_T || p_S) + (1 - alpha) * CE."""

    kind: Literal["logit"] = "logit"
    temperature: Positive = 4.0
    alpha: Fraction = 0.9


FEATURE_OBJECTIVES: dict[str, tuple[str, ...]] = {
    "attention_transfer": ("variant",),
    "correlation": ("gamma", "order"),
    "hint": (),
    "nst": ("kernel",),
    "pkt": ("variant",),
    "rkd_angle": (),
    "rkd_distance": (),
    "similarity": (),
}
"""Objectives on a pair of hidden states by name, each with its options."""

PROJECTORS = ("auto", "conv1x1", "identity", "linear", "mlp")
"""Kinds of projectors."""


def _objective(name: str) -> str:
    if name not in FEATURE_OBJECTIVES:
        raise ValueError(
            f"unknown objective {name!r}{_suggest(name, FEATURE_OBJECTIVES)}; "
            f"allowed: {', '.join(FEATURE_OBJECTIVES)}"
        )
    return name


FeatureObjective = Annotated[str, AfterValidator(_objective)]


class PairConfig(Section):
    """Two modules whose outputs are compared. What it leaves out is taken from the method."""

    student: str
    """Path of a module of the student, such as ``stages.1``."""
    teacher: str
    """Path of a module of the teacher."""
    objective: FeatureObjective | None = None
    """What compares them."""
    weight: NotNegative | None = None
    """Weight of this pair."""
    projector: Literal[PROJECTORS] | None = None  # type: ignore[valid-type]
    """Kind of the projector."""
    norm: bool | None = None
    """Batch norm after the projector."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the objective."""


def _pairs(given: Any) -> Any:
    if given is None or given == "auto":
        return None
    if not isinstance(given, list) or not given:
        raise ValueError(f"{given!r} is no list of pairs; allowed: auto, or [{{student: PATH, teacher: PATH}}, ...]")
    return given


class FeatureConfig(Section):
    """Hidden states beside soft labels: alpha * kd + (1 - alpha) * ce + an objective over pairs, weighted."""

    kind: Literal["feature"]
    """Matches hidden states of teacher and student, through projectors where the objective needs them."""
    temperature: Positive = 4.0
    """T, of teacher and student alike."""
    alpha: Fraction = 0.9
    """Weight of the soft labels; the hard ones have 1 - alpha."""
    pairs: Annotated[list[PairConfig] | None, BeforeValidator(_pairs)] = None
    """``auto``, the default: the last feature maps of every resolution that both models have. Or a list of
    ``{student: PATH, teacher: PATH}``, each with ``objective``, ``weight``, ``projector``, ``norm`` and ``options``
    of its own where wanted."""
    objective: FeatureObjective = "hint"
    """``attention_transfer``, ``correlation``, ``hint``, ``nst``, ``pkt``, ``rkd_angle``, ``rkd_distance`` or
    ``similarity``."""
    weight: NotNegative = 1.0
    """Weight of each pair. Papers use about 100 for ``hint``, 25 and 50 for ``rkd_distance`` and ``rkd_angle``."""
    projector: Literal[PROJECTORS] = "auto"  # type: ignore[valid-type]
    """Brings the student's feature to the teacher's channels, for ``hint``. ``auto``: a linear one (``conv1x1`` on
    maps) where they differ. Sizes are matched by pooling or interpolation."""
    norm: bool = False
    """Batch norm after the projector."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the objective: ``variant`` of attention_transfer and pkt, ``kernel`` of nst, ``gamma`` and
    ``order`` of correlation."""

    @model_validator(mode="after")
    def _known(self) -> FeatureConfig:
        chosen = [(self.objective, self.options)]
        chosen += [(pair.objective or self.objective, pair.options) for pair in self.pairs or []]
        for name, options in chosen:
            for key in options:
                if key not in FEATURE_OBJECTIVES[name]:
                    allowed = ", ".join(FEATURE_OBJECTIVES[name]) or "none"
                    raise Misfit(f"{name} has no option {key!r}; its options: {allowed}", "options")
        return self


METHOD_KINDS: dict[str, type[Section]] = {"feature": FeatureConfig, "logit": LogitConfig}
"""Every method that a recipe can name, with its options."""


class Recipe(Section):
    """One comparison: a teacher, a student without it, the student with it."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    data: DataConfig
    teacher: TeacherConfig
    student: ModelConfig
    method: Annotated[LogitConfig | FeatureConfig, Field(discriminator="kind")]
    train: TrainConfig = Field(default_factory=TrainConfig)
    seeds: Annotated[list[Seed], Field(min_length=1)] = Field(default_factory=lambda: [0])
    """Seeds of initialisation, order and views; each trains its own students. The teacher is trained once."""
    baseline: bool = True
    """Train the student alone too, with the same budget, for the comparison."""

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if len(set(self.seeds)) != len(self.seeds):
            raise Misfit(f"{self.seeds} holds a seed twice, and a copy adds no evidence; remove it", "seeds")
        if self.teacher.train is not None and self.teacher.checkpoint is not None:
            raise Misfit(
                "teacher has both 'checkpoint' and 'train', and one with weights is not trained again; remove one",
                "teacher",
            )
        for key in ("precision", "trackers") if self.teacher.train is not None else ():
            own, shared = getattr(self.teacher.train, key), getattr(self.train, key)
            if own != shared:
                raise Misfit(
                    f"teacher.train.{key} is {own!r} and train.{key} {shared!r}: it is one for the whole run; "
                    f"set train.{key} alone",
                    "teacher",
                )
        return self


def check_options(what: str, kind: str, given: Mapping[str, Any], known: Mapping[str, tuple[str, ...]]) -> None:
    """Raise ``ValueError`` unless ``kind`` is known and takes every option ``given``."""
    if kind not in known:
        raise Misfit(f"unknown {what} {kind!r}{_suggest(kind, known)}; allowed: {', '.join(known)}", "kind")
    for key in given:
        if key not in known[kind]:
            allowed = [
                "kind",
                *(["lr", "weight_decay", "decay_vectors"] if what == "optimizer" else ["warmup"]),
                *known[kind],
            ]
            raise Misfit(
                f"{what} {kind!r} has no option {key!r}{_suggest(key, allowed)}; allowed: {', '.join(allowed)}", key
            )


def _suggest(given: str, allowed: Iterable[str]) -> str:
    close = nearest(given, list(allowed), 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


# ---------------------------------------------------------------------------------------------
# YAML with line numbers

Key = tuple[str | int, ...]
Place = int | str
"""Where a value was given: a line of the file, or an override."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: 1e-3 is a number, and 'no', 'on' and 'off' are words."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in pairs if tag not in (
        "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp",
    )]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}  # fmt: skip
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$", re.I), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.[\d_]*(?:[eE][-+]?\d+)?|\.\d[\d_]*(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+"
               r"|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"),
    list("-+0123456789."),
)  # fmt: skip

SHORTHANDS = {"data": "source", "teacher": "model", "student": "model", "method": "kind"}
TRAIN_SHORTHANDS = {"optimizer": "kind", "schedule": "kind"}


def _lines(node: yaml.Node | None, seen_nodes: set[int], at: Key = ()) -> Iterator[tuple[Key, int]]:
    if node is None:
        return
    yield at, node.start_mark.line + 1
    if id(node) in seen_nodes:  # an alias: what is in it has its line already
        return
    seen_nodes.add(id(node))
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in seen:
                raise ConfigError(
                    f"{name!r} is given twice, first on line {seen[name]}",
                    where=str(line),
                    remedy="keep one of the two",
                )
            seen[name] = line
            yield from _lines(value, seen_nodes, (*at, name))
            yield (*at, name), line  # the key's own line wins over its value's
    elif isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            yield from _lines(item, seen_nodes, (*at, i))


def parse_yaml(text: str, name: str) -> tuple[dict[str, Any], dict[Key, int]]:
    """The mapping in ``text`` and the line of each of its keys.

    Raises:
        ConfigError: not YAML, not a mapping, or a key twice.
    """
    try:
        raw = yaml.load(text, _Loader)
        lines = dict(_lines(yaml.compose(text, _Loader), set()))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(
            f"not YAML: {problem}", where=where, remedy="check indentation, colons and quotes near that line"
        ) from None
    except ConfigError as error:
        raise ConfigError(error.what, where=f"{name}:{error.where}", remedy=error.remedy) from None
    except RecursionError:
        raise ConfigError("is nested too deeply", where=name, remedy="a recipe has four levels at most") from None
    except (ValueError, AttributeError, TypeError, LookupError) as error:  # of an explicit tag, or a number too long
        raise ConfigError(
            f"not YAML: {error}", where=name, remedy="write values without tags such as !!int, and shorter numbers"
        ) from None
    if raw is None:
        raise ConfigError("the recipe is empty", where=name, remedy="`tutelage run recipes/digits.yaml` shows one")
    if not isinstance(raw, dict) or not all(isinstance(k, str) for k in raw):
        raise ConfigError(
            f"a recipe is a mapping of keys to values, not {'a ' + type(raw).__name__}",
            where=name,
            remedy="start from recipes/digits.yaml",
        )
    return raw, lines


def _expand(raw: dict[str, Any]) -> None:
    """Write shorthands out in place: ``data: digits`` is ``data: {source: digits}``."""

    def expand(section: Any, table: dict[str, str]) -> None:
        if isinstance(section, dict):
            for key, field in table.items():
                if isinstance(section.get(key), str):
                    section[key] = {field: section[key]}

    expand(raw, SHORTHANDS)
    expand(raw.get("train"), TRAIN_SHORTHANDS)
    if isinstance(raw.get("teacher"), dict):
        expand(raw["teacher"].get("train"), TRAIN_SHORTHANDS)


BUDGETS = {"epochs": "steps", "steps": "epochs"}
"""Two ways to say how long: an override of one replaces the other."""


def _override(raw: dict[str, Any], text: str) -> Key:
    """Set what ``text`` says and return the key it set."""
    key, equals, value = text.partition("=")
    where = f"override {text!r}"
    if not equals or not all(key.split(".")):
        raise ConfigError("not of the form key=value", where=where, remedy="for example method.temperature=8")
    try:
        parsed = yaml.load(value, _Loader)
    except (yaml.YAMLError, RecursionError, ValueError, AttributeError, TypeError, LookupError):
        raise ConfigError("the value is not YAML", where=where, remedy="quote it: name='a: b'") from None
    if key == "seed":
        key, parsed = "seeds", [parsed]
    *path, last = key.split(".")
    section: Any = raw
    for i, part in enumerate(path):
        section = section.setdefault(part, {})
        if section is None or not isinstance(section, dict):
            raise ConfigError(
                f"{'.'.join(path[: i + 1])!r} is not a section that holds keys",
                where=where,
                remedy=f"override the whole of it: {'.'.join(path[: i + 1])}=VALUE",
            )
    if parsed is not None and last in BUDGETS:
        section.pop(BUDGETS[last], None)
    section[last] = parsed
    _expand(raw)
    return (*path, last)


def _has_weights(teacher: dict[str, Any]) -> bool:
    """Whether a teacher without a checkpoint comes with weights of its own."""
    if isinstance(teacher.get("trained"), bool):
        return bool(teacher["trained"])
    options = teacher.get("options")
    options = options if isinstance(options, dict) else {}
    return teacher["model"].startswith("hf:") or bool(options.get("pretrained") or options.get("weights"))


def _merge(base: Any, over: Any) -> Any:
    if isinstance(base, dict) and isinstance(over, dict):
        if "kind" in over and over["kind"] != base.get("kind"):
            keep = {k: v for k, v in base.items() if k in ("lr", "weight_decay", "decay_vectors", "warmup")}
            return {**keep, **over}
        merged = {k: v for k, v in base.items() if not (k in BUDGETS and BUDGETS.keys() & over.keys())}
        return {**merged, **{k: _merge(base.get(k), v) for k, v in over.items()}}
    return over


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read, override, check and resolve a recipe.

    Args:
        path: the YAML file.
        overrides: ``key=value`` with dots between sections and a YAML value; ``seed=1`` stands for ``seeds=[1]``.

    Raises:
        ConfigError: names the file, line, key, what was given and what is allowed.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        close = nearest(str(path), [str(p) for p in (path.parent if path.parent.is_dir() else Path()).glob("*.y*ml")])
        raise ConfigError(
            "no such recipe",
            where=str(path),
            remedy=f"did you mean {close[0]}?" if close else "give the path of a YAML file",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"cannot be read: {reason}", where=str(path), remedy="give a YAML file") from None
    raw, lines = parse_yaml(text, str(path))
    default_name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._") or "recipe"
    return build_recipe(raw, lines, name=str(path), default_name=default_name, overrides=overrides)


def build_recipe(
    raw: dict[str, Any],
    lines: Mapping[Key, int] | None = None,
    *,
    name: str = "recipe",
    default_name: str | None = None,
    overrides: Iterable[str] = (),
) -> Recipe:
    """A checked recipe from a mapping; ``lines`` place its keys for error messages."""
    places: dict[Key, Place] = dict(lines or {})
    if "seed" in raw:
        if "seeds" in raw:
            raise ConfigError("both 'seed' and 'seeds' are given", where=_where(name, places, ("seed",)),
                              remedy="give one; 'seeds' takes a list")  # fmt: skip
        raw["seeds"] = [raw.pop("seed")]
        if ("seed",) in places:
            places["seeds",] = places["seed",]
    _expand(raw)
    for text in overrides:
        key = _override(raw, text)
        places = {k: v for k, v in places.items() if k[: len(key)] != key}
        places[key] = f"override {text!r}"
    if default_name is not None:
        raw.setdefault("name", default_name)
    method = raw.get("method")
    if isinstance(method, dict):
        kind = method.setdefault("kind", "logit")
        if not isinstance(kind, str) or kind not in METHOD_KINDS:
            raise ConfigError(
                f"unknown method {kind!r}{_suggest(str(kind), METHOD_KINDS)}",
                where=_where(name, places, ("method", "kind")),
                remedy=f"allowed: {', '.join(METHOD_KINDS)}",
            )
    teacher = raw.get("teacher")
    if isinstance(teacher, dict) and teacher.get("checkpoint") is None and isinstance(teacher.get("model"), str):
        asked = teacher.get("train")
        if asked is not None or not _has_weights(teacher):
            teacher["train"] = _merge(raw.get("train", {}), asked or {})
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        problems = []
        for details in error.errors(include_url=False):
            if details["loc"][:1] == ("method",) and details["loc"][1:2] and details["loc"][1] in METHOD_KINDS:
                details["loc"] = ("method", *details["loc"][2:])  # pydantic names the kind in between
            if details["loc"][:2] == ("teacher", "train") and _inherited(details, error):
                continue
            kind = method.get("kind") if isinstance(method, dict) else None
            problems.append(_explain(details, name, places, METHOD_KINDS.get(str(kind))))
        raise ConfigError("\n".join(problems)) from None


def _inherited(details: ErrorDetails, error: ValidationError) -> bool:
    """Whether a fault of the teacher's training is one of ``train`` seen a second time."""
    return any(other["loc"] == details["loc"][1:] for other in error.errors(include_url=False))


def _where(name: str, places: Mapping[Key, Place], loc: Key) -> str:
    for end in range(len(loc), 0, -1):
        place = places.get(loc[:end])
        if place is not None:
            return place if isinstance(place, str) else f"{name}:{place}"
    if loc[:2] == ("teacher", "train"):  # what the teacher's training takes over from the student's
        return _where(name, places, loc[1:])
    return name


def _section(loc: Key, method: type[Section] | None = None) -> type[BaseModel] | None:
    """The class whose field the last part of ``loc`` is; ``method`` is that of the recipe's method."""
    model: Any = Recipe
    if loc[:1] == ("method",) and len(loc) > 1:
        if method is not FeatureConfig or loc[1] != "pairs" or len(loc) < 4:
            return method if len(loc) == 2 else None
        return PairConfig if len(loc) == 4 else None
    for part in loc[:-1]:
        field = model.model_fields.get(part) if isinstance(part, str) else None
        if field is None:
            return None
        options = [field.annotation, *getattr(field.annotation, "__args__", ())]
        model = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
        if model is None:
            return None
    found: type[BaseModel] = model
    return found


def _explain(
    details: ErrorDetails, name: str, places: Mapping[Key, Place], method: type[Section] | None = None
) -> str:
    loc = details["loc"]
    where, key = _where(name, places, loc), ".".join(str(p) for p in loc)
    given = details["input"]
    section = _section(loc, method)
    fields = [f for f in section.model_fields if f != "kind"] if section else []
    match details["type"]:
        case "extra_forbidden":
            last = str(loc[-1])
            return (
                f"{where}: unknown key {key!r}{_suggest(last, fields)}, given {given!r}\n"
                f"  -> allowed here: {', '.join(fields)}"
            )
        case "missing":
            return f"{where}: {key!r} is missing\n  -> add it; see recipes/digits.yaml for an example"
        case "value_error":
            error = details.get("ctx", {}).get("error")
            if isinstance(error, Misfit):
                where = _where(name, places, (*loc, error.key))
            what, _, remedy = details["msg"].removeprefix("Value error, ").rpartition("; ")
            return f"{where}: {key + ': ' if key else ''}{what or remedy}" + (f"\n  -> {remedy}" if what else "")
        case "literal_error":
            allowed = str(details.get("ctx", {}).get("expected", ""))
            words = re.findall(r"'([^']*)'", allowed)
            return f"{where}: {key}: given {given!r}{_suggest(str(given), words)}\n  -> allowed: {allowed}"
        case "model_type" | "dict_type":
            inside = _section((*loc, ""), method)
            allowed = ", ".join(inside.model_fields) if inside else "any"
            return f"{where}: {key}: given {_shown(given)}\n  -> it takes keys and values; keys: {allowed}"
        case _:
            return f"{where}: {key}: given {_shown(given)}\n  -> {details['msg']}"


def _shown(given: Any) -> str:
    shown = repr(given)
    return "nothing" if given is None else shown if len(shown) < 80 else shown[:77] + "..."


def dump_recipe(recipe: BaseModel) -> str:
    """The resolved recipe as YAML that :func:`load_recipe` reads back to the same."""
    return yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)


def differing_keys(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ between two nested mappings."""
    found: list[str] = []
    for key in [*a, *(k for k in b if k not in a)]:
        x, y = a.get(key), b.get(key)
        if isinstance(x, Mapping) and isinstance(y, Mapping):
            found += differing_keys(x, y, f"{prefix}{key}.")
        elif x != y:
            found.append(f"{prefix}{key}")
    return found
