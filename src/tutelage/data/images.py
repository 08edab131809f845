"""Data sets of labelled images, and the choice of splits."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tutelage.data.batch import IGNORE
from tutelage.data.image_set import ImageData, ImageSet
from tutelage.data.image_sources import open_source
from tutelage.data.preprocessing import Preprocessing, to_picture
from tutelage.data.raw_images import RawImages, RawSplit
from tutelage.data.views import CROPS, MIX_AUGMENTS, build_augments, parse_augment
from tutelage.errors import DataError, TutelageError, require

IN_MEMORY_BYTES = 2**30
"""Data sets up to this size are decoded into memory; images of larger ones are decoded at each access."""

Progress = Callable[[Sequence[int], str], Any]


def choose_rows(
    labels: Tensor, count: int, seed: int, key: str, *, things: str = "images", stratify: bool = True
) -> tuple[Tensor, Tensor]:
    """Choose ``count`` rows at random, stratified by class; return them and the other rows, in ascending order.

    Rows without label are no class: their share is chosen at random.

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
    labelled = (labels != IGNORE).nonzero().flatten()
    if stratify and 0 < len(labelled) < len(labels):
        hidden = (labels == IGNORE).nonzero().flatten()
        many = round(count * len(labelled) / len(labels))
        parts = [
            [rows[part] for part in choose_rows(labels[rows], n, seed, key, things=things, stratify=is_class)]
            for rows, n, is_class in ((labelled, many, True), (hidden, count - many, False))
        ]
        chosen, rest = (torch.cat(both).sort().values for both in zip(*parts, strict=True))
        return chosen, rest
    if not stratify or not len(labelled):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        return order[:count].sort().values, order[count:].sort().values
    try:
        chosen, rest = train_test_split(rows.numpy(), train_size=count, stratify=labels.numpy(), random_state=seed)
    except ValueError:
        classes, per_class = labels.unique(return_counts=True)
        raise DataError(
            f"{key}: cannot choose {count} of {len(labels)} {things} so that both parts have every class "
            f"({len(per_class)} classes; the smallest has {int(per_class.min())}, its index is "
            f"{int(classes[per_class.argmin()])})",
            remedy=f"change {key}, or add some {things} to the smallest class",
        ) from None
    return torch.from_numpy(chosen).sort().values, torch.from_numpy(rest).sort().values


Choose = Callable[[Any, int, str], tuple[Tensor, Tensor]]


def choose_labelled(split: Any, count: int, key: str, choose: Choose) -> tuple[Tensor, Tensor]:
    """Choose among the rows with a label, or among all rows if none has one; all others are the second part."""
    labelled = (split.labels != IGNORE).nonzero().flatten()
    if not 0 < len(labelled) < len(split):
        return choose(split, count, key)
    chosen = labelled[choose(split.select(labelled), count, key)[0]]
    left = torch.ones(len(split), dtype=torch.bool)
    left[chosen] = False
    return chosen, left.nonzero().flatten()


def check_labelled(
    splits: Mapping[str, Any], where: str, things: str, say: Callable[[str], None], *, drop: bool
) -> dict[str, Any]:
    """The splits, validation and test with labelled rows only; a line states how many rows have no label.

    A split of the hub whose labels are all hidden is left out. ``drop``: leave out training rows without label too.

    Raises:
        DataError: no row of a split that needs labels has one.
    """
    usable = dict(splits)
    for name, split in splits.items():
        labelled = (split.labels != IGNORE).nonzero().flatten()
        count = len(split) - len(labelled)
        if not count:
            continue
        if len(labelled):
            use = "the student learns them from the teacher" if name == "train" and not drop else "they are left out"
            say(f"note: {count:,} of {len(split):,} {things} of the {name} split have no label; {use}")
            usable[name] = split.select(labelled) if name != "train" or drop else split
        elif name != "train" and where.startswith("hf:"):
            say(f"note: the {name} split has no labels, so it is taken from the training {things}")
            del usable[name]
        elif name != "train" or drop or not {"validation", "test"} <= usable.keys():
            raise DataError(
                f"no {things[:-1]} of the {name} split has a label",
                where=where,
                remedy="add labels: they are needed to select and measure the student",
            )
    return usable


