"""Sections of a recipe's ``data``: images and texts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from tutelage.config.base import Count, Fraction, Section, Seed
from tutelage.config.messages import Misfit
from tutelage.errors import shorten, suggest

SOURCES = ("digits", "fashion-mnist", "imagefolder", "torchvision:NAME", "hf:DATASET_ID")
"""What ``data.source`` can be."""

AUGMENTS = (
    "flip", "shift", "cutmix", "mixup", "auto-augment", "color-jitter", "erase", "grayscale", "rand-augment",
    "rotate", "trivial-augment", "resized-crop",
)  # fmt: skip
"""Augmentations by name."""

TEXT_SOURCES = ("table", "plain", "hf:DATASET_ID")
"""What ``data.source`` of texts can be."""

METRICS: dict[str, tuple[str, ...]] = {
    "classes": ("accuracy", "f1", "matthews"),
    "multi-label": ("f1", "accuracy"),
    "regression": ("spearman", "pearson"),
    "tokens": ("accuracy", "f1"),
    "mlm": ("accuracy",),
    "causal": ("accuracy",),
    "embedding": ("spearman",),
    "ranking": ("accuracy",),
}
"""Metrics that choose the best model, by task; the default first."""

TEACHER_ONLY_TASKS = ("embedding", "ranking")
"""Tasks without labels, whose only target is the teacher."""

UNLABELLED = ("mlm", "causal", "tokens", *TEACHER_ONLY_TASKS)
"""Tasks without one label for each text."""


TextTask = Literal["classes", "multi-label", "regression", "tokens", "mlm", "causal", "embedding", "ranking"]


def _text_source(name: str) -> str:
    if name not in TEXT_SOURCES[:2] and not (name.startswith("hf:") and name[3:]):
        raise ValueError(
            f"unknown source of texts {shorten(name)}{suggest(name, TEXT_SOURCES)}; "
            f"allowed: {', '.join(TEXT_SOURCES)}"
        )
    return name


def _source(name: str) -> str:
    kind, _, rest = name.partition(":")
    if name not in SOURCES[:3] and not (rest and kind in ("torchvision", "hf")):
        raise ValueError(f"unknown source {shorten(name)}{suggest(name, SOURCES)}; allowed: {', '.join(SOURCES)}")
    return name


def _augment(entry: Any) -> Any:
    """An entry of ``augment``, once its form and its name are known to be right."""
    form = "an augmentation is a name, or one name with its options, as in {shift: 2}"
    names = [entry] if isinstance(entry, str) else list(entry) if isinstance(entry, dict) else []
    if len(names) != 1 or not isinstance(names[0], str):
        raise ValueError(f"{shorten(entry)} is not an augmentation; {form}")
    if names[0] not in AUGMENTS:
        raise ValueError(
            f"unknown augmentation {shorten(names[0])}{suggest(names[0], AUGMENTS)}; allowed: {', '.join(AUGMENTS)}"
        )
    return entry


Augments = list[Annotated[Any, AfterValidator(_augment)]]


class SplitsConfig(Section):
    """Which samples are used, and in which splits: the keys that images and texts share."""

    labels: Count | None = None
    """Use the labels of only this many training samples, stratified by class. Default: of all."""
    unlabeled: Literal["keep", "drop"] = "keep"
    """Samples without a label: ``keep``, the student learns them from the teacher; ``drop``, they are left out."""
    limit: Count | None = None
    """Use only this many training samples, stratified by class. Default: all."""
    validation: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Share of the training samples used for validation, if the source has no validation split."""
    test: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """Share of the samples used as test split, if the source has none."""
    split_seed: Seed = 0
    """Seed of these splits and of ``labels`` and ``limit``. All ``seeds`` of a run share the splits."""


