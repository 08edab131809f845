"""Data sets of labelled images, and the choice of splits."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from tutelage.data.batch import IGNORE, Batch
from tutelage.data.image_sources import RawImages, RawSplit, open_source
from tutelage.data.views import (
    CROPS,
    MIX_AUGMENTS,
    Augment,
    Mix,
    apply_seeded,
    build_augments,
    parse_augment,
    partners,
)
from tutelage.errors import DataError, TutelageError, require

IN_MEMORY_BYTES = 2**30
"""Data sets up to this size are decoded into memory; images of larger ones are decoded at each access."""

Progress = Callable[[Sequence[int], str], Any]
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@dataclass(frozen=True, kw_only=True)
class ImageSet(RawSplit):
    """One split. :meth:`fetch` augments rows by view seed and normalises them.

    Attributes:
        crop: share of the shorter side that the centre crop of an image file keeps.
        random_crop: a random crop of an image file, instead of the centre crop.
        mix_augments: augmentations that combine two images, each with its random stream.
    """

    size: int
    channels: int
    mean: Tensor
    std: Tensor
    crop: float = 1.0
    random_crop: Callable[[Any], Any] | None = None
    augments: Sequence[Augment] = ()
    mix_augments: Sequence[tuple[int, Mix]] = ()

    @property
    def is_augmented(self) -> bool:
        """Whether a view depends on its seed."""
        return bool(self.augments) or bool(self.mix_augments) or self.random_crop is not None

    def fetch(self, rows: Tensor, views: Tensor | None = None) -> Batch:
        """The given rows as normalised float images, augmented from the seeds ``views`` if given.

        Rows that are mixed with other rows have no label.

        Raises:
            DataError: an image cannot be decoded.
        """
        views = views if self.is_augmented else None
        images, labels = self._augment(rows, views), self.labels[rows]
        if views is not None:
            for stream, mix in self.mix_augments:
                images = mix(images, self._augment(*partners(views, len(self), stream)), views)
                labels = torch.full_like(labels, IGNORE)
        x = images.float().mul_(1 / 255).sub_(self.mean).div_(self.std)
        route = None if self.route is None else self.route[rows]
        return Batch(x, labels, ids=self.ids[rows], views=views, route=route)

    def _augment(self, rows: Tensor, views: Tensor | None) -> Tensor:
        """uint8 images with the augmentations of one image."""
        images = self.pixels[rows] if self.pixels is not None else self._decode(rows, views)
        if views is not None:
            for augment in self.augments:
                images = augment(images, views)
        return images

    def _decode(self, rows: Tensor, views: Tensor | None) -> Tensor:
        assert self.open is not None
        out = []
        for i, row in enumerate(rows.tolist()):
            image = self.open(row)
            if views is not None and self.random_crop is not None:
                image = apply_seeded(self.random_crop, image, int(views[i]))
            out.append(to_pixels(image, self.channels, self.size, self.crop))
        return torch.stack(out)


@dataclass(frozen=True)
class ImageData:
    """Three disjoint splits with the same classes, size and normalisation."""

    name: str
    train: ImageSet
    validation: ImageSet
    test: ImageSet
    classes: list[str]
    for_teacher: ImageSet
    """The training images with all their labels, for the training of a teacher."""
    route_names: list[str] = field(default_factory=list)
    """The value of each index in a batch's ``route``."""

    @property
    def task(self) -> Literal["classes"]:
        """The kind of labels."""
        return "classes"

    @property
    def spec(self) -> dict[str, Any]:
        """Arguments of the model that fits the data."""
        return {"classes": len(self.classes), "channels": self.train.channels, "size": self.train.size}

    def summary(self) -> str:
        """The data in a few words."""
        size = self.train.size
        return f"{self.train.channels}x{size}x{size}, {len(self.classes)} classes"

    def preprocessing(self) -> dict[str, Any]:
        """The preprocessing that a user of the student must apply."""
        return {
            "size": self.train.size,
            "channels": self.train.channels,
            "crop": self.train.crop,
            "mean": [round(v, 6) for v in self.train.mean.flatten().tolist()],
            "std": [round(v, 6) for v in self.train.std.flatten().tolist()],
        }


def to_pixels(image: Any, channels: int, size: int, crop: float = 1.0) -> Tensor:
    """A PIL image as uint8 ``[channels, size, size]``: shorter side resized, centre cropped."""
    import numpy as np

    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (size, size):
        shorter = max(size, round(size / crop))
        scale = shorter / min(image.size)
        width, height = (max(size, round(side * scale)) for side in image.size)
        image = image.resize((width, height), resample=2)  # bilinear
        left, top = (width - size) // 2, (height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels.unsqueeze(0) if channels == 1 else pixels.permute(2, 0, 1).contiguous()