def complete_splits(
    splits: Mapping[str, Any],
    validation: float,
    test: float,
    limit: int | None,
    choose: Choose,
) -> dict[str, Any]:
    """The splits of a source; missing ones are taken from the training split, which is then limited.

    ``choose(split, count, key)`` chooses rows as :func:`choose_rows` does.
    """
    splits = dict(splits)
    for name, fraction in (("test", test), ("validation", validation)):
        if name not in splits:
            train = splits["train"]
            labelled = int((train.labels != IGNORE).sum()) or len(train)
            chosen, rest = choose_labelled(train, max(1, round(labelled * fraction)), f"data.{name}", choose)
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
    crop: float | None = None,
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
    student: Preprocessing | None = None,
    teachers: Sequence[Preprocessing | None] = (),
    say: Callable[[str], None] = lambda _: None,
) -> ImageData:
    """Load a data set of images and its splits. Training images without label have the label -100.

    The arguments are the keys of a recipe's ``data``. ``teacher_augment`` is for the training of a teacher (default:
    ``augment``). ``progress`` wraps the iteration over images that are decoded into memory. ``student`` and
    ``teachers`` are what the files of the models say about their images; ``size``, ``crop``, ``mean`` and ``std``
    win over them. A model without files reads the images as the data section says. For image files, what that leaves
    open is as for the teacher, else as for the student. ``say`` receives a line for what is not read or has no label.

    Raises:
        DataError: data is missing, broken or empty; names the file.
        ConfigError: the source or an augmentation is unknown.
        MissingDependencyError: the source or an augmentation needs an extra.
    """
    teacher_augment = augment if teacher_augment is None else teacher_augment
    teacher_augment = [entry for entry in teacher_augment if parse_augment(entry)[0] not in MIX_AUGMENTS]
    classes = None if classes is None else [str(name) for name in classes]
    raw = open_source(
        source, path=path, options=options or {}, image_column=image_column, label_column=label_column,
        classes=classes, route=route, unlabeled=unlabeled == "keep",
    )  # fmt: skip
    if raw.note:
        say(raw.note)
    _check_labels(raw, path or source)
    if classes is not None and classes != raw.classes:
        raw = _reorder_classes(raw, classes)
    usable = check_labelled(raw.splits, path or source, "images", say, drop=unlabeled == "drop")
    splits: dict[str, RawSplit] = complete_splits(
        usable, validation, test, limit, lambda split, n, key: choose_rows(split.labels, n, split_seed, key)
    )
    given = {k: v for k, v in (("size", size), ("crop", crop), ("mean", mean), ("std", std)) if v is not None}
    (augments, mixes), (teacher_augments, _) = build_augments(augment), build_augments(teacher_augment)
    in_memory = splits["train"].pixels is not None
    crops = [_random_crop(entries, in_memory) for entries in (augment, teacher_augment)]
    own = _without_files(splits["train"], given, [*teachers, student])
    readers = [own if files is None else _override(files, given, splits["train"]) for files in (student, *teachers)]
    geometries = list(dict.fromkeys(each.geometry for each in readers))
    stored = sum(len(split) * g.size**2 * g.channels for split in splits.values() for g in geometries)
    if stored > IN_MEMORY_BYTES or (crops != [None, None] and not in_memory):
        geometries = [own.geometry] if in_memory and None in (student, *teachers) else []
    by_split = {name: _decode(split, geometries, own.geometry, name, progress) for name, split in splits.items()}
    if in_memory or (student, *teachers).count(None) == len(readers):
        own = _normalised(raw, own, by_split["train"].get(own.geometry), given)
    readers = [own if files is None else _override(files, given, splits["train"]) for files in (student, *teachers)]
    _check_channels(readers)

    def build(name: str, **augmentation: Any) -> ImageSet:
        split, pixels = splits[name], by_split[name].get(readers[0].geometry)
        fields = {**vars(split), "pixels": pixels, "open": _opener(split), "stored": by_split[name]}
        return ImageSet(**fields, preprocessing=readers[0], teachers=tuple(readers[1:]), **augmentation)

    train = build("train", random_crop=crops[0], augments=augments, mix_augments=mixes)
    for_teacher = build("train", random_crop=crops[1], augments=teacher_augments)
    _try_augments(train)
    _try_augments(for_teacher)
    if labels is not None:
        chosen = choose_labelled(
            train, labels, "data.labels", lambda split, n, key: choose_rows(split.labels, n, split_seed, key)
        )
        train = hide_labels(train, chosen, drop=unlabeled == "drop")
    validation_set, test_set = build("validation"), build("test")
    return ImageData(source, train, validation_set, test_set, list(raw.classes), for_teacher, raw.route_names)


def _check_labels(raw: RawImages, where: str) -> None:
    for name, split in raw.splits.items():
        if len(split) == 0:
            raise DataError(f"the {name} split has no images", where=where, remedy="add images, or remove the split")
        labels = split.labels[split.labels != IGNORE]
        if not len(labels):
            continue
        low, high = int(labels.min()), int(labels.max())
        if high >= len(raw.classes) or low < 0:
            raise DataError(
                f"the {name} split has labels from {low} to {high}, but {len(raw.classes)} classes",
                where=where,
                remedy=f"labels must be integers from 0 to {len(raw.classes) - 1}, or null or -1 without label",
            )


