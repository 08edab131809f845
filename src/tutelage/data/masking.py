"""Masked language modelling: which tokens are to be guessed, and what stands in their places."""

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
    """Masked language modelling: which tokens a view hides, as a function of its seed.

    Attributes:
        share: of the tokens of the text that are to be guessed.
        mask: id of the mask token, which 8 of 10 of them become.
        ids: ids that 1 of 10 of them become one of; 1 of 10 stays.

    Reference: Devlin et al., BERT (2019), section 3.1, task 1, which has a share of 0.15.
    """

    share: float
    mask: int
    ids: Tensor

    def __call__(self, ids: Tensor, counted: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids with some hidden, and labels: the hidden ones, -100 elsewhere.

        Args:
            ids: ``[B, L]``.
            counted: ``[B, L]``, true for tokens of the text.
            seeds: ``[B]`` int64.
        """
        where = torch.arange(ids.shape[1])
        places = torch.from_numpy(np.stack([view_seeds(int(seed), 0, where).numpy() for seed in seeds]))
        draw = [torch.from_numpy(uniform(places.flatten(), stream)).view_as(ids) for stream in (101, 102, 103)]
        chosen = (draw[0] < self.share) & counted
        # A text without any would teach nothing: its likeliest is taken.
        least = torch.where(counted, draw[0], torch.inf).argmin(1)
        none = ~chosen.any(1) & counted.any(1)
        chosen[none, least[none]] = True
        labels = ids.masked_fill(~chosen, IGNORE)
        other = self.ids[(draw[2] * len(self.ids)).long()]
        seen = torch.where(chosen & (draw[1] < 0.8), torch.full_like(ids, self.mask), ids)
        return torch.where(chosen & (draw[1] >= 0.9), other, seen), labels


def build_masking(tokenizer: Any, share: float) -> Masking:
    """That of a tokenizer of transformers, whose special tokens are never put in a word's place.

    Raises:
        DataError: it has no mask token.
    """
    if tokenizer.mask_token_id is None:
        raise DataError(
            f"the tokenizer, a {type(tokenizer).__name__}, has no mask token",
            remedy="masked language modelling is for encoders: use another teacher, or another task",
        )
    special = set(tokenizer.all_special_ids)
    ids = torch.tensor([i for i in sorted(tokenizer.get_vocab().values()) if i not in special])
    return Masking(share, tokenizer.mask_token_id, ids)