class DataConfig(SplitsConfig):
    """What to train and evaluate on: images."""

    kind: Literal["images"] = "images"
    """Images, the default."""
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
    route: str | None = None
    """Decides which member of an ensemble teaches an image: a column of an hf data set, or ``folder`` for an
    ``imagefolder``: the sub-folder between class and file, as in ``train/CLASS/night/1.png``."""
    size: Annotated[int, Field(ge=4, le=2048)] | None = None
    """Height and width in pixels that images are resized to. Default: no resizing, or 224 for files."""
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
    views: Count | None = None
    """Number of different views of a sample, the same for all seeds; epochs cycle through them. Default: new views in
    every epoch, which no cache can store."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that decode image files. 0: the main process."""

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        kind = self.source.partition(":")[0]
        if self.options and kind not in ("torchvision", "hf"):
            raise Misfit(
                f"source {shorten(self.source)} takes no options, given {shorten(self.options)}; remove them",
                "options",
            )
        for key in ("image_column", "label_column"):
            if getattr(self, key) is not None and kind != "hf":
                raise Misfit(f"source {shorten(self.source)} has no columns; remove {key!r}", key)
        if self.route is not None and kind != "hf" and (self.source, self.route) != ("imagefolder", "folder"):
            raise Misfit(
                f"source {shorten(self.source)} has no column {shorten(self.route)} to choose teachers by; "
                "allowed: a column of an hf data set, or folder with imagefolder",
                "route",
            )
        if self.source == "imagefolder" and self.path is None:
            raise ValueError(
                "source 'imagefolder' needs 'path'; give the folder that has a sub-folder for each class"
            )
        if (self.mean is None) != (self.std is None):
            raise ValueError("'mean' and 'std' go together; give both or neither")
        if self.views is not None and not self.augment:
            raise Misfit(
                f"views: {self.views}, and nothing augments the images; remove it, or set 'augment'", "views"
            )
        if self.std is not None and min(self.std, default=1.0) <= 0:
            raise Misfit(f"std {shorten(self.std)} has a value of 0; every one must be above 0", "std")
        return self

    @property
    def task(self) -> Literal["classes"]:
        """One label an image."""
        return "classes"

    @property
    def metric(self) -> Literal["accuracy"]:
        """What models are chosen by."""
        return "accuracy"


