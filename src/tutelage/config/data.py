"""Sections of a recipe's ``data``: images and texts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from tutelage.config.base import Count, CountOrZero, Fraction, Section, Seed, Share, known_source
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
    "regression": ("spearman", "pearson", "r2"),
    "tokens": ("accuracy", "f1"),
    "mlm": ("accuracy",),
    "causal": ("accuracy",),
    "embedding": ("spearman",),
    "ranking": ("accuracy",),
}
"""Metrics that can select the best model, by task; the first is the default."""

TEACHER_ONLY_TASKS = ("embedding", "ranking")
"""Tasks without labels, whose only target is the teacher."""

UNLABELLED = ("mlm", "causal", "tokens", *TEACHER_ONLY_TASKS)
"""Tasks without one label for each text."""


TextTask = Literal["classes", "multi-label", "regression", "tokens", "mlm", "causal", "embedding", "ranking"]
TextColumns = str | Annotated[list[str], Field(min_length=1, max_length=3)]


def _augment(entry: Any) -> Any:
    """``entry`` of ``augment``; raises ``ValueError`` for a wrong form or an unknown name."""
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


def _number_as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


ClassName = Annotated[str, BeforeValidator(_number_as_text)]
"""The name of a class; a whole number is the name that its digits spell."""


class SplitsConfig(Section):
    """Which samples are used, and in which splits: the keys that images and texts share."""

    labels: Count | None = None
    """Use the labels of only this many training samples, stratified by class. Default: of all."""
    unlabeled: Literal["keep", "drop"] = "keep"
    """Samples without a label: ``keep``, the student learns them from the teacher; ``drop``, they are left out."""
    limit: Count | None = None
    """Use only this many training samples, stratified by class. Default: all."""
    validation: Share = 0.1
    """Share of the training samples used for validation, if the source has no validation split."""
    test: Share = 0.2
    """Share of the samples used as test split, if the source has none."""
    split_seed: Seed = 0
    """Seed of these splits and of ``labels`` and ``limit``. All ``seeds`` of a run share the splits."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of ``load_dataset`` (hf) or of the data set's constructor (torchvision)."""
    classes: list[ClassName] | None = None
    """Class names in the order of the teacher's logits. Default: the order of the source (sorted folder names); for
    texts the order of the teacher, if its model names the classes."""
    views: Count | None = None
    """Number of different views (augmentations, or maskings of ``mlm``) of a sample, which all seeds share; epochs
    cycle through them. Default: new views in every epoch, which no cache can store."""
    workers: CountOrZero = 0
    """Number of processes that load batches. 0: the main process."""


