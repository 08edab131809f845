"""Sources of labelled images: one function for each kind of source."""

import gzip
import hashlib
import inspect
import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from tutelage.errors import ConfigError, DataError, first_line, nearest, require, suggest

IMAGE_EXTENSIONS = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}
FASHION_CLASSES = [
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
]  # fmt: skip
FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class RawSplit:
    """A split of a source: labels, and pixels or a function that opens an image.

    Attributes:
        labels: ``[N]`` class indices.
        ids: ``[N]`` stable sample ids.
        pixels: uint8 ``[N, C, H, W]``; ``None`` if there is ``open``.
        open: row -> PIL image.
        route: int64 ``[N]``, index of the route of each row.
    """

    labels: Tensor
    ids: Tensor
    pixels: Tensor | None = None
    open: Callable[[int], Any] | None = None
    route: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: Tensor) -> Self:
        """The split with only the given rows."""
        tensors = {"labels": self.labels, "ids": self.ids, "pixels": self.pixels, "route": self.route}
        chosen: dict[str, Any] = {name: x[rows] for name, x in tensors.items() if x is not None}
        return replace(self, open=None if self.open is None else partial(_open_row, self.open, rows), **chosen)


def _open_row(opener: Callable[[int], Any], rows: Tensor, row: int) -> Any:
    return opener(int(rows[row]))


@dataclass
class RawImages:
    """A source: its splits, its class names, and the mean and standard deviation of its pixels, if known."""

    classes: list[str]
    splits: dict[str, RawSplit]
    mean: list[float] | None = None
    std: list[float] | None = None
    route_names: list[str] = field(default_factory=list)
    """The value of each index in ``route``."""


def open_source(
    source: str,
    *,
    path: str | None,
    options: dict[str, Any],
    image_column: str | None,
    label_column: str | None,
    classes: list[str] | None,
    route: str | None = None,
) -> RawImages:
    """Read a source with the splits that it has.

    Raises:
        ConfigError: the source is unknown.
        DataError: data is missing or broken.
    """
    kind, _, name = source.partition(":")
    if kind == "torchvision" and name:
        return read_torchvision(name, path, options)
    if kind == "hf" and name:
        return read_huggingface(name, options, image_column, label_column, route)
    if source == "imagefolder":
        assert path is not None
        return read_image_folder(Path(path), classes, by_folder=route is not None)
    if source == "digits":
        return read_digits()
    if source == "fashion-mnist":
        return read_fashion_mnist(path)
    names = ["digits", "fashion-mnist", "imagefolder", "torchvision:NAME", "hf:DATASET_ID"]
    raise ConfigError(
        f"data.source: unknown source {source!r}" + suggest(source, names),
        remedy=f"allowed: {', '.join(names)}",
    )


def read_digits() -> RawImages:
    """The 1,797 images of handwritten digits of scikit-learn, 8x8, in a single split."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = torch.from_numpy(np.rint(images * (255 / 16)).astype(np.uint8)).view(-1, 1, 8, 8)
    split = RawSplit(torch.from_numpy(labels).long(), torch.arange(len(labels)), pixels)
    return RawImages([str(i) for i in range(10)], {"train": split})


def read_fashion_mnist(path: str | None) -> RawImages:
    """Fashion-MNIST, 28x28: from the files of Debian's package if it is installed, else from torchvision."""
    folder = Path(path) if path else FASHION_FOLDER
    if (folder / "train-images-idx3-ubyte.gz").exists():
        splits = {}
        for split, stem in (("train", "train"), ("test", "t10k")):
            pixels = read_idx(folder / f"{stem}-images-idx3-ubyte.gz").unsqueeze(1)
            labels = read_idx(folder / f"{stem}-labels-idx1-ubyte.gz").long()
            if len(pixels) != len(labels):
                raise DataError(
                    f"{stem} has {len(pixels)} images but {len(labels)} labels",
                    where=str(folder),
                    remedy="download the four files again",
                )
            splits[split] = RawSplit(labels, torch.arange(len(labels)), pixels)
        return RawImages(FASHION_CLASSES, splits, [0.2860], [0.3530])
    try:
        raw = read_torchvision("FashionMNIST", path, {})
    except DataError as error:
        raise DataError(
            f"Fashion-MNIST is not in {folder}, and the download failed: {error.what}",
            remedy="on Debian or Ubuntu: apt-get install dataset-fashion-mnist",
        ) from None
    return RawImages(FASHION_CLASSES, raw.splits, [0.2860], [0.3530])


