"""Samples keep their ids, splits stay apart, and a view can be drawn again from its seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from tutelage.data import (
    Batch,
    LoaderBatches,
    PlannedBatches,
    RankSlice,
    SequentialBatches,
    as_batch,
    causal_batch,
    load_images,
)
from tutelage.data.batch import IGNORE, even_spans
from tutelage.data.views import apply_seeded, flip, shift, uniform, view_seeds
from tutelage.errors import ConfigError, DataError
from tutelage.export.inference import read_image


def test_digits_splits_are_disjoint_stratified_and_fixed() -> None:
    a, b = load_images("digits"), load_images("digits")
    ids = [set(s.ids.tolist()) for s in (a.train, a.validation, a.test)]
    assert sum(len(i) for i in ids) == len(set.union(*ids)) == 1797
    assert a.train.ids.equal(b.train.ids)
    share = torch.bincount(a.test.labels).float() / len(a.test)
    assert share.min() > 0.08
    assert not torch.equal(a.test.ids, load_images("digits", split_seed=1).test.ids)


def test_labels_are_hidden_by_class_and_images_kept_or_dropped() -> None:
    kept, dropped = (load_images("digits", labels=50, unlabeled=u) for u in ("keep", "drop"))
    assert torch.bincount(kept.train.labels[kept.train.labels != IGNORE]).tolist() == [5] * 10
    assert len(dropped.train) == 50
    assert len(kept.train) == len(kept.for_teacher)
    assert (kept.for_teacher.labels != IGNORE).all()
    has = kept.train.labels != IGNORE
    assert torch.equal(kept.train.ids[has], dropped.train.ids)


def test_view_seeds_are_a_function_of_seed_epoch_and_sample() -> None:
    ids = torch.arange(100)
    seeds = view_seeds(3, 5, ids)
    assert torch.equal(seeds, view_seeds(3, 5, ids))
    assert torch.equal(seeds[7:9], view_seeds(3, 5, ids[7:9]))
    assert len(set(seeds.tolist()) | set(view_seeds(3, 6, ids).tolist()) | set(view_seeds(4, 5, ids).tolist())) == 300
    draws = uniform(view_seeds(0, 0, torch.arange(20000)), 1)
    assert abs(draws.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(draws, uniform(view_seeds(0, 0, torch.arange(20000)), 2))[0, 1]) < 0.03


@pytest.mark.parametrize("augment", [["flip", {"shift": 2}], ["rand-augment", "erase"]])
def test_a_view_is_redrawn_from_its_seed_whatever_is_fetched_with_it(augment: list[str]) -> None:
    data = load_images("digits", augment=augment).train
    rows = torch.tensor([3, 50, 7, 100])
    views = view_seeds(1, 2, data.ids[rows])
    together = data.fetch(rows, views)
    before = torch.get_rng_state()
    alone = torch.cat([data.fetch(rows[i : i + 1], views[i : i + 1]).inputs for i in range(4)])
    assert torch.equal(before, torch.get_rng_state()), "drawing a view must not move the global generator"
    assert torch.equal(together.inputs, alone)
    assert not torch.equal(together.inputs, data.fetch(rows).inputs)
    assert data.fetch(rows).views is None


def test_flip_and_shift_do_what_they_say() -> None:
    images = torch.arange(2 * 5 * 5, dtype=torch.uint8).view(2, 1, 5, 5) + 1
    seeds = view_seeds(0, 0, torch.arange(2))
    assert torch.equal(flip(1.0, stream=0)(images, seeds), images.flip(-1))
    assert torch.equal(flip(0.0, stream=0)(images, seeds), images)
    moved = shift(1, stream=0)(images.repeat(50, 1, 1, 1), view_seeds(0, 0, torch.arange(100)))
    padded = torch.nn.functional.pad(images[0, 0], [1] * 4)
    crops = {tuple(padded[y : y + 5, x : x + 5].flatten().tolist()) for y in range(3) for x in range(3)}
    assert {tuple(m.flatten().tolist()) for m in moved[::2, 0]} == crops


def test_drawn_restores_the_generators() -> None:
    before = torch.get_rng_state()
    assert apply_seeded(lambda _: torch.rand(1), None, 5).equal(apply_seeded(lambda _: torch.rand(1), None, 5))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (2, 1), (1, 4), (3, 2)])
def test_shares_of_all_processes_make_the_batch_and_nothing_twice(world: int, accumulate: int) -> None:
    data = load_images("digits", limit=75).train
    plan = PlannedBatches(data, 32, seed=1)
    whole = [m[0].ids for m in plan.epoch(2, RankSlice())]
    shares = [list(plan.epoch(2, RankSlice(rank, world, accumulate))) for rank in range(world)]
    for step, ids in enumerate(whole):
        counted = [m.ids[m.counted()] for share in shares for m in share[step]]
        assert torch.equal(torch.cat(counted), ids)
        assert all(len(share[step]) == accumulate for share in shares)
    assert sorted(torch.cat(whole).tolist()) == sorted(data.ids.tolist())


def test_a_process_without_a_row_gets_a_stand_in_that_does_not_count() -> None:
    batch = Batch(torch.randn(1, 3), torch.tensor([2]))
    first, second = batch.split(2)
    shares = [first, second] if first.labelled().any() else [second, first]
    assert shares[0].labelled().sum() == 1
    assert shares[1].labelled().sum() == shares[1].counted().sum() == 0
    assert len(shares[1]) == 1
    assert even_spans(7, 3) == [(0, 2), (2, 4), (4, 7)]


def test_skipping_steps_gives_the_same_batches_as_going_through_them() -> None:
    plan = PlannedBatches(load_images("digits", limit=100, augment=["flip"]).train, 16, seed=0)
    whole, later = list(plan.epoch(1, RankSlice())), list(plan.epoch(1, RankSlice(), skip=3))
    for (a,), (b,) in zip(whole[3:], later, strict=True):
        assert torch.equal(a.inputs, b.inputs)


def test_worker_processes_give_the_same_batches() -> None:
    data = load_images("digits", limit=64, augment=["flip"]).train
    here = list(PlannedBatches(data, 16, seed=0).epoch(0, RankSlice()))
    there = list(PlannedBatches(data, 16, seed=0, workers=2).epoch(0, RankSlice()))
    assert all(torch.equal(a[0].inputs, b[0].inputs) for a, b in zip(here, there, strict=True))


def test_a_shuffling_loader_repeats_its_order_and_leaves_the_global_generator_alone() -> None:
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.arange(20.0).view(20, 1), torch.zeros(20).long()), 4, shuffle=True
    )
    batches = LoaderBatches(loader, seed=5)
    torch.manual_seed(1)
    first = [m[0].inputs for m in batches.epoch(0, RankSlice())]
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))
    again = [m[0].inputs for m in batches.epoch(0, RankSlice(), skip=2)]
    assert all(torch.equal(a, b) for a, b in zip(first[2:], again, strict=True))
    assert not torch.equal(torch.cat(first), torch.cat([m[0].inputs for m in batches.epoch(1, RankSlice())]))


def test_in_order_gives_every_row_once() -> None:
    data = load_images("digits").test
    for workers in (0, 2):
        assert torch.equal(torch.cat([b.ids for b in SequentialBatches(data, 50, workers=workers)]), data.ids)


@pytest.mark.parametrize("given", [4, 6])
def test_a_loader_whose_length_lies_is_an_error_and_not_an_endless_epoch(given: int) -> None:
    class Loader:
        def __len__(self) -> int:
            return 5

        def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            return iter([(torch.zeros(2, 3), torch.zeros(2).long())] * given)

    with pytest.raises(DataError, match="length is 5"):
        list(LoaderBatches(Loader(), seed=0).epoch(0, RankSlice()))


@pytest.mark.parametrize("source", ["torch", "python", "numpy", "own"])
def test_a_loader_draws_from_a_stream_of_its_own_whatever_it_draws_with(source: str) -> None:
    own = torch.Generator()
    draw = {
        "torch": lambda: torch.rand(1), "python": lambda: torch.tensor([random.random()]),
        "numpy": lambda: torch.from_numpy(np.random.rand(1)), "own": lambda: torch.rand(1, generator=own),
    }[source]  # fmt: skip

    class Loader:
        generator = own

        def __len__(self) -> int:
            return 6

        def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for _ in range(6):
                yield draw().float().view(1, 1), torch.zeros(1).long()

    batches = LoaderBatches(Loader(), seed=1)
    whole = [float(m[0].inputs) for m in batches.epoch(0, RankSlice())]
    random.random(), np.random.rand(), torch.rand(1)
    before = random.getstate(), torch.get_rng_state()
    assert [float(m[0].inputs) for m in batches.epoch(0, RankSlice(), skip=4)] == whole[4:]
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert [float(m[0].inputs) for m in batches.epoch(1, RankSlice())] != whole


def test_fetching_processes_leave_the_global_generator_alone() -> None:
    plan = PlannedBatches(load_images("digits", limit=40).train, 16, seed=0, workers=1)
    before = torch.get_rng_state()
    list(plan.epoch(0, RankSlice()))
    assert torch.equal(before, torch.get_rng_state())


def test_a_last_row_all_by_itself_joins_the_batch_before() -> None:
    plan = PlannedBatches(load_images("digits", limit=33).train, 16, seed=0)
    assert [len(m[0]) for m in plan.epoch(0, RankSlice())] == [16, 17]
    assert plan.steps_per_epoch == 2


def test_padding_of_token_labels_does_not_count() -> None:
    labels = torch.tensor([[1, 0, 1, -100, -100]])
    attention = torch.tensor([[1, 1, 1, 0, 0]])
    batch = as_batch({"input_ids": torch.ones(1, 5).long() * 7, "attention_mask": attention, "labels": labels})
    assert batch.counted().sum() == 3
    assert as_batch({"input_ids": torch.ones(2, 5), "labels": torch.zeros(2).long()}).mask is None


# Causal language models: the shift happens here, once -------------------------------------------------


def test_position_t_is_asked_for_token_t_plus_one() -> None:
    batch = causal_batch({"input_ids": torch.tensor([[5, 6, 7, 8]])})
    assert batch.labels.tolist() == [[6, 7, 8, -100]]
    assert batch.mask.tolist() == [[True, True, True, False]]


def test_padding_is_known_by_the_mask_and_not_by_the_token() -> None:
    ids = torch.tensor([[5, 6, 2, 2, 2]])  # the first 2 is the end of the sequence, the others are padding
    batch = causal_batch({"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 0, 0]])})
    assert batch.labels.tolist() == [[6, 2, -100, -100, -100]]


def test_left_padding_is_not_asked_for_the_first_token() -> None:
    batch = causal_batch({"input_ids": torch.tensor([[2, 2, 5, 6]]), "attention_mask": torch.tensor([[0, 0, 1, 1]])})
    assert batch.labels.tolist() == [[-100, -100, 6, -100]]


def test_ragged_prompts_are_masked_row_by_row_and_a_fully_masked_row_counts_nothing() -> None:
    ids = torch.arange(15).view(3, 5)
    labels = ids.masked_fill(torch.arange(5) < torch.tensor([[1], [3], [5]]), -100)
    batch = causal_batch({"input_ids": ids, "labels": labels})
    assert batch.counted().sum(1).tolist() == [4, 2, 0]
    assert batch.labels[1].tolist() == [-100, -100, 8, 9, -100]


def test_unshifted_labels_are_refused() -> None:
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(DataError, match="predict its own token"):
        as_batch({"input_ids": ids, "labels": ids.clone()})


# Image files ------------------------------------------------------------------------------------------


def folder(path: Path, names: tuple[str, ...] = ("a", "b"), count: int = 12) -> Path:
    from PIL import Image

    draw = np.random.default_rng(0)
    for k, name in enumerate(names):
        (path / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = draw.integers(0, 60, (20 + i, 30, 3)) + 90 * k
            Image.fromarray(pixels.astype(np.uint8)).save(path / name / f"{i}.png")
    return path


def test_ids_of_files_survive_the_adding_of_others(tmp_path: Path) -> None:
    root = folder(tmp_path / "x")
    before = load_images("imagefolder", path=str(root), size=16)
    kept = {int(i) for s in (before.train, before.validation, before.test) for i in s.ids}
    folder(root, count=13)
    after = load_images("imagefolder", path=str(root), size=16)
    assert kept < {int(i) for s in (after.train, after.validation, after.test) for i in s.ids}


def test_decoding_ahead_and_on_demand_give_the_same_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder(tmp_path / "x")
    ahead = load_images("imagefolder", path=str(root), size=16).train
    monkeypatch.setattr("tutelage.data.images.IN_MEMORY_BYTES", 0)
    own = ahead.preprocessing
    lazy = load_images("imagefolder", path=str(root), size=16, mean=list(own.mean), std=list(own.std)).train
    assert lazy.pixels is None
    assert ahead.pixels is not None
    rows = torch.arange(len(ahead))
    torch.testing.assert_close(ahead.fetch(rows).inputs, lazy.fetch(rows).inputs)


def test_split_folders_are_taken_as_they_are_and_crops_drawn_from_the_seed(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        folder(tmp_path / "x" / split)
    data = load_images("imagefolder", path=str(tmp_path / "x"), size=16, augment=["resized-crop", "flip"])
    assert len(data.train) == len(data.validation) == len(data.test) == 24
    rows = torch.arange(4)
    views = view_seeds(0, 0, data.train.ids[rows])
    a, b = data.train.fetch(rows, views).inputs, data.train.fetch(rows, views).inputs
    assert torch.equal(a, b)
    assert a.shape == (4, 3, 16, 16)


def test_a_hugging_face_data_set_and_a_torchvision_one(tmp_path: Path) -> None:
    root = folder(tmp_path / "x")
    hf = load_images("hf:imagefolder", options={"data_dir": str(root), "cache_dir": str(tmp_path / "c")}, size=16)
    assert hf.classes == ["a", "b"]
    assert sum(len(s) for s in (hf.train, hf.validation, hf.test)) == 24
    fake = load_images(
        "torchvision:FakeData", options={"size": 60, "image_size": [3, 20, 20], "num_classes": 2}, size=8
    )
    assert fake.train.fetch(torch.arange(2)).inputs.shape == (2, 3, 8, 8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_reader_turns_a_picture_as_its_orientation_says(orientation: int, tmp_path: Path) -> None:
    pixels = np.zeros((16, 16), np.uint8)
    pixels[:8, :4] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("a", "b"):
        (tmp_path / "x" / "train" / name).mkdir(parents=True)
        for i in range(12):
            Image.fromarray(pixels).save(tmp_path / "x" / "train" / name / f"{i}.png", exif=exif)
    files = load_images("imagefolder", path=str(tmp_path / "x"), size=16)
    options = {"data_dir": str(tmp_path / "x"), "cache_dir": str(tmp_path / "c")}
    hf = load_images("hf:imagefolder", options=options, size=16)
    assert files.train.pixels is not None
    assert hf.train.pixels is not None
    channels = files.train.preprocessing.channels
    preprocessing = {"channels": channels, "size": 16, "mean": [0.0] * channels, "std": [1.0] * channels}
    predicted = read_image(tmp_path / "x" / "train" / "a" / "0.png", preprocessing)
    expected = torch.from_numpy(np.array(ImageOps.exif_transpose(Image.open(tmp_path / "x/train/a/0.png"))))
    for image in (files.train.pixels[0], hf.train.pixels[0], (predicted * 255).round().to(torch.uint8)):
        assert torch.equal(image[0], expected)


def test_mixed_views_are_functions_of_their_seed_and_have_no_label() -> None:
    for entry in ({"mixup": 0.7}, {"cutmix": 1.0}):
        data = load_images("digits", limit=60, augment=[{"shift": 1}, entry])
        rows, seeds = torch.arange(20), torch.arange(100, 120)
        batch, again = data.train.fetch(rows, seeds), data.train.fetch(rows.flip(0), seeds.flip(0))
        assert torch.equal(batch.inputs, again.inputs.flip(0))
        assert (batch.labels == -100).all()
        assert (data.train.fetch(rows).labels >= 0).all()
        assert not torch.equal(batch.inputs, data.train.fetch(rows, seeds + 1).inputs)
        assert not data.for_teacher.mix_augments
        assert data.for_teacher.augments
    with pytest.raises(ConfigError, match="put mixup and cutmix last"):
        load_images("digits", augment=["mixup", "flip"])
    with pytest.raises(ConfigError, match="above 0"):
        load_images("digits", augment=[{"mixup": -1}])


def test_mixup_adds_and_cutmix_cuts() -> None:
    from tutelage.data.views import cutmix, mixup

    dark, bright, seeds = torch.zeros(500, 1, 10, 12), torch.full((500, 1, 10, 12), 200), torch.arange(500)
    dark, bright = dark.to(torch.uint8), bright.to(torch.uint8)
    mixed = mixup(1.0, stream=0)(bright, dark, seeds).float()
    assert (mixed.amax((1, 2, 3)) == mixed.amin((1, 2, 3))).all()
    assert abs(mixed.mean() / 200 - 0.5) < 0.05
    cut = cutmix(1.0, stream=0)(bright, dark, seeds)
    assert set(cut.unique().tolist()) == {0, 200}
    for image in (cut[:, 0] == 0)[:50]:
        ys, xs = image.nonzero(as_tuple=True)
        if len(ys):
            assert image[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1].all()  # a rectangle
