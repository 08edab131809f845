"""Contrastive representation distillation, with a memory of every training example."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tutelage import losses
from tutelage.config import ResolvedPair
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


class ContrastiveLoss(FeatureLoss):
    """CRD: a head for each embedding, and the memory of every training example.

    Negatives are drawn from all other examples, whatever their class. (The authors' sampler leaves out those of the
    same class.)

    Feature maps are averaged over positions.

    Raises:
        CapabilityError: the sample ids are not known.

    Reference: Tian, Krishnan, Isola, Contrastive Representation Distillation (ICLR 2020).
    """

    needs_ids = True
    ids: Tensor

    def __init__(self, settings: ResolvedPair, pairs: Sequence[FeaturePair], context: FeatureContext) -> None:
        super().__init__(settings, pairs, context)
        if context.ids is None:
            raise CapabilityError(
                "crd needs sample ids, and the training examples have none",
                remedy="use a recipe, or a loader whose batches carry ids: distill(to_batch=...)",
            )
        (pair,) = pairs
        self.student_head, self.teacher_head = (
            nn.Linear(shape[1] if len(shape) == 4 else shape[-1], self.options.width)
            for shape in (pair.student_shape, pair.teacher_shape)
        )
        self.register_buffer("ids", context.ids.sort().values)
        try:
            self.memory = losses.ContrastiveMemory(
                len(context.ids), self.options.width, momentum=self.options.momentum
            )
        except ValueError as error:
            raise ConfigError(f"crd: {error}", remedy="give more training examples, or other options") from None
        self.negatives = min(self.options.negatives, len(context.ids) - 1)
        self.seen: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], batch: Batch) -> Tensor:
        """The sum of the contrastive loss over what counts."""
        mask = self.counted(batch)
        s = self.student_head(match_dtype(self.student_head, self._vector(student[0], batch)))
        t = self.teacher_head(match_dtype(self.teacher_head, self._vector(teacher[0].detach(), batch)))
        index = self._index(batch) if self.training else torch.zeros(len(batch), dtype=torch.long, device=s.device)
        negatives = self.memory.draw(index, self.negatives)
        arguments = self.arguments
        if self.training:
            if self.options.variant == "authors":
                self.memory.calibrate(s, t, negatives, temperature=self.options.temperature)
            self.seen.append((index, s.detach(), t.detach(), mask))
        elif not self.memory.scales.all():  # nothing is measured outside training
            arguments = {**arguments, "variant": "paper"}
        return losses.crd(s, t, index, negatives, self.memory, mask=mask, reduction="sum", **arguments)

    def after_step(self) -> None:
        """Move the memory by what all processes have seen in this step."""
        seen, self.seen = self.seen, []
        if seen:
            self.memory.update(*_everywhere([torch.cat(parts) for parts in zip(*seen, strict=True)]))

    def _vector(self, x: Tensor, batch: Batch) -> Tensor:
        if x.ndim == 4:
            return x.mean((2, 3))
        return x if x.ndim == 2 else mean_over(x, token_positions(batch)) if self.pairs[0].tokens else x.mean(1)

    def _index(self, batch: Batch) -> Tensor:
        if batch.ids is None:
            raise CapabilityError("crd: a training batch has no ids", remedy="let every batch carry its samples' ids")
        index = torch.searchsorted(self.ids, batch.ids).clamp(max=len(self.ids) - 1)
        if not torch.equal(self.ids[index], batch.ids):
            raise CapabilityError(
                "crd: a training batch has a sample that is not in the contrastive memory",
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