def _without_files(train: RawSplit, given: Mapping[str, Any], files: Sequence[Preprocessing | None]) -> Preprocessing:
    """The preprocessing of a model without files, before the normalisation of images in memory is known."""
    if train.pixels is not None:
        channels = train.pixels.shape[1]
        usual = Preprocessing(train.pixels.shape[-1], channels, (0.0,) * channels, (1.0,) * channels)
        return usual.override({k: v for k, v in given.items() if k == "size"})
    return next((each for each in files if each is not None), Preprocessing(224)).override(given)


def _override(files: Preprocessing, given: Mapping[str, Any], train: RawSplit) -> Preprocessing:
    """``files`` with a recipe's values; those of one grey channel hold for each channel that a model makes of it."""
    if train.pixels is not None and train.pixels.shape[1] == 1:
        given = {k: v * files.channels if k in ("mean", "std") and len(v) == 1 else v for k, v in given.items()}
    return files.override(given)


def _normalised(raw: RawImages, own: Preprocessing, pixels: Tensor | None, given: Mapping[str, Any]) -> Preprocessing:
    """``own`` with mean and standard deviation of each channel: as given, of the source, or of the images."""
    known = {k: v for k, v in (("mean", raw.mean), ("std", raw.std)) if v is not None} | {
        k: v for k, v in given.items() if k in ("mean", "std")
    }
    if len(known) < 2 and pixels is not None:
        sample = pixels[:: max(1, len(pixels) // 10000)].float().div(255)
        known |= {"mean": sample.mean(dim=(0, 2, 3)).tolist()}
        known |= {"std": sample.std(dim=(0, 2, 3)).clamp(min=1e-3).tolist()}
    return own.override(known)


def _check_channels(readers: Iterable[Preprocessing]) -> None:
    for each in readers:
        if len(each.mean) != each.channels or len(each.std) != each.channels:
            raise DataError(
                f"data.mean and data.std have {len(each.mean)} and {len(each.std)} values, the images "
                f"{each.channels} channels",
                remedy="give one value for each channel",
            )


def _reorder_classes(raw: RawImages, classes: list[str]) -> RawImages:
    if sorted(classes) != sorted(raw.classes):
        known = ", ".join(raw.classes[:20]) + (" ..." if len(raw.classes) > 20 else "")
        raise DataError(
            f"data.classes names {len(classes)} classes that are not the {len(raw.classes)} of the source: {known}",
            remedy="name every class of the source once, in the order of the teacher's outputs",
        )
    to = torch.tensor([classes.index(name) for name in raw.classes])
    splits = {
        name: replace(split, labels=torch.where(split.labels < 0, IGNORE, to[split.labels.clamp(min=0)]))
        for name, split in raw.splits.items()
    }
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


def _decode(
    split: RawSplit, geometries: Sequence[Preprocessing], own: Preprocessing, name: str, progress: Progress
) -> dict[Preprocessing, Tensor]:
    """The pixels of a split, as models of each geometry read them; ``own`` is that of a model without files."""
    out: dict[Preprocessing, Tensor] = {}
    if split.pixels is not None and own in geometries:
        out[own] = _resize(split.pixels, own.size)
    if missing := [g for g in geometries if g not in out]:
        picture = _opener(split)
        out |= {g: torch.empty(len(split), g.channels, g.size, g.size, dtype=torch.uint8) for g in missing}
        for row in progress(range(len(split)), f"decoding {name} images"):
            image = picture(row)
            for g in missing:
                out[g][row] = g.pixels(image)
    return out


def _opener(split: RawSplit) -> Callable[[int], Any]:
    if split.open is not None:
        return split.open
    assert split.pixels is not None
    return partial(_picture_of, split.pixels)


def _picture_of(pixels: Tensor, row: int) -> Any:
    return to_picture(pixels[row])


def _resize(pixels: Tensor, size: int) -> Tensor:
    if pixels.shape[-1] == size:
        return pixels
    x = torch.nn.functional.interpolate(pixels.float(), size=(size, size), mode="bilinear", antialias=True)
    return x.round().clamp(0, 255).to(torch.uint8)


def _random_crop(augment: Sequence[str | dict[str, Any]], in_memory: bool) -> dict[str, Any] | None:
    """The options of a random crop of the image files, if there is one."""
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
        return options
    return None
