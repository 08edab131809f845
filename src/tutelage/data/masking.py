"""Masked language modelling: the choice and replacement of masked tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tutelage.data.batch import IGNORE
from tutelage.data.views import uniform, view_seeds
from tutelage.errors import DataError


@dataclass(frozen=True)
class Masking:
    """Masks tokens as a function of the view seed.

    Attributes:
        share: fraction of the tokens to predict.
        mask: id of the mask token, which replaces 80 % of these.
        ids: ids of random tokens, which replace 10 %; 10 % stay unchanged.

    Reference: Devlin et al., BERT (2019), section 3.1, task 1, with a share of 0.15.
    """

    share: float
    mask: int
    ids: Tensor

    def __call__(self, ids: Tensor, counted: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """Masked token ids, and labels: the original ids at the chosen positions, else -100.

        Args:
            ids: ``[B, L]``.
            counted: ``[B, L]``, true for tokens of the text.
            seeds: ``[B]`` int64 view seeds.
        """
        where = torch.arange(ids.shape[1])
        places = torch.from_numpy(np.stack([view_seeds(int(seed), 0, where).numpy() for seed in seeds]))
        draw = [torch.from_numpy(uniform(places.flatten(), stream)).view_as(ids) for stream in (101, 102, 103)]
        chosen = (draw[0] < self.share) & counted
        # In a text without a chosen token, the one with the lowest draw is chosen.
        least = torch.where(counted, draw[0], torch.inf).argmin(1)
        none = ~chosen.any(1) & counted.any(1)
        chosen[none, least[none]] = True
        labels = ids.masked_fill(~chosen, IGNORE)
        other = self.ids[(draw[2] * len(self.ids)).long()]
        seen = torch.where(chosen & (draw[1] < 0.8), torch.full_like(ids, self.mask), ids)
        return torch.where(chosen & (draw[1] >= 0.9), other, seen), labels


def build_masking(tokenizer: Any, share: float) -> Masking:
    """The masking for a tokenizer of transformers; special tokens never replace a word.

    Raises:
        DataError: the tokenizer has no mask token.
    """
    if tokenizer.mask_token_id is None:
        raise DataError(
            f"the tokenizer, a {type(tokenizer).__name__}, has no mask token",
            remedy="masked language modelling needs an encoder: use another teacher, or another task",
        )
    special = set(tokenizer.all_special_ids)
    ids = torch.tensor([i for i in sorted(tokenizer.get_vocab().values()) if i not in special])
    return Masking(share, tokenizer.mask_token_id, ids)
