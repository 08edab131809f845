"""Sources of labelled images: one function for each kind of source."""

import gzip
import inspect
import struct
import zlib
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tutelage.data.batch import IGNORE
from tutelage.data.image_folder import read_image_folder
from tutelage.data.raw_images import SPLIT_NAMES, UNLABELED, RawImages, RawSplit, index_values, join_unlabeled
from tutelage.errors import ConfigError, DataError, first_line, nearest, require, shorten, suggest

FASHION_CLASSES = [
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
]  # fmt: skip
FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")


def open_source(
    source: str,
    *,
    path: str | None,
    options: dict[str, Any],
    image_column: str | None,
    label_column: str | None,
    classes: list[str] | None,
    route: str | None = None,
    unlabeled: bool = True,
) -> RawImages:
    """Read a source with the splits that it has; training images without labels only if ``unlabeled``.

    Raises:
        ConfigError: the source is unknown.
        DataError: data is missing or broken.
    """
    kind, _, name = source.partition(":")
    if kind == "torchvision" and name:
        return read_torchvision(name, path, options, unlabeled=unlabeled)
    if kind == "hf" and name:
        return read_huggingface(name, options, image_column, label_column, route, unlabeled=unlabeled)
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


def _open_item(items: Any, key: str | int, row: int) -> Any:
    return items[row][key]


class _NoSuchSplit(DataError):
    """A data set of torchvision has no split of this name."""


def read_torchvision(name: str, path: str | None, options: dict[str, Any], *, unlabeled: bool = True) -> RawImages:
    """Read a classification data set of torchvision, by the name of its class; download it if possible.

    A split ``unlabeled`` belongs to the training images.

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
        wanted = {split: SPLIT_NAMES[split] for split in ("validation", "test")}
        for split, candidates in (wanted | ({"unlabeled": UNLABELED[:1]} if unlabeled else {})).items():
            for candidate in candidates:
                with suppress(_NoSuchSplit):
                    parts[split] = build(split=candidate)
                    break
    else:
        parts = {"train": build()}
    splits = join_unlabeled({split: _torchvision_split(part) for split, part in parts.items()})
    return RawImages(_class_names(getattr(parts["train"], "classes", None), splits), splits)


def _torchvision_split(part: Any) -> RawSplit:
    labels = next((getattr(part, n) for n in ("targets", "labels", "_labels") if hasattr(part, n)), None)
    if labels is None:
        labels = [int(part[i][1]) for i in range(len(part))]
    indices = torch.as_tensor(np.asarray(labels)).long()
    indices = indices.masked_fill(indices == -1, IGNORE)
    return RawSplit(indices, torch.arange(len(indices)), open=partial(_open_item, part, 0))


def load_hub_splits(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Load a data set of Hugging Face and name its splits train, validation, test and unlabeled.

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
        split: loaded[candidate]
        for split, names in (SPLIT_NAMES | {"unlabeled": UNLABELED}).items()
        for candidate in names
        if candidate in loaded
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
    *,
    unlabeled: bool = True,
) -> RawImages:
    """Read an image classification data set with ``datasets.load_dataset``.

    A label ``null`` or -1 is no label; a split ``unlabeled`` belongs to the training images.

    Raises:
        DataError: it cannot be loaded, has no image or label column, or a label is of another type.
    """
    require("datasets", "vision", f"the data set hf:{name}")
    import datasets

    parts = load_hub_splits(name, options)
    if not unlabeled:
        parts.pop("unlabeled", None)
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
    assert label is not None
    columns = {split: part[label][:] for split, part in parts.items() if label in part.features}
    texts = {v for values in columns.values() for v in values if isinstance(v, str) and v.strip()}
    names = list(getattr(features[label], "names", None) or sorted(texts))
    splits, route_names = {}, list[str]()
    for split, part in parts.items():
        labels = torch.full((len(part),), IGNORE)
        if split in columns and split != "unlabeled":
            labels = _label_indices(columns[split], names if texts else None, f"hf:{name}, {split} split", label)
        indices = None
        if route is not None:
            values = part[route][:]
            if isinstance(features[route], datasets.ClassLabel):
                values = [features[route].names[v] if v is not None and v >= 0 else None for v in values]
            if None in values:
                raise DataError(
                    f"row {values.index(None)} (the first is 0), column {route!r} has no value",
                    where=f"hf:{name}, {split} split",
                    remedy="give every row a value, or remove data.route",
                )
            indices = index_values(values, route_names)
        splits[split] = RawSplit(
            labels, torch.arange(len(labels)), open=partial(_open_item, part, image), route=indices
        )
    splits = join_unlabeled(splits)
    return RawImages(_class_names(names, splits), splits, route_names=route_names)


def _label_indices(values: Sequence[Any], names: list[str] | None, where: str, column: str) -> Tensor:
    """The class of each value, an index or one of ``names``; -100 for ``null``, -1 and empty texts.

    Raises:
        DataError: a value is of another type; names row and column.
    """
    known = None if names is None else {name: i for i, name in enumerate(names)}
    indices = []
    for row, value in enumerate(values):
        if value is None or value == -1 or (isinstance(value, str) and not value.strip()):
            indices.append(IGNORE)
        elif known is None and (isinstance(value, int) or (isinstance(value, float) and value.is_integer())):
            indices.append(int(value))
        elif known is not None and value in known:
            indices.append(known[value])
        else:
            raise DataError(
                f"row {row} (the first is 0), column {column!r} holds {shorten(value)}, not a label",
                where=where,
                remedy="give indices of classes, names, or null for an image without label",
            )
    return torch.tensor(indices, dtype=torch.int64)


def _class_names(names: Sequence[Any] | None, splits: dict[str, RawSplit]) -> list[str]:
    """The class names of a source; without names the numbers up to the highest label."""
    highest = max((int(split.labels.max()) for split in splits.values() if len(split)), default=-1)
    return [str(name) for name in names or range(highest + 1)]
