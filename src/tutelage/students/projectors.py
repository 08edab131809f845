"""Projectors: from a student's feature to the shape of its teacher's.

They are built from the shapes of one dry run of both models. They belong to the method, are trained with the student,
and are not exported.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tutelage.data.batch import Batch
from tutelage.errors import ConfigError, ModelError, shorten
from tutelage.taps import Needs, Observation, evaluating, observe

Shape = tuple[int, ...]


@contextmanager
def eval_no_grad(model: nn.Module) -> Iterator[nn.Module]:
    """Evaluation mode without autograd; afterwards each module has its previous mode."""
    with evaluating(model), torch.no_grad():
        yield model


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def dry_run(model: nn.Module, example: Batch, needs: Needs) -> Observation:
    """The outputs of a model for an example, in evaluation mode and without autograd."""
    with eval_no_grad(model):
        return observe(model, example.to(device_of(model)).inputs, needs)


def feature_shapes(model: nn.Module, example: Batch, paths: Sequence[str]) -> dict[str, Shape]:
    """The shape of each tap for ``example``, from one run; raises :class:`ModelError` for an unknown path."""
    observed = dry_run(model, example, Needs(hidden=tuple(dict.fromkeys(paths))))
    return {path: tuple(x.shape) for path, x in observed.hidden.items()}


def _linear(inputs: int, outputs: int, maps: bool) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 1, bias=True) if maps else nn.Linear(inputs, outputs)


def _identity(inputs: int, outputs: int, maps: bool) -> nn.Module:
    if inputs != outputs:
        raise ModelError(
            f"an identity projector cannot map {inputs} to {outputs} channels",
            remedy="use projector: auto, which adds a layer only where the numbers differ",
        )
    return nn.Identity()


PROJECTORS: dict[str, Callable[[int, int, bool], nn.Module]] = {
    "auto": lambda inputs, outputs, maps: nn.Identity() if inputs == outputs else _linear(inputs, outputs, maps),
    "conv1x1": _linear,
    "identity": _identity,
    "linear": _linear,
    "mlp": lambda inputs, outputs, maps: nn.Sequential(
        _linear(inputs, outputs, maps), nn.ReLU(), _linear(outputs, outputs, maps)
    ),
}
"""Kinds by name: (input channels, output channels, whether features are maps) -> module. On maps ``linear`` is
``conv1x1``; ``auto`` is ``linear`` if the numbers of channels differ, else ``identity``."""


def match_dtype(module: nn.Module, x: Tensor) -> Tensor:
    """``x`` in the dtype of the module's weights, if it has any."""
    first = next(module.parameters(), None)
    return x if first is None else x.to(first.dtype)


class Projector(nn.Module):
    """Maps a student's feature to the size and number of channels of the teacher's.

    The size is that of the teacher's feature in the batch, not in the dry run, so inputs of any size work: larger
    maps are average-pooled, smaller maps and sequences interpolated, and a map becomes a vector by its mean.

    Args:
        body: acts on channels: those of ``[B, C, H, W]``, or the last dimension of ``[B, D]`` and ``[B, L, D]``.
        norm: a norm after ``body``.
    """

    def __init__(self, body: nn.Module, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.norm = body, norm

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The student's feature in the shape of the teacher's."""
        x: Tensor = self.body(match_dtype(self, resize_like(student, teacher)))
        return x if self.norm is None else self.norm(x)

    def extra_repr(self) -> str:
        """The number of parameters."""
        return f"{sum(p.numel() for p in self.parameters()):,} parameters"


def resize_like(x: Tensor, like: Tensor) -> Tensor:
    """``x`` in the spatial size or length of ``like``: larger maps are averaged, others interpolated."""
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
        teacher: shape of the teacher's; the same kind of feature, or ``[B, D]`` for a map.
        kind: one of :data:`PROJECTORS`.
        norm: add a batch norm, for maps and vectors. Its statistics are those of a micro-batch.

    Raises:
        ConfigError: unknown kind, or a norm for tokens.
        ModelError: there is no projector between the shapes.
    """
    if kind not in PROJECTORS:
        raise ConfigError(f"unknown projector {shorten(kind)}", remedy=f"allowed: {', '.join(PROJECTORS)}")
    mine, theirs = (f"[B, {', '.join(map(str, shape[1:]))}]" for shape in (student, teacher))
    shapes = f"the student's feature is {mine}, the teacher's {theirs}"
    names = {2: "a vector", 3: "tokens", 4: "a map"}
    pooled = len(student) == 4 and len(teacher) == 2
    if len(student) not in names or len(teacher) not in names or (len(student) != len(teacher) and not pooled):
        raise ModelError(
            f"{shapes}: no projector leads from {names.get(len(student), 'that')} to "
            f"{names.get(len(teacher), 'that')}",
            remedy="pair features of one kind (maps [B, C, H, W], tokens [B, L, D] or vectors [B, D]), or a map with "
            "a vector",
        )
    maps = len(student) == 4 and len(teacher) == 4
    if norm and len(teacher) == 3:
        raise ConfigError(f"norm: true, and {shapes}", remedy="remove norm, which is for maps and vectors")
    inputs = student[1] if len(student) == 4 else student[-1]
    outputs = teacher[1] if maps else teacher[-1]
    after = None if not norm else nn.BatchNorm2d(outputs) if maps else nn.BatchNorm1d(outputs)
    return Projector(PROJECTORS[kind](inputs, outputs, maps), after)
