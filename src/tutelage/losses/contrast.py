"""Contrastive representation distillation, and the memory bank that provides its negatives."""

import math

import torch
from torch import Tensor, nn

from tutelage.losses.common import (
    Mask,
    Reduction,
    Variant,
    as_float,
    check_choice,
    check_mask,
    check_same_shape,
    check_temperature,
    reduce,
    unit,
    without_autocast,
    zero_masked,
)


class ContrastiveMemory(nn.Module):
    """The last embedding of every training example, of student and teacher.

    All state is in buffers, so it moves and is saved with the module. Embeddings have norm 1. One step is ``draw``,
    :func:`crd`, ``update``.

    Args:
        size: examples in the training set, M.
        width: of the embeddings, D.
        momentum: share of the old embedding in an update, in [0, 1).
    """

    student: Tensor
    teacher: Tensor
    scales: Tensor

    def __init__(self, size: int, width: int, *, momentum: float = 0.5) -> None:
        if size < 2:
            raise ValueError(f"size={size}: a memory of fewer than 2 examples has no negatives")
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum={momentum}: must lie in [0, 1); at 1 the memory would never change")
        super().__init__()
        self.momentum = momentum
        self.register_buffer("student", unit(torch.randn(size, width)))
        self.register_buffer("teacher", unit(torch.randn(size, width)))
        # M times the mean of exp(score) in each direction, measured once by `calibrate`; 0 before
        self.register_buffer("scales", torch.zeros(2))

    @property
    def size(self) -> int:
        """Examples in the training set."""
        return self.student.shape[0]

    def draw(self, index: Tensor, count: int) -> Tensor:
        """``[B, count]`` indices of other examples than ``index`` ``[B]``, uniform, with replacement."""
        others = torch.randint(self.size - 1, (len(index), count), device=index.device)
        return others + (others >= index.unsqueeze(-1)).long()

    @torch.no_grad()
    def update(self, index: Tensor, student: Tensor, teacher: Tensor, mask: Mask = None) -> None:
        """Move the embeddings of ``index`` ``[B]`` towards the given ones ``[B, D]``."""
        if mask is not None:
            keep = check_mask(mask, index.shape)
            index, student, teacher = index[keep], student[keep], teacher[keep]
        for bank, new in ((self.student, student), (self.teacher, teacher)):
            old = bank[index]
            bank[index] = unit(self.momentum * old + (1 - self.momentum) * unit(new.to(bank.dtype)))

    @torch.no_grad()
    def calibrate(self, student: Tensor, teacher: Tensor, negatives: Tensor, *, temperature: float = 0.07) -> None:
        """Set the normalisers of ``variant="authors"`` from a first batch; later calls change nothing."""
        if self.scales.any():
            return
        pairs = ((student, self.teacher), (teacher, self.student))
        logs = [
            (scores(unit(as_float(anchor)), bank, negatives) / temperature).flatten().logsumexp(0)
            for anchor, bank in pairs
        ]
        self.scales.copy_((torch.stack(logs) - math.log(max(negatives.numel(), 1) / self.size)).exp())


def scores(anchor: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    """Products ``[B, N]`` of each ``anchor`` ``[B, D]`` with the rows ``index`` ``[B, N]`` of ``bank``."""
    bank = bank.to(anchor.dtype)
    if bank.shape[0] <= index.shape[-1] * bank.shape[-1]:
        # cheaper than gathering B x N x D values
        return (anchor @ bank.T).gather(-1, index)
    return (bank[index] @ anchor.unsqueeze(-1)).squeeze(-1)


@without_autocast
def crd(
    student: Tensor,
    teacher: Tensor,
    index: Tensor,
    negatives: Tensor,
    memory: ContrastiveMemory,
    *,
    temperature: float = 0.07,
    variant: Variant = "paper",
    mask: Mask = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Contrastive representation distillation (CRD): discriminate the pair of one input from N others.

    :math:`-\log h(s, t) - \sum_n \log(1 - h_n)`, with
    :math:`h = e^{s \cdot t/\tau} / (e^{s \cdot t/\tau} + N/M)` the probability that two embeddings belong to the same
    of M examples. Summed over both anchors: the student against the teacher's memory, and the teacher against the
    student's.

    The teacher's embedding comes from a learned head and receives a gradient; detach the features before the head.
    The memory receives none, and is not changed: call ``memory.update`` after the step.

    Args:
        student: embeddings ``[B, D]`` of the student's head; normalised here.
        teacher: embeddings ``[B, D]`` of the teacher's head; normalised here.
        index: ``[B]``, the numbers of these training examples, from 0 to M - 1.
        negatives: ``[B, N]``, numbers of others: ``memory.draw(index, N)``. The paper uses N = 16384.
        memory: the last embeddings.
        temperature: :math:`\tau`, above 0.
        variant: ``paper`` takes the positive from the batch. ``authors``, the code of the published numbers (weight
            0.8), takes it from the memory, and divides each :math:`e^{s \cdot t/\tau}` by M times its mean over a
            first
            batch: ``memory.calibrate``. The loss is then about a thousandth of the paper's, in which a negative costs
            1.4 nats at the start.

    Returns:
        Nats. Not zero at equality: it is a classification loss.

    Raises:
        ValueError: shapes differ or do not fit the memory, temperature not above 0, unknown variant, or ``authors``
            before the memory is calibrated.

    Reference: Tian, Krishnan, Isola, Contrastive Representation Distillation (ICLR 2020), the contrastive loss of
    section 3 with its critic h. Both sides are anchors, as in their code.
    """
    tau = check_temperature(temperature)
    check_choice("variant", variant, "paper", "authors")
    check_same_shape(student, teacher)
    size, width = memory.student.shape
    if student.ndim != 2 or student.shape[1] != width:
        raise ValueError(f"student {tuple(student.shape)} must be embeddings [B, {width}], as wide as the memory's")
    if index.shape != student.shape[:1] or negatives.ndim != 2 or len(negatives) != len(index):
        raise ValueError(
            f"index {tuple(index.shape)} and negatives {tuple(negatives.shape)} must hold one example and "
            f"one row of others for each of {len(student)} embeddings; draw them with memory.draw"
        )
    if mask is not None:
        mask = check_mask(mask, index.shape)
    index, negatives = zero_masked(index, mask), zero_masked(negatives, mask)
    student, teacher = unit(zero_masked(as_float(student), mask)), unit(zero_masked(as_float(teacher), mask))

    # h = sigmoid(s.t / tau - offset) avoids the exponentials of +-1 / tau
    prior = math.log(max(negatives.shape[1], 1) / size)
    offsets = memory.scales.new_full((2,), prior)
    if variant == "authors":
        if not memory.scales.all():
            raise ValueError(
                "variant='authors' divides by normalisers that the memory has not measured yet: "
                "call memory.calibrate with the first batch"
            )
        offsets = prior + memory.scales.log()
    value = student.new_zeros(len(student))
    for anchor, other, bank, offset in zip(
        (student, teacher), (teacher, student), (memory.teacher, memory.student), offsets, strict=True
    ):
        if variant == "authors":
            other = bank[index].to(anchor.dtype)
        offset = offset.to(anchor.dtype)
        positive = (anchor * other).sum(-1) / tau - offset
        negative = scores(anchor, bank, negatives) / tau - offset
        value = value - nn.functional.logsigmoid(positive) - nn.functional.logsigmoid(-negative).sum(-1)
    return reduce(value, mask, reduction)
