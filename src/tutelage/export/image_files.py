"""The preprocessing in the files of an image model, compared with what its library does."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tutelage.data.preprocessing import Preprocessing
from tutelage.errors import CapabilityError
from tutelage.models import read_image_files


@dataclass(frozen=True)
class KnownPreprocessing:
    """What the files of a model say about its images, and which file it is."""

    preprocessing: Preprocessing
    source: str


def known_preprocessing(
    model: str, options: Mapping[str, Any], checkpoint: str | None = None
) -> KnownPreprocessing | None:
    """What the files of a model, as a recipe names it, say about its images; ``None`` if it has no such files.

    Raises:
        CapabilityError: its library does more than resizing, cropping and normalising.
        ModelError: the files cannot be read.
    """
    files = read_image_files(model, options, checkpoint)
    if files is None:
        return None
    if files.pipeline is None:
        return KnownPreprocessing(Preprocessing.from_dict(files.entries or {}), files.source)
    own = identify(files.pipeline, files.candidates)
    if own is None:
        raise CapabilityError(
            f"{files.source} prepares images in another way than by resizing, one square centre crop and "
            "normalisation, and this package cannot reproduce it",
            remedy="use another model; or remove this file: images are then read as the recipe's data section says",
        )
    return KnownPreprocessing(own, files.source)


SAME = 0.03
"""Levels of 255 by which pixels may differ because of rounding."""

Pipeline = Callable[[Any], Tensor]
"""A library's own: a PIL image in RGB -> ``[3, size, size]``."""


def identify(pipeline: Pipeline, candidates: Iterable[Mapping[str, Any]]) -> Preprocessing | None:
    """The preprocessing that gives what a library's pipeline gives, on pictures of random pixels.

    Normalisation and order of the channels are read off the output for plain colours, so that any rescaling is
    included.

    Args:
        candidates: fields of the geometries to try.

    Returns:
        ``None`` if no candidate gives the same, or the output is not square.
    """
    from PIL import Image

    try:
        plain = ((0, 0, 0), (255, 255, 255), (255, 0, 0))
        colours = [pipeline(Image.new("RGB", (64, 64), colour)) for colour in plain]
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError):  # it takes no RGB pictures
        return None
    side = colours[0].shape[-1]
    if colours[0].shape != (3, side, side) or not colours[0].is_floating_point():
        return None
    black, white, red = (x[:, side // 2, side // 2].double() for x in colours)
    if bool((white == black).any()):
        return None
    std = 1 / (white - black)
    is_red = (red - black).abs() > 0.5 * (white - black).abs()
    common: dict[str, Any] = {
        "size": side,
        "mean": (-black * std).tolist(),
        "std": std.tolist(),
        "order": "BGR" if is_red.tolist() == [False, False, True] else "RGB",
    }
    noise = np.random.default_rng(0)
    shapes = ((461, 307), (47, 90), (side, side + 1))
    pictures = [Image.fromarray(noise.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in shapes]
    wanted = [pipeline(picture).float() for picture in pictures]
    for candidate in candidates:
        own = Preprocessing(**{**common, **candidate})
        if all(_same(own, picture, theirs) for picture, theirs in zip(pictures, wanted, strict=True)):
            return own
    return None


def greatest_difference(own: Preprocessing, pipeline: Pipeline) -> float:
    """The greatest difference from a library's pipeline on a picture of random pixels, in levels of 255."""
    from PIL import Image

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (461, 307, 3), dtype=np.uint8))
    ours, theirs = own.normalise(own.pixels(picture)[None]), pipeline(picture)[None].float()
    return 255 * float((own.denormalise(ours) - own.denormalise(theirs)).abs().max())


def _same(own: Preprocessing, picture: Any, theirs: Tensor) -> bool:
    ours = own.normalise(own.pixels(picture)[None])[0]
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=0, atol=1e-4)
