"""The preprocessing in the files of an image model, compared with what its library does."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tutelage.data.preprocessing import Preprocessing, identify
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
