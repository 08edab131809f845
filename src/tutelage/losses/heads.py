"""Output layers over a vocabulary: their projection of hidden states to logits, and its gradients."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tutelage.losses.common import as_float

TILE = 1 << 13
"""Rows of a head whose gradient exists at a time in a lower precision than that of the sum."""


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
    """How hidden states ``h`` become logits: ``cap(scale * (h @ (weight + LoRA).T + bias))``.

    Tensors that require a gradient get one. A tied weight is the embedding's own parameter, whose gradients add up. A
    weight sharded by FSDP or tensor parallelism is gathered once; its gradient is sharded in the same way and is the
    mean over processes, as in FSDP.

    Attributes:
        weight: ``[V, D]``; ``[V, 0]`` if the hidden states are the logits ``[..., V]`` themselves.
        bias: ``[V]``.
        scale: of the logits: Cohere's ``logit_scale``, one over Granite's ``logits_scaling``.
        softcap: c of ``c tanh(z / c)``, Gemma's ``final_logit_softcapping``; ``None`` for none.
        lora: low-rank matrices added to the weight, which may be frozen.
        vocabulary: how many rows are tokens; the rest is padding, which gets neither probability nor gradient.
            Default: all.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    lora: LoRA | None = None
    vocabulary: int | None = None

    @property
    def size(self) -> int:
        """The number of tokens, without padding."""
        return len(self.weight) if self.vocabulary is None else self.vocabulary

    def __post_init__(self) -> None:
        if not 0 < self.size <= len(self.weight):
            raise ValueError(f"vocabulary={self.vocabulary}: must be above 0 and at most {len(self.weight)} rows")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap={self.softcap}: must be above 0, or None for no soft cap")
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
        """Weight, bias, and LoRA's a and b, gathered on this process."""
        a, b = (None, None) if self.lora is None else self.lora[:2]
        return tuple(None if x is None else _gathered(x) for x in (self.weight, self.bias, a, b))

    def finish(self, raw: Tensor) -> Tensor:
        """Logits from ``h @ weight.T + bias``, in the precision of losses; they may be ``raw`` itself."""
        raw = as_float(raw)
        if self.softcap is not None:
            return torch.mul(raw, self.scale / self.softcap).tanh_().mul_(self.softcap)
        return raw if self.scale == 1.0 else raw * self.scale

    def finish_backward_(self, grad: Tensor, logits: Tensor) -> Tensor:
        """The gradient by the raw projection from that by the logits, in place."""
        if self.softcap is not None:
            grad.addcmul_(grad * logits, logits, value=-1.0 / self.softcap**2)
        return grad if self.scale == 1.0 else grad.mul_(self.scale)


def as_head(head: Tensor | LinearHead) -> LinearHead:
    """A weight ``[V, D]`` as a head."""
    return head if isinstance(head, LinearHead) else LinearHead(head)


def _gathered(x: Tensor) -> Tensor:
    """``x``, gathered if it is sharded; its gradient returns to the shards as the mean over processes.

    Processes with different tokens have different gradients, of which FSDP takes the mean too. With the same tokens
    on all processes, as under tensor parallelism, the mean is any of them.
    """
    if not hasattr(x, "full_tensor"):
        return x
    from torch.distributed.tensor import Partial

    mesh = x.device_mesh  # type: ignore[attr-defined]
    full: Tensor = x.full_tensor(grad_placements=[Partial("sum")] * mesh.ndim)
    if full.requires_grad:
        full.register_hook(lambda gradient: gradient / mesh.size())  # gloo has no mean of its own
    return full


