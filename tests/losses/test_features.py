"""Losses on features, each against its paper's equation in numpy, by loops and in float64."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from support.loss_values import draw, norm, same, tensors
from tutelage import losses

features = pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4, 5)])


@features
def test_hint_and_simkd(shape):
    fs, ft = draw(*shape, seed=1), draw(*shape, seed=2)
    each = [((a - b) ** 2).sum() for a, b in zip(fs, ft, strict=True)]
    elements = fs[0].size
    same(losses.hint(*tensors(fs, ft)), np.mean(each) / elements)
    same(losses.hint(*tensors(fs, ft)), ((fs - ft) ** 2).mean())
    same(losses.simkd(*tensors(fs, ft), reduction="none"), each)
    same(losses.simkd(*tensors(fs, ft), variant="authors"), np.mean(each) / elements)


def test_hint_with_a_mask_of_tokens_averages_over_tokens():
    fs, ft = draw(2, 3, 4, seed=1), draw(2, 3, 4, seed=2)
    mask = np.array([[True, True, False], [True, False, False]])
    expected = np.mean([((fs[i] - ft[i]) ** 2).mean() for i in zip(*np.nonzero(mask), strict=True)])
    same(
        losses.hint(
            *tensors(
                fs,
                ft,
            ),
            mask=torch.from_numpy(mask),
        ),
        expected,
    )


maps = pytest.mark.parametrize(("student", "teacher"), [((2, 3, 4, 5), (2, 6, 4, 5)), ((3, 7, 2, 2), (3, 2, 2, 2))])


@maps
def test_attention_transfer(student, teacher):
    fs, ft = draw(*student, seed=1), draw(*teacher, seed=2)
    each = []
    for a, b in zip(fs, ft, strict=True):
        gap = norm((a**2).sum(0)) - norm((b**2).sum(0))
        each.append((gap**2).sum())
    same(losses.attention_transfer(*tensors(fs, ft)), np.mean(each))
    positions = student[2] * student[3]
    same(losses.attention_transfer(*tensors(fs, ft), variant="authors"), np.mean(each) / positions)


def test_attention_transfer_pools_the_larger_map():
    fs, ft = draw(2, 3, 4, 6, seed=1), draw(2, 5, 2, 3, seed=2)
    pooled = fs.reshape(2, 3, 2, 2, 3, 2).mean((3, 5))
    same(losses.attention_transfer(*tensors(fs, ft)), losses.attention_transfer(*tensors(pooled, ft)))
    same(losses.attention_transfer(*tensors(ft, fs)), losses.attention_transfer(*tensors(ft, pooled)))


@maps
@pytest.mark.parametrize(("kernel", "power"), [("polynomial", 2), ("linear", 1)])
def test_nst(student, teacher, kernel, power):
    fs, ft = draw(*student, seed=1), draw(*teacher, seed=2)
    total = 0.0
    for a, b in zip(fs, ft, strict=True):
        x, y = [norm(c.ravel()) for c in b], [norm(c.ravel()) for c in a]

        def k(u, v):
            return np.mean([(i @ j) ** power for i in u for j in v])

        total += k(x, x) + k(y, y) - 2 * k(x, y)
    same(losses.nst(*tensors(fs, ft), kernel=kernel), total / student[0])


@features
def test_factor_transfer(shape):
    fs, ft = draw(*shape, seed=1), draw(*shape, seed=2)
    each = [abs(norm(a) - norm(b)).sum() for a, b in zip(fs, ft, strict=True)]
    same(losses.factor_transfer(*tensors(fs, ft)), np.mean(each))
    same(losses.factor_transfer(*tensors(fs, ft), variant="authors"), np.mean(each) / fs[0].size)


@features
def test_overhaul(shape):
    fs, ft = draw(*shape, seed=1), draw(*shape, seed=2)
    margin = -np.linspace(0.1, 0.9, shape[1])
    total, skipped = 0.0, 0
    for index in itertools.product(*map(range, shape)):
        s, t = fs[index], max(ft[index], margin[index[1]])
        if s <= t <= 0:
            skipped += 1
        else:
            total += (t - s) ** 2
    assert skipped
    same(losses.overhaul(*tensors(fs, ft, margin)), total / shape[0])


def test_overhaul_margin_is_the_mean_of_the_negative_part():
    scale, shift = np.array([1.0, -0.7, 2.0]), np.array([0.0, 0.5, -1.0])
    margins = losses.overhaul_margin(*tensors(scale, shift))
    x = np.linspace(-30, 0, 400_001)
    for m, a, b in zip(margins, scale, shift, strict=True):
        density = np.exp(-0.5 * ((x - b) / a) ** 2)
        assert m.item() == pytest.approx((x * density).sum() / density.sum(), rel=1e-4)
    assert margins[0].item() == pytest.approx(-math.sqrt(2 / math.pi), rel=1e-9)


@features
def test_vid(shape):
    fs, ft = draw(*shape, seed=1), draw(*shape, seed=2)
    spread = np.linspace(-2, 2, shape[1])
    total = 0.0
    for index in itertools.product(*map(range, shape)):
        variance = math.log1p(math.exp(spread[index[1]])) + 1e-5
        total += 0.5 * math.log(variance) + (ft[index] - fs[index]) ** 2 / (2 * variance)
    same(losses.vid(*tensors(fs, ft, spread)), total / shape[0])
    same(losses.vid(*tensors(fs, ft, spread), variant="authors"), total / fs.size)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (3, 2, 4, 4)])
def test_review(shape):
    fs, ft = draw(*shape, seed=1), draw(*shape, seed=2)
    b, c, h, _ = shape
    total, weights, weight = ((fs - ft) ** 2).mean(), 1.0, 1.0
    for side in (4, 2, 1):
        if side >= h:
            continue
        weight /= 2
        ps, pt = (x.reshape(b, c, side, h // side, side, h // side).mean((3, 5)) for x in (fs, ft))
        total, weights = total + weight * ((ps - pt) ** 2).mean(), weights + weight
    same(losses.review(*tensors(fs, ft)), total / weights)


@pytest.mark.parametrize(("b", "d", "n", "m"), [(3, 4, 5, 8), (2, 6, 3, 40)])
@pytest.mark.parametrize("variant", ["paper", "authors"])
def test_crd(b, d, n, m, variant):
    s, t = draw(b, d, seed=1), draw(b, d, seed=2)
    memory = losses.ContrastiveMemory(m, d).double()
    index = torch.arange(b)
    negatives = memory.draw(index, n)
    tau, z = 0.2, [1.0, 1.0]
    if variant == "authors":
        memory.calibrate(*tensors(s, t), negatives, temperature=tau)
        z = []
    banks = memory.teacher.numpy(), memory.student.numpy()
    for anchors, bank in zip((s, t), banks, strict=True):
        if variant == "authors":
            drawn = negatives.numpy()
            z.append(m * np.mean([math.exp(norm(anchors[i]) @ bank[j] / tau) for i in range(b) for j in drawn[i]]))
    total = 0.0
    for anchors, others, bank, scale in zip((s, t), (t, s), banks, z, strict=True):
        for i in range(b):

            def h(other, i=i, anchors=anchors, scale=scale):
                e = math.exp(norm(anchors[i]) @ other / tau) / scale
                return e / (e + n / m)

            positive = norm(others[i]) if variant == "paper" else bank[i]
            total -= math.log(h(positive))
            total -= sum(math.log(1 - h(bank[j])) for j in negatives[i].numpy())
    value = losses.crd(*tensors(s, t), index, negatives, memory, temperature=tau, variant=variant)
    same(value, total / b)
