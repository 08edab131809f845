"""Losses on relations and attention, each against its paper's equation in numpy, by loops and in float64."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from support.loss_values import draw, kl, norm, same, softmax, tensors
from tutelage import losses


def huber(d):
    return 0.5 * d * d if abs(d) < 1 else abs(d) - 0.5


batches = pytest.mark.parametrize(("b", "d", "e"), [(4, 3, 5), (6, 7, 2)])


@batches
def test_similarity(b, d, e):
    fs, ft = draw(b, d, seed=1), draw(b, e, seed=2)
    gs, gt = (np.array([norm(row) for row in x @ x.T]) for x in (fs, ft))
    same(losses.similarity(*tensors(fs, ft)), ((gs - gt) ** 2).sum() / b**2)


@batches
@pytest.mark.parametrize(("gamma", "order"), [(0.4, 2), (0.7, 3)])
def test_correlation(b, d, e, gamma, order):
    fs, ft = draw(b, d, seed=1), draw(b, e, seed=2)

    def k(x, y):
        series = sum((2 * gamma * (norm(x) @ norm(y))) ** p / math.factorial(p) for p in range(order + 1))
        return math.exp(-2 * gamma) * series

    total = sum((k(fs[i], fs[j]) - k(ft[i], ft[j])) ** 2 for i in range(b) for j in range(b))
    same(losses.correlation(*tensors(fs, ft), gamma=gamma, order=order), total / b**2)


def test_correlations_series_tends_to_the_gaussian_kernel():
    fs, ft = draw(4, 3, seed=1), draw(4, 5, seed=2)
    us, ut = (np.array([norm(row) for row in x]) for x in (fs, ft))
    ks, kt = (np.exp(-0.4 * ((u[:, None] - u[None]) ** 2).sum(-1)) for u in (us, ut))
    same(losses.correlation(*tensors(fs, ft), order=20), ((ks - kt) ** 2).mean())


@batches
def test_pkt(b, d, e):
    fs, ft = draw(b, d, seed=1), draw(b, e, seed=2)

    def k(x, y):
        return (norm(x) @ norm(y) + 1) / 2

    total = 0.0
    for i in range(b):
        p, q = ([k(x[i], x[j]) for j in range(b) if j != i] for x in (ft, fs))
        total += kl(np.array(p) / sum(p), np.array(q) / sum(q))
    same(losses.pkt(*tensors(fs, ft)), total / b)
    same(losses.pkt(*tensors(fs, ft), reduction="sum"), total)
    theirs = 0.0
    for i in range(b):
        p, q = (np.array([k(x[i], x[j]) for j in range(b)]) for x in (ft, fs))
        p, q = p / p.sum(), q / q.sum()
        theirs += (p * np.log((p + 1e-7) / (q + 1e-7))).sum() / b**2
    same(losses.pkt(*tensors(fs, ft), variant="authors"), theirs)


@batches
def test_rkd_distance(b, d, e):
    fs, ft = draw(b, d, seed=1), 3 * draw(b, e, seed=2)

    def psi(x):
        distances = np.array([[math.dist(u, v) for u in x] for v in x])
        return distances / distances[distances > 0].mean()

    ps, pt = psi(fs), psi(ft)
    total = sum(huber(ps[i, j] - pt[i, j]) for i in range(b) for j in range(b))
    same(losses.rkd_distance(*tensors(fs, ft)), total / b**2)


@batches
def test_rkd_angle(b, d, e):
    fs, ft = draw(b, d, seed=1), draw(b, e, seed=2)

    def cosine(x, i, j, k):
        return norm(x[i] - x[j]) @ norm(x[k] - x[j]) if i != j != k else 0.0

    triples = itertools.product(range(b), repeat=3)
    total = sum(huber(cosine(fs, *t) - cosine(ft, *t)) for t in triples)
    same(losses.rkd_angle(*tensors(fs, ft)), total / b**3)


attentions = pytest.mark.parametrize(("b", "h", "n"), [(2, 3, 4), (3, 1, 5)])


def visible(b, n):
    """Padding mask with a different length in every example, and causal visibility besides."""
    tokens = np.arange(n)[None] < np.array([n - i for i in range(b)])[:, None]
    causal = tokens[:, :, None] & tokens[:, None, :] & np.tril(np.ones((n, n), bool))
    return tokens, causal


def masks(b, n):
    tokens, causal = visible(b, n)
    return [
        (None, np.ones((b, n, n), bool)),
        (torch.from_numpy(tokens), tokens[:, :, None] & tokens[:, None, :]),
        (torch.from_numpy(causal), causal),
    ]


@attentions
@pytest.mark.parametrize("which", [0, 1, 2])
def test_attention_mse(b, h, n, which):
    s, t = draw(b, h, n, n, seed=1), draw(b, h, n, n, seed=2)
    mask, pairs = masks(b, n)[which]
    queries = []
    for i, q in itertools.product(range(b), range(n)):
        keys = pairs[i, q]
        if keys.any():
            queries.append(np.mean([((s[i, a, q, keys] - t[i, a, q, keys]) ** 2).mean() for a in range(h)]))
    same(losses.attention_mse(*tensors(s, t), mask=mask), np.mean(queries))


@attentions
@pytest.mark.parametrize("which", [0, 1, 2])
def test_attention_kl(b, h, n, which):
    s, t = draw(b, h, n, n, seed=1), draw(b, h, n, n, seed=2)
    mask, pairs = masks(b, n)[which]
    each, mean = [], []
    for i, q in itertools.product(range(b), range(n)):
        keys = pairs[i, q]
        if keys.any():
            ps, pt = ([softmax(x[i, a, q, keys], 2.0) for a in range(h)] for x in (s, t))
            each.append(4 * np.mean([kl(u, v) for u, v in zip(pt, ps, strict=True)]))
            mean.append(4 * kl(np.mean(pt, 0), np.mean(ps, 0)))
    same(losses.attention_kl(*tensors(s, t), temperature=2.0, mask=mask), np.mean(each))
    same(losses.attention_kl(*tensors(s, t), temperature=2.0, mask=mask, heads="mean"), np.mean(mean))


def test_attention_kl_takes_the_probabilities_that_models_return():
    s, t = draw(2, 3, 4, 4, seed=1), draw(2, 3, 4, 4, seed=2)
    scores = losses.attention_kl(*tensors(s, t))
    same(losses.attention_kl(*tensors(softmax(s), softmax(t)), inputs="probabilities"), scores)


def test_attention_means_over_different_head_counts():
    s, t = draw(2, 2, 4, 4, seed=1), draw(2, 6, 4, 4, seed=2)
    same(losses.attention_mse(*tensors(s, t), heads="mean"), ((s.mean(1) - t.mean(1)) ** 2).mean())
    ps, pt = softmax(s).mean(1), softmax(t).mean(1)
    same(losses.attention_kl(*tensors(s, t), heads="mean"), kl(pt, ps) / 8)


@pytest.mark.parametrize(("b", "n", "d", "e", "heads"), [(2, 4, 6, 6, 3), (3, 5, 4, 8, 2), (1, 3, 5, 10, 1)])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_value_relation(b, n, d, e, heads, which):
    s, t = draw(b, n, d, seed=1), draw(b, n, e, seed=2)
    mask, pairs = masks(b, n)[which]

    def relation(x, i, a, q, keys):
        width = x.shape[-1] // heads
        v = x[i, :, a * width : (a + 1) * width]
        return softmax(v[keys] @ v[q] / math.sqrt(width))

    queries = []
    for i, q in itertools.product(range(b), range(n)):
        keys = pairs[i, q]
        if keys.any():
            queries.append(
                np.mean([kl(relation(t, i, a, q, keys), relation(s, i, a, q, keys)) for a in range(heads)])
            )
    same(losses.value_relation(*tensors(s, t), heads=heads, mask=mask), np.mean(queries))


def test_directions_by_hand():
    one, other = (
        torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 0.0]]),
        torch.tensor([[5.0, 0.0], [1.0, 0.0], [-7.0, 0.0]]),
    )
    torch.testing.assert_close(losses.cosine(one, other, reduction="none"), torch.tensor([0.0, 1.0, 2.0]))
    torch.testing.assert_close(losses.patient(one, other, reduction="none"), torch.tensor([0.0, 2.0, 4.0]))
    authors = losses.patient(one, other, variant="authors", reduction="none")
    torch.testing.assert_close(authors, torch.tensor([0.0, 1.0, 2.0]))
    # student: 1 and 3 alike, 2 at a right angle; teacher: 1 and 2 alike, 3 opposite
    pairs = torch.tensor([(0.0 - 1.0) ** 2, (1.0 + 1.0) ** 2, (0.0 + 1.0) ** 2])
    torch.testing.assert_close(losses.cosine_matrix(one, other), pairs.mean())
    turned = other @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]]) * 4
    assert losses.cosine_matrix(turned, other).item() == pytest.approx(0.0, abs=1e-7)


def test_margins_by_hand():
    student, teacher = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[9.0, 6.0, 8.0]])
    assert losses.margin_mse(student, teacher).item() == pytest.approx(((1 - 3) ** 2 + (2 - 1) ** 2) / 2)