def read_idx(path: Path) -> Tensor:
    """Read a gzipped IDX file of unsigned bytes (the format of MNIST).

    Raises:
        DataError: the file is missing, truncated or has another format.
    """
    try:
        with gzip.open(path) as file:
            data = file.read()
        zeros, dtype, dims = struct.unpack(">HBB", data[:4])
        shape = struct.unpack(f">{dims}I", data[4 : 4 + 4 * dims])
        if zeros != 0 or dtype != 8:
            raise ValueError(f"type code {dtype:#x}, expected 0x8 (unsigned bytes)")
        return torch.from_numpy(np.frombuffer(data, np.uint8, offset=4 + 4 * dims).reshape(shape).copy())
    except FileNotFoundError:
        raise DataError(
            "no such file", where=str(path), remedy="put all four files of the data set into this folder"
        ) from None
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise DataError(
            f"is damaged, or is not a gzipped IDX file: {error}", where=str(path), remedy="download it again"
        ) from None


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
        raise DataError(
            f"cannot be decoded: {reason}", where=str(path), remedy="remove the file or replace it"
        ) from None


def _open_file(files: list[Path], row: int) -> Any:
    return open_image(files[row])


def _open_item(items: Any, key: str | int, row: int) -> Any:
    return items[row][key]


def read_image_folder(path: Path, classes: list[str] | None, *, by_folder: bool = False) -> RawImages:
    """Read image files in one sub-folder per class, optionally inside split folders.

    A sample id is a hash of the path, so it does not change when files are added. With ``by_folder`` the folder
    between class and file (``night`` in ``train/CLASS/night/1.png``) is the route of the sample.

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
    folders = _subfolders(roots["train"])
    if not folders:
        raise DataError(
            "has no sub-folders", where=str(roots["train"]), remedy="put the images of each class in one folder"
        )
    if classes is not None and sorted(classes) != folders:
        raise DataError(
            f"data.classes is {classes}, the folders are {folders}",
            where=str(roots["train"]),
            remedy="name every folder once, in the order of the class indices",
        )
    names = classes or folders
    splits: dict[str, RawSplit] = {}
    route_names: list[str] = []
    for split, root in roots.items():
        if unknown := [c for c in _subfolders(root) if c not in names]:
            raise DataError(
                f"classes {unknown[:5]} are not among those of the training images",
                where=str(root),
                remedy=f"classes of the training images: {', '.join(names[:20])}",
            )
        files: list[Path] = []
        labels: list[int] = []
        for label, name in enumerate(names):
            mine = sorted(p for p in (root / name).rglob("*") if p.suffix.lower() in IMAGE_EXTENSIONS)
            if not mine and split == "train":
                raise DataError(
                    "has no images",
                    where=str(root / name),
                    remedy=f"add files ending in one of {', '.join(sorted(IMAGE_EXTENSIONS))}, or remove the folder",
                )
            files += mine
            labels += [label] * len(mine)
        route = None
        if by_folder:
            between = [p.relative_to(root).parts[1:-1] for p in files]
            if () in between:
                raise DataError(
                    "is directly in the folder of its class, so it has no route",
                    where=str(files[between.index(())]),
                    remedy="put every image into a sub-folder of its class, or remove data.route",
                )
            route = _index_values((folders[0] for folders in between), route_names)
        ids = torch.tensor([path_id(p.relative_to(path).as_posix()) for p in files], dtype=torch.int64)
        opener = partial(_open_file, files)
        splits[split] = RawSplit(torch.tensor(labels, dtype=torch.int64), ids, open=opener, route=route)
    return RawImages(names, splits, route_names=route_names)


def _subfolders(path: Path) -> list[str]:
    return sorted(d.name for d in path.iterdir() if d.is_dir() and not d.name.startswith("."))


def _index_values(values: Iterable[Any], names: list[str]) -> Tensor:
    """The index of each value in ``names``, which gets new values in alphabetical order."""
    texts = [str(value) for value in values]
    names += sorted(set(texts) - set(names))
    number = {name: i for i, name in enumerate(names)}
    return torch.tensor([number[text] for text in texts], dtype=torch.int64)


class _NoSuchSplit(DataError):
    """A data set of torchvision has no split of this name."""


def read_torchvision(name: str, path: str | None, options: dict[str, Any]) -> RawImages:
    """Read a classification data set of torchvision, by the name of its class; download it if possible.

    Raises:
        DataError: there is no such data set, or it cannot be loaded.
    """
    require("torchvision", "vision", f"the data set torchvision:{name}")
    from torchvision import datasets

    cls = getattr(datasets, name, None)
    if not inspect.isclass(cls):
        known = [n for n in dir(datasets) if inspect.isclass(getattr(datasets, n))]
        raise DataError(
            f"torchvision has no data set {name!r}",
            remedy=f"nearest: {', '.join(nearest(name, known)) or 'none'}; see torchvision.datasets",
        )
    parameters = inspect.signature(cls).parameters
    common = dict(options)
    if "root" in parameters:
        common.setdefault("root", path or "data")
    if "download" in parameters:
        common.setdefault("download", True)

    def build(**split: Any) -> Any:
        try:
            return cls(**common, **split)
        except TypeError as error:
            raise DataError(
                f"torchvision:{name} with options {options}: {error}", remedy="fix data.options"
            ) from None
        except ValueError as error:
            raise _NoSuchSplit(f"torchvision:{name}: {first_line(error)}", remedy="fix data.options") from None
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"torchvision:{name} cannot be loaded: {first_line(error)}",
                remedy="check the network, or download it yourself and set data.path to its folder",
            ) from None

    if "train" in parameters:
        parts = {"train": build(train=True), "test": build(train=False)}
    elif "split" in parameters:
        parts = {"train": build(split="train")}
        for split in ("validation", "test"):
            for candidate in SPLIT_NAMES[split]:
                with suppress(_NoSuchSplit):
                    parts[split] = build(split=candidate)
                    break
    else:
        parts = {"train": build()}
    splits = {split: _torchvision_split(part) for split, part in parts.items()}
    return RawImages(_class_names(getattr(parts["train"], "classes", None), splits), splits)


def _torchvision_split(part: Any) -> RawSplit:
    labels = next((getattr(part, n) for n in ("targets", "labels", "_labels") if hasattr(part, n)), None)
    if labels is None:
        labels = [int(part[i][1]) for i in range(len(part))]
    indices = torch.as_tensor(np.asarray(labels)).long()
    return RawSplit(indices, torch.arange(len(indices)), open=partial(_open_item, part, 0))


def load_hub_splits(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Load a data set of Hugging Face and name its splits train, validation and test.

    A data set without splits becomes the training split.

    Raises:
        DataError: it cannot be loaded, or has no training split.
    """
    import datasets

    try:
        loaded = datasets.load_dataset(name, **options)
    except Exception as error:  # noqa: BLE001 - the library raises what its loaders raise
        raise DataError(
            f"hf:{name} cannot be loaded: {type(error).__name__}: {first_line(error)}",
            remedy="check the id, data.options and the network; with HF_HUB_OFFLINE=1 only local files are used",
        ) from None
    loaded = loaded if isinstance(loaded, datasets.DatasetDict) else datasets.DatasetDict({"train": loaded})
    parts = {
        split: loaded[candidate] for split, names in SPLIT_NAMES.items() for candidate in names if candidate in loaded
    }
    if "train" not in parts:
        raise DataError(f"hf:{name} has splits {list(loaded)}, none called train", remedy="name one in data.options")
    return parts


