"""Silent failures that others fell into, one test each, and what is refused with a remedy."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tutelage import losses
from tutelage.losses.common import centre, unit


def pair(*shape, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)


DIVERGENCES = {
    "kd": {},
    "reverse_kl": {},
    "js": {},
    "js-0.1": {"beta": 0.1},
    "skew_kl": {},
    "skew_kl-reverse": {"reverse": True},
    "tvd": {},
    "soft_cross_entropy": {},
    "binary_kd": {},
    "attention_kl": {},
    "value_relation": {"heads": 1},
}
divergences = pytest.mark.parametrize(("name", "options"), DIVERGENCES.items(), ids=DIVERGENCES)

# ------------------------------------------------------ trap 1: averages and T^2


def test_kl_is_not_averaged_over_classes():
    """`F.kl_div(reduction="mean")` is C times too small, which looks like a weak teacher."""
    s, t = pair(4, 100)
    expected = F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="batchmean")
    torch.testing.assert_close(losses.kd(s, t, temperature=1.0), expected)


@pytest.mark.parametrize(
    ("name", "options"), [(k, v) for k, v in DIVERGENCES.items() if k not in ("value_relation", "binary_kd")]
)
def test_classes_that_nobody_predicts_do_not_dilute_the_loss(name, options):
    s, t = pair(1, 1, 6, 6) if name == "attention_kl" else pair(2, 6, 6)
    f = getattr(losses, name.split("-")[0])
    padded = [F.pad(x, (0, 30), value=-1e4) for x in (s, t)]
    if name == "attention_kl":
        padded = [F.pad(x, (0, 0, 0, 30)) for x in padded]
        mask = torch.zeros(1, 36, 36, dtype=torch.bool)
        mask[:, :6] = True
        torch.testing.assert_close(f(*padded, mask=mask), f(s, t))
    else:
        torch.testing.assert_close(f(*padded, **options), f(s, t, **options))


@divergences
def test_t_squared_is_there_exactly_once(name, options):
    """Logits and T scaled together are the same distributions: only T^2 may remain."""
    s, t = pair(2, 3, 5, 5, dtype=torch.float64) if name == "attention_kl" else pair(2, 5, 5, dtype=torch.float64)
    f = getattr(losses, name.split("-")[0])
    root = 3.0**0.5 if name == "value_relation" else 3.0  # its scores are products of two features
    at_3 = f(root * s, root * t, temperature=3.0, **options)
    torch.testing.assert_close(at_3, 9.0 * f(s, t, temperature=1.0, **options))


def test_t_squared_is_there_exactly_once_in_dkd_and_dist():
    s, t = pair(5, 6, dtype=torch.float64)
    labels = torch.arange(5)
    at_3 = losses.dkd(3 * s, 3 * t, labels, temperature=3.0)
    torch.testing.assert_close(at_3, 9 * losses.dkd(s, t, labels, temperature=1.0))
    torch.testing.assert_close(losses.dist(3 * s, 3 * t, temperature=3.0), 9 * losses.dist(s, t))
    only_kl = {"batch": 0.0, "classes": 0.0}
    kl = losses.mlkd(s, t, temperatures=(3.0,), **only_kl)
    torch.testing.assert_close(kl, losses.kd(s, t, temperature=3.0))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_t_squared_is_not_dropped_at_any_alpha(alpha):
    s, t = pair(5, 6)
    labels = torch.arange(5)
    value = losses.distillation(s, t, labels, temperature=5.0, alpha=alpha)
    kl = F.kl_div((s / 5).log_softmax(-1), (t / 5).softmax(-1), reduction="batchmean")
    torch.testing.assert_close(value, alpha * 25 * kl + (1 - alpha) * F.cross_entropy(s, labels))


def test_hard_labels_are_at_temperature_1():
    s, t = pair(5, 6)
    labels = torch.arange(5)
    at = [losses.distillation(s, t, labels, temperature=x, alpha=0.0) for x in (1.0, 8.0)]
    assert at[0] == at[1] == losses.cross_entropy(s, labels)


def test_shifted_logits_change_nothing_so_that_log_probabilities_are_accepted_too():
    """Probabilities given as logits would be nearly uniform; log-probabilities are logits."""
    s, t = pair(5, 6)
    kd = losses.kd(s, t, temperature=1.0)
    torch.testing.assert_close(losses.kd(s.log_softmax(-1), t.log_softmax(-1), temperature=1.0), kd)


@pytest.mark.parametrize("name", ["kd", "reverse_kl", "js", "skew_kl", "soft_cross_entropy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_log_of_softmax_does_not_underflow(name, dtype):
    """softmax(-200) is 0 in float32, and its logarithm minus infinity."""
    s = torch.tensor([[200.0, -200.0, 0.0]], dtype=dtype, requires_grad=True)
    t = torch.tensor([[-200.0, 200.0, 0.0]], dtype=dtype)
    value = getattr(losses, name)(s, t, temperature=1.0)
    value.backward()
    assert value.isfinite()
    assert s.grad.isfinite().all()
    if name in ("kd", "reverse_kl", "soft_cross_entropy"):
        assert value.item() == pytest.approx(400.0)
        assert (s.grad != 0).any() or name == "reverse_kl"


def test_dkds_other_classes_do_not_underflow():
    s = torch.tensor([[200.0, -200.0, -100.0]], requires_grad=True)
    t = torch.tensor([[200.0, -100.0, -200.0]])
    # the target takes all probability, yet the two others differ by e^100
    value = losses.dkd(s, t, torch.tensor([0]), beta=1.0, temperature=1.0)
    value.backward()
    assert value.item() == pytest.approx(100.0)
    assert s.grad.abs().max() > 0.9


# ------------------------------------------------ trap 3: cross-entropy is no KL


def test_kd_is_not_cross_entropy_in_disguise():
    """Cross-entropy against the teacher is not 0 at equality, so that its value says nothing."""
    s, t = pair(5, 6, dtype=torch.float64)
    assert losses.kd(t, t, temperature=2.0).abs() < 1e-12
    p = (t / 2).softmax(-1)
    entropy = -(p * p.log()).sum(-1).mean()
    torch.testing.assert_close(losses.soft_cross_entropy(t, t, temperature=2.0), 4 * entropy)
    gap = losses.soft_cross_entropy(s, t) - losses.kd(s, t)
    torch.testing.assert_close(gap, losses.soft_cross_entropy(t, t))


def test_soft_cross_entropy_has_the_gradient_of_kd():
    s, t = pair(5, 6, dtype=torch.float64)
    grads = []
    for f in (losses.kd, losses.soft_cross_entropy):
        x = s.clone().requires_grad_()
        f(x, t).backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


# ------------------------------------------------------ trap 11: the ends of JSD


def test_jsd_does_not_vanish_at_the_ends():
    s, t = pair(5, 6)
    torch.testing.assert_close(losses.js(s, t, beta=0.0), losses.kd(s, t, temperature=1.0))
    torch.testing.assert_close(losses.js(s, t, beta=1.0), losses.reverse_kl(s, t))


def test_jsd_shrinks_towards_the_ends_so_that_its_weight_has_to_grow():
    s, t = pair(5, 6, dtype=torch.float64)
    forward = losses.kd(s, t, temperature=1.0)
    assert losses.js(s, t, beta=0.01) < 0.011 * forward
    torch.testing.assert_close(losses.js(s, t, beta=0.01) / 0.01, forward, rtol=0.1, atol=0)


def test_a_skew_that_compares_a_distribution_with_itself_is_refused():
    s, t = pair(5, 6)
    with pytest.raises(ValueError, match="nothing is learned"):
        losses.skew_kl(s, t, alpha=1.0)


# --------------------------------------------- trap 12: degenerate DKD, RKD, CRD


def test_dkd_on_two_classes_is_kd_and_not_nan():
    s, t = pair(6, 2, dtype=torch.float64)
    s.requires_grad_()
    labels = torch.arange(6) % 2
    value = losses.dkd(s, t, labels, alpha=1.0, beta=8.0)
    torch.testing.assert_close(value, losses.kd(s, t))
    assert losses.dkd(s, t, labels, alpha=0.0, beta=8.0) == 0
    value.backward()
    assert s.grad.isfinite().all()


def test_dkd_on_one_class_is_refused():
    s, t = pair(6, 1)
    with pytest.raises(ValueError, match="binary_kd"):
        losses.dkd(s, t, torch.zeros(6, dtype=torch.long))


def test_dkd_leaves_out_rows_without_a_label():
    s, t = pair(4, 5)
    labels = torch.tensor([1, -100, 3, -100])
    some = labels >= 0
    torch.testing.assert_close(losses.dkd(s, t, labels), losses.dkd(s[some], t[some], labels[some]))


@pytest.mark.parametrize("name", ["rkd_distance", "rkd_angle", "similarity", "correlation", "pkt"])
@pytest.mark.parametrize("value", [0.0, 0.1, -3.3, 1e4])
@pytest.mark.parametrize("equal", ["student", "teacher", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_relations_of_features_that_are_all_equal_are_finite(name, value, equal, dtype):
    s, t = pair(30, 9, dtype=dtype)
    same = torch.full((30, 9), value, dtype=dtype)
    s = (t if equal == "teacher" else same).clone().requires_grad_()
    t = t if equal == "student" else same
    loss = getattr(losses, name)(s, t)
    loss.backward()
    assert loss.isfinite()
    assert s.grad.isfinite().all()
    if equal == "both":
        assert loss == 0
        assert s.grad.abs().max() < 1e-6


@pytest.mark.parametrize("name", ["rkd_distance", "rkd_angle"])
def test_rkd_of_two_equal_rows_among_others_is_finite_and_right(name):
    s, t = pair(6, 4, dtype=torch.float64)
    s[3] = s[1]
    s.requires_grad_()
    f = getattr(losses, name)
    f(s, t).backward()
    assert s.grad.isfinite().all()
    # by perturbation along one row that is not among the equal ones
    step = torch.zeros_like(s)
    step[0] = torch.randn(4)
    slope = (f(s + 1e-6 * step, t) - f(s - 1e-6 * step, t)).item() / 2e-6
    assert (s.grad * step).sum().item() == pytest.approx(slope, rel=1e-5)


def test_angles_within_tight_clusters_far_apart_are_right():
    """Inner products of float32 features lose such angles to cancellation."""
    s, t = pair(12, 8)
    clusters = 1e-3 * s + torch.where(torch.arange(12) % 2 == 0, 10.0, -5.0).unsqueeze(1)
    grads, values = [], []
    for dtype in (torch.float32, torch.float64):
        x = clusters.to(dtype, copy=True).requires_grad_()
        values.append(losses.rkd_angle(x, t.to(dtype)))
        values[-1].backward()
        grads.append(x.grad.double())
    torch.testing.assert_close(values[0].double(), values[1], rtol=1e-5, atol=0)
    assert (grads[0] - grads[1]).norm() < 1e-3 * grads[1].norm()


def test_crds_memory_bank_survives_a_checkpoint(tmp_path):
    memory = losses.ContrastiveMemory(20, 4)
    holder = nn.ModuleDict({"memory": memory, "head": nn.Linear(3, 4)})
    index, (s, t) = torch.arange(5), pair(5, 4)
    negatives = memory.draw(index, 6)
    memory.calibrate(s, t, negatives)
    memory.update(index, s, t)
    torch.save(holder.state_dict(), tmp_path / "state.pt")
    loaded = nn.ModuleDict({"memory": losses.ContrastiveMemory(20, 4), "head": nn.Linear(3, 4)})
    args = s, t, index, negatives
    options = {"variant": "authors"}
    with pytest.raises(ValueError, match="calibrate"):
        losses.crd(*args, loaded["memory"], **options)
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(losses.crd(*args, loaded["memory"], **options), losses.crd(*args, memory, **options))
    assert not list(memory.parameters()), "the bank is state, not something to optimise"
    other = pair(5, 4, seed=9)
    memory.calibrate(*other, negatives)
    assert torch.equal(memory.scales, loaded["memory"].scales), "calibrated twice"


def test_crds_memory_follows_the_embeddings_and_stays_on_the_sphere():
    memory = losses.ContrastiveMemory(20, 4, momentum=0.25)
    index, (s, t) = torch.tensor([3, 7, 11]), pair(3, 4)
    before = {name: bank.clone() for name, bank in memory.state_dict().items()}
    memory.update(index, s.requires_grad_(), t, mask=torch.tensor([True, False, True]))
    for bank, old, new in (
        (memory.student, before["student"], s.detach()),
        (memory.teacher, before["teacher"], t),
    ):
        expected = 0.25 * old[3] + 0.75 * new[0] / new[0].norm()
        torch.testing.assert_close(bank[3], expected / expected.norm())
        torch.testing.assert_close(bank.norm(dim=1), torch.ones(20))
        assert torch.equal(bank[7], old[7])
        assert torch.equal(bank[0], old[0])
        assert not bank.requires_grad


def test_crds_negatives_are_never_the_example_itself():
    memory = losses.ContrastiveMemory(5, 4)
    index = torch.arange(5)
    drawn = memory.draw(index, 400)
    assert drawn.shape == (5, 400)
    for i, row in zip(index.tolist(), drawn, strict=True):
        assert set(row.tolist()) == set(range(5)) - {i}


def test_crd_keeps_both_heads_learning_and_the_bank_still():
    memory = losses.ContrastiveMemory(20, 4)
    s, t = (x.requires_grad_() for x in pair(5, 4))
    before = memory.teacher.clone()
    for variant in ("paper", "authors"):
        memory.calibrate(s, t, memory.draw(torch.arange(5), 6))
        s.grad = t.grad = None
        losses.crd(s, t, torch.arange(5), memory.draw(torch.arange(5), 6), memory, variant=variant).backward()
        assert s.grad.abs().sum() > 0
        assert t.grad.abs().sum() > 0
    assert torch.equal(memory.teacher, before)


# ------------------------------------------------------- other quiet degenerations


@pytest.mark.parametrize("value", [0.0, 0.1, 123.456])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_standardizing_a_constant_row_makes_it_uniform_and_not_noise(value, dtype):
    s, t = pair(2, 37, dtype=torch.float32)
    s = s.to(dtype)
    s[0] = value
    s.requires_grad_()
    loss = losses.kd(s, t.to(dtype), standardize=True, reduction="none")
    loss.sum().backward()
    uniform = losses.kd(torch.zeros(1, 37, dtype=dtype), t[:1].to(dtype), standardize=True)
    torch.testing.assert_close(loss[0], uniform)
    assert (s.grad[0] == 0).all()
    assert s.grad[1].abs().sum() > 0


def test_dist_of_a_class_that_never_varies_is_finite_and_says_nothing():
    t = pair(6, 4, dtype=torch.float64)[1]
    t = t.log_softmax(-1)
    constant = t[:1].expand(6, -1).contiguous().requires_grad_()
    assert losses.dist(constant, constant.detach()) == 0
    # the student is constant and the teacher is not: no correlation, distance 1
    value = losses.dist(constant, t, beta=0.0)
    value.backward()
    assert value.item() == pytest.approx(1.0)
    assert constant.grad.isfinite().all()


def test_attention_transfer_of_a_dead_map_is_finite():
    t = torch.randn(2, 3, 4, 4)
    dead = torch.zeros(2, 5, 4, 4, requires_grad=True)
    value = losses.attention_transfer(dead, t)
    value.backward()
    assert value.item() == pytest.approx(1.0)
    assert (dead.grad == 0).all()


def test_overhaul_margins_of_channels_that_are_always_on_or_off():
    weight = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 1e-3])
    bias = torch.tensor([50.0, 10.0, -50.0, 2.0, -2.0, 3.0])
    margin = losses.overhaul_margin(weight, bias)
    assert margin.dtype == torch.float32
    assert margin.isfinite().all()
    assert (margin <= 0).all()
    torch.testing.assert_close(margin[2], torch.tensor(-50.0))
    torch.testing.assert_close(margin[4], torch.tensor(-2.0))
    assert (margin[[0, 1, 3, 5]] > -0.11).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e30])
def test_vectors_of_any_size_are_normalised_without_overflow(scale):
    x = (scale * torch.randn(3, 8, generator=torch.Generator().manual_seed(0))).requires_grad_()
    torch.testing.assert_close(unit(x).norm(dim=-1), torch.ones(3))
    unit(x).sum().backward()
    assert x.grad.isfinite().all()
    zero = torch.zeros(3, 8, requires_grad=True)
    unit(centre(zero)).sum().backward()
    assert (zero.grad == 0).all()


# ---------------------------------------------------------------- attention masks


@pytest.mark.parametrize("name", ["attention_mse", "attention_kl", "value_relation"])
def test_padded_tokens_count_neither_as_query_nor_as_key(name):
    f = getattr(losses, name)
    keep = torch.tensor([True, True, False, True, False])
    mask = keep.expand(3, 5)
    options = {"heads": 2} if name == "value_relation" else {}
    s, t = pair(3, 5, 6) if name == "value_relation" else pair(3, 2, 5, 5)
    for x in (s, t):
        if name == "value_relation":
            x[:, ~keep] = float("nan")
        else:
            x[:, :, ~keep] = float("nan")
            x[:, :, :, ~keep] = float("-inf")
    short = [x[:, keep] if name == "value_relation" else x[:, :, keep][..., keep] for x in (s, t)]
    s.requires_grad_()
    value = f(s, t, mask=mask, **options)
    torch.testing.assert_close(value, f(*short, **options))
    value.backward()
    assert s.grad.isfinite().all()


def test_causal_scores_with_minus_infinity_are_finite():
    s, t = pair(2, 3, 5, 5)
    above = torch.ones(5, 5, dtype=torch.bool).triu(1)
    causal = [x.masked_fill(above, float("-inf")) for x in (s, t)]
    causal[0].requires_grad_()
    value = losses.attention_kl(*causal)
    torch.testing.assert_close(value, losses.attention_kl(s, t, mask=(~above).expand(2, 5, 5)))
    value.backward()
    assert causal[0].grad.isfinite().all()


def test_attention_probabilities_of_zero_are_finite():
    s, t = (x.softmax(-1) for x in pair(2, 3, 5, 5))
    s[..., 0] = 0.0
    s.requires_grad_()
    value = losses.attention_kl(s, t, inputs="probabilities")
    value.backward()
    assert value.isfinite()
    assert s.grad.isfinite().all()


# -------------------------------------------------- refusals that name the remedy

WRONG = {
    "heads": (lambda: losses.attention_mse(*[torch.zeros(1, h, 3, 3) for h in (2, 3)]), 'heads="mean"'),
    "heads-kl": (lambda: losses.attention_kl(*[torch.zeros(1, h, 3, 3) for h in (2, 3)]), 'heads="mean"'),
    "divisor": (lambda: losses.value_relation(torch.zeros(1, 3, 8), torch.zeros(1, 3, 9), heads=4), "divisor"),
    "joined": (lambda: losses.value_relation(*[torch.zeros(1, 2, 3, 4)] * 2), "flatten"),
    "tokens": (lambda: losses.attention_mse(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 4, 4)), "tokens"),
    "project": (lambda: losses.hint(torch.zeros(2, 3), torch.zeros(2, 4)), "project"),
    "maps": (lambda: losses.attention_transfer(torch.zeros(2, 3), torch.zeros(2, 3)), "hint"),
    "margin": (lambda: losses.overhaul(*[torch.zeros(2, 3, 4, 4)] * 2, torch.zeros(4)), "channel"),
    "spread": (lambda: losses.vid(*[torch.zeros(2, 3)] * 2, torch.zeros(4)), "channel"),
    "variant": (lambda: losses.simkd(*[torch.zeros(2, 3)] * 2, variant="mine"), "'paper', 'authors'"),
    "kernel": (lambda: losses.nst(*[torch.zeros(2, 3, 2, 2)] * 2, kernel="rbf"), "'polynomial', 'linear'"),
    "alpha": (
        lambda: losses.distillation(*[torch.zeros(2, 3)] * 2, torch.zeros(2).long(), alpha=2.0),
        r"\[0, 1\]",
    ),
    "beta": (lambda: losses.js(*[torch.zeros(2, 3)] * 2, beta=-0.1), r"\[0, 1\]"),
    "order": (lambda: losses.correlation(*[torch.zeros(2, 3)] * 2, order=0), "at least 1"),
    "labels": (lambda: losses.dkd(*[torch.zeros(2, 3)] * 2, torch.zeros(3).long()), "one class index"),
    "temperatures": (lambda: losses.mlkd(*[torch.zeros(2, 3)] * 2, temperatures=()), "at least one"),
    "memory": (lambda: losses.ContrastiveMemory(1, 4), "negatives"),
    "momentum": (lambda: losses.ContrastiveMemory(9, 4, momentum=1.0), "never change"),
    "width": (
        lambda: losses.crd(
            *[torch.zeros(2, 3)] * 2,
            torch.zeros(2).long(),
            torch.zeros(2, 1).long(),
            losses.ContrastiveMemory(9, 4),
        ),
        "wide",
    ),
    "negatives": (
        lambda: losses.crd(
            *[torch.zeros(2, 4)] * 2,
            torch.zeros(2).long(),
            torch.zeros(3, 1).long(),
            losses.ContrastiveMemory(9, 4),
        ),
        "memory.draw",
    ),
}


@pytest.mark.parametrize(("call", "remedy"), WRONG.values(), ids=WRONG)
def test_a_mistake_is_refused_with_its_remedy(call, remedy):
    with pytest.raises(ValueError, match=remedy):
        call()


def test_a_student_that_is_no_tensor_is_refused():
    with pytest.raises(TypeError, match="student must be a tensor"):
        losses.kd([1.0], [2.0])
    torch.testing.assert_close(
        losses.kd(student=torch.zeros(1, 2), teacher=torch.tensor([[math.log(3.0), 0.0]]), temperature=1.0),
        torch.tensor(0.75 * math.log(1.5) + 0.25 * math.log(0.5)),
    )
