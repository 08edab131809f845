"""Splits of images, as teacher and student read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, Self

import torch
from torch import Tensor

from tutelage.data.batch import IGNORE, Batch, Inputs
from tutelage.data.preprocessing import Preprocessing, convert, to_picture, to_pixels
from tutelage.data.raw_images import RawSplit
from tutelage.data.views import Augment, Mix, apply_seeded, partners


@dataclass(frozen=True, kw_only=True)
class ImageSet(RawSplit):
    """One split. :meth:`fetch` augments rows by view seed and gives each model its own inputs.

    Models that differ in normalisation only share the pixels. With other sizes or crops the picture is augmented
    before it is resized for each model, so that all see the same view.

    Attributes:
        pixels: as the student reads them; ``None`` if images are decoded at each access.
        preprocessing: the student's.
        teachers: that of each member of the teacher; empty without one.
        stored: the pixels that other models read, by the geometry of their preprocessing.
        random_crop: options of a random crop of an image file, which replaces resizing and centre crop.
        mix_augments: augmentations that combine two images, each with its random stream.
    """

    preprocessing: Preprocessing
    teachers: tuple[Preprocessing, ...] = ()
    stored: Mapping[Preprocessing, Tensor] = field(default_factory=dict)
    random_crop: Mapping[str, Any] | None = None
    augments: Sequence[Augment] = ()
    mix_augments: Sequence[tuple[int, Mix]] = ()

    def select(self, rows: Tensor) -> Self:
        """The split with only the given rows."""
        return replace(super().select(rows), stored={k: x[rows] for k, x in self.stored.items()})

    def read_as(self, preprocessing: Preprocessing) -> Self:
        """The split for a student with another preprocessing."""
        stored = self._pixels_by_geometry
        return replace(self, preprocessing=preprocessing, pixels=stored.get(preprocessing.geometry), stored=stored)

    @property
    def is_augmented(self) -> bool:
        """Whether a view depends on its seed."""
        return bool(self.augments) or bool(self.mix_augments) or self.random_crop is not None

    @property
    def is_in_memory(self) -> bool:
        """Whether the pixels that every model reads are in memory."""
        return all(g in self._pixels_by_geometry for g in self.geometries)

    @cached_property
    def geometries(self) -> tuple[Preprocessing, ...]:
        """The different geometries that are read, the student's first."""
        return tuple(dict.fromkeys(each.geometry for each in (self.preprocessing, *self.teachers)))

    @cached_property
    def _pixels_by_geometry(self) -> dict[Preprocessing, Tensor]:
        own = {} if self.pixels is None else {self.preprocessing.geometry: self.pixels}
        return {**self.stored, **own}

    def fetch(self, rows: Tensor, views: Tensor | None = None) -> Batch:
        """The given rows as normalised float images, augmented from the seeds ``views`` if given.

        Rows that are mixed with other rows have no label.

        Raises:
            DataError: an image cannot be decoded.
        """
        views = views if self.is_augmented else None
        images, labels = self._views(rows, views), self.labels[rows]
        if views is not None:
            for stream, mix in self.mix_augments:
                others = self._views(*partners(views, len(self), stream))
                images = [mix(mine, other, views) for mine, other in zip(images, others, strict=True)]
                labels = torch.full_like(labels, IGNORE)
        route = None if self.route is None else self.route[rows]
        inputs = self.preprocessing.normalise(images[0])
        return Batch(
            inputs, labels, ids=self.ids[rows], views=views, route=route,
            teacher_inputs=self._teacher_inputs(images, inputs),
        )  # fmt: skip

    def _teacher_inputs(self, images: Sequence[Tensor], inputs: Tensor) -> Inputs | None:
        """What the teacher reads, if it differs from the student's ``inputs``."""
        if all(each == self.preprocessing for each in self.teachers):
            return None
        known = {self.preprocessing: inputs}
        for each in self.teachers:
            if each not in known:
                known[each] = each.normalise(images[self.geometries.index(each.geometry)])
        if len(set(self.teachers)) == 1:
            return known[self.teachers[0]]
        return {f"member_{number}": known[each] for number, each in enumerate(self.teachers)}

    def _views(self, rows: Tensor, views: Tensor | None) -> list[Tensor]:
        """uint8 images with the augmentations of one image, one tensor for each geometry."""
        if views is None:
            return self._resized(rows)
        if self.random_crop is None and len(self.geometries) == 1:
            return [self._augment(self._resized(rows)[0], views)]
        return self._augmented_pictures(rows, views)

    def _augment(self, images: Tensor, views: Tensor) -> Tensor:
        for augment in self.augments:
            images = augment(images, views)
        return images

    def _resized(self, rows: Tensor) -> list[Tensor]:
        known = {g: x[rows] for g in self.geometries if (x := self._pixels_by_geometry.get(g)) is not None}
        missing = [g for g in self.geometries if g not in known]
        if missing:
            assert self.open is not None
            decoded = [[g.pixels(picture) for g in missing] for picture in map(self.open, rows.tolist())]
            known |= {g: torch.stack(list(each)) for g, each in zip(missing, zip(*decoded, strict=True), strict=True)}
        return [known[g] for g in self.geometries]

    def _augmented_pictures(self, rows: Tensor, views: Tensor) -> list[Tensor]:
        """Augment each picture, at the largest size that a model reads or its own, then resize it for each model."""
        assert self.open is not None
        channels = max(g.channels for g in self.geometries)
        pictures = [convert(self.open(row), channels) for row in rows.tolist()]
        if self.random_crop is None:
            side = max(g.resize for g in self.geometries)
            augmented = [
                to_picture(self._augment(to_pixels(_shrink(picture, side))[None], views[i : i + 1])[0])
                for i, picture in enumerate(pictures)
            ]
            return [torch.stack([g.pixels(picture) for picture in augmented]) for g in self.geometries]
        from torchvision.transforms import v2

        side = max(g.size for g in self.geometries)
        crop: Callable[[Any], Any] = v2.RandomResizedCrop(side, antialias=True, **self.random_crop)
        pictures = [apply_seeded(crop, p, int(view)) for p, view in zip(pictures, views, strict=True)]
        images = self._augment(torch.stack([to_pixels(picture) for picture in pictures]), views)
        return [_without_crop(g).all_pixels(images) for g in self.geometries]


