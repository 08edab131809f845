"""How a model reads images: resizing, cropping and normalisation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]

RESAMPLE: dict[str, int] = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}
"""Pillow's number of each interpolation."""

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of ImageNet's pixels."""


@dataclass(frozen=True)
class Preprocessing:
    """What is done to an image before a model reads it.

    Attributes:
        size: height and width of the model's input.
        channels: 1, grey, or 3.
        mean: of each channel of the input, for pixels in [0, 1].
        std: standard deviation of each channel.
        resize: side in pixels to which the image is resized, before the centre is cut out. Default: ``size``.
        fit: ``crop``: the shorter side becomes ``resize``; ``squash``: both sides; ``pad``: the longer side, and the
            rest of the square gets the mean colour.
        interpolation: of the resizing.
        backend: library that resizes; their results differ by one level of 255.
        centre: how half a pixel is rounded where the centre is cut out: ``round``, to even, as in torchvision, or
            ``floor``, as in transformers.
        order: of the channels in the input.
    """

    size: int
    channels: int = 3
    mean: tuple[float, ...] = IMAGENET[0]
    std: tuple[float, ...] = IMAGENET[1]
    resize: int = 0
    fit: Literal["crop", "squash", "pad"] = "crop"
    interpolation: Interpolation = "bilinear"
    backend: Literal["pillow", "torchvision"] = "pillow"
    centre: Literal["round", "floor"] = "round"
    order: Literal["RGB", "BGR"] = "RGB"

    def __post_init__(self) -> None:
        object.__setattr__(self, "resize", self.resize or self.size)
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(float(f"{v:.7g}") + 0.0 for v in getattr(self, name)))

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> Preprocessing:
        """The preprocessing on a model's card; entries of another kind are ignored."""
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in entries.items() if key in known})

    def to_dict(self) -> dict[str, Any]:
        """The entry of a model's card: every field that differs from its default."""
        usual = {field.name: field.default for field in fields(self)}
        always = ("size", "channels", "mean", "std", "resize", "interpolation")
        entries = {k: v for k, v in asdict(self).items() if k in always or v != usual[k]}
        return entries | {"mean": list(self.mean), "std": list(self.std)}

    def override(self, given: Mapping[str, Any]) -> Preprocessing:
        """This preprocessing with a recipe's ``size``, ``crop``, ``mean`` and ``std`` in place of its own."""
        size = given.get("size") or self.size
        share = given.get("crop") or self.size / self.resize
        resize = self.resize if {"size", "crop"}.isdisjoint(given) else resized_side(size, share)
        own: dict[str, Any] = {k: tuple(v) for k, v in given.items() if k in ("mean", "std")}
        return replace(self, size=size, resize=resize, **own)

    @property
    def geometry(self) -> Preprocessing:
        """What decides the pixels; equal for two models that differ in normalisation only."""
        fill = self.mean if self.fit == "pad" else IMAGENET[0]
        return replace(self, mean=fill, std=IMAGENET[1], order="RGB")

    def pixels(self, image: Any) -> Tensor:
        """A PIL image as uint8 ``[channels, size, size]``."""
        image = convert(image, self.channels)
        width, height = self._resized(*image.size)
        if self.backend == "torchvision":
            from torchvision.transforms.v2 import InterpolationMode
            from torchvision.transforms.v2 import functional as F

            mode = InterpolationMode(self.interpolation)
            return self._centre(F.resize(to_pixels(image), [height, width], interpolation=mode, antialias=True))
        if image.size != (width, height):
            image = image.resize((width, height), resample=RESAMPLE[self.interpolation])
        return self._centre(to_pixels(image))

    def all_pixels(self, images: Tensor) -> Tensor:
        """:meth:`pixels` of uint8 images ``[B, C, H, W]`` with 1 or 3 channels."""
        if images.shape[1:] == (self.channels, self.size, self.size) and self.resize == self.size:
            return images
        return torch.stack([self.pixels(to_picture(image)) for image in images])

    def normalise(self, pixels: Tensor) -> Tensor:
        """The model's input, float, from uint8 images ``[B, C, H, W]``."""
        x = pixels.flip(1) if self.order == "BGR" else pixels
        return x.float().mul_(1 / 255).sub_(self._mean).div_(self._std)

    def denormalise(self, inputs: Tensor) -> Tensor:
        """Pixels in [0, 1], RGB or grey, from the model's input."""
        x = inputs * self._std + self._mean
        return x.flip(1) if self.order == "BGR" else x

    def describe(self) -> str:
        """What is done to an image, in words."""
        sides = {"crop": "the shorter side", "squash": "both sides", "pad": "the longer side"}[self.fit]
        size, mean, std = f"{self.size}x{self.size}", _as_text(self.mean), _as_text(self.std)
        outside = "the mean colour" if self.fit == "pad" else "black"
        cut = f"cut out the centre of {size}" + (
            f" ({outside} outside the picture)" if self.resize < self.size else ""
        )
        order = ", channels in the order blue, green, red" if self.order == "BGR" else ""
        colours = "grey" if self.channels == 1 else "RGB"
        return (
            f"{colours}, resize {sides} to {self.resize} ({self.interpolation}), {cut}, divide by 255, normalise "
            f"with mean {mean} and standard deviation {std}{order}"
        )

    @cached_property
    def _mean(self) -> Tensor:
        return torch.tensor(self.mean).view(1, -1, 1, 1)

    @cached_property
    def _std(self) -> Tensor:
        return torch.tensor(self.std).view(1, -1, 1, 1)

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height after resizing, rounded as torchvision, transformers and timm round."""
        if self.fit == "squash":
            return self.resize, self.resize
        if self.fit == "pad":
            ratio = max(width, height) / self.resize
            return round(width / ratio), round(height / ratio)
        if width <= height:
            return self.resize, int(self.resize * height / width)
        return int(self.resize * width / height), self.resize

    def _centre(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        size = self.size
        if height < size or width < size:
            fill = [round(255 * v) for v in self.mean] if self.fit == "pad" else [0] * len(x)
            padded = (
                torch.tensor(fill, dtype=torch.uint8).view(-1, 1, 1).repeat(1, max(size, height), max(size, width))
            )
            top, left = max(size - height, 0) // 2, max(size - width, 0) // 2
            padded[:, top : top + height, left : left + width] = x
            x, (height, width) = padded, padded.shape[-2:]
        rounding: Callable[[float], int] = round if self.centre == "round" else int
        top, left = rounding((height - size) / 2), rounding((width - size) / 2)
        return x[:, top : top + size, left : left + size].contiguous()


def resized_side(size: int, crop: float) -> int:
    """The side before the centre crop that keeps the share ``crop`` of it, rounded as timm does."""
    return math.floor(size / crop)


def convert(image: Any, channels: int) -> Any:
    """A PIL image of any mode in grey (``channels`` 1) or RGB."""
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def to_pixels(image: Any) -> Tensor:
    """A PIL image in grey or RGB as uint8 ``[C, H, W]``."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def to_picture(pixels: Tensor) -> Any:
    """uint8 ``[C, H, W]`` as a PIL image."""
    from PIL import Image

    array = pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)
    return Image.fromarray(array.contiguous().numpy())


def differences(ours: Preprocessing, theirs: Preprocessing) -> Sequence[str]:
    """Each field that differs, as ``name ours (theirs)``."""
    own, other = asdict(ours), asdict(theirs)
    return [f"{k} {_as_text(own[k])} ({_as_text(other[k])})" for k in own if own[k] != other[k]]


def _as_text(value: Any) -> str:
    return "[" + ", ".join(f"{v:g}" for v in value) + "]" if isinstance(value, tuple) else str(value)
