"""The teacher's word on disk: the truth, whole or not at all, and never somebody else's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support.cache_cases import FROM, network, some
from tutelage import api, losses
from tutelage.config import build_recipe
from tutelage.data import Batch, PlannedBatches, RankSlice, SequentialBatches, load_images
from tutelage.errors import CacheError, ConfigError
from tutelage.models.small import ConvNet
from tutelage.progress import Terminal
from tutelage.taps import Needs
from tutelage.teachers import CachedTeacher, Layout, LiveTeacher
from tutelage.teachers.cache import CacheReader, inspect_cache, verify_cache
from tutelage.teachers.cache.columns import take_rows

SILENT = Terminal(speaks=False)


def layouts() -> list[Layout]:
    return [
        *(Layout("dense", 10, dtype) for dtype in ("fp32", "fp16", "bf16")),
        Layout("topk", 10, "fp32", k=4, temperatures=(1.0, 4.0)),
        Layout("sampled", 10, "fp32", draws=9, temperatures=(4.0, 2.0)),
        Layout("sampled", 10, "fp32", draws=9, head=3, temperatures=(4.0,)),
        Layout(None, 10, "fp32", hidden={"stages.0": (4, 8, 8), "head:input": (8,)}),
    ]


@pytest.mark.parametrize("layout", layouts(), ids=lambda c: f"{c.keep}-{c.dtype}-{c.head}")
def test_what_is_read_is_what_the_teacher_said(layout: Layout, tmp_path: Path) -> None:
    live = LiveTeacher(network())
    needs = Needs(logits=layout.keep is not None, hidden=tuple(layout.hidden), temperature=4.0)
    with CachedTeacher(tmp_path / "c", layout, FROM, live) as first:
        said = [first.signal(some(10, start), needs) for start in (0, 10, 20, 30)]
    again = CachedTeacher(tmp_path / "c", layout, FROM)
    order = torch.randperm(40)
    whole = some()
    shuffled = Batch(whole.inputs[order], whole.labels[order], ids=whole.ids[order])
    read = again.signal(shuffled, needs)
    expected = live.signal(whole, Needs(logits=needs.logits, hidden=needs.hidden))
    tolerance = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 2e-2}[layout.dtype]
    if layout.keep == "dense":
        torch.testing.assert_close(read.dense(), expected.dense()[order], rtol=tolerance, atol=tolerance)
        assert torch.equal(read.dense(), torch.cat([s.dense() for s in said])[order])
    elif layout.keep is not None:
        assert read.sparse is not None
        p = (expected.dense()[order] / 4).softmax(-1)
        if layout.keep == "topk":
            torch.testing.assert_close(read.sparse.values.exp(), p.gather(-1, read.sparse.index))
            assert torch.equal(read.sparse.index.sort(-1).values, p.topk(4).indices.sort(-1).values)
        else:
            torch.testing.assert_close(read.sparse.values.sum(-1), torch.ones(40), rtol=1e-5, atol=1e-5)
    for tap in layout.hidden:
        torch.testing.assert_close(read.hidden[tap], expected.hidden[tap][order], rtol=1e-5, atol=1e-5)
    assert verify_cache(tmp_path / "c") == []
    assert inspect_cache(tmp_path / "c")["rows"] == 40


def test_views_are_kept_apart_and_are_the_live_teachers(tmp_path: Path) -> None:
    data = load_images("digits", limit=60, augment=[{"shift": 2}])
    live, layout = LiveTeacher(network()), Layout("dense", 10, "fp32")
    with CachedTeacher(tmp_path / "c", layout, FROM, live) as cache:
        for view in range(3):
            for batch in SequentialBatches(data.train, batch_size=25, view=view):
                cache.fill(batch)
    cache = CachedTeacher(tmp_path / "c", layout, FROM)
    assert len(cache.reader) == 180
    for seed in (0, 7):
        for epoch in range(4):
            for (batch,) in PlannedBatches(data.train, 16, seed, views=3).epoch(epoch, RankSlice()):
                expected = live.signal(batch, Needs()).dense()
                torch.testing.assert_close(cache.signal(batch, Needs()).dense(), expected, rtol=1e-5, atol=1e-5)
    assert cache.computed_rows == 0


def test_two_rows_swapped_do_not_pass(tmp_path: Path) -> None:
    live, layout, whole = LiveTeacher(network()), Layout("dense", 10, "fp32"), some()
    with CachedTeacher(tmp_path / "c", layout, FROM, live) as cache:
        cache.fill(whole)
    order = torch.arange(40)
    order[[3, 4]] = torch.tensor([4, 3])
    swapped = Batch(whole.inputs[order], whole.labels, ids=whole.ids)  # the samples of two ids, exchanged
    cache = CachedTeacher(tmp_path / "c", layout, FROM)
    found = 0
    for _ in range(40):  # one row of each batch is looked at
        try:
            cache.signal(swapped, Needs())
        except CacheError as error:
            found += "differs from the input" in str(error)
    assert found == 2


def test_a_cached_student_is_the_live_students_bits(tmp_path: Path) -> None:
    data: dict[str, Any] = {"source": "digits", "limit": 192, "augment": [{"shift": 1}], "views": 2}
    recipe: dict[str, Any] = {
        "name": "c", "data": data, "student": {"model": "convnet", "options": {"widths": [4, 8], "depth": 1}},
        "teacher": {"model": "convnet", "options": {"widths": [8, 16], "depth": 1}, "train": {"steps": 60}},
        "method": {"kind": "logit"}, "train": {"epochs": 6, "batch_size": 64}, "baseline": False, "seeds": [0, 1],
    }  # fmt: skip

    def copy(**changes: Any) -> Any:
        return build_recipe(json.loads(json.dumps({**recipe, **changes})))

    api.run(copy(), out=tmp_path / "live", terminal=SILENT)
    teacher = {**recipe["teacher"], "cache": {"path": str(tmp_path / "c"), "dtype": "fp32"}}
    api.run(copy(teacher=teacher), out=tmp_path / "cached", terminal=SILENT)
    assert inspect_cache(tmp_path / "c")["rows"] == 2 * 192
    api.run(copy(teacher=teacher), out=tmp_path / "read", terminal=SILENT)
    files = [
        tmp_path / run / "models" / "distilled-seed1" / "model.safetensors" for run in ("live", "cached", "read")
    ]
    assert files[0].read_bytes() == files[1].read_bytes() == files[2].read_bytes()


class Told:
    """A memory map that keeps what it is told."""

    def __init__(self, mapped: Any) -> None:
        self.mapped, self.spans = mapped, list[tuple[int, int]]()

    def madvise(self, what: int, start: int, length: int) -> None:
        self.mapped.madvise(what, start, length)  # raises where it is not the begin of a page
        self.spans.append((start, start + length))


@pytest.mark.parametrize(
    "layout",
    [
        Layout("dense", 3000, "fp32"),
        Layout("sampled", 3000, "fp16", draws=2000, temperatures=(4.0,)),
        Layout("dense", 3000, "fp16", hidden={"stages.0": (4, 8, 8)}),
    ],
    ids=["dense", "ragged", "hidden"],
)
def test_the_system_is_told_of_the_pages_of_the_rows_that_come_and_of_no_others(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    live = LiveTeacher(ConvNet(classes=3000, channels=1, widths=(4, 8), depth=1))
    with CachedTeacher(tmp_path / "c", layout, FROM, live) as cache:
        for start in (0, 100):
            cache.fill(some(100, start))
            assert cache.writer is not None
            cache.writer.flush()
    monkeypatch.setattr("tutelage.teachers.cache.reader.memory_for_cache", lambda: 0)
    reader = CacheReader(tmp_path / "c")
    assert (reader.scattered, len(reader.shards)) == (True, 2)
    told = [Told(shard.mapped) for shard in reader.shards]
    reader.shards = [shard._replace(mapped=t) for shard, t in zip(reader.shards, told, strict=True)]  # type: ignore[arg-type]
    ids = np.array([50, 3, 170]) * 7
    position = reader.find(ids, np.zeros_like(ids))
    reader.prefetch(position)
    _, columns = reader.rows(position)
    for number, count in ((0, 2), (1, 1)):
        shard, spans = reader.shards[number], told[number].spans
        raw = bytes(told[number].mapped)
        known = b"".join(raw[start:stop] for start, stop in spans)
        for i in [i for i, sample in enumerate(ids) if sample in shard.keys["id"]]:
            for column in take_rows(columns, np.array([i])).values():
                values = column if isinstance(column, np.ndarray) else column.values
                assert values.tobytes() in known
        assert len(spans) == count * len(shard.columns)
        assert sum(stop - start for start, stop in spans) < 0.2 * len(raw)


def test_a_student_of_a_cache_larger_than_memory_is_the_same_and_each_batch_is_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe: dict[str, Any] = {
        "name": "c", "data": {"source": "digits", "limit": 128}, "baseline": False,
        "student": {"model": "mlp", "options": {"hidden": [8]}},
        "teacher": {"model": "mlp", "options": {"hidden": [16]}, "train": {"steps": 60},
                    "cache": {"path": str(tmp_path / "c"), "dtype": "fp32"}},
        "method": {"kind": "logit"}, "train": {"epochs": 3, "batch_size": 32},
    }  # fmt: skip
    api.run(build_recipe(json.loads(json.dumps(recipe))), out=tmp_path / "a", terminal=SILENT)
    monkeypatch.setattr("tutelage.teachers.cache.reader.memory_for_cache", lambda: 0)
    happened: list[tuple[str, tuple[int, ...]]] = []
    for name in ("prefetch", "rows"):
        whole = getattr(CacheReader, name)

        def noted(self: CacheReader, positions: Any, name: str = name, whole: Any = whole) -> Any:
            happened.append((name, tuple(positions.tolist())))
            return whole(self, positions)

        monkeypatch.setattr(CacheReader, name, noted)
    api.run(build_recipe(json.loads(json.dumps(recipe))), out=tmp_path / "b", terminal=SILENT)
    file = Path("models") / "distilled-seed0" / "model.safetensors"
    assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert [name for name, _ in happened[:6]] == ["prefetch", "prefetch", "rows", "prefetch", "rows", "prefetch"]
    announced = [positions for name, positions in happened if name == "prefetch"]
    assert announced == [positions for name, positions in happened if name == "rows"]
    assert len(announced) == 12


def test_all_classes_are_the_whole_and_fewer_keep_the_tail() -> None:
    torch.manual_seed(0)
    s, t = torch.randn(6, 9, dtype=torch.float64, requires_grad=True), torch.randn(6, 9, dtype=torch.float64)
    log_p = (t / 3).log_softmax(-1)
    index = log_p.topk(9).indices
    whole = losses.topk_kd(s, index, log_p.gather(-1, index), temperature=3.0)
    torch.testing.assert_close(whole, losses.kd(s, t, temperature=3.0))
    for k in (1, 4):
        part = losses.topk_kd(s, index[:, :k], log_p.gather(-1, index[:, :k]), temperature=3.0)
        p, q = log_p.exp(), (s / 3).softmax(-1)
        expected = 0.0
        for row in range(6):
            chosen = index[row, :k]
            expected += (p[row, chosen] * (p[row, chosen] / q[row, chosen]).log()).sum()
            rest_p, rest_q = 1 - p[row, chosen].sum(), 1 - q[row, chosen].sum()
            expected += rest_p * (rest_p / rest_q).log()
        torch.testing.assert_close(part, 9.0 * expected / 6)
        assert 0 < part < whole
        (gradient,) = torch.autograd.grad(part, s)
        assert gradient.abs().sum() > 0  # a renormalised top-1 would be zero everywhere


def test_sparse_objectives_obey_the_laws() -> None:
    torch.manual_seed(0)
    s, t = torch.randn(5, 7, dtype=torch.float64, requires_grad=True), torch.randn(5, 7, dtype=torch.float64)
    log_p = (t / 2).log_softmax(-1)
    index = log_p.topk(3).indices
    mask = torch.tensor([True, False, True, True, False])
    for loss, values in (
        (losses.topk_kd, log_p.gather(-1, index)),
        (losses.sampled_kd, log_p.gather(-1, index).exp()),
    ):
        masked = loss(s, index, values, temperature=2.0, mask=mask)
        torch.testing.assert_close(masked, loss(s[mask], index[mask], values[mask], temperature=2.0))
        poisoned = torch.where(mask[:, None], s, torch.nan)
        torch.testing.assert_close(masked, loss(poisoned, index, values, temperature=2.0, mask=mask))
        empty = loss(s, index, values, mask=torch.zeros(5, dtype=torch.bool))
        (gradient,) = torch.autograd.grad(empty, s)
        assert empty == 0
        assert torch.equal(gradient, torch.zeros_like(s))
        assert torch.autograd.gradcheck(lambda x, f=loss, v=values: f(x, index, v, temperature=2.0), (s,))
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            extreme = torch.full((5, 7), -200.0, dtype=dtype)
            extreme[:, 0] = 200
            assert bool(torch.isfinite(loss(extreme, index, values.to(dtype))))
        with pytest.raises(ValueError, match="of one shape"):
            loss(s, index[:3], values[:3])
    exact = losses.topk_kd(t.requires_grad_(), index, log_p.gather(-1, index), temperature=2.0)
    assert exact.abs() < 1e-12


def test_the_sample_is_unbiased_and_drawn_by_the_row(tmp_path: Path) -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 30) * 3
    for head in (0, 4):
        layout = Layout("sampled", 30, "fp32", draws=12, head=head, temperatures=(2.0,))
        mean = torch.zeros(30, dtype=torch.float64)
        n = 4000
        from tutelage.teachers import Signal

        columns = layout.encode(Signal(logits.expand(n, -1)), torch.arange(n))
        part = layout.decode(columns, Needs(temperature=2.0), "cpu").sparse
        assert part is not None
        mean.scatter_add_(0, part.index.flatten(), part.values.double().flatten() / n)
        p = (logits[0] / 2).double().softmax(-1)
        assert (mean - p).abs().max() < 5 * (0.25 / (12 * n)) ** 0.5
        one = layout.encode(Signal(logits.expand(5, -1)), torch.arange(17, 22))
        both, again = take_rows(columns, np.arange(17, 22)), one
        assert np.array_equal(both["drawn@2"].values, again["drawn@2"].values)  # type: ignore[union-attr]


def test_a_recipe_that_no_cache_can_serve_is_refused() -> None:
    base: dict[str, Any] = {
        "name": "c", "data": {"source": "digits", "augment": ["flip"]}, "student": "mlp", "method": "logit",
        "teacher": {"model": "mlp", "cache": True},
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"set data\.views, such as 10"):
        build_recipe(json.loads(json.dumps(base)))
    with pytest.raises(ConfigError, match="needs an augmentation"):
        build_recipe(json.loads(json.dumps({**base, "data": {"source": "digits", "views": 3}})))
    with pytest.raises(ConfigError, match="use mode: eval"):
        build_recipe(json.loads(json.dumps(
            {**base, "data": "digits", "teacher": {"model": "convnet", "cache": True, "mode": "train_bn"}}
        )))  # fmt: skip