def choose_rows(
    labels: Tensor, count: int, seed: int, key: str, *, things: str = "images", stratify: bool = True
) -> tuple[Tensor, Tensor]:
    """Choose ``count`` rows at random, stratified by class; return them and the other rows, in ascending order.

    Raises:
        DataError: there are fewer rows, or a class would be missing in one part; the message names ``key``.
    """
    from sklearn.model_selection import train_test_split

    rows = torch.arange(len(labels))
    if count == len(labels):
        return rows, rows[:0]
    if count > len(labels):
        raise DataError(
            f"{key}: {count} {things} are requested, there are {len(labels)}",
            remedy=f"set it to at most {len(labels)}, or leave it out to use all",
        )
    if not stratify:
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        return order[:count].sort().values, order[count:].sort().values
    try:
        chosen, rest = train_test_split(rows.numpy(), train_size=count, stratify=labels.numpy(), random_state=seed)
    except ValueError:
        per_class = torch.bincount(labels)
        raise DataError(
            f"{key}: {count} of {len(labels)} {things} cannot be chosen so that every class is among the chosen and "
            f"among the others ({len(per_class)} classes, the smallest has {int(per_class.min())})",
            remedy=f"change {key} so that both parts get {things} of every class, or add some to the smallest class",
        ) from None
    return torch.from_numpy(chosen).sort().values, torch.from_numpy(rest).sort().values


def complete_splits(
    splits: Mapping[str, Any],
    validation: float,
    test: float,
    limit: int | None,
    choose: Callable[[Any, int, str], tuple[Tensor, Tensor]],
) -> dict[str, Any]:
    """The splits of a source; missing ones are taken from the training split, which is then limited.

    ``choose(split, count, key)`` chooses rows as :func:`choose_rows` does.
    """
    splits = dict(splits)
    for name, fraction in (("test", test), ("validation", validation)):
        if name not in splits:
            train = splits["train"]
            chosen, rest = choose(train, max(1, round(len(train) * fraction)), f"data.{name}")
            splits[name], splits["train"] = train.select(chosen), train.select(rest)
    if limit is not None:
        splits["train"] = splits["train"].select(choose(splits["train"], limit, "data.limit")[0])
    return splits


def load_images(
    source: str,
    *,
    path: str | None = None,
    options: dict[str, Any] | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    route: str | None = None,
    size: int | None = None,
    crop: float = 1.0,
    classes: list[str] | None = None,
    augment: Sequence[str | dict[str, Any]] = (),
    teacher_augment: Sequence[str | dict[str, Any]] | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    labels: int | None = None,
    unlabeled: str = "keep",
    limit: int | None = None,
    validation: float = 0.1,
    test: float = 0.2,
    split_seed: int = 0,
    progress: Progress = lambda rows, _: rows,
) -> ImageData:
    """Load a data set of labelled images and its splits.

    The arguments are the keys of a recipe's ``data``. ``teacher_augment`` is for the training of a teacher (default:
    ``augment``). ``progress`` wraps the iteration over images that are decoded into memory.

    Raises:
        DataError: data is missing, broken or empty; names the file.
        ConfigError: the source or an augmentation is unknown.
        MissingDependencyError: the source or an augmentation needs an extra.
    """
    teacher_augment = augment if teacher_augment is None else teacher_augment
    teacher_augment = [entry for entry in teacher_augment if parse_augment(entry)[0] not in MIX_AUGMENTS]
    raw = open_source(
        source, path=path, options=options or {}, image_column=image_column, label_column=label_column,
        classes=classes, route=route,
    )  # fmt: skip
    _check_labels(raw, path or source)
    if classes is not None and classes != raw.classes:
        raw = _reorder_classes(raw, classes)
    splits: dict[str, RawSplit] = complete_splits(
        raw.splits, validation, test, limit, lambda split, n, key: choose_rows(split.labels, n, split_seed, key)
    )
    pixels = splits["train"].pixels
    channels, native = (3, 224) if pixels is None else (pixels.shape[1], pixels.shape[-1])
    size = size or native
    (augments, mixes), (teacher_augments, _) = build_augments(augment), build_augments(teacher_augment)
    random_crop, teacher_crop = (
        _random_crop(entries, size, pixels is not None) for entries in (augment, teacher_augment)
    )
    total = sum(len(split) for split in splits.values())
    if pixels is not None:
        splits = {name: _resize(split, size) for name, split in splits.items()}
    elif random_crop is None and teacher_crop is None and total * channels * size * size <= IN_MEMORY_BYTES:
        splits = {n: _decode_all(s, size, crop, progress, f"decoding {n} images") for n, s in splits.items()}
    mean, std = _normalisation(raw, splits["train"], mean, std, channels)

    def build(split: RawSplit, **augmentation: Any) -> ImageSet:
        return ImageSet(
            **vars(split),
            size=size,
            channels=channels,
            mean=torch.tensor(mean).view(1, -1, 1, 1),
            std=torch.tensor(std).view(1, -1, 1, 1),
            crop=crop,
            **augmentation,
        )

    train = build(splits["train"], random_crop=random_crop, augments=augments, mix_augments=mixes)
    for_teacher = build(splits["train"], random_crop=teacher_crop, augments=teacher_augments)
    _try_augments(train)
    _try_augments(for_teacher)
    if labels is not None:
        chosen = choose_rows(train.labels, labels, split_seed, "data.labels")
        train = hide_labels(train, chosen, drop=unlabeled == "drop")
    validation_set, test_set = build(splits["validation"]), build(splits["test"])
    return ImageData(source, train, validation_set, test_set, list(raw.classes), for_teacher, raw.route_names)


