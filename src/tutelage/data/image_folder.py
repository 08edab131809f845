"""Folders of image files: a sub-folder for each class."""

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tutelage.data.batch import IGNORE
from tutelage.data.image_files import (
    HIDDEN,
    IMAGE_EXTENSIONS,
    OTHER,
    OUTSIDE,
    UNREADABLE,
    describe_skipped,
    find_images,
    is_hidden,
    kind_of_file,
    open_image,
)
from tutelage.data.raw_images import SPLIT_NAMES, UNLABELED, RawImages, RawSplit, index_values, path_id
from tutelage.errors import DataError, shorten


def read_image_folder(path: Path, classes: list[str] | None, *, by_folder: bool = False) -> RawImages:
    """Read image files in one sub-folder per class, optionally inside split folders.

    A folder ``unlabeled``, beside ``train`` or beside the classes, has training images without labels. Hidden files,
    files that are not images and folders of them are skipped and counted. A sample id is a hash of the path, so it
    does not change when files are added. With ``by_folder`` the folder between class and file (``night`` in
    ``train/CLASS/night/1.png``) is the route of the sample.

    Raises:
        DataError: the folder or images are missing, splits have different classes, ``classes`` are unknown, or an
            image has no route.
    """
    if not path.is_dir():
        raise DataError(
            "no such folder" if not path.exists() else "not a folder",
            where=str(path),
            remedy="data.path must have one sub-folder per class, or train/ with these sub-folders",
        )
    roots = {
        split: folder
        for split, names in SPLIT_NAMES.items()
        for folder in (path / name for name in names)
        if folder.is_dir()
    }
    if "train" not in roots:
        roots = {"train": path}
    skipped = Counter[str]()
    if path not in roots.values():
        known = [*(root.name for root in roots.values()), *UNLABELED]
        skipped["folders that are not splits"] += sum(name not in known for name in _subfolders(path, skipped))
        skipped[OUTSIDE] += sum(kind_of_file(p.name, skipped) for p in path.iterdir() if p.is_file())
    splits: dict[str, RawSplit] = {}
    route_names: list[str] = []
    names = classes
    for split, root in roots.items():
        by_class = _class_images(root, classes, skipped)
        unlabeled: list[Path] = []
        if split == "train":
            inside = [name for name in UNLABELED if name in by_class and name not in (classes or ())]
            unlabeled = [file for name in inside for file in by_class.pop(name)]
            if root != path:
                unlabeled += [file for name in UNLABELED for file in find_images(path / name, skipped)]
            names = _check_class_folders(root, by_class, classes)
        assert names is not None
        if unknown := [c for c in by_class if c not in names]:
            raise DataError(
                f"classes {unknown[:5]} are not among those of the training images",
                where=str(root),
                remedy=f"classes of the training images: {', '.join(names[:20])}",
            )
        files = [file for name in names for file in by_class.get(name, [])]
        labels = [label for label, name in enumerate(names) for _ in by_class.get(name, [])]
        if split == "train":
            files, labels = files + unlabeled, labels + [IGNORE] * len(unlabeled)
        route = index_values(_routes(files, path, roots), route_names) if by_folder else None
        ids = torch.tensor([path_id(p.relative_to(path).as_posix()) for p in files], dtype=torch.int64)
        opener = partial(_open_file, files)
        splits[split] = RawSplit(torch.tensor(labels, dtype=torch.int64), ids, open=opener, route=route)
    assert names is not None
    return RawImages(names, splits, route_names=route_names, note=describe_skipped(skipped, path))


def _class_images(root: Path, classes: list[str] | None, skipped: Counter[str]) -> dict[str, list[Path]]:
    """The images of each sub-folder of a split.

    Raises:
        DataError: a folder of a class has no image that can be read.
    """
    by_class = {}
    skipped[OUTSIDE] += sum(kind_of_file(p.name, skipped) for p in root.iterdir() if p.is_file())
    for name in _subfolders(root, skipped):
        inside = Counter[str]()
        files = find_images(root / name, inside)
        if not files and inside[OTHER] and not inside.keys() & UNREADABLE and name not in (classes or ()):
            skipped["folders without images"] += 1
            continue
        skipped.update(inside)
        by_class[name] = files
    return by_class


def _check_class_folders(root: Path, by_class: dict[str, list[Path]], classes: list[str] | None) -> list[str]:
    """The class names of the training images."""
    if not by_class:
        raise DataError(
            "has no folders of classes", where=str(root), remedy="put the images of each class in one folder"
        )
    if classes is not None and sorted(classes) != list(by_class):
        raise DataError(
            f"data.classes is {shorten(classes)}, the folders are {shorten(list(by_class))}",
            where=str(root),
            remedy="name every folder once, in the order of the class indices",
        )
    if empty := next((name for name, files in by_class.items() if not files), None):
        unread = Counter[str]()
        find_images(root / empty, unread)
        types = sorted(unread.keys() & UNREADABLE)
        raise DataError(
            "has no images" + (f" that can be read, only {', '.join(types)}" if types else ""),
            where=str(root / empty),
            remedy=f"add files ending in one of {', '.join(sorted(IMAGE_EXTENSIONS))}, or remove the folder",
        )
    return classes or list(by_class)


def _routes(files: list[Path], path: Path, roots: dict[str, Path]) -> list[str]:
    """The folder between class and file, for each file."""
    depth = 1 if path in roots.values() else 2
    folders = []
    for file in files:
        parts = file.relative_to(path).parts
        between = parts[1 if parts[0] in UNLABELED else depth : -1]
        if not between:
            raise DataError(
                "is directly in the folder of its class, so it has no route",
                where=str(file),
                remedy="put every image into a sub-folder of its class, or remove data.route",
            )
        folders.append(between[0])
    return folders


def _subfolders(path: Path, skipped: Counter[str]) -> list[str]:
    names = sorted(d.name for d in path.iterdir() if d.is_dir())
    visible = [name for name in names if not is_hidden(name)]
    skipped[HIDDEN] += len(names) - len(visible)
    return visible


def _open_file(files: list[Path], row: int) -> Any:
    return open_image(files[row])
