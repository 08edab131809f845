"""The mathematics of the soft loss, as exact as floating point allows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage import losses

ROWS, CLASSES = 8, 10


def logits(seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Logits with mean 0 in every row."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(ROWS, CLASSES, generator=generator, dtype=dtype)
    return z - z.mean(-1, keepdim=True)


def kd_gradient(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Gradient of each row's loss, T^2 included."""
    student = student.clone().requires_grad_()
    losses.kd(student, teacher, temperature=temperature, reduction="sum").backward()
    return student.grad


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0, 8.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_of_the_soft_loss_is_the_gap_of_probabilities_over_t(temperature, dtype):
    zs, zt = logits(1, dtype), logits(2, dtype)
    without_t2 = kd_gradient(zs, zt, temperature) / temperature**2
    gap = (zs.div(temperature).softmax(-1) - zt.div(temperature).softmax(-1)) / temperature
    assert (without_t2 - gap).abs().max() < 1e-6


@settings(derandomize=True, deadline=None, max_examples=30)
@given(scale=st.floats(0.1, 50), temperature=st.floats(0.3, 50), seed=st.integers(0, 1000))
def test_gradient_identity_holds_for_any_logits_and_temperature(scale, temperature, seed):
    zs, zt = scale * logits(seed), scale * logits(seed + 1)
    gap = zs.div(temperature).softmax(-1) - zt.div(temperature).softmax(-1)
    torch.testing.assert_close(kd_gradient(zs, zt, temperature), temperature * gap, atol=1e-6, rtol=1e-9)


@pytest.mark.parametrize("temperature", [16, 32, 64, 128, 256])
def test_with_t_squared_the_gradient_tends_to_the_gap_of_logits_over_k(temperature):
    for seed in range(5):
        zs, zt = logits(seed), logits(seed + 100)
        limit = (zs - zt) / CLASSES
        error = (kd_gradient(zs, zt, temperature) - limit).norm() / limit.norm()
        assert error < 0.05
        assert error < 2.0 / temperature  # and falls as 1/T


def test_without_t_squared_the_gradient_shrinks_as_one_over_t_squared():
    zs, zt = logits(1), logits(2)
    temperatures = np.array([16.0, 32, 64, 128, 256])
    with_t2 = np.array([kd_gradient(zs, zt, t).norm().item() for t in temperatures])
    slope = np.polyfit(np.log(temperatures), np.log(with_t2 / temperatures**2), 1)[0]
    assert slope == pytest.approx(-2, abs=0.02)
    assert np.polyfit(np.log(temperatures), np.log(with_t2), 1)[0] == pytest.approx(0, abs=0.02)


def test_at_high_temperature_kd_is_half_the_mean_squared_gap_of_logits():
    zs, zt = logits(1), logits(2)
    value = losses.kd(zs, zt, temperature=1e4)
    assert value.item() == pytest.approx(losses.mse(zs, zt).item() / (2 * CLASSES), rel=1e-3)


def test_a_high_temperature_makes_teachers_uniform():
    zt = logits(1)
    uniform = torch.zeros_like(zt)
    # a uniform student is right, whatever the teacher thinks: KL alone goes to 0
    at = [losses.kd(uniform, zt, temperature=t).item() / t**2 for t in (1.0, 10.0, 100.0, 1000.0)]
    assert at == sorted(at, reverse=True)
    assert at[-1] < 1e-5
    # and the teacher's distribution, read off the gradient at a uniform student, is 1/K
    p = 1 / CLASSES - kd_gradient(uniform, zt, 1e6) / 1e6
    torch.testing.assert_close(p, torch.full_like(p, 1 / CLASSES), atol=1e-5, rtol=0)


