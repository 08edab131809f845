"""A class with a score of minus infinity has probability 0: it adds 0 to a divergence, and no NaN to its gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tutelage import losses
from tutelage.data import Batch
from tutelage.evaluation.metrics import Scores
from tutelage.integrations import Distiller
from tutelage.methods import LogitMethod

INF = float("inf")
EVERY: dict[str, Callable[..., Tensor]] = {
    "kd": losses.kd,
    "js": losses.js,
    "js-0.1": lambda s, t, **o: losses.js(s, t, beta=0.1, **o),
    "skew_kl": losses.skew_kl,
    "skew_rkl": lambda s, t, **o: losses.skew_kl(s, t, reverse=True, **o),
    "tvd": losses.tvd,
    "soft_cross_entropy": losses.soft_cross_entropy,
}


def scores(rows: int = 3, classes: int = 5) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(rows, classes, generator=g), torch.randn(rows, classes, generator=g)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("both", [False, True])
def test_the_value_and_the_gradient_are_the_limit(name: str, both: bool) -> None:
    student, teacher = (x.double() for x in scores())
    near, student_near = teacher.clone(), student.clone()
    teacher[:, 1], near[:, 1] = -INF, -3000.0
    if both:
        student[:, 1], student_near[:, 1] = -INF, -3000.0
    student.requires_grad_()
    student_near.requires_grad_()
    loss, limit = EVERY[name](student, teacher), EVERY[name](student_near, near)
    assert float(loss.detach()) == pytest.approx(float(limit.detach()), abs=1e-6)
    (mine,), (expected,) = torch.autograd.grad(loss, student), torch.autograd.grad(limit, student_near)
    assert torch.allclose(mine, expected, atol=1e-6)


@pytest.mark.parametrize("name", ["dkd", "mlkd", "dist", "binary_kd", "reverse_kl"])
def test_no_other_loss_gives_nan(name: str) -> None:
    student, teacher = scores()
    teacher[:, 1] = -INF
    student.requires_grad_()
    labels = (torch.tensor([0, 2, 3]),) if name == "dkd" else ()
    loss = getattr(losses, name)(student, teacher, *labels)
    assert not loss.isnan()


def test_top_k_with_fewer_possible_classes() -> None:
    student, teacher = scores()
    teacher[:, 1:] = -INF
    teacher[:, 0] = 0.0
    log_p, index = teacher.log_softmax(-1).topk(2)
    expected = losses.kd(student, teacher, temperature=1.0)
    assert float(losses.topk_kd(student, index, log_p, temperature=1.0)) == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("divergence", ["kl", "js", "skew_kl", "tvd"])
def test_token_losses(divergence: str) -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(6, 8, generator=g, requires_grad=True), torch.randn(10, 8, generator=g)
    teacher = torch.randn(6, 10, generator=g)
    teacher[:, 4] = -INF
    value = losses.linear_divergence(hidden, weight, teacher, divergence=divergence)
    plain = {"kl": losses.kd, "js": losses.js, "skew_kl": losses.skew_kl, "tvd": losses.tvd}[divergence]
    expected = plain(hidden @ weight.T, teacher, temperature=1.0)
    assert float(value.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)
    (mine,), (theirs,) = torch.autograd.grad(value, hidden), torch.autograd.grad(expected, hidden)
    assert torch.allclose(mine, theirs, atol=1e-5)


def test_the_distiller_and_the_metrics() -> None:
    class Excludes(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([super().forward(x), torch.full((len(x), 1), -INF)], -1)

    raw = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    distiller = Distiller(torch.nn.Linear(3, 4), Excludes(3, 3), LogitMethod(), example=raw)
    (loss,) = distiller.losses(raw)
    loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in distiller.parameters() if p.grad is not None)
    measured = Scores()
    student, teacher = scores()
    teacher[:, 1] = -INF
    measured.add(student, Batch(student, torch.tensor([0, 2, 3])), teacher, (0, 3, 3))
    assert measured.result()["kl"] == pytest.approx(float(losses.kd(student, teacher, temperature=1.0)), abs=1e-6)


def test_what_a_conversion_would_lose_is_refused() -> None:
    student, teacher = scores()
    with pytest.raises(ValueError, match=r"mask is torch.float32.*reduction='none'"):
        losses.kd(student, teacher, mask=torch.tensor([1.0, 0.5, 0.0]))
    with pytest.raises(TypeError, match="complex64"):
        losses.kd(student.to(torch.complex64), teacher)
    with pytest.raises(TypeError, match="complex64"):
        losses.kd(student, teacher.to(torch.complex64))
    assert losses.kd(student, teacher, mask=torch.tensor([1, 0, 1])).isfinite()
