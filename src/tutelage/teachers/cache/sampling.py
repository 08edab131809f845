"""Samples of distributions. Random numbers are functions of a seed, so a row gets the same sample in every batch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from tutelage.data.views import uniform, view_seeds
from tutelage.teachers.cache.coding import Counts


def draw_samples(p: Tensor, draws: int, seeds: Tensor, stream: int) -> Counts:
    """``draws`` independent draws from each row of unnormalised ``p``, by the inverse of its cumulative sum.

    ``p`` ``[N, C]`` is float64 with positive sums; ``seeds`` are ``[N]``; different streams give independent draws.
    """
    u = np.stack([uniform(seeds, 1_000_003 * stream + d) for d in range(draws)], 1)
    total = p.cumsum(-1)
    thresholds = torch.from_numpy(u) * total[:, -1:]
    classes = torch.searchsorted(total, thresholds, right=True).clamp(max=p.shape[-1] - 1).sort(-1).values.numpy()
    first = np.diff(classes, axis=1, prepend=-1) != 0
    starts = np.flatnonzero(first)
    return Counts(classes.ravel()[starts], np.diff(np.append(starts, classes.size)), first.sum(1))


def round_stochastically(pieces: Iterator[Tensor], draws: int, seed: int, stream: int) -> Iterator[Counts]:
    r"""Stochastic rounding of ``draws`` times the distributions of one sample's tokens, with error feedback.

    The rounding error of each class is carried to the next token. With :math:`C_t = n (p_1 + ... + p_t)` and one
    uniform u of [0, 1) for each class, the count at t is :math:`\lfloor C_t + u \rfloor - \lfloor C_{t-1} + u
    \rfloor`. Its expectation is :math:`n p_t` at every token. Over any stretch of tokens the total count of a class
    is wrong by less than one, where independent draws are wrong by the square root of their number. ``pieces`` are
    ``[L, C]`` float64 distributions of consecutive tokens; different streams round independently.
    """
    carry: Tensor | None = None
    for p in pieces:
        if carry is None:
            classes = view_seeds(seed, stream, torch.arange(p.shape[-1]))
            carry = torch.from_numpy(uniform(classes, 11))
        places, counts = [], []
        for share in p * draws:  # one token at a time keeps the carry in the processor's cache
            carry += share
            place = (carry >= 1.0).nonzero().squeeze(1)
            values = carry[place]
            count = values.floor()
            carry[place] = values - count
            places.append(place)
            counts.append(count)
        sizes = np.array([len(place) for place in places], np.int64)
        yield Counts(torch.cat(places).numpy(), torch.cat(counts).long().numpy(), sizes)


def concat_counts(parts: list[Counts]) -> Counts:
    """The rows of several parts, concatenated."""
    none = Counts(*(np.empty(0, np.int64) for _ in range(3)))
    return Counts(*(np.concatenate(column) for column in zip(none, *parts, strict=True)))
