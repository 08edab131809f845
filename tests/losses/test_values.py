"""Each loss against its paper's equation, written here once more in numpy, by loops and in float64."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from tutelage import losses


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape) * 1.5


def same(actual: torch.Tensor, expected, tolerance: float = 1e-9) -> None:
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=tolerance, atol=tolerance)


def tensors(*arrays):
    return [torch.from_numpy(np.asarray(x)) for x in arrays]


def softmax(z, temperature=1.0):
    e = np.exp(np.asarray(z) / temperature)
    return e / e.sum(-1, keepdims=True)


def kl(p, q):
    return float(sum(a * math.log(a / b) for a, b in zip(np.ravel(p), np.ravel(q), strict=True)))


def norm(x):
    return x / math.sqrt(float((x**2).sum()))


def huber(d):
    return 0.5 * d * d if abs(d) < 1 else abs(d) - 0.5


logits = pytest.mark.parametrize("shape", [(3, 4), (5, 2), (1, 7)])
temperatures = pytest.mark.parametrize("t", [1.0, 4.0])
features = pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4, 5)])
batches = pytest.mark.parametrize(("b", "d", "e"), [(4, 3, 5), (6, 7, 2)])


# ------------------------------------------------------------- class scores


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


# --------------------------------------------------------------- structured


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


# ----------------------------------------------------------------- features


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


# ---------------------------------------------------------------- relations


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


# ---------------------------------------------------------------- attention

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