class HeadProjection:
    """The raw logits of some of the hidden states ``[N, D]`` at a time.

    ``tensors`` are :meth:`LinearHead.tensors`; ``size`` is V without padding, which is never projected; ``dtype`` is
    that of autocast, or ``None`` for the tensors' own.
    """

    def __init__(
        self, head: LinearHead, tensors: Sequence[Tensor | None], hidden: Tensor, size: int, dtype: torch.dtype | None
    ) -> None:
        if dtype is None or not head.weight.shape[1]:  # logits are in the precision that the model gives them
            dtype = functools.reduce(torch.promote_types, [x.dtype for x in (hidden, *tensors) if x is not None])
        self.dtype, self.hidden, self.size = dtype, hidden.detach(), size
        weight, bias, a, b = (None if x is None else x.detach().to(dtype) for x in tensors)
        assert weight is not None
        self.weight = weight[:size]
        self.bias = None if bias is None else bias[:size]
        self.lora = None if a is None or b is None or head.lora is None else LoRA(a, b[:size], head.lora.scale)
        self.buffer: Tensor | None = None

    def project(self, rows: slice | Tensor) -> Tensor:
        """``[n, V]`` of some tokens, before :meth:`LinearHead.finish`; valid until the next call."""
        hidden = self.hidden[rows].to(self.dtype)
        if self.weight.shape[1] == 0:
            return hidden[:, : self.size].clone()
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
    """Sums, in float32 or more, of the gradients by the hidden states and the head's tensors that require one."""

    def __init__(
        self, projection: HeadProjection, required: Sequence[bool], tensors: Sequence[Tensor | None]
    ) -> None:
        self.projection = projection
        self.sums = [
            None if x is None or not needed else torch.zeros_like(
                x, dtype=torch.promote_types(x.dtype, torch.float32), memory_format=torch.contiguous_format
            )
            for x, needed in zip(tensors, required, strict=True)
        ]  # fmt: skip
        # the gradients of a large vocabulary underflow in float16, and no loss scale has been applied yet
        self.dtype = torch.float32 if projection.dtype == torch.float16 else projection.dtype
        self.weight = projection.weight.to(self.dtype)
        self.buffer: Tensor | None = None

    def buffer_for(self, raw: Tensor) -> Tensor:
        """Where to write the gradient by the raw logits: in their place if they are without_autocast enough."""
        if self.dtype == raw.dtype:
            return raw
        if self.buffer is None or self.buffer.shape[0] < len(raw):
            self.buffer = torch.empty_like(raw, dtype=self.dtype)
        return self.buffer[: len(raw)]

    def add(self, grad: Tensor, rows: slice | Tensor) -> None:
        """Add the gradients of some rows, from that by their raw logits ``[n, V]``."""
        by_hidden, by_weight, by_bias, by_a, by_b = self.sums
        lora, size = self.projection.lora, self.projection.size
        if by_hidden is not None:
            part = grad @ self.weight if self.weight.shape[1] else grad
            if lora is not None:
                part.addmm_(grad @ lora.b.to(self.dtype), lora.a.to(self.dtype), alpha=lora.scale)
            by_hidden[rows, : part.shape[1]] = part.to(by_hidden.dtype)
        if by_bias is not None:
            by_bias[:size] += grad.sum(0, dtype=by_bias.dtype)
        if by_weight is None and by_a is None and by_b is None:
            return
        hidden = self.projection.hidden[rows].to(self.dtype)
        if by_weight is not None:
            _add_product(by_weight[:size], grad, hidden)
        if lora is None:
            return
        if by_b is not None:
            low = (hidden @ lora.a.to(self.dtype).mT) * lora.scale
            _add_product(by_b[:size], grad, low)
        if by_a is not None:
            by_a.add_((grad @ lora.b.to(self.dtype)).mT @ hidden, alpha=lora.scale)


def _add_product(total: Tensor, grad: Tensor, hidden: Tensor) -> None:
    """``total += grad.T @ hidden``, without a second tensor of that size."""
    if total.dtype == grad.dtype:
        total.addmm_(grad.mT, hidden)
        return
    for start in range(0, len(total), TILE):
        total[start : start + TILE] += grad[:, start : start + TILE].mT @ hidden
