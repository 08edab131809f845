"""Image files: which files of a folder are images, and how one is decoded."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

from tutelage.errors import DataError, require

IMAGE_EXTENSIONS = {
    ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff",
    ".webp",
}  # fmt: skip
"""Suffixes of image files that can be read."""

UNREADABLE = {
    ".arw", ".avif", ".cr2", ".cr3", ".dng", ".exr", ".heic", ".heif", ".jp2", ".jxl", ".nef", ".orf", ".psd", ".raf",
    ".raw", ".rw2", ".svg", ".tga",
}  # fmt: skip
"""Suffixes of image files that cannot be read."""

CONVERT = "convert it to .jpg or .png"
HIDDEN, OTHER = "hidden files or folders", "files that are not images"
OUTSIDE = "images outside of the folders of classes (images without labels belong in a folder unlabeled)"


def is_hidden(name: str) -> bool:
    """Whether a name starts with a dot, or is of a folder that macOS, Windows or a file server adds."""
    return name.startswith(".") or name in ("__MACOSX", "@eaDir", "$RECYCLE.BIN")


def find_images(folder: Path, skipped: Counter[str]) -> list[Path]:
    """The image files in a folder and its sub-folders, sorted; what is skipped is counted by kind in ``skipped``."""
    images: list[Path] = []
    for place, folders, files in os.walk(folder):
        visible = [name for name in folders if not is_hidden(name)]
        skipped[HIDDEN] += len(folders) - len(visible)
        folders[:] = visible
        images += [Path(place, name) for name in files if kind_of_file(name, skipped)]
    return sorted(images)


def kind_of_file(name: str, skipped: Counter[str]) -> bool:
    """Whether a file is an image that can be read; if not, it is counted in ``skipped``."""
    suffix = os.path.splitext(name)[1].lower()
    if not is_hidden(name) and suffix in IMAGE_EXTENSIONS:
        return True
    skipped[HIDDEN if is_hidden(name) else suffix if suffix in UNREADABLE else OTHER] += 1
    return False


def describe_skipped(skipped: Counter[str], where: Path) -> str | None:
    """One line on what was skipped in a folder; ``None`` if nothing was."""
    parts = [
        f"{n:,} {kind} images, a type that cannot be read ({CONVERT})" if kind in UNREADABLE else f"{n:,} {kind}"
        for kind, n in sorted(skipped.items())
        if n
    ]
    return f"note: skipped in {where}: {', '.join(parts)}" if parts else None


def open_image(path: Path) -> Any:
    """Open and decode an image with PIL, turned as its EXIF orientation says, as ``datasets`` does.

    Raises:
        DataError: the file is missing, truncated or no image.
    """
    require("PIL", "vision", "reading image files")
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with open(path, "rb") as file:
            image = Image.open(file)
            image.load()
            return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        reason = "it is not an image" if isinstance(error, UnidentifiedImageError) else str(error)
        remedy = "remove the file or replace it"
        if path.suffix.lower() in UNREADABLE:
            reason, remedy = f"{path.suffix} is an image type that cannot be read", CONVERT
        raise DataError(f"cannot be decoded: {reason}", where=str(path), remedy=remedy) from None