def _shrink(picture: Any, side: int) -> Any:
    """A PIL image whose shorter side is at most ``side``."""
    if min(picture.size) <= side:
        return picture
    scale = side / min(picture.size)
    return picture.resize([round(scale * each) for each in picture.size], resample=2)


def _without_crop(geometry: Preprocessing) -> Preprocessing:
    return replace(geometry, resize=geometry.size, fit="squash")


@dataclass(frozen=True)
class ImageData:
    """Three disjoint splits with the same classes and preprocessing."""

    name: str
    train: ImageSet
    validation: ImageSet
    test: ImageSet
    classes: list[str]
    for_teacher: ImageSet
    """The training images with all their labels, for the training of a teacher."""
    route_names: list[str] = field(default_factory=list)
    """The value of each index in a batch's ``route``."""
    notes: list[str] = field(default_factory=list)
    """What the files of the models say about their images, a line for each model."""

    @property
    def task(self) -> Literal["classes"]:
        """The kind of labels."""
        return "classes"

    @property
    def spec(self) -> dict[str, Any]:
        """Arguments of the student that fits the data."""
        return self._spec_for(self.train.preprocessing)

    def teacher_spec(self, number: int) -> dict[str, Any]:
        """Arguments of the teacher's member that fits the data."""
        return self._spec_for(self.teacher(number))

    def _spec_for(self, preprocessing: Preprocessing) -> dict[str, Any]:
        return {"classes": len(self.classes), "channels": preprocessing.channels, "size": preprocessing.size}

    def teacher(self, number: int) -> Preprocessing:
        """The preprocessing of the teacher's member."""
        teachers = self.train.teachers
        return teachers[number] if teachers else self.train.preprocessing

    def training_of(self, number: int) -> ImageSet:
        """The training images of the teacher's member, as it reads them."""
        return replace(self.for_teacher.read_as(self.teacher(number)), teachers=())

    def read_as(self, preprocessing: Preprocessing) -> ImageData:
        """The data for a student with another preprocessing."""
        splits = {name: getattr(self, name).read_as(preprocessing) for name in ("train", "validation", "test")}
        return replace(self, **splits)

    def summary(self) -> str:
        """The data in a few words."""
        size, channels = self.train.preprocessing.size, self.train.preprocessing.channels
        return f"{channels}x{size}x{size}, {len(self.classes)} classes"

    def preprocessing(self) -> dict[str, Any]:
        """The preprocessing that a user of the student must apply."""
        return self.train.preprocessing.to_dict()
