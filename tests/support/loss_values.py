"""Random arrays and numpy formulas for tests of losses."""

from __future__ import annotations

import math

import numpy as np
import torch


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
