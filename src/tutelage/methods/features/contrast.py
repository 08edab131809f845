"""The link of CRD, which keeps a memory of every training example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tutelage import losses
from tutelage.data.batch import Batch
from tutelage.errors import CapabilityError, ConfigError
from tutelage.methods.features.base import (
    FeatureContext,
    FeatureLoss,
    FeaturePair,
    counted_rows,
    mean_over,
    token_positions,
)
from tutelage.students import match_dtype


class Contrast(FeatureLoss):
    """CRD: a head for each embedding, and the memory of every training example.

    Negatives are drawn from all other examples, whatever their class. (The authors' sampler leaves out those of the
    same class.)

    Args:
        sites: one pair of vectors; maps are averaged over positions.
        setting: the models, and the sample ids of the training data.
        options: ``width`` of the heads, default 128; ``negatives``, default 16384 or as many as there are others;
            ``momentum`` of the memory, default 0.5; ``temperature`` and ``variant`` of the loss, by default
            ``authors``, to which the weight belongs.

    Raises:
        CapabilityError: the sample ids are not known.

    Reference: Tian, Krishnan, Isola, Contrastive Representation Distillation (ICLR 2020).
    """

    maps = False
    needs_ids = True
    ids: Tensor

    def __init__(self, sites: Sequence[FeaturePair], setting: FeatureContext, options: Mapping[str, Any]) -> None:
        options = {"variant": "authors", **options}
        width, negatives = options.pop("width", 128), options.pop("negatives", 16_384)
        momentum = options.pop("momentum", 0.5)
        super().__init__(sites, setting, options)
        if setting.ids is None:
            raise CapabilityError(
                "crd keeps a memory of every training example, and these have no ids",
                remedy="use a recipe, or a loader whose batches carry ids: distill(to_batch=...)",
            )
        (site,) = sites
        self.student_head, self.teacher_head = (
            nn.Linear(shape[1] if len(shape) == 4 else shape[-1], width)
            for shape in (site.student_shape, site.teacher_shape)
        )
        self.register_buffer("ids", setting.ids.sort().values)
        try:
            self.memory = losses.ContrastiveMemory(len(setting.ids), width, momentum=momentum)
        except ValueError as error:
            raise ConfigError(f"crd: {error}", remedy="give more training examples, or other options") from None
        self.negatives = min(negatives, len(setting.ids) - 1)
        self.seen: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        """Whether the numbers are in range."""
        for key in ("width", "negatives"):
            number = options.get(key, 1)
            if not isinstance(number, int) or number < 1:
                raise ValueError(f"{key} must be a whole number above 0")
        losses.ContrastiveMemory(2, 1, momentum=options.get("momentum", 0.5))
        if not options.get("temperature", 1.0) > 0:
            raise ValueError("temperature must be above 0")
        if options.get("variant", "paper") not in ("paper", "authors"):
            raise ValueError("variant must be paper or authors")

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], batch: Batch) -> Tensor:
        """The sum of the contrastive loss over what counts."""
        mask = self.counted(batch)
        s = self.student_head(match_dtype(self.student_head, self._vector(student[0], batch)))
        t = self.teacher_head(match_dtype(self.teacher_head, self._vector(teacher[0].detach(), batch)))
        index = self._index(batch) if self.training else torch.zeros(len(batch), dtype=torch.long, device=s.device)
        negatives = self.memory.draw(index, self.negatives)
        options = self.options
        if self.training:
            if options["variant"] == "authors":
                self.memory.calibrate(s, t, negatives, temperature=options.get("temperature", 0.07))
            self.seen.append((index, s.detach(), t.detach(), mask))
        elif not self.memory.scales.all():  # nothing is measured outside training
            options = {**options, "variant": "paper"}
        return losses.crd(s, t, index, negatives, self.memory, mask=mask, reduction="sum", **options)

    def after_step(self) -> None:
        """Move the memory by what all processes have seen in this step."""
        seen, self.seen = self.seen, []
        if seen:
            self.memory.update(*_everywhere([torch.cat(parts) for parts in zip(*seen, strict=True)]))

    def _vector(self, x: Tensor, batch: Batch) -> Tensor:
        if x.ndim == 4:
            return x.mean((2, 3))
        return x if x.ndim == 2 else mean_over(x, token_positions(batch)) if self.sites[0].tokens else x.mean(1)

    def _index(self, batch: Batch) -> Tensor:
        if batch.ids is None:
            raise CapabilityError("crd: a training batch has no ids", remedy="let every batch carry its samples' ids")
        index = torch.searchsorted(self.ids, batch.ids).clamp(max=len(self.ids) - 1)
        if not torch.equal(self.ids[index], batch.ids):
            raise CapabilityError(
                "crd: a training batch holds a sample that the memory does not know",
                remedy="train on the data that the method was built for",
            )
        return index

    def counted(self, batch: Batch) -> Tensor:
        """Examples that count."""
        return counted_rows(batch)


def _everywhere(parts: list[Tensor]) -> list[Tensor]:
    """The rows of all processes, in the order of their ranks; alone, the rows themselves."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return parts
    world = torch.distributed.get_world_size()
    if world == 1:
        return parts
    count = torch.tensor([len(parts[0])], device=parts[0].device)
    counts = [torch.zeros_like(count) for _ in range(world)]
    torch.distributed.all_gather(counts, count)
    most = int(torch.stack(counts).max())
    gathered = []
    for part in parts:
        padded = torch.cat([part, part.new_zeros(most - len(part), *part.shape[1:])])
        whole = [torch.zeros_like(padded) for _ in range(world)]
        torch.distributed.all_gather(whole, padded)
        gathered.append(torch.cat([rows[: int(n)] for rows, n in zip(whole, counts, strict=True)]))
    return gathered
