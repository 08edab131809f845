"""Hidden states and heads of a student and a teacher, with dense and chunked losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tutelage import losses
from tutelage.losses import (
    LinearHead,
    LoRA,
    linear_divergence,
)

TOKENS, WIDTH, OTHER, SIZE = 12, 5, 7, 17


DIVERGENCES: dict[str, tuple[str, Callable[..., Tensor], dict[str, Any]]] = {
    "kl": ("kl", losses.kd, {}),
    "reverse_kl": ("reverse_kl", losses.reverse_kl, {}),
    "js": ("js", losses.js, {}),
    "js-0": ("js", losses.js, {"beta": 0.0}),
    "js-0.001": ("js", losses.js, {"beta": 0.001}),
    "js-0.7": ("js", losses.js, {"beta": 0.7}),
    "js-1": ("js", losses.js, {"beta": 1.0}),
    "skew_kl": ("skew_kl", losses.skew_kl, {}),
    "skew_kl-0": ("skew_kl", losses.skew_kl, {"alpha": 0.0}),
    "skew_kl-0.6": ("skew_kl", losses.skew_kl, {"alpha": 0.6}),
    "skew_kl-reverse": ("skew_kl", losses.skew_kl, {"reverse": True, "alpha": 0.3}),
    "skew_kl-reverse-0": ("skew_kl", losses.skew_kl, {"reverse": True, "alpha": 0.0}),
    "tvd": ("tvd", losses.tvd, {}),
}


class World:
    """Student and teacher of random numbers; ``plain`` has neither bias nor anything else."""

    def __init__(
        self, dtype: torch.dtype = torch.float64, seed: int = 0, tokens: int = TOKENS, size: int = SIZE, **head: Any
    ) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.hidden = self.draw(tokens, WIDTH).to(dtype).requires_grad_()
        self.weight = self.draw(size, WIDTH).to(dtype).requires_grad_()
        self.said, self.other = self.draw(tokens, OTHER).to(dtype), self.draw(size, OTHER).to(dtype)
        self.labels = torch.randint(size, (tokens,), generator=self.generator)
        self.labels[::3] = -100
        self.bias = self.draw(size).to(dtype).requires_grad_() if head.pop("bias", False) else None
        self.lora = None
        if head.pop("lora", False):
            self.lora = LoRA(*(self.draw(*s).to(dtype).requires_grad_() for s in ((2, WIDTH), (size, 2))), 0.7)
        self.head = LinearHead(self.weight, self.bias, lora=self.lora, **head)

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    @property
    def learned(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.weight, self.bias, *(self.lora or ())[:2]) if x is not None]

    def scores(self) -> Tensor:
        weight = self.weight if self.lora is None else self.weight + self.lora.scale * self.lora.b @ self.lora.a
        scores = F.linear(self.hidden, weight, self.bias) * self.head.scale
        cap = self.head.softcap
        return scores if cap is None else cap * torch.tanh(scores / cap)

    def teacher(self) -> Tensor:
        return F.linear(self.said, self.other)

    def dense(self, name: str = "kl", ce: float = 0.0, mask: Tensor | None = None, **options: Any) -> Tensor:
        _, f, more = DIVERGENCES[name]
        scores = self.scores()
        options = {"temperature": 1.0, "mask": mask, **options}
        value = f(scores, self.teacher(), **more, **options)
        if ce:
            options.pop("temperature")
            value = value + ce * losses.cross_entropy(scores, self.labels, **options)
        return value

    def chunked(self, name: str = "kl", ce: float = 0.0, **options: Any) -> Tensor:
        divergence, _, more = DIVERGENCES[name]
        options = {"teacher": (self.said, self.other), **options}
        teacher = options.pop("teacher")
        labels = {"labels": self.labels, "ce_weight": ce} if ce else {}
        return linear_divergence(
            self.hidden, self.head, teacher, divergence=divergence, **labels, **more, **options
        )  # fmt: skip


def gradients(value: Tensor, of: list[Tensor], by: Tensor | None = None) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, of, by)


def close(x: Tensor, y: Tensor, tolerance: float = 1e-9) -> None:
    """Equal, to the largest of the tensor."""
    atol = tolerance * max(1.0, float(y.detach().abs().max()))
    torch.testing.assert_close(x, y, rtol=tolerance, atol=atol, check_dtype=False)


def same(
    a: Tensor,
    b: Tensor,
    of: list[Tensor],
    tolerance: float = 1e-9,
    by: Tensor | None = None,
    others: list[Tensor] | None = None,
) -> None:
    """Values and gradients agree; those of b are by ``others``, if it is of other tensors."""
    close(a, b, tolerance)
    for x, y in zip(gradients(a, of, by), gradients(b, others or of, by), strict=True):
        close(x, y, tolerance)


every = pytest.mark.parametrize("name", DIVERGENCES)
