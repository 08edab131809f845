"""``distill(cache=...)``: the teacher's word on a caller's own data, and never on another's."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import tutelage
from tutelage.data import Batch, IndexedDataset
from tutelage.errors import CacheError, CapabilityError, ConfigError, DataError, Interrupted
from tutelage.methods import LogitMethod
from tutelage.models.small import ConvNet
from tutelage.teachers.cache import input_digest, inspect_cache, verify_cache

HELD = [(torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(9)), torch.arange(16) % 4)]


def pictures(n: int = 64, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(4, 1, 8, 8, generator=generator)
    labels = torch.arange(n) % 4
    return TensorDataset(means[labels] + 0.5 * torch.randn(n, 1, 8, 8, generator=generator), labels)


class Counting(ConvNet):
    """Remembers every image that it was shown."""

    def forward(self, x: Tensor) -> Tensor:
        self.__dict__.setdefault("seen", []).extend(image.clone() for image in x)
        return super().forward(x)


def network(width: int, seed: int = 0, cls: type[ConvNet] = ConvNet) -> ConvNet:
    torch.manual_seed(seed)
    return cls(classes=4, channels=1, widths=(width, 2 * width), depth=1)


def knowing(seed: int = 1) -> Counting:
    """A teacher that is better than chance on what it is measured on."""
    model = network(8, seed, Counting)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(40):
        for inputs, labels in HELD:
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    model.__dict__["seen"] = []
    return model


def taught(teacher: nn.Module, out: Path, data: Any = None, size: int = 16, **more: Any) -> Any:
    loader = more.pop("loader", None) or DataLoader(IndexedDataset(data or pictures()), size, shuffle=True)
    arguments = {"epochs": 3, "seeds": (0, 1), "baseline": False, "verbose": False, **more}
    return tutelage.distill(
        teacher, lambda: network(4), loader, eval_data=HELD, method=LogitMethod(temperature=4.0), out=out, **arguments
    )


def weights(run: Any) -> list[bytes]:
    return [(run.path / "models" / f"distilled-seed{seed}" / "model.safetensors").read_bytes() for seed in (0, 1)]


def asked(teacher: Any, data: TensorDataset) -> int:
    """How often the teacher was shown a training image."""
    mine = {image.numpy().tobytes() for image in data.tensors[0]}
    return sum(image.numpy().tobytes() in mine for image in teacher.seen)


def test_the_teacher_sees_a_training_image_once_ever_and_the_student_is_the_live_ones_bits(tmp_path: Path) -> None:
    teacher, data, kept = knowing(), pictures(), {"path": str(tmp_path / "c"), "dtype": "fp32"}
    live = taught(teacher, tmp_path / "live")
    assert asked(teacher, data) == 2 * 3 * 64
    teacher.seen.clear()
    first = taught(teacher, tmp_path / "first", cache=kept)
    assert asked(teacher, data) == 64
    teacher.seen.clear()
    second = taught(teacher, tmp_path / "second", cache=kept)
    assert asked(teacher, data) == 0
    assert weights(live) == weights(first) == weights(second)
    assert inspect_cache(tmp_path / "c")["rows"] == 64
    assert verify_cache(tmp_path / "c") == []
    teacher.seen.clear()
    other = taught(teacher, tmp_path / "other", size=24, cache=kept, seeds=(5,))  # other batches, another order
    assert asked(teacher, data) == 0
    alone = taught(teacher, tmp_path / "live-5", size=24, seeds=(5,))
    for a, b in zip(other.student.parameters(), alone.student.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_an_interrupted_run_goes_on_from_the_cache_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, kept = knowing(), {"path": str(tmp_path / "c"), "dtype": "fp32"}
    whole = taught(teacher, tmp_path / "whole")
    calls = iter(range(1000))

    class Stopping(IndexedDataset):
        def __getitem__(self, place: int) -> tuple[Any, ...]:
            if next(calls) == 64 + 64 + 100:  # read once, its first batches again, and in the second epoch
                os.kill(os.getpid(), 15)
            return super().__getitem__(place)

    loader = DataLoader(Stopping(pictures()), 16, shuffle=True)
    with pytest.raises(Interrupted):
        taught(teacher, tmp_path / "cut", loader=loader, cache=kept)
    assert inspect_cache(tmp_path / "c")["rows"] == 64
    teacher.seen.clear()
    again = taught(teacher, tmp_path / "cut", cache=kept, resume=True)
    assert asked(teacher, pictures()) == 0
    assert weights(again) == weights(whole)


def moved(data: TensorDataset) -> TensorDataset:
    return TensorDataset(data.tensors[0].roll(1, 0), data.tensors[1].roll(1))


@pytest.mark.parametrize(
    ("teacher", "data", "more", "field"),
    [
        (2, pictures(), {}, r"teacher\.weights"),
        (1, pictures(60), {}, r"data\.ids.*data\.samples"),
        (1, pictures(seed=1), {}, r"data\.inputs"),
        (1, moved(pictures()), {}, r"data\.inputs"),
        (1, pictures(), {"train": {"precision": "bf16"}}, "precision"),
        (1, pictures(), {"cache": {"keep": "topk", "k": 2}}, r"stored\.keep"),
    ],
    ids=["teacher", "fewer", "other-data", "other-order", "precision", "kept"],
)
def test_another_teacher_or_other_data_is_refused_by_the_name_of_the_field(
    teacher: int, data: TensorDataset, more: dict[str, Any], field: str, tmp_path: Path
) -> None:
    where = tmp_path / "c"
    taught(knowing(1), tmp_path / "first", cache=where, epochs=1, seeds=(0,))
    kept = {"path": str(where), **more.pop("cache", {})}
    with pytest.raises(CacheError, match=field):
        taught(knowing(teacher), tmp_path / "second", data, cache=kept, epochs=1, seeds=(0,), **more)


class Noisy(IndexedDataset):
    def __getitem__(self, place: int) -> tuple[Any, ...]:
        image, label, number = super().__getitem__(place)
        return image + torch.rand(()), label, number


def with_views(raw: Any) -> Batch:
    return Batch(*raw[:2], ids=raw[2] if len(raw) == 3 else None, views=raw[1])


def constant(raw: Any) -> Batch:
    return Batch(*raw[:2], ids=torch.zeros_like(raw[1]))


@pytest.mark.parametrize(
    ("loader", "more", "error", "says"),
    [
        (lambda d: DataLoader(d, 16), {}, CapabilityError, r"the loader's batches have no ids\n.*IndexedDataset"),
        (lambda d: DataLoader(Noisy(d), 16), {}, CapabilityError, "different inputs have the same sample id"),
        (lambda d: DataLoader(d, 16), {"to_batch": constant}, CapabilityError, "samples share an id"),
        (lambda d: DataLoader(IndexedDataset(d), 16), {"to_batch": with_views}, CapabilityError, "are augmented"),
        (lambda d: DataLoader(IndexedDataset(d), 12, drop_last=True), {}, DataError, "drop_last=False"),
        (lambda d: DataLoader(IndexedDataset(d), 16), {"cache": {"keeps": "topk"}}, ConfigError, "keeps='topk'"),
        (
            lambda d: DataLoader(IndexedDataset(d), 16),
            {"inference": {"overlap": True}},
            ConfigError,
            "neither prefetched",
        ),
        (
            lambda d: DataLoader(IndexedDataset(d), 16),
            {"inference": {"sharded": True}},
            ConfigError,
            "nor computed by all processes",
        ),
        (
            lambda d: DataLoader(IndexedDataset(d), 16),
            {"teacher_mode": "train_bn"},
            ConfigError,
            "teacher_mode='eval'",
        ),
    ],
    ids=["no-ids", "augmented", "one-id", "views", "drop-last", "unknown-key", "ahead", "sharded", "train-bn"],
)
def test_what_a_cache_cannot_keep_is_refused_before_any_training(
    loader: Callable[[Any], Any], more: dict[str, Any], error: type[Exception], says: str, tmp_path: Path
) -> None:
    arguments = {"cache": tmp_path / "c", **more}
    with pytest.raises(error, match=says):
        taught(knowing(), tmp_path / "out", loader=loader(pictures()), **arguments)
    assert not (tmp_path / "out" / "models").exists()


def test_true_finds_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    teacher = knowing()
    for out, seed in (("a", 0), ("b", 1), ("c", 0)):
        taught(teacher, tmp_path / out, pictures(seed=seed), cache=True, epochs=1, seeds=(0,))
    assert len(list((tmp_path / "runs" / "cache").glob("distill-*"))) == 2


# Texts -----------------------------------------------------------------------------------------------------


def words(vocabulary: list[str]) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *vocabulary])}
    plain = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]")


class Reads(nn.Module):
    """A mean of embeddings of the tokens that count."""

    def __init__(self, seed: int, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.head = nn.Embedding(40, width), nn.Linear(width, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        counted = attention_mask.unsqueeze(-1)
        out: Tensor = self.head((self.embedding(input_ids) * counted).sum(1) / counted.sum(1))
        return out


def text_batch(raw: Any) -> Batch:
    inputs = {k: raw[k] for k in ("input_ids", "attention_mask")}
    return Batch(inputs, raw["labels"], ids=raw["id"])


def test_another_tokenizer_is_refused_by_name_and_more_padding_is_not(tmp_path: Path) -> None:
    from transformers import DataCollatorWithPadding

    vocabulary = ["the", "film", "was", "good", "bad", "long", "and", "its", "end", "a", "bore", "delight"]
    texts = [" ".join(vocabulary[(i + j) % len(vocabulary)] for j in range(3 + i % 5)) for i in range(24)]

    def loader(tokenizer: Any, size: int) -> DataLoader[Any]:
        rows = [
            {**tokenizer(text, return_token_type_ids=False), "labels": i % 2, "id": i} for i, text in enumerate(texts)
        ]
        return DataLoader(rows, size, shuffle=True, collate_fn=DataCollatorWithPadding(tokenizer))  # type: ignore[arg-type]

    teacher = Reads(3)
    first = words(vocabulary)
    held = list(DataLoader(loader(first, 24).dataset, 24, collate_fn=DataCollatorWithPadding(first)))
    with torch.no_grad():  # labels that the teacher knows
        held[0]["labels"] = teacher(held[0]["input_ids"], held[0]["attention_mask"]).argmax(1)

    def distilled(tokenizer: Any, size: int, out: str) -> None:
        tutelage.distill(
            teacher, lambda: Reads(4), loader(tokenizer, size), eval_data=held, to_batch=text_batch, epochs=2,
            cache=tmp_path / "c", out=tmp_path / out, baseline=False, verbose=False,
        )  # fmt: skip

    distilled(first, 4, "first")
    distilled(first, 12, "wider")
    assert inspect_cache(tmp_path / "c")["rows"] == 24
    with pytest.raises(CacheError, match=r"data\.inputs.*preprocessing\.tokenizer\.vocabulary"):
        distilled(words(vocabulary[::-1]), 4, "second")
    more = words([*vocabulary, "unheard"])  # the same numbers, from another vocabulary
    with pytest.raises(CacheError, match=r"different settings: preprocessing\.tokenizer\.vocabulary"):
        distilled(more, 4, "third")


def test_a_digest_is_of_what_counts() -> None:
    ids, mask = torch.tensor([[5, 6, 0], [5, 6, 7]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    short = Batch({"input_ids": ids[:, :2], "attention_mask": mask[:, :2]}, torch.zeros(2))
    long = Batch({"input_ids": ids, "attention_mask": mask}, torch.zeros(2))
    assert input_digest(short, 0) == input_digest(long, 0)
    assert input_digest(short, 1) != input_digest(long, 1)
    routed = Batch(torch.zeros(2, 3), torch.zeros(2), route=torch.tensor([0, 1]))
    assert input_digest(routed, 0) != input_digest(routed, 1)
