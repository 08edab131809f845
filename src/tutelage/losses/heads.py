"""Output layers over a vocabulary, as values: what turns hidden states into scores, and gradients of one into the
other's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tutelage.losses.common import as_float

TILE = 1 << 13
"""Rows of a head whose gradient exists at a time in another precision than that which it is summed in."""


class LoRA(NamedTuple):
    """A low-rank addition to a head's weight: ``scale * b @ a``.

    Attributes:
        a: ``[r, D]``.
        b: ``[V, r]``.
        scale: of the product; ``lora_alpha / r`` in peft.

    Reference: Hu et al., LoRA (ICLR 2022), section 4.1.
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0


@dataclass(frozen=True)
class LinearHead:
    """How hidden states ``h`` become scores: ``cap(scale * (h @ (weight + LoRA).T + bias))``.

    Tensors that require a gradient get one. A tied weight is the embedding's own parameter, whose gradients add up;
    one that FSDP or tensor parallelism has sharded is gathered once, and its gradient is sharded alike and the mean
    over processes, as FSDP's is.

    Attributes:
        weight: ``[V, D]``.
        bias: ``[V]``.
        scale: of the scores: Cohere's ``logit_scale``, one over Granite's ``logits_scaling``.
        softcap: c of ``c tanh(z / c)``, Gemma's ``final_logit_softcapping``; ``None`` for none.
        lora: what is learned beside a weight, which may be frozen.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    lora: LoRA | None = None

    def __post_init__(self) -> None:
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap={self.softcap}: must be above 0, or None for scores as they are")
        if self.weight.ndim != 2 or (self.bias is not None and self.bias.shape != self.weight.shape[:1]):
            bias = "" if self.bias is None else f" and bias {tuple(self.bias.shape)}"
            raise ValueError(
                f"weight {tuple(self.weight.shape)}{bias} must be [V, D] and [V], as in torch.nn.Linear: "
                "a row for each token of the vocabulary"
            )
        if self.lora is not None:
            a, b = self.lora.a.shape, self.lora.b.shape
            if (b[0], a[-1]) != self.weight.shape or b[-1] != a[0]:
                raise ValueError(
                    f"LoRA of a {tuple(a)} and b {tuple(b)} must be [r, D] and [V, r], of the weight's "
                    f"{tuple(self.weight.shape)} = [V, D]"
                )

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Weight, bias, and LoRA's a and b, whole on this process."""
        a, b = (None, None) if self.lora is None else self.lora[:2]
        return tuple(None if x is None else _whole(x) for x in (self.weight, self.bias, a, b))

    def finished(self, raw: Tensor) -> Tensor:
        """HeadProjection from ``h @ weight.T + bias``, in the precision of losses; it may be ``raw`` itself."""
        raw = as_float(raw)
        if self.softcap is not None:
            return torch.mul(raw, self.scale / self.softcap).tanh_().mul_(self.softcap)
        return raw if self.scale == 1.0 else raw * self.scale

    def unfinished_(self, slope: Tensor, finished: Tensor) -> Tensor:
        """The gradient by raw scores from that by finished ones, in its place."""
        if self.softcap is not None:
            slope.addcmul_(slope * finished, finished, value=-1.0 / self.softcap**2)
        return slope if self.scale == 1.0 else slope.mul_(self.scale)

    @property
    def rows(self) -> int:
        """V, the padding of the vocabulary included."""
        return self.weight.shape[0]


def as_head(given: Tensor | LinearHead) -> LinearHead:
    """A weight ``[V, D]`` as a head."""
    return given if isinstance(given, LinearHead) else LinearHead(given)


def _whole(x: Tensor) -> Tensor:
    """``x`` gathered where it is sharded; its gradient goes back to the shards as the mean over processes.

    Processes that saw different tokens have different gradients, whose mean is what FSDP makes of those that it
    gathered itself; where all saw the same, as under tensor parallelism, it is any of them.
    """
    if not hasattr(x, "full_tensor"):
        return x
    from torch.distributed.tensor import Partial

    mesh = x.device_mesh  # type: ignore[attr-defined]
    whole: Tensor = x.full_tensor(grad_placements=[Partial("sum")] * mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda gradient: gradient / mesh.size())  # gloo has no mean of its own
    return whole


