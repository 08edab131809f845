"""Samples of distributions, drawn by numbers that are functions of a seed: a row is drawn the same whenever and with
whatever others it is computed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from tutelage.data.views import uniform, view_seeds
from tutelage.teachers.cache.coding import Counts
from tutelage.teachers.cache.columns import Array


def draw_samples(p: Tensor, draws: int, seeds: Tensor, stream: int) -> Counts:
    """``draws`` independent draws from each row of unnormalised ``p`` ``[N, C]``, by inverse distribution.

    Args:
        p: float64, with a positive sum.
        draws: of each row.
        seeds: ``[N]``.
        stream: another one draws independently.
    """
    u = np.stack([uniform(seeds, 1_000_003 * stream + d) for d in range(draws)], 1)
    total = p.cumsum(-1)
    aimed = torch.from_numpy(u) * total[:, -1:]
    found = torch.searchsorted(total, aimed, right=True).clamp(max=p.shape[-1] - 1).sort(-1).values.numpy()
    first = np.ones_like(found, dtype=bool)
    first[:, 1:] = found[:, 1:] != found[:, :-1]
    starts = np.flatnonzero(first)
    return Counts(found.ravel()[starts], np.diff(np.append(starts, found.size)), first.sum(1))


def round_stochastically(pieces: Iterator[Tensor], draws: int, seed: int, stream: int) -> Iterator[Counts]:
    r"""``draws`` times the distributions of one sample's tokens, each class rounded up or down by chance.

    What rounding left over is not lost but carried to the next token: with :math:`C_t = n (p_1 + ... + p_t)` and u of
    [0, 1), one for each class, the count at t is :math:`\lfloor C_t + u \rfloor - \lfloor C_{t-1} + u \rfloor`. Its
    expectation is :math:`n p_t` at every token, and over any stretch of tokens the counts of a class are off by less
    than one in all, where independent draws are off by the square root of their number.

    Args:
        pieces: ``[L, C]`` float64 distributions of consecutive tokens.
        draws: n.
        seed: of the sample.
        stream: another one rounds independently.
    """
    left: Tensor | None = None
    for p in pieces:
        if left is None:
            classes = view_seeds(seed, stream, torch.arange(p.shape[-1]))
            left = torch.from_numpy(uniform(classes, 11))
        places, counts = [], []
        for share in p * draws:  # a token at a time: what is carried stays in the processor's cache
            left += share
            place = (left >= 1.0).nonzero().squeeze(1)
            some = left[place]
            whole = some.floor()
            left[place] = some - whole
            places.append(place)
            counts.append(whole)
        yield Counts(
            torch.cat(places).numpy(),
            torch.cat(counts).long().numpy(),
            np.array([len(place) for place in places], np.int64),
        )


def concat_counts(parts: list[Counts]) -> Counts:
    """Rows of several after each other."""
    if not parts:
        return Counts(*(np.empty(0, np.int64) for _ in range(3)))
    arrays: list[Array] = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return Counts(*arrays)