class TextDataConfig(SplitsConfig):
    """What to train and evaluate on: texts."""

    kind: Literal["texts"]
    """Texts, as token ids. The default if there is ``source: table`` or ``plain``, ``text`` or ``task``."""
    source: Annotated[str, AfterValidator(_text_source)]
    """``table`` (CSV, TSV, JSON lines or Parquet), ``plain`` (files that end in .txt, whose paragraphs are texts) or
    ``hf:DATASET_ID``."""
    path: str | dict[Literal["train", "validation", "test"], str] | None = None
    """A file or a folder, or one for each split: ``{train: a.parquet, test: b.parquet}``."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Passed to ``load_dataset`` (hf)."""
    task: TextTask = "classes"
    """``classes``: one label a text; ``multi-label``: any number; ``regression``: numbers; ``tokens``: a label
    for each word; ``mlm``: masked words; ``causal``: the next token, for language models; ``embedding``: none, for
    sentence encoders; ``ranking``: query, answer and other answer."""
    text: str | Annotated[list[str], Field(min_length=1, max_length=3)] = "text"
    """Column of the texts; two of pairs, three of a ranking; of ``tokens``, of lists of words; of ``causal``, of
    texts or conversations (lists of messages with role and content), or two columns, a prompt and its answer."""
    teacher_text: str | Annotated[list[str], Field(min_length=1, max_length=3)] | None = None
    """Column of the teacher's input, if it differs from the student's, such as the text in another language."""
    label: str | list[str] | None = None
    """Column of the labels: names, numbers, or lists of either; a list of columns that are each yes or no, or
    numbers. Default: ``label``, where the task has one."""
    metric: Literal["accuracy", "f1", "matthews", "spearman", "pearson"] | None = None
    """What models are chosen by. Default: ``accuracy``; of several labels ``f1``, of numbers ``spearman``."""
    tokenizer: str | None = None
    """The student's tokenizer: a hub id or a folder. Default: the student's own, else the teacher's."""
    max_length: Annotated[int, Field(ge=4, le=65_536)] = 128
    """Tokens of a text, special tokens included; longer texts are truncated at the end."""
    pack: bool = False
    """Several texts to a row of ``max_length``. Of ``mlm``: joined, separated and cut; of ``causal``: whole, side by
    side, and none sees another."""
    learn: Literal["answers", "all"] = "answers"
    """For ``causal``: the loss is on the tokens of the assistant's answers, or on all tokens of a conversation."""
    mask: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.15
    """For ``mlm``: share of the tokens that are masked."""
    empty: Literal["error", "drop"] = "error"
    """Empty texts: an error, or left out."""
    classes: list[str] | None = None
    """Class names in the order of the logits. Default: those of a teacher that knows them, else of the data."""
    route: str | None = None
    """Column that decides which member of an ensemble teaches a text."""
    views: Count | None = None
    """For ``mlm``: number of different maskings of a text; epochs cycle through them. Default: new ones in every
    epoch."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that collate batches. 0: the main process."""

    @model_validator(mode="after")
    def _consistent(self) -> TextDataConfig:
        hub = self.source.startswith("hf:")
        if hub == (self.path is not None):
            what = "is a data set of the hub; remove" if hub else "needs"
            raise Misfit(f"source {shorten(self.source)} {what} 'path'; files are for table and plain", "path")
        if self.options and not hub:
            raise Misfit(f"source {shorten(self.source)} takes no options; remove them", "options")
        if isinstance(self.path, dict) and "train" not in self.path:
            raise Misfit(f"path has {', '.join(self.path)} and no 'train'; add it", "path")
        texts = 1 if isinstance(self.text, str) else len(self.text)
        if (self.task == "ranking") != (texts == 3):
            raise Misfit(
                f"task {self.task!r} and {texts} columns of text; a ranking has three, others 1 or 2", "text"
            )
        if self.task in ("tokens", "mlm") and texts > 1:
            raise Misfit(f"task {self.task!r} takes one column of text, given {texts}; name one", "text")
        unlabelled = self.task in ("mlm", "causal", *TEACHER_ONLY_TASKS)
        if unlabelled and self.label is not None:
            raise Misfit(f"task {self.task!r} has no labels; remove 'label'", "label")
        if self.source == "plain" and not unlabelled:
            raise Misfit(
                f"plain text has no labels, and task {self.task!r} needs them; use a table, or mlm or causal", "task"
            )
        if not unlabelled and self.label is None:
            self.label = "label"
        if isinstance(self.label, list) and self.task not in ("multi-label", "regression"):
            raise Misfit(f"task {self.task!r} has one column of labels, given a list; name it", "label")
        if self.labels is not None and self.task in UNLABELLED:
            raise Misfit(f"task {self.task!r} has no label for each text to leave out; use 'limit'", "labels")
        if self.pack and self.route is not None:
            raise Misfit("packed rows hold several texts, of several routes; remove 'pack' or 'route'", "route")
        for key, default, tasks in (
            ("pack", False, ("mlm", "causal")), ("mask", 0.15, ("mlm",)), ("views", None, ("mlm",)),
            ("learn", "answers", ("causal",)),
        ):  # fmt: skip
            if self.task not in tasks and getattr(self, key) != default:
                raise Misfit(f"{key!r} is for task {' and '.join(tasks)}, this is {self.task!r}; remove it", key)
        fitting = METRICS[self.task]
        if self.metric is not None and self.metric not in fitting:
            raise Misfit(f"task {self.task!r} has no {self.metric}; allowed: {', '.join(fitting)}", "metric")
        self.metric = self.metric or fitting[0]  # type: ignore[assignment]
        if self.classes is not None and self.task not in ("classes", "multi-label", "tokens"):
            raise Misfit(f"task {self.task!r} has no classes; remove them", "classes")
        return self

    @property
    def augment(self) -> Augments:
        """Texts are not augmented, but for the masks of ``mlm``."""
        return []


DATA_KINDS: dict[str, type[Section]] = {"images": DataConfig, "texts": TextDataConfig}
"""The kinds of data."""


def kind_of(data: dict[str, Any]) -> str:
    """The kind of data of a section without ``kind``."""
    return "texts" if {"text", "task", "tokenizer"} & data.keys() or data.get("source") in TEXT_SOURCES else "images"