class HeadProjection:
    """What a head makes of some hidden states at a time.

    Args:
        head: the LoRA's scale is read off it.
        tensors: of the head, in the order of :meth:`LinearHead.tensors`.
        hidden: ``[N, D]``.
        size: V without its padding, which is never projected.
        dtype: of the projections: that of autocast, or ``None`` for the tensors' own.
    """

    def __init__(
        self,
        head: LinearHead,
        tensors: Sequence[Tensor | None],
        hidden: Tensor,
        size: int,
        dtype: torch.dtype | None,
    ) -> None:
        assert tensors[0] is not None
        given = [x for x in (hidden, *tensors) if x is not None]
        if dtype is None:
            dtype = given[0].dtype
            for x in given[1:]:
                dtype = torch.promote_types(dtype, x.dtype)
        self.dtype, self.hidden, self.size = dtype, hidden.detach(), size
        weight, bias, a, b = (None if x is None else x.detach().to(dtype) for x in tensors)
        assert weight is not None
        self.weight = weight[:size]
        self.bias = None if bias is None else bias[:size]
        self.lora = None if a is None or b is None or head.lora is None else LoRA(a, b[:size], head.lora.scale)
        self.buffer: Tensor | None = None

    def project(self, rows: slice | Tensor) -> Tensor:
        """``[n, V]``, before :meth:`LinearHead.finished`, of some tokens; valid until the next call."""
        hidden = self.hidden[rows].to(self.dtype)
        if self.buffer is None or len(self.buffer) < len(hidden):
            self.buffer = hidden.new_empty(len(hidden), self.size)
        out = self.buffer[: len(hidden)]
        if self.bias is None:
            torch.mm(hidden, self.weight.mT, out=out)
        else:
            torch.addmm(self.bias, hidden, self.weight.mT, out=out)
        if self.lora is not None:
            out.addmm_(hidden @ self.lora.a.mT, self.lora.b.mT, alpha=self.lora.scale)
        return out


class GradientSums:
    """Sums, in float32 or more, of the gradients by hidden states and by a head's tensors.

    Args:
        scores: of the student.
        wanted: whether hidden states, weight, bias, LoRA's a and b are to have one.
        like: those tensors.
    """

    def __init__(self, scores: HeadProjection, wanted: Sequence[bool], like: Sequence[Tensor | None]) -> None:
        self.scores = scores
        self.sums = [
            None if x is None or not want else torch.zeros_like(
                x, dtype=torch.promote_types(x.dtype, torch.float32), memory_format=torch.contiguous_format
            )
            for x, want in zip(like, wanted, strict=True)
        ]  # fmt: skip
        # float16 has no room for the slopes of a large vocabulary, which no loss scale has made larger yet
        self.dtype = torch.float32 if scores.dtype == torch.float16 else scores.dtype
        self.weight = scores.weight.to(self.dtype)
        self.buffer: Tensor | None = None

    def slopes(self, scores: Tensor) -> Tensor:
        """Where the gradient by ``scores`` is to be written: in their place, if it is precise enough."""
        if self.dtype == scores.dtype:
            return scores
        if self.buffer is None or self.buffer.shape[0] < len(scores):
            self.buffer = torch.empty_like(scores, dtype=self.dtype)
        return self.buffer[: len(scores)]

    def add(self, slope: Tensor, rows: slice | Tensor) -> None:
        """Add the gradients of some rows, from that by their raw scores ``[n, V]``."""
        by_hidden, by_weight, by_bias, by_a, by_b = self.sums
        lora = self.scores.lora
        if by_hidden is not None:
            part = slope @ self.weight
            if lora is not None:
                part.addmm_(slope @ lora.b.to(self.dtype), lora.a.to(self.dtype), alpha=lora.scale)
            by_hidden[rows] = part.to(by_hidden.dtype)
        if by_bias is not None:
            by_bias[: self.scores.size] += slope.sum(0, dtype=by_bias.dtype)
        if by_weight is None and by_a is None and by_b is None:
            return
        hidden = self.scores.hidden[rows].to(self.dtype)
        if by_weight is not None:
            _add_product(by_weight[: self.scores.size], slope, hidden)
        if lora is None:
            return
        if by_b is not None:
            low = (hidden @ lora.a.to(self.dtype).mT) * lora.scale
            _add_product(by_b[: self.scores.size], slope, low)
        if by_a is not None:
            by_a.add_((slope @ lora.b.to(self.dtype)).mT @ hidden, alpha=lora.scale)


def _add_product(into: Tensor, slope: Tensor, hidden: Tensor) -> None:
    """``into += slope.T @ hidden``, without a second tensor of that size."""
    if into.dtype == slope.dtype:
        into.addmm_(slope.mT, hidden)
        return
    for start in range(0, len(into), TILE):
        into[start : start + TILE] += slope[:, start : start + TILE].mT @ hidden