def test_a_low_temperature_makes_teachers_one_hot():
    zt, uniform = logits(1), torch.zeros(ROWS, CLASSES, dtype=torch.float64)
    p = 1 / CLASSES - kd_gradient(uniform, zt, 1e-3) / 1e-3
    one_hot = torch.nn.functional.one_hot(zt.argmax(-1), CLASSES).double()
    torch.testing.assert_close(p, one_hot, atol=1e-6, rtol=0)
    # KL to the uniform student is then the whole ln K
    value = losses.kd(uniform, zt, temperature=1e-3) / 1e-6
    assert value.item() == pytest.approx(math.log(CLASSES), rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_kl_is_tckd_and_nckd_weighed_by_the_teachers_doubt(temperature, classes):
    zs, zt = (2 * logits(seed)[:, :classes] for seed in (1, 2))
    labels = torch.arange(ROWS) % classes
    options = {"temperature": temperature, "reduction": "none"}
    tckd = losses.dkd(zs, zt, labels, alpha=1.0, beta=0.0, **options)
    nckd = losses.dkd(zs, zt, labels, alpha=0.0, beta=1.0, **options)
    p_target = zt.div(temperature).softmax(-1).gather(-1, labels[:, None])[:, 0]
    torch.testing.assert_close(tckd + (1 - p_target) * nckd, losses.kd(zs, zt, **options))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_generalised_jsd_over_beta_tends_to_forward_kl_and_over_one_minus_beta_to_reverse(temperature):
    zs, zt = logits(1), logits(2)
    forward = losses.kd(zs, zt, temperature=temperature)
    reverse = losses.reverse_kl(zs, zt, temperature=temperature)
    for beta in (1e-3, 1e-5):
        near_0 = losses.js(zs, zt, beta=beta, temperature=temperature) / beta
        near_1 = losses.js(zs, zt, beta=1 - beta, temperature=temperature) / beta
        torch.testing.assert_close(near_0, forward, rtol=10 * beta, atol=0)
        torch.testing.assert_close(near_1, reverse, rtol=10 * beta, atol=0)


def test_jsd_is_symmetric_in_its_arguments_and_bounded_by_ln_2():
    zs, zt = 100 * logits(1), 100 * logits(2)
    for beta in (0.2, 0.5):
        mirrored = losses.js(zt, zs, beta=1 - beta, reduction="none")
        torch.testing.assert_close(losses.js(zs, zt, beta=beta, reduction="none"), mirrored)
    assert losses.js(zs, zt, reduction="none").max() <= math.log(2) + 1e-12


@settings(derandomize=True, deadline=None, max_examples=20)
@given(temperature=st.floats(0.5, 10), seed=st.integers(0, 1000))
def test_total_variation_keeps_pinskers_bound(temperature, seed):
    zs, zt = 3 * logits(seed), 3 * logits(seed + 1)
    options = {"temperature": temperature, "reduction": "none"}
    tvd = losses.tvd(zs, zt, **options) / temperature**2
    kl = losses.kd(zs, zt, **options) / temperature**2
    assert (tvd <= (kl / 2).sqrt() + 1e-12).all()
    assert (tvd <= 1).all()


@settings(derandomize=True, deadline=None, max_examples=20)
@given(scale=st.floats(0.1, 10), shift=st.floats(-10, 10))
def test_standardized_kd_ignores_the_scale_and_place_of_logits(scale, shift):
    zs, zt = logits(1), logits(2)
    plain = losses.kd(zs, zt, standardize=True)
    torch.testing.assert_close(losses.kd(scale * zs + shift, zt, standardize=True), plain)
    torch.testing.assert_close(losses.kd(zs, scale * zt + shift, standardize=True), plain)


@pytest.mark.parametrize("name", ["similarity", "correlation", "pkt", "rkd_distance", "rkd_angle"])
def test_relations_ignore_the_scale_and_orientation_of_features(name):
    s, t = logits(1), logits(2)
    rotation = torch.linalg.qr(torch.randn(CLASSES, CLASSES, generator=torch.Generator().manual_seed(0)).double())[0]
    f = getattr(losses, name)
    torch.testing.assert_close(f(3 * s @ rotation, t), f(s, t))
    torch.testing.assert_close(f(s, 0.2 * t @ rotation), f(s, t))


@pytest.mark.parametrize("name", ["rkd_distance", "rkd_angle"])
def test_rkd_ignores_where_features_lie(name):
    s, t = logits(1), logits(2)
    f = getattr(losses, name)
    torch.testing.assert_close(f(s + 7, t - 3), f(s, t))


def test_attention_transfer_and_nst_ignore_the_order_of_channels():
    torch.manual_seed(0)
    s, t = torch.randn(2, 6, 3, 3), torch.randn(2, 4, 3, 3)
    order = torch.randperm(6)
    for f in (losses.attention_transfer, losses.nst):
        torch.testing.assert_close(f(s[:, order], t), f(s, t))
        assert f(t[:, torch.tensor([2, 0, 3, 1])], t).abs() < 1e-6
