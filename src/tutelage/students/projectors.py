"""Projectors: from a student's feature to the shape of its teacher's.

Built from one dry run of both models, which tells the shapes. They belong to the method, are trained
with the student, and are not part of what is exported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tutelage.data.batch import Batch
from tutelage.errors import ConfigError, ModelError
from tutelage.taps import Needs, evaluating, observe

Shape = tuple[int, ...]


# The dry run -----------------------------------------------------------------------------------------


@contextmanager
def eval_no_grad(model: nn.Module) -> Iterator[nn.Module]:
    """``model`` in evaluation mode and without autograd; each of its modules gets its own mode back."""
    with evaluating(model), torch.no_grad():
        yield model


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def feature_shapes(model: nn.Module, example: Batch, paths: Sequence[str]) -> dict[str, Shape]:
    """The shape of what each module at ``paths`` gives for ``example``, batch first.

    The model runs once, in evaluation mode, so that no running statistic moves.

    Raises:
        ModelError: unknown path, or its module gives no tensor.
    """
    with eval_no_grad(model):
        seen = observe(model, example.to(device_of(model)).inputs, Needs(hidden=tuple(dict.fromkeys(paths))))
    return {path: tuple(x.shape) for path, x in seen.hidden.items()}


# Projectors ------------------------------------------------------------------------------------------


def _linear(inputs: int, outputs: int, maps: bool) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 1, bias=True) if maps else nn.Linear(inputs, outputs)


def _mlp(inputs: int, outputs: int, maps: bool) -> nn.Module:
    return nn.Sequential(_linear(inputs, outputs, maps), nn.ReLU(), _linear(outputs, outputs, maps))


def _identity(inputs: int, outputs: int, maps: bool) -> nn.Module:
    if inputs != outputs:
        raise ModelError(
            f"an identity projector cannot bring {inputs} to {outputs} channels",
            remedy="use projector: auto, which adds one only where the numbers differ",
        )
    return nn.Identity()


def _auto(inputs: int, outputs: int, maps: bool) -> nn.Module:
    return nn.Identity() if inputs == outputs else _linear(inputs, outputs, maps)


PROJECTORS: dict[str, Callable[[int, int, bool], nn.Module]] = {
    "auto": _auto,
    "conv1x1": _linear,
    "identity": _identity,
    "linear": _linear,
    "mlp": _mlp,
}
"""Kinds by name: (channels in, channels out, whether of maps) -> module. ``linear`` on every position of a map is
``conv1x1``; ``auto`` is that where the numbers of channels differ, and ``identity`` where they agree."""


def match_dtype(module: nn.Module, x: Tensor) -> Tensor:
    """``x`` in the precision of the module's weights, where it has any."""
    first = next(module.parameters(), None)
    return x if first is None else x.to(first.dtype)


class Projector(nn.Module):
    """A student's feature, brought to the size and the number of channels of the teacher's.

    The size is that of the teacher's feature at hand, not of the dry run, so inputs of any size will do: larger
    maps and sequences are average-pooled, smaller ones interpolated, and a map becomes a vector by its mean.

    Args:
        body: acts on channels: of ``[B, C, H, W]``, or the last dimension of ``[B, D]`` and ``[B, L, D]``.
        norm: normalises after it; ``None`` for none.
    """

    def __init__(self, body: nn.Module, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.norm = body, norm

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The student's feature in the shape of the teacher's."""
        x: Tensor = self.body(match_dtype(self, resize_like(student, teacher)))
        return x if self.norm is None else self.norm(x)

    def extra_repr(self) -> str:
        """Its number of parameters."""
        return f"{sum(p.numel() for p in self.parameters()):,} parameters"


def resize_like(x: Tensor, like: Tensor) -> Tensor:
    """``x`` in the spatial size, or the length, of ``like``: averaged where larger, interpolated where smaller."""
    if x.ndim == 4 and like.ndim == 2:
        return x.mean((2, 3))
    if x.ndim == 4 and x.shape[2:] != like.shape[2:]:
        size = (like.shape[2], like.shape[3])
        if x.shape[2] >= size[0] and x.shape[3] >= size[1]:
            return F.adaptive_avg_pool2d(x, size)
        return F.interpolate(x, size, mode="bilinear", align_corners=False)
    if x.ndim == 3 and x.shape[1] != like.shape[1]:
        return F.interpolate(x.mT, like.shape[1], mode="linear", align_corners=False).mT
    return x


def build_projector(student: Shape, teacher: Shape, *, kind: str = "auto", norm: bool = False) -> Projector:
    """A projector from the student's feature to the teacher's.

    Args:
        student: shape of the student's feature, ``[B, C, H, W]``, ``[B, L, D]`` or ``[B, D]``.
        teacher: shape of the teacher's; the same kind of feature, or ``[B, D]`` of a map.
        kind: one of :data:`PROJECTORS`.
        norm: a batch norm after it, for maps and vectors. Its statistics are those of a micro-batch.

    Raises:
        ConfigError: unknown kind, or a norm where it cannot be.
        ModelError: no projector leads from one shape to the other.
    """
    if kind not in PROJECTORS:
        raise ConfigError(f"unknown projector {kind!r}", remedy=f"allowed: {', '.join(PROJECTORS)}")
    shown = f"the student's feature is {_shown(student)}, the teacher's {_shown(teacher)}"
    known = {2: "a vector", 3: "tokens", 4: "a map"}
    pooled = len(student) == 4 and len(teacher) == 2
    if len(student) not in known or len(teacher) not in known or (len(student) != len(teacher) and not pooled):
        raise ModelError(
            f"{shown}: no projector leads from {known.get(len(student), 'that')} to "
            f"{known.get(len(teacher), 'that')}",
            remedy="pair maps [B, C, H, W], tokens [B, L, D] or vectors [B, D] with their like, or a map "
            "with a vector",
        )
    maps = len(student) == 4 and len(teacher) == 4
    if norm and len(teacher) == 3:
        raise ConfigError(f"norm: true, and {shown}", remedy="a batch norm is for maps and vectors; leave it out")
    inputs = student[1] if len(student) == 4 else student[-1]
    outputs = teacher[1] if maps else teacher[-1]
    after = None if not norm else nn.BatchNorm2d(outputs) if maps else nn.BatchNorm1d(outputs)
    return Projector(PROJECTORS[kind](inputs, outputs, maps), after)


def _shown(shape: Shape) -> str:
    return f"[B, {', '.join(map(str, shape[1:]))}]"
