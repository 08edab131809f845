"""Parts of a language model's distributions: coded, drawn, read back, and what a loss makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tutelage import losses
from tutelage.data import IGNORE, Batch
from tutelage.errors import CacheError, CapabilityError, ConfigError
from tutelage.taps import Head, Needs
from tutelage.teachers import CachedTeacher, Layout, MemoryTeacher, Signal, Sparse
from tutelage.teachers.cache import inspect_cache, verify_cache
from tutelage.teachers.cache.coding import Coder, Counts
from tutelage.teachers.cache.encodings import round_stochastically

CLASSES = 40


def layout(keep: Any, **options: Any) -> Layout:
    """Of tokens, in float32, at T = 1 and 2."""
    partial = keep not in ("dense", "hidden")
    return Layout(keep, CLASSES, "fp32", temperatures=(1.0, 2.0) if partial else (), tokens=True, **options)


SAMPLES = {
    "draws": layout("sampled", draws=7),
    "head": layout("sampled", draws=5, head=4),
    "flatter": layout("sampled", draws=7, power=0.8),
    "sharper": layout("sampled", draws=7, power=1.25),
    "head, flatter": layout("sampled", draws=5, head=4, power=0.8),
    "stochastic_rounding": layout("stochastic_rounding", draws=7),
}


def scores(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, CLASSES, generator=torch.Generator().manual_seed(seed)) * 2


def part(kept: Layout, said: Tensor, temperature: float = 1.0, first: int = 0) -> Sparse:
    """What is read of ``[B, L, C]`` logits."""
    counted = torch.ones(said.shape[:2], dtype=torch.bool)
    columns = kept.encode(Signal(said), torch.arange(first, first + len(said)), counted)
    found = kept.decode(columns, Needs(temperature=temperature), "cpu", counted=counted).sparse
    assert found is not None
    return found


def spread(found: Sparse) -> Tensor:
    """Weights of all classes ``[B, L, C]``, float64."""
    out = torch.zeros(*found.index.shape[:-1], CLASSES, dtype=torch.float64)
    return out.scatter_add_(-1, found.index, found.values.double())


# Coding --------------------------------------------------------------------------------------------------


@given(
    st.lists(st.lists(st.sets(st.integers(0, 49_151), max_size=9), max_size=4), max_size=4),
    st.integers(1, 70), st.integers(0, 999),
)  # fmt: skip
def test_what_is_written_in_few_bits_is_read(samples: list[list[set[int]]], most: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    rows = [sorted(row) for sample in samples for row in sample]
    classes = np.array([c for row in rows for c in row], np.int64)
    given_counts = Counts(
        classes, draw.integers(1, most, len(classes), endpoint=True), np.array(list(map(len, rows)), np.int64)
    )
    lengths = np.array([len(s) for s in samples], np.int64)
    coder = Coder(49_152, most)
    coded = coder.encode(given_counts, lengths)
    assert coded.values.dtype == np.uint8
    assert len(coded.values) == coded.lengths.sum()
    for found, expected in zip(coder.decode(coded, lengths), given_counts, strict=True):
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("classes", [2, 10, 49_152, 200_000])
def test_the_first_and_the_last_class_are_written(classes: int) -> None:
    ends = Counts(np.array([0, classes - 1]), np.ones(2, np.int64), np.array([2]))
    coder = Coder(classes, size=2)
    assert coder.decode(coder.encode(ends, np.array([1])), np.array([1])).classes.tolist() == [0, classes - 1]


def test_what_cannot_be_written_is_refused() -> None:
    three = Counts(np.arange(3), np.array([1, 5, 1]), np.array([3]))
    with pytest.raises(ValueError, match="at most 255 and 4"):
        Coder(10, 4).encode(three, np.array([1]))
    with pytest.raises(ValueError, match="at most 2 and 5"):
        Coder(10, 5, largest=2).encode(three, np.array([1]))


# Samples -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", SAMPLES)
def test_the_expectation_of_a_sample_is_the_distribution(name: str, temperature: float) -> None:
    said, n = scores(1, 2), 3_000
    found = spread(part(SAMPLES[name], said.expand(n, -1, -1), temperature))
    p = (said[0] / temperature).double().softmax(-1)
    error = (found.mean(0) - p) / (found.std(0) / n**0.5 + 1e-4)
    assert error.abs().max() < 5.0
    assert (found[:, 0] != found[0, 0]).any()  # each sample is drawn for itself


@pytest.mark.parametrize("name", SAMPLES)
def test_a_sample_is_drawn_the_same_whatever_is_asked_with_it(name: str) -> None:
    said = scores(5, 3)
    whole, one = part(SAMPLES[name], said), part(SAMPLES[name], said[2:3], first=2)
    assert torch.equal(spread(whole)[2:3], spread(one))


def test_what_rounding_leaves_over_is_carried_and_never_lost() -> None:
    p, n = scores(200).double().softmax(-1), 6
    found = list(round_stochastically(iter(p.split(37)), n, 3, 0))
    counts = torch.zeros(200, CLASSES, dtype=torch.float64)
    sizes = np.concatenate([f.sizes for f in found])
    row = torch.from_numpy(np.repeat(np.arange(200), sizes))
    counts[row, torch.from_numpy(np.concatenate([f.classes for f in found]))] = torch.from_numpy(
        np.concatenate([f.counts for f in found])
    ).double()
    off = counts.cumsum(0) - n * p.cumsum(0)
    assert off.abs().max() < 1.0  # of 200 tokens, where draws would be off by more
    pieces = list(round_stochastically(iter(p.split(200)), n, 3, 0))
    assert np.array_equal(pieces[0].classes, np.concatenate([f.classes for f in found]))


def test_the_head_of_a_sample_is_exact() -> None:
    said = scores(6, 2)
    found, p = spread(part(SAMPLES["head"], said)), said.double().softmax(-1)
    largest = p.topk(4, -1).indices
    torch.testing.assert_close(found.gather(-1, largest), p.gather(-1, largest), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.sum(-1), torch.ones(6, 2, dtype=torch.float64), rtol=1e-5, atol=1e-5)


# Losses ----------------------------------------------------------------------------------------------


def slope(loss: Any, student: Tensor, *rest: Any, **options: Any) -> Tensor:
    x = student.detach().double().requires_grad_()
    (found,) = torch.autograd.grad(loss(x, *rest, **options), x)
    return found


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_weights_of_the_whole_distribution_give_the_gradient_of_kd(temperature: float) -> None:
    student, teacher = scores(4, seed=1), scores(4, seed=2).double()
    p = (teacher / temperature).softmax(-1)
    index = torch.arange(CLASSES).expand(4, -1)
    found = slope(losses.sampled_kd, student, index, p, temperature=temperature)
    torch.testing.assert_close(found, slope(losses.kd, student, teacher, temperature=temperature))


def test_weights_that_make_up_one_only_on_average_leave_the_students_own_distribution_whole() -> None:
    student = scores(3, seed=1)
    index, w = torch.tensor([[1, 5], [2, 2], [0, 9]]), torch.tensor([[0.5, 0.9], [0.1, 0.2], [0.0, 0.0]]).double()
    found = slope(losses.sampled_kd, student, index, w, temperature=1.0, reduction="sum")
    spare = (1 - w.sum(-1, keepdim=True)) / CLASSES
    expected = student.double().softmax(-1) - torch.zeros(3, CLASSES).double().scatter_add(-1, index, w) - spare
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.sum(-1), torch.zeros(3, dtype=torch.float64))


def head_gradient(loss: Any, student: Tensor, hidden: Tensor, found: Sparse, change: Any = lambda w: w) -> Tensor:
    """``[C, D]``, of all tokens."""
    by = slope(loss, student.flatten(0, 1), found.index.flatten(0, 1), change(found.values.flatten(0, 1).double()),
               temperature=1.0, reduction="sum")  # fmt: skip
    return by.T @ hidden.flatten(0, 1)


def angle(a: Tensor, b: Tensor) -> float:
    return float(torch.rad2deg(torch.acos((a * b).sum() / a.norm() / b.norm())))


def test_the_noise_of_a_sample_averages_out_and_the_error_of_a_truncation_stays() -> None:
    """Evidence 10: what is taught by renormalised largest classes is another lesson, however long it is taught."""
    tokens = 8_192
    teacher = scores(1, tokens, seed=1) + torch.linspace(3, -3, CLASSES)  # some classes are rare everywhere
    noise = scores(1, tokens, seed=2)
    hidden = scores(1, tokens, seed=3)[..., :6].double() + 1.0
    student = 0.8 * teacher + 0.2 * noise + 0.5 * scores(seed=4)  # wrong in the same way at every token

    def angles(n: int) -> dict[str, float]:
        t, s, h = teacher[:, :n], student[:, :n], hidden[:, :n]
        full = slope(losses.kd, s.flatten(0, 1), t.double().flatten(0, 1), temperature=1.0, reduction="sum")
        whole = full.T @ h.flatten(0, 1)
        few = part(layout("topk", k=4), t)
        return {
            name: angle(head_gradient(losses.sampled_kd, s, h, part(SAMPLES[name], t)), whole)
            for name in ("draws", "head", "stochastic_rounding")
        } | {
            "renormalised": angle(
                head_gradient(losses.sampled_kd, s, h, few, lambda w: w.exp() / w.exp().sum(-1, keepdim=True)),
                whole,
            ),
            "tail": angle(head_gradient(losses.topk_kd, s, h, few), whole),
        }

    short, long = angles(256), angles(tokens)  # noise falls by the square root of 32
    for name in ("draws", "head", "stochastic_rounding"):
        assert long[name] < short[name] / 3, name
    assert long["renormalised"] > short["renormalised"] / 2
    assert long["tail"] > short["tail"] / 2
    assert long["stochastic_rounding"] < long["draws"] < long["renormalised"]


def test_a_tail_is_of_its_temperature_and_of_no_other() -> None:
    """Evidence 10: softened afterwards, a truncated distribution is not that of the softened logits."""
    said = scores(1, 3)
    kept = layout("topk", k=4)
    at_one, at_two = (part(kept, said, t).values.exp() for t in (1.0, 2.0))
    k_plus_rest = torch.cat([at_one, 1 - at_one.sum(-1, keepdim=True)], -1) ** 0.5
    assert (k_plus_rest / k_plus_rest.sum(-1, keepdim=True))[..., :4].sub(at_two).abs().max() > 0.05
    for one in (kept, *SAMPLES.values()):
        with pytest.raises(CapabilityError, match=r"needs T = 4"):
            part(one, said, 4.0)


# A row for each token ------------------------------------------------------------------------------------


class Talker:
    """Says of each token a function of it; a head makes its logits."""

    provides = frozenset({"logits", "head", "hidden"})

    def __init__(self, **head: Any) -> None:
        self.head = head
        generator = torch.Generator().manual_seed(4)
        self.table = torch.randn(50, 8, generator=generator)
        self.weight = torch.randn(CLASSES, 8, generator=generator)
        self.bias = torch.randn(CLASSES, generator=generator)
        self.asked = 0

    def signal(self, batch: Batch, needs: Needs) -> Signal:
        """Its word."""
        self.asked += 1
        x = self.table[batch.inputs["input_ids"]]  # type: ignore[call-overload,index]
        head = Head(x, self.weight, self.bias, **self.head)
        said = head.scores(slice(None))
        return Signal(said if needs.logits else None, dict.fromkeys(needs.hidden, x), head if needs.head else None)


def texts(width: int = 6) -> Batch:
    """Of 5, 3, 0 and 4 tokens that count, padded to ``width``."""
    ids = torch.randint(0, 50, (4, 6), generator=torch.Generator().manual_seed(0))
    ids = torch.nn.functional.pad(ids, (0, width - 6))
    attention = torch.arange(width) < torch.tensor([[6], [4], [3], [5]])
    counts = torch.arange(width) < torch.tensor([[5], [3], [0], [4]])
    return Batch(
        {"input_ids": ids * attention, "attention_mask": attention.long()},
        torch.where(counts, ids, IGNORE), mask=counts, ids=torch.tensor([7, 3, 11, 5]),
    )  # fmt: skip


TOKENS = {
    "dense": layout("dense"),
    "hidden": layout("hidden", width=8),
    "topk": layout("topk", k=4),
    "layers": layout("dense", hidden={"body": (8,)}),
    **SAMPLES,
}


def told(signal: Signal) -> Tensor:
    if signal.sparse is None:
        return signal.dense()
    return signal.sparse.values.exp() if signal.sparse.kind == "topk" else spread(signal.sparse)


@pytest.mark.parametrize("name", TOKENS)
def test_a_cache_gives_each_token_what_the_teacher_said_of_it(name: str, tmp_path: Path) -> None:
    kept, live, batch = TOKENS[name], Talker(), texts()
    needs = Needs(logits=True, head=name == "hidden", hidden=tuple(kept.hidden), temperature=1.0)
    with CachedTeacher(tmp_path, kept, {}, live) as first:
        before = first.signal(batch, needs)
    asked = live.asked
    again = CachedTeacher(tmp_path, kept, {}, live)
    wider = texts(9)
    order = torch.tensor([3, 2, 0, 1])
    read = again.signal(_picked(wider, order), needs)
    remembered = MemoryTeacher(Talker(), [batch], layout=kept).signal(batch, needs)
    assert live.asked == asked
    counted = batch.counted()
    for one in (before, remembered):
        width = min(told(one).shape[-1], told(read).shape[-1])
        assert torch.equal(told(one)[order][counted[order]][:, :width], told(read)[:, :6][counted[order]][:, :width])
    said = live.signal(batch, Needs(logits=True))
    p = said.dense().double().softmax(-1)
    if kept.keep in ("dense", "hidden"):
        torch.testing.assert_close(read.dense()[:, :6][counted[order]], said.dense()[order][counted[order]])
    elif kept.keep == "topk":
        assert read.sparse is not None
        torch.testing.assert_close(
            told(read)[:, :6][counted[order]].double(),
            p[order].gather(-1, read.sparse.index[:, :6])[counted[order]], rtol=1e-5, atol=1e-6,
        )  # fmt: skip
    if name == "hidden":
        assert read.head is not None
        torch.testing.assert_close(
            read.head.inputs[:, :6][counted[order]], live.table[batch.inputs["input_ids"]][order][counted[order]]
        )  # type: ignore[call-overload,index]
    assert not told(read)[:, 6:].any() or kept.keep == "topk"
    assert inspect_cache(tmp_path)["tokens"] == 12
    assert verify_cache(tmp_path) == []


def _picked(batch: Batch, order: Tensor) -> Batch:
    assert isinstance(batch.inputs, dict)
    assert batch.mask is not None
    assert batch.ids is not None
    return Batch(
        {k: v[order] for k, v in batch.inputs.items()}, batch.labels[order], mask=batch.mask[order],
        ids=batch.ids[order],
    )  # fmt: skip


def test_a_batch_in_which_nothing_counts_is_read(tmp_path: Path) -> None:
    batch = texts().rows(2, 3)
    for name, kept in TOKENS.items():
        with CachedTeacher(tmp_path / name, kept, {}, Talker()) as cache:
            found = cache.signal(batch, Needs(logits=True, temperature=1.0))
            assert len(told(found)) == 1


@pytest.mark.parametrize("name", ["topk", "stochastic_rounding", "hidden"])
def test_other_tokens_or_others_that_count_are_refused(name: str, tmp_path: Path) -> None:
    kept, batch, needs = TOKENS[name], texts(), Needs(logits=True, temperature=1.0)
    with CachedTeacher(tmp_path, kept, {}, Talker()) as cache:
        cache.fill(batch)
    memory = MemoryTeacher(Talker(), [batch], layout=kept)
    assert batch.mask is not None
    fewer = batch.mask.clone()
    fewer[0, 0] = False
    other = Batch(batch.inputs, batch.labels, mask=fewer, ids=batch.ids)
    with pytest.raises(CacheError, match=r"(?s)sample 7 differs.*mask of tokens"):
        CachedTeacher(tmp_path, kept, {}).signal(other, needs)
    with pytest.raises(CapabilityError, match="another mask of tokens"):
        memory.signal(other, needs)
    assert isinstance(batch.inputs, dict)
    ids = batch.inputs["input_ids"].clone()
    ids[3, 1] += 1
    rewritten = Batch(batch.inputs | {"input_ids": ids}, batch.labels, mask=batch.mask, ids=batch.ids)
    with pytest.raises(CacheError, match="sample 5 differs"):
        CachedTeacher(tmp_path, kept, {}).signal(rewritten, needs)


def test_a_head_is_kept_with_its_scale_and_its_cap(tmp_path: Path) -> None:
    live, batch, needs = Talker(scale=0.5, softcap=3.0), texts(), Needs(logits=True, head=True)
    with CachedTeacher(tmp_path, TOKENS["hidden"], {}, live) as cache:
        cache.fill(batch)
    read, said = CachedTeacher(tmp_path, TOKENS["hidden"], {}).signal(batch, needs), live.signal(batch, needs)
    counted = batch.counted()
    torch.testing.assert_close(read.dense()[counted], said.dense()[counted])
    assert read.head is not None
    torch.testing.assert_close(read.head.scores(slice(None))[counted], said.dense()[counted])


def test_a_head_is_kept_under_autocast(tmp_path: Path) -> None:
    """A run with ``precision: bf16`` fills the cache inside of autocast, where the product with the head is bf16."""
    live, batch = Talker(), texts()
    with CachedTeacher(tmp_path, TOKENS["hidden"], {}, live) as cache, torch.autocast("cpu", torch.bfloat16):
        cache.fill(batch)
    read = CachedTeacher(tmp_path, TOKENS["hidden"], {}).signal(batch, Needs(logits=True, head=True))
    assert read.head is not None
    assert torch.equal(read.head.weight, live.weight)


def test_a_head_that_does_not_make_the_logits_alone_is_not_kept(tmp_path: Path) -> None:
    class Capped(Talker):
        def signal(self, batch: Batch, needs: Needs) -> Signal:
            said = super().signal(batch, needs)
            return Signal(None if said.logits is None else said.logits.tanh(), said.hidden, said.head)

    with (
        CachedTeacher(tmp_path, TOKENS["hidden"], {}, Capped()) as cache,
        pytest.raises(CapabilityError, match="cannot reproduce the teacher's logits"),
    ):
        cache.fill(texts())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keep": "stochastic_rounding", "draws": 0}, "0 draws"),
        ({"keep": "stochastic_rounding", "draws": 70_000}, "70000 draws"),
        ({"keep": "sampled", "power": 0.0}, r"p\^0"),
        ({"keep": "hidden"}, "has width 0"),
        ({"keep": "topk", "temperatures": ()}, "has no temperature"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Layout(**{"classes": 10, "temperatures": (1.0,), **options})