class DataConfig(SplitsConfig):
    """What to train and evaluate on: images."""

    kind: Literal["images"] = "images"
    """Images, the default."""
    source: Annotated[str, AfterValidator(known_source("source", SOURCES, ("torchvision", "hf")))]
    """``digits``, ``fashion-mnist``, ``imagefolder``, ``torchvision:NAME`` or ``hf:DATASET_ID``."""
    path: str | None = None
    """Folder of an ``imagefolder``, or the folder for downloads. A folder ``unlabeled`` has images without labels."""
    image_column: str | None = None
    """Column of the images, of an hf data set. Default: the one of type Image."""
    label_column: str | None = None
    """Column of the labels, of an hf data set. Default: the one of type ClassLabel."""
    route: str | None = None
    """Which member of an ensemble teaches an image: a column of an hf data set, or ``folder`` for an ``imagefolder``:
    the sub-folder between class and file, as in ``train/CLASS/night/1.png``."""
    size: Annotated[int, Field(ge=4, le=2048)] | None = None
    """Height and width in pixels to which images are resized, for teacher and student. Default: the size in the
    model's files, else no resizing, and 224 for image files."""
    crop: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Share of the shorter side that the centre crop of an image file keeps. Default: the share in the model's
    files, else 1."""
    augment: Augments = Field(default_factory=list)
    """Augmentations of the training images, in order: ``flip``, ``{shift: 2}``, ``resized-crop`` ..."""
    mean: Annotated[list[Fraction], Field(min_length=1)] | None = None
    """Mean of the pixels for each channel, in [0, 1], with ``std``. Default: the mean in the model's files, else the
    source's, else that of the training images if these are in memory, else ImageNet's."""
    std: Annotated[list[Fraction], Field(min_length=1)] | None = None
    """Standard deviation of the pixels for each channel, in [0, 1]. Default: as for ``mean``."""

    def misfits(self) -> Iterator[tuple[str, str]]:
        """Keys that do not fit the source."""
        source, kind = f"source {shorten(self.source)}", self.source.partition(":")[0]
        if self.options and kind not in ("torchvision", "hf"):
            yield "options", f"{source} takes no options, given {shorten(self.options)}; remove them"
        for key in ("image_column", "label_column"):
            if getattr(self, key) is not None and kind != "hf":
                yield key, f"{source} has no columns; remove {key!r}"
        if self.route is not None and kind != "hf" and (self.source, self.route) != ("imagefolder", "folder"):
            what = (
                f"{source} has no column {shorten(self.route)} to choose teachers by; allowed: a column of an hf "
                "data set, or folder with imagefolder"
            )
            yield "route", what
        if self.source == "imagefolder" and self.path is None:
            yield "source", "source 'imagefolder' needs 'path'; give the folder that has a sub-folder for each class"
        if (self.mean is None) != (self.std is None):
            yield "mean" if self.std is None else "std", "'mean' and 'std' go together; give both or neither"
        if self.views is not None and not self.augment:
            yield "views", f"views: {self.views} needs an augmentation; remove 'views', or set 'augment'"
        if self.std is not None and min(self.std, default=1.0) <= 0:
            yield "std", f"std {shorten(self.std)} has a value of 0; every one must be above 0"

    @property
    def task(self) -> Literal["classes"]:
        """One label for each image."""
        return "classes"

    @property
    def metric(self) -> Literal["accuracy"]:
        """The metric that selects the best model."""
        return "accuracy"


class TextDataConfig(SplitsConfig):
    """What to train and evaluate on: texts."""

    kind: Literal["texts"]
    """Texts, as token ids. The default if there is ``source: table`` or ``plain``, ``text`` or ``task``."""
    source: Annotated[str, AfterValidator(known_source("source of texts", TEXT_SOURCES, ("hf",)))]
    """``table`` (CSV, JSON lines, Parquet, CoNLL or a saved data set), ``plain`` (.txt files; each paragraph is a
    text) or ``hf:DATASET_ID``."""
    path: str | dict[Literal["train", "validation", "test"], str] | None = None
    """A file or a folder, or one for each split: ``{train: a.parquet, test: b.parquet}``."""
    task: TextTask = "classes"
    """``classes``: one label for each text; ``multi-label``: any number; ``regression``: numbers, in any unit: losses
    are computed on targets standardised by the training split; ``tokens``: a label for each word; ``mlm``: masked
    language modelling; ``causal``: the next token; ``embedding``: no labels, for sentence encoders; ``ranking``: a
    query, a relevant and another passage."""
    text: TextColumns = "text"
    """Column of the texts; a list of two for pairs, of three for ``ranking``. For ``tokens``: a column of lists of
    words. For ``causal``: texts, conversations (lists of messages with role and content), or a prompt and its
    answer."""
    teacher_text: TextColumns | None = None
    """Column of the teacher's input, if it differs from the student's, such as the text in another language."""
    prompt: str | None = None
    """For ``embedding``: name of the prompt before each of the student's texts, from its sentence-transformers
    folder; ``""``: none. Default: the folder's ``default_prompt_name``; for a student cut from its teacher, the
    teacher's. The exported student has it as its default. For ``ranking`` the student's prompts ``query`` and
    ``document`` are always used."""
    teacher_prompt: str | None = None
    """For ``embedding``: the teacher's prompt. Default: ``prompt``, else the folder's ``default_prompt_name``."""
    label: str | list[str] | None = None
    """Column of the labels: names, numbers, or lists of either; or a list of columns (yes or no, or numbers). For
    ``regression`` with several targets: a column of lists of numbers, or a list of columns. Default: ``label``, if
    the task has labels."""
    separator: Annotated[str, Field(min_length=1)] | None = None
    """For ``multi-label``: what separates the labels in a cell, as the comma in ``red, blue``. Spaces around labels
    are removed; an empty cell means no labels."""
    metric: Literal["accuracy", "f1", "matthews", "spearman", "pearson", "r2"] | None = None
    """Metric that selects the best model. Default: ``f1`` for ``multi-label``, ``spearman`` for ``regression`` and
    ``embedding``, else ``accuracy``."""
    tokenizer: str | None = None
    """The student's tokenizer: a hub id or a folder. Default: the student's own, else the teacher's."""
    max_length: Annotated[int, Field(ge=4, le=65_536)] = 128
    """Most tokens of a text, special tokens included; longer texts are truncated at the end."""
    pack: bool = False
    """Pack several texts into a row of ``max_length`` tokens. For ``mlm`` texts are joined and cut; for ``causal``
    they stay complete, and attention does not cross from one to another."""
    learn: Literal["answers", "all"] = "answers"
    """For ``causal``: the loss is on the tokens of the assistant's answers, or on all tokens of a conversation."""
    mask: Share = 0.15
    """For ``mlm``: share of the tokens that are masked."""
    empty: Literal["error", "drop"] = "error"
    """Empty texts: an error, or left out."""
    route: str | None = None
    """Column whose value decides which member of an ensemble teaches a text."""

    def misfits(self) -> Iterator[tuple[str, str]]:
        """Keys that do not fit the source or the task."""
        source, task, hub = f"source {shorten(self.source)}", f"task {self.task!r}", self.source.startswith("hf:")
        if hub == (self.path is not None):
            what = "is a data set of the hub; remove" if hub else "needs"
            yield "path", f"{source} {what} 'path'; files are for table and plain"
        if self.options and not hub:
            yield "options", f"{source} takes no options; remove them"
        if isinstance(self.path, dict) and "train" not in self.path:
            yield "path", f"path has {', '.join(self.path)} and no 'train'; add it"
        texts = 1 if isinstance(self.text, str) else len(self.text)
        if (self.task == "ranking") != (texts == 3):
            yield "text", f"{task} and {texts} columns of text; a ranking has three, others 1 or 2"
        if self.task in ("tokens", "mlm") and texts > 1:
            yield "text", f"{task} takes one column of text, given {texts}; name one"
        if not self._has_labels and self.label is not None:
            yield "label", f"{task} has no labels; remove 'label'"
        if self.source == "plain" and self._has_labels:
            yield "task", f"plain text has no labels, and {task} needs them; use a table, or mlm or causal"
        if isinstance(self.label, list) and self.task not in ("multi-label", "regression"):
            yield "label", f"{task} needs one column of labels, not a list; give one name"
        if self.separator is not None and (self.task != "multi-label" or not isinstance(self.label, str | None)):
            yield "separator", "'separator' needs task multi-label and one column of labels; remove it"
        if self.labels is not None and self.task in UNLABELLED:
            yield "labels", f"{task} has no label for each text to leave out; use 'limit'"
        if self.pack and self.route is not None:
            yield "route", "packed rows hold several texts, of several routes; remove 'pack' or 'route'"
        for key, default, tasks in (
            ("pack", False, ("mlm", "causal")), ("mask", 0.15, ("mlm",)), ("views", None, ("mlm",)),
            ("learn", "answers", ("causal",)), ("prompt", None, ("embedding",)),
            ("teacher_prompt", None, ("embedding",)),
        ):  # fmt: skip
            if self.task not in tasks and getattr(self, key) != default:
                yield key, f"{key!r} is for task {' and '.join(tasks)}, this is {self.task!r}; remove it"
        metrics = METRICS[self.task]
        if self.metric is not None and self.metric not in metrics:
            yield "metric", f"{task} has no {self.metric}; allowed: {', '.join(metrics)}"
        if self.classes is not None and self.task not in ("classes", "multi-label", "tokens"):
            yield "classes", f"{task} has no classes; remove them"

    @property
    def _has_labels(self) -> bool:
        return self.task not in ("mlm", "causal", *TEACHER_ONLY_TASKS)

    @model_validator(mode="after")
    def _set_defaults(self) -> TextDataConfig:
        if self._has_labels and self.label is None:
            self.label = "label"
        self.metric = self.metric or METRICS[self.task][0]  # type: ignore[assignment]
        return self

    @property
    def augment(self) -> Augments:
        """Texts are not augmented, except by the masks of ``mlm``."""
        return []


DATA_KINDS: dict[str, type[Section]] = {"images": DataConfig, "texts": TextDataConfig}
"""The kinds of data."""


def kind_of(data: dict[str, Any]) -> str:
    """The kind of data of a section without ``kind``."""
    return "texts" if {"text", "task", "tokenizer"} & data.keys() or data.get("source") in TEXT_SOURCES else "images"