def _check_labels(raw: RawImages, where: str) -> None:
    for name, split in raw.splits.items():
        if len(split) == 0:
            raise DataError(f"the {name} split has no images", where=where, remedy="add images, or remove the split")
        low, high = int(split.labels.min()), int(split.labels.max())
        if high >= len(raw.classes) or low < 0:
            raise DataError(
                f"the {name} split has labels from {low} to {high}, but {len(raw.classes)} classes",
                where=where,
                remedy=f"labels must be integers from 0 to {len(raw.classes) - 1}",
            )


def _normalisation(
    raw: RawImages, train: RawSplit, mean: list[float] | None, std: list[float] | None, channels: int
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel: as given, of the source, of the training images, or ImageNet's."""
    mean, std = raw.mean if mean is None else mean, raw.std if std is None else std
    if mean is None or std is None:
        if train.pixels is not None:
            sample = train.pixels[:: max(1, len(train.pixels) // 10000)].float().div(255)
            mean = sample.mean(dim=(0, 2, 3)).tolist()
            std = sample.std(dim=(0, 2, 3)).clamp(min=1e-3).tolist()
        else:
            mean, std = IMAGENET
    if len(mean) != channels or len(std) != channels:
        raise DataError(
            f"data.mean and data.std have {len(mean)} and {len(std)} values, the images {channels} channels",
            remedy="give one value for each channel",
        )
    return mean, std


def _reorder_classes(raw: RawImages, classes: list[str]) -> RawImages:
    if sorted(classes) != sorted(raw.classes):
        known = ", ".join(raw.classes[:20]) + (" ..." if len(raw.classes) > 20 else "")
        raise DataError(
            f"data.classes names {len(classes)} classes that are not the {len(raw.classes)} of the source: {known}",
            remedy="name every class of the source once, in the order of the teacher's outputs",
        )
    to = torch.tensor([classes.index(name) for name in raw.classes])
    splits = {name: replace(split, labels=to[split.labels]) for name, split in raw.splits.items()}
    return replace(raw, classes=list(classes), splits=splits)


def _try_augments(images: ImageSet) -> None:
    """Augment one image with a few seeds, so that wrong options stop the run before training."""
    if not images.is_augmented:
        return
    try:
        images.fetch(torch.zeros(8, dtype=torch.int64), torch.arange(8))
    except (TypeError, ValueError, RuntimeError, LookupError) as error:
        if isinstance(error, TutelageError):
            raise
        raise DataError(
            f"data.augment cannot be applied to these images: {error}",
            remedy="check the options of each augmentation",
        ) from error


def hide_labels(data: Any, rows: tuple[Tensor, Tensor], *, drop: bool) -> Any:
    """Keep the labels of ``rows[0]`` in a split; remove the labels of ``rows[1]``, or drop these rows."""
    if drop:
        return data.select(rows[0])
    hidden = data.labels.clone()
    hidden[rows[1]] = IGNORE
    return replace(data, labels=hidden)


def _resize(split: RawSplit, size: int) -> RawSplit:
    assert split.pixels is not None
    if split.pixels.shape[-1] == size:
        return split
    x = torch.nn.functional.interpolate(split.pixels.float(), size=(size, size), mode="bilinear", antialias=True)
    return replace(split, pixels=x.round().clamp(0, 255).to(torch.uint8))


def _decode_all(split: RawSplit, size: int, crop: float, progress: Progress, what: str) -> RawSplit:
    assert split.open is not None
    pixels = torch.empty(len(split.labels), 3, size, size, dtype=torch.uint8)
    for i in progress(range(len(split.labels)), what):
        pixels[i] = to_pixels(split.open(i), 3, size, crop)
    return replace(split, pixels=pixels, open=None)


def _random_crop(augment: Sequence[str | dict[str, Any]], size: int, in_memory: bool) -> Callable[[Any], Any] | None:
    for position, entry in enumerate(augment):
        name, options = parse_augment(entry)
        if name not in CROPS:
            continue
        if position != 0 or in_memory:
            raise DataError(
                f"data.augment: {name} crops the image file before it is resized, "
                + ("and this source has no files" if in_memory else "so it cannot follow another augmentation"),
                remedy="use {shift: PIXELS}" if in_memory else f"put {name} first",
            )
        require("torchvision", "vision", f"the augmentation {name!r}")
        from torchvision.transforms import v2

        crop: Callable[[Any], Any] = v2.RandomResizedCrop(size, antialias=True, **options)
        return crop
    return None
