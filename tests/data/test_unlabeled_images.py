"""Images without labels, and what a folder contains that is not an image of a class."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from tutelage import distill
from tutelage.config import DataConfig
from tutelage.data import ImageData, load_images
from tutelage.data.batch import IGNORE
from tutelage.data.image_files import IMAGE_EXTENSIONS, find_images
from tutelage.data.images import choose_rows
from tutelage.errors import DataError
from tutelage.export.inference import list_image_files
from tutelage.methods import LogitMethod


def write(folder: Path, count: int, value: int, name: str = "{}.png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(np.full((12, 12, 3), value + i, np.uint8)).save(folder / name.format(i))
    return folder


def labelled(root: Path) -> Path:
    for k, name in enumerate(("cat", "dog")):
        write(root / name, 10, 100 * k)
    return root


def load(root: Path, **options: Any) -> tuple[ImageData, list[str]]:
    lines: list[str] = []
    return load_images("imagefolder", path=str(root), size=8, say=lines.append, **options), lines


def hidden(data: ImageData) -> int:
    return int((data.train.labels == IGNORE).sum())


@pytest.mark.parametrize("place", ["unlabeled", "train/unlabeled", "train/unlabelled/deeper", "flat"])
def test_a_folder_of_images_without_labels_joins_the_training_images(place: str, tmp_path: Path) -> None:
    flat = place == "flat"
    labelled(tmp_path if flat else tmp_path / "train")
    write(tmp_path / ("unlabeled" if flat else place), 7, 50)
    data, lines = load(tmp_path)
    assert data.classes == ["cat", "dog"]
    assert hidden(data) == 7
    assert len(data.train) == 21  # 14 of 20 with a label, the others are validation and test
    assert not (data.validation.labels == IGNORE).any()
    assert not (data.test.labels == IGNORE).any()
    assert lines == [
        "note: 7 of 27 images of the train split have no label; the student learns them from the teacher"
    ]
    assert hidden(load(tmp_path, unlabeled="drop")[0]) == 0


def test_labels_are_counted_among_the_labelled_images(tmp_path: Path) -> None:
    write(labelled(tmp_path) / "unlabeled", 7, 50)
    data, _ = load(tmp_path, labels=4)
    assert hidden(data) == 21 - 4
    assert Counter(data.train.labels[data.train.labels != IGNORE].tolist()) == {0: 2, 1: 2}


def test_the_images_with_labels_are_split_as_without_the_others(tmp_path: Path) -> None:
    before, _ = load(labelled(tmp_path))
    write(tmp_path / "unlabeled", 7, 50)
    after, _ = load(tmp_path)
    for name in ("validation", "test"):
        assert torch.equal(getattr(before, name).ids, getattr(after, name).ids)


def test_a_class_may_be_called_unlabeled_if_the_recipe_names_it(tmp_path: Path) -> None:
    write(labelled(tmp_path) / "unlabeled", 7, 50)
    data, _ = load(tmp_path, classes=["cat", "dog", "unlabeled"], validation=0.2)
    assert len(data.classes) == 3
    assert hidden(data) == 0


def hub(folder: Path, labels: dict[str, list[Any]], feature: Any) -> str:
    """A data set of Hugging Face in a folder of Parquet files."""
    folder.mkdir()
    for split, values in labels.items():
        images = [Image.fromarray(np.full((12, 12, 3), i, np.uint8)) for i in range(len(values))]
        features = datasets.Features({"image": datasets.Image(), "label": feature})
        part = datasets.Dataset.from_dict({"image": images, "label": values}, features=features)
        part.to_parquet(folder / f"{split}.parquet")
    return f"hf:{folder}"


NAMES = datasets.ClassLabel(names=["cat", "dog"])


@pytest.mark.parametrize(("feature", "cat", "dog"), [(NAMES, 0, 1), (datasets.Value("string"), "cat", "dog")])
def test_null_and_minus_one_are_no_label_in_a_hugging_face_data_set(
    feature: Any, cat: Any, dog: Any, tmp_path: Path
) -> None:
    none = [None, -1] if feature is NAMES else [None, " "]
    source = hub(tmp_path / "x", {"train": [cat, dog] * 8 + none, "test": [cat, None, dog]}, feature)
    lines: list[str] = []
    options = {"cache_dir": str(tmp_path / "c")}
    data = load_images(source, options=options, label_column="label", size=8, say=lines.append)
    assert data.classes == ["cat", "dog"]
    assert hidden(data) == 2
    assert data.test.labels.tolist() == [0, 1]
    assert not set(data.train.ids.tolist()) & set(data.test.ids.tolist())
    assert [line.partition(" images")[0] for line in lines] == ["note: 2 of 18", "note: 1 of 3"]


def test_a_split_without_labels_is_training_data_or_left_out_and_said(tmp_path: Path) -> None:
    labels = {"train": [0, 1] * 10, "test": [-1, -1], "unlabeled": [None] * 5}
    hub(tmp_path / "x", labels, NAMES)
    options = {"data_files": {split: str(tmp_path / "x" / f"{split}.parquet") for split in labels}}
    lines: list[str] = []
    data = load_images("hf:parquet", options=options | {"cache_dir": str(tmp_path / "c")}, size=8, say=lines.append)
    assert hidden(data) == 5
    assert len(data.test) == 4
    assert any("the test split has no labels" in line for line in lines)
    ids = [i for split in (data.train, data.validation, data.test) for i in split.ids.tolist()]
    assert len(set(ids)) == len(ids)
    rows = (data.train.labels == IGNORE).nonzero().flatten()
    assert data.train.pixels is not None
    assert data.train.pixels[rows, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]


def test_a_label_of_another_type_names_row_and_column(tmp_path: Path) -> None:
    source = hub(tmp_path / "x", {"train": [0.0, 1.0, 0.5]}, datasets.Value("float32"))
    with pytest.raises(DataError, match=r"row 2 \(the first is 0\), column 'label' holds 0.5"):
        load_images(source, options={"cache_dir": str(tmp_path / "c")}, label_column="label")


def test_a_torchvision_split_without_labels_joins_the_training_images(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets as known

    class Stl(known.VisionDataset):  # the data set STL10 has this interface, and 2.6 GB
        classes = ("cat", "dog")

        def __init__(self, root: str, split: str = "train", download: bool = False) -> None:
            super().__init__(root)
            if split not in ("train", "test", "unlabeled"):
                raise ValueError(f"Unknown value {split!r} for argument split")
            self.labels = np.array([-1] * 6 if split == "unlabeled" else [0, 1] * 10)

        def __getitem__(self, row: int) -> tuple[Any, int]:
            return Image.fromarray(np.zeros((12, 12, 3), np.uint8)), int(self.labels[row])

        def __len__(self) -> int:
            return len(self.labels)

    monkeypatch.setattr(known, "STL10", Stl)
    assert hidden(load_images("torchvision:STL10", size=8)) == 6
    assert hidden(load_images("torchvision:STL10", size=8, unlabeled="drop")) == 0


def test_what_is_not_an_image_of_a_class_is_skipped_and_counted(tmp_path: Path) -> None:
    before, lines = load(labelled(tmp_path))
    assert lines == []
    write(tmp_path / "cat" / ".ipynb_checkpoints", 2, 0)
    write(tmp_path / "__MACOSX" / "cat", 2, 0)
    write(tmp_path / "dog", 3, 0, "._{}.png")
    write(tmp_path, 2, 0, "stray{}.png")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("about")
    (tmp_path / "labels.csv").write_text("a,b")
    (tmp_path / "cat" / "phone.HEIC").write_bytes(b"x")
    after, (line,) = load(tmp_path)
    assert after.classes == ["cat", "dog"]
    for name in ("train", "validation", "test"):
        assert torch.equal(getattr(before, name).ids, getattr(after, name).ids)
    assert line == (
        f"note: skipped in {tmp_path}: 1 .heic images, a type that cannot be read (convert it to .jpg or .png), "
        "1 files that are not images, 1 folders without images, 5 hidden files or folders, "
        "2 images outside of the folders of classes (images without labels belong in a folder unlabeled)"
    )


def test_a_class_whose_images_cannot_be_read_names_their_type(tmp_path: Path) -> None:
    (labelled(tmp_path) / "owl").mkdir()
    (tmp_path / "owl" / "1.heic").write_bytes(b"x")
    with pytest.raises(DataError, match=r"owl: has no images that can be read, only .heic"):
        load(tmp_path)


def test_predict_and_training_read_the_same_files(tmp_path: Path) -> None:
    for suffix in IMAGE_EXTENSIONS:
        (tmp_path / f"a{suffix}").write_bytes(b"x")
    (tmp_path / "._a.png").write_bytes(b"x")
    lines: list[str] = []
    assert list_image_files([tmp_path], lines.append) == find_images(tmp_path, Counter())
    assert lines == [f"note: skipped in {tmp_path}: 1 hidden files or folders"]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_split_without_any_label_is_refused(split: str, tmp_path: Path) -> None:
    labelled(tmp_path / "train")
    write(tmp_path / split / "unlabeled", 3, 0)
    with pytest.raises(DataError, match="not among those of the training images"):
        load(tmp_path)


def pairs(labels: list[int]) -> torch.utils.data.DataLoader[Any]:
    x = torch.linspace(-1, 1, 5 * len(labels)).view(-1, 5)
    data = torch.utils.data.TensorDataset(x, torch.tensor(labels))
    return torch.utils.data.DataLoader(data, batch_size=4)


@pytest.mark.parametrize(
    ("train", "evaluation", "message"),
    [
        ([0, 1] * 4, [-1, 0, 1, 1], "the evaluation data has a label -1"),
        ([0, 1] * 4, [IGNORE] * 4, "the evaluation data has no labels: every label is -100"),
        ([IGNORE] * 8, [0, 1], "every label of train_loader is -100"),
        ([0, 1, -1, 1], [0, 1], "a training batch has labels from -1 to 1"),
    ],
)
def test_a_caller_s_samples_without_labels_count_nowhere_as_labelled(
    train: list[int], evaluation: list[int], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        distill(
            torch.nn.Linear(5, 2), lambda: torch.nn.Linear(5, 2), pairs(train), eval_data=pairs(evaluation),
            epochs=2, out=tmp_path / "run", verbose=False,
        )  # fmt: skip


def test_a_caller_s_student_learns_from_samples_without_labels(tmp_path: Path) -> None:
    result = distill(
        torch.nn.Linear(5, 2), lambda: torch.nn.Linear(5, 2), pairs([IGNORE] * 8), eval_data=pairs([0, IGNORE, 1]),
        epochs=2, out=tmp_path / "run", verbose=False, baseline=False, method=LogitMethod(alpha=1.0),
    )  # fmt: skip
    assert result.summary["teacher"]["n"] == 2


def test_rows_without_label_are_no_class_when_rows_are_chosen(tmp_path: Path) -> None:
    labels = torch.tensor([0, 1] * 10 + [IGNORE])
    chosen, rest = choose_rows(labels, 11, 0, "data.limit")
    assert torch.cat([chosen, rest]).sort().values.tolist() == list(range(21))
    assert Counter(labels[chosen].tolist()) in ({0: 5, 1: 5, IGNORE: 1}, {0: 5, 1: 6}, {0: 6, 1: 5})
    with pytest.raises(DataError, match=r"2 classes; the smallest has 1, its index is 1"):
        choose_rows(torch.tensor([0] * 6 + [1] + [IGNORE] * 6), 4, 0, "data.limit")
    write(labelled(tmp_path) / "unlabeled", 1, 50)
    data, _ = load(tmp_path, limit=8)
    assert len(data.train) == 8


def test_classes_may_be_numbers(tmp_path: Path) -> None:
    for k, name in enumerate(("1", "2")):
        write(tmp_path / name, 10, 100 * k)
    config = DataConfig(source="imagefolder", path=str(tmp_path), classes=[2, 1])  # type: ignore[list-item]
    assert load(tmp_path, classes=config.classes)[0].classes == ["2", "1"]
    assert load(tmp_path, classes=[2, 1])[0].classes == ["2", "1"]
