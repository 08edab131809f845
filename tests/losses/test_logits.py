"""Losses on logits, each against its paper's equation in numpy, by loops and in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from support.loss_values import draw, kl, same, softmax, tensors
from tutelage import losses

logits = pytest.mark.parametrize("shape", [(3, 4), (5, 2), (1, 7)])


temperatures = pytest.mark.parametrize("t", [1.0, 4.0])


def test_kd_on_numbers_worked_out_by_hand():
    # p = (3/4, 1/4), q = (1/2, 1/2): KL = 3/4 ln(3/2) + 1/4 ln(1/2)
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]])
    by_hand = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert losses.kd(student, teacher, temperature=1.0).item() == pytest.approx(by_hand, abs=1e-6)
    # at T = 2 the same distributions need logits twice as large, and count four times
    assert losses.kd(student, 2 * teacher, temperature=2.0).item() == pytest.approx(4 * by_hand, abs=1e-6)


@logits
@temperatures
def test_divergences_between_distributions(shape, t):
    zs, zt = draw(*shape, seed=1), draw(*shape, seed=2)
    s, u = tensors(zs, zt)
    q, p = softmax(zs, t), softmax(zt, t)

    def mean(f):
        return t * t * np.mean([f(a, b) for a, b in zip(p, q, strict=True)])

    same(losses.kd(s, u, temperature=t), mean(kl))
    same(losses.reverse_kl(s, u, temperature=t), mean(lambda a, b: kl(b, a)))
    same(losses.soft_cross_entropy(s, u, temperature=t), mean(lambda a, b: -(a * np.log(b)).sum()))
    same(losses.tvd(s, u, temperature=t), mean(lambda a, b: abs(a - b).sum() / 2))
    for beta in (0.5, 0.1):

        def jsd(a, b, beta=beta):
            m = beta * a + (1 - beta) * b
            return beta * kl(a, m) + (1 - beta) * kl(b, m)

        same(losses.js(s, u, beta=beta, temperature=t), mean(jsd))
    for alpha in (0.1, 0.7):
        forward = losses.skew_kl(s, u, alpha=alpha, temperature=t)
        same(forward, mean(lambda a, b, x=alpha: kl(a, x * a + (1 - x) * b)))
        backward = losses.skew_kl(s, u, alpha=alpha, reverse=True, temperature=t)
        same(backward, mean(lambda a, b, x=alpha: kl(b, (1 - x) * a + x * b)))


@logits
@temperatures
def test_standardized_kd(shape, t):
    zs, zt = draw(*shape, seed=1), draw(*shape, seed=2)

    def z_score(z):
        return (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True))

    expected = (
        t * t * np.mean([kl(softmax(z_score(b), t), softmax(z_score(a), t)) for a, b in zip(zs, zt, strict=True)])
    )
    same(losses.kd(*tensors(zs, zt), temperature=t, standardize=True), expected)
    # the authors' deviation over C - 1 is the temperature and weight that the docstring says
    c = shape[-1]
    sample = [((z - z.mean(-1, keepdims=True)) / z.std(-1, ddof=1, keepdims=True)) for z in (zs, zt)]
    theirs = t * t * np.mean([kl(softmax(b, t), softmax(a, t)) for a, b in zip(*sample, strict=True)])
    ours = losses.kd(*tensors(zs, zt), temperature=t * math.sqrt(c / (c - 1)), standardize=True)
    same(ours * (c - 1) / c, theirs)


@logits
def test_hard_labels_and_the_combination(shape):
    zs, zt = draw(*shape, seed=1), draw(*shape, seed=2)
    y = np.arange(shape[0]) % shape[1]
    s, u, labels = tensors(zs, zt, y)
    ce = np.mean([-math.log(softmax(z)[k]) for z, k in zip(zs, y, strict=True)])
    same(losses.cross_entropy(s, labels), ce)
    soft = 9 * np.mean([kl(b, a) for a, b in zip(softmax(zs, 3), softmax(zt, 3), strict=True)])
    same(losses.distillation(s, u, labels, temperature=3.0, alpha=0.7), 0.7 * soft + 0.3 * ce)


@logits
def test_labels_that_are_smoothed(shape):
    zs, c = draw(*shape, seed=1), shape[1]
    y = np.arange(shape[0]) % c
    s, labels = tensors(zs, y)
    target = 0.7 * np.eye(c)[y] + 0.3 / c
    expected = np.mean([-(p * np.log(softmax(z))).sum() for p, z in zip(target, zs, strict=True)])
    same(losses.cross_entropy(s, labels, label_smoothing=0.3), expected)


@logits
@pytest.mark.parametrize("t", [1.0, 20.0])
def test_the_virtual_teacher(shape, t):
    zs, c = draw(*shape, seed=1), shape[1]
    y = np.arange(shape[0]) % c
    s, labels = tensors(zs, y)
    virtual = np.where(np.eye(c)[y] == 1, 0.95, 0.05 / (c - 1))
    softened = virtual ** (1 / t) / (virtual ** (1 / t)).sum(-1, keepdims=True)
    paper = t * t * np.mean([kl(p, q) for p, q in zip(softened, softmax(zs, t), strict=True)])
    same(losses.teacher_free(s, labels, correct=0.95, temperature=t), paper)
    authors = np.mean([kl(p, q) for p, q in zip(softmax(virtual, t), softmax(zs), strict=True)])
    same(losses.teacher_free(s, labels, correct=0.95, temperature=t, variant="authors"), authors)


def test_the_virtual_teacher_by_hand_and_who_has_none():
    logits = torch.zeros(2, 3, dtype=torch.float64)
    rows = losses.teacher_free(
        logits, torch.tensor([1, -100]), correct=0.8, temperature=1.0, reduction="none"
    )  # 0.8 log 2.4 + 2 * 0.1 log 0.3
    same(rows, [0.8 * math.log(2.4) + 0.2 * math.log(0.3), 0.0])
    perfect = torch.tensor([[math.log(0.1), math.log(0.8), math.log(0.1)]], requires_grad=True)
    loss = losses.teacher_free(perfect, torch.tensor([1]), correct=0.8, temperature=7.0)
    loss.backward()
    assert abs(float(loss.detach())) < 1e-5
    assert perfect.grad.abs().max() < 1e-5
    for correct in (1.0, 1 / 3):
        with pytest.raises(ValueError, match="between 1/C and 1"):
            losses.teacher_free(logits, torch.tensor([0, 1]), correct=correct)
    with pytest.raises(ValueError, match="label_smoothing"):
        losses.cross_entropy(logits, torch.tensor([0, 1]), label_smoothing=1.0)


def test_rows_without_a_label_are_still_taught_by_the_teacher():
    zs, zt = draw(3, 4, seed=1), draw(3, 4, seed=2)
    s, u = tensors(zs, zt)
    labels = torch.tensor([1, -100, 2])
    soft = 16 * np.mean([kl(b, a) for a, b in zip(softmax(zs, 4), softmax(zt, 4), strict=True)])
    hard = np.mean([-math.log(softmax(zs)[0, 1]), -math.log(softmax(zs)[2, 2])])
    same(losses.distillation(s, u, labels), 0.9 * soft + 0.1 * hard)
    none = torch.full((3,), -100)
    same(losses.distillation(s, u, none), 0.9 * soft)


@pytest.mark.parametrize("shape", [(3, 4), (5, 1)])
@temperatures
def test_binary_kd(shape, t):
    zs, zt = draw(*shape, seed=1), draw(*shape, seed=2)
    q, p = 1 / (1 + np.exp(-zs / t)), 1 / (1 + np.exp(-zt / t))
    expected = (
        t
        * t
        * np.mean(
            [sum(kl([a, 1 - a], [b, 1 - b]) for a, b in zip(x, y, strict=True)) for x, y in zip(p, q, strict=True)]
        )
    )
    same(losses.binary_kd(*tensors(zs, zt), temperature=t), expected)


def test_binary_kd_of_one_logit_is_kd_of_two_classes():
    zs, zt = tensors(draw(5, 1, seed=1), draw(5, 1, seed=2))
    pad = torch.nn.functional.pad
    same(losses.binary_kd(zs, zt), losses.kd(pad(zs, (0, 1)), pad(zt, (0, 1))))


@logits
def test_mse_sums_over_outputs(shape):
    zs, zt = draw(*shape, seed=1), draw(*shape, seed=2)
    same(losses.mse(*tensors(zs, zt)), ((zs - zt) ** 2).sum() / shape[0])


@pytest.mark.parametrize("shape", [(9, 1), (20, 3)])
@pytest.mark.parametrize("margin", [0.0, 0.7])
def test_bounded_regression(shape, margin):
    s, u, y = (draw(*shape, seed=i) for i in range(3))
    expected, active = 0.0, 0
    for a, b, c in zip(s, u, y, strict=True):
        if ((a - c) ** 2).sum() + margin > ((b - c) ** 2).sum():
            expected, active = expected + ((a - c) ** 2).sum(), active + 1
    assert 0 < active < shape[0]
    same(losses.bounded_regression(*tensors(s, u, y), margin=margin), expected / shape[0])


@logits
@temperatures
def test_dkd(shape, t):
    zs, zt = draw(*shape, seed=1), draw(*shape, seed=2)
    y = np.arange(shape[0]) % shape[1]
    total = 0.0
    for p, q, k in zip(softmax(zt, t), softmax(zs, t), y, strict=True):
        tckd = kl([p[k], 1 - p[k]], [q[k], 1 - q[k]])
        others = [i for i in range(shape[1]) if i != k]
        nckd = kl(p[others] / p[others].sum(), q[others] / q[others].sum())
        total += t * t * (0.5 * tckd + 6.0 * nckd)
    value = losses.dkd(*tensors(zs, zt, y), alpha=0.5, beta=6.0, temperature=t)
    same(value, total / shape[0])


@pytest.mark.parametrize("shape", [(3, 4), (6, 5)])
@temperatures
def test_dist(shape, t):
    q, p = softmax(draw(*shape, seed=1), t), softmax(draw(*shape, seed=2), t)
    inter = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q, p, strict=True)])
    intra = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q.T, p.T, strict=True)])
    value = losses.dist(*tensors(draw(*shape, seed=1), draw(*shape, seed=2)), beta=2.0, gamma=0.5, temperature=t)
    same(value, t * t * (2.0 * inter + 0.5 * intra))


@pytest.mark.parametrize("shape", [(3, 4), (6, 5)])
def test_mlkd(shape):
    n, c = shape
    zs, zt = draw(*shape, seed=1), draw(*shape, seed=2)
    total = 0.0
    for t in (2.0, 5.0):
        q, p = softmax(zs, t), softmax(zt, t)
        total += 0.3 * t * t * np.mean([kl(a, b) for a, b in zip(p, q, strict=True)])
        total += 0.7 * sum((q[i] @ q[j] - p[i] @ p[j]) ** 2 for i in range(n) for j in range(n)) / n
        total += 1.1 * sum((q[:, i] @ q[:, j] - p[:, i] @ p[:, j]) ** 2 for i in range(c) for j in range(c)) / c
    value = losses.mlkd(*tensors(zs, zt), temperatures=(2.0, 5.0), instance=0.3, batch=0.7, classes=1.1)
    same(value, total)