def read_huggingface(
    name: str,
    options: dict[str, Any],
    image_column: str | None,
    label_column: str | None,
    route: str | None = None,
) -> RawImages:
    """Read an image classification data set with ``datasets.load_dataset``.

    Raises:
        DataError: it cannot be loaded, or has no image or label column.
    """
    require("datasets", "vision", f"the data set hf:{name}")
    import datasets

    parts = load_hub_splits(name, options)
    features = parts["train"].features
    image = image_column or next((k for k, f in features.items() if isinstance(f, datasets.Image)), None)
    label = label_column or next((k for k, f in features.items() if isinstance(f, datasets.ClassLabel)), None)
    keys = [("image", image, "image_column"), ("label", label, "label_column")]
    for what, column, key in [*keys, *([("route", route, "route")] if route is not None else [])]:
        if column is None or column not in features:
            raise DataError(
                f"hf:{name} has no {what} column" + (f" {column!r}" if column else " of that type"),
                remedy=f"set data.{key} to one of {', '.join(features)}",
            )
    assert image is not None
    feature = features[label]
    splits, route_names = {}, list[str]()
    for split, part in parts.items():
        labels = torch.tensor(part[label][:], dtype=torch.int64)
        indices = None
        if route is not None:
            values = part[route][:]
            if isinstance(features[route], datasets.ClassLabel):
                names = features[route].names
                values = [names[value] if value >= 0 else value for value in values]
            indices = _index_values(values, route_names)
        splits[split] = RawSplit(
            labels, torch.arange(len(labels)), open=partial(_open_item, part, image), route=indices
        )
    return RawImages(_class_names(getattr(feature, "names", None), splits), splits, route_names=route_names)


def _class_names(names: Sequence[Any] | None, splits: dict[str, RawSplit]) -> list[str]:
    """The class names of a source; without names the numbers up to the highest label."""
    highest = max(int(split.labels.max()) for split in splits.values() if len(split))
    return [str(name) for name in names or range(highest + 1)]


def path_id(path: str) -> int:
    """A stable sample id, from a path relative to the data set's folder."""
    return int.from_bytes(hashlib.blake2b(path.encode(), digest_size=8).digest(), "big") >> 1
