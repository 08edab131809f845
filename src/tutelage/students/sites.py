"""Where in a model a feature is worth comparing, found by one dry run."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tutelage.data.batch import Batch
from tutelage.errors import ModelError
from tutelage.students.projectors import device_of, untouched
from tutelage.taps import Needs, observe, output_head

Size = tuple[int, int]

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish)
"""Modules whose input is a feature before its activation."""


def stages(model: nn.Module, example: Batch) -> dict[Size, str]:
    """For each resolution the path of the module that gives the last feature map of it.

    Of modules inside each other it is the outermost that keeps to one resolution, such as a whole stage of a
    ResNet. Maps of one pixel are left out: those are pooled.
    """
    seen: list[tuple[str, Size]] = []

    def keep(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == 4:
                seen.append((path, (output.shape[2], output.shape[3])))

        return hook

    _dry_run(model, example, [m.register_forward_hook(keep(path)) for path, m in model.named_modules() if path])
    inside: dict[str, set[Size]] = {}
    for path, size in seen:
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            inside.setdefault(".".join(parts[:end]), set()).add(size)
    even = [(path, size) for path, size in seen if len(inside[path]) == 1 and size != (1, 1)]
    return {size: path for path, size in even}  # hooks fire innermost and earliest first: the last one stays


def before_activations(model: nn.Module, example: Batch) -> dict[Size, str]:
    """For each resolution the tap of the last feature map in front of an activation module."""
    calls: dict[str, int] = {}
    seen: list[tuple[str, int, Size]] = []

    def keep(path: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            call = calls[path] = calls.get(path, -1) + 1
            if args and isinstance(args[0], Tensor) and args[0].ndim == 4:
                seen.append((path, call, (args[0].shape[2], args[0].shape[3])))

        return hook

    found = [(path, m) for path, m in model.named_modules() if isinstance(m, ACTIVATIONS)]
    _dry_run(model, example, [m.register_forward_pre_hook(keep(path)) for path, m in found])
    return {
        size: f"{path}@{call}:input" if calls[path] else f"{path}:input"
        for path, call, size in seen
        if size != (1, 1)
    }


def embedding(model: nn.Module) -> str:
    """The tap of what goes into the output head, such as ``head:input``.

    Raises:
        ModelError: the model has no linear head, or is one itself.
    """
    head = output_head(model)
    path = next(path for path, module in model.named_modules() if module is head)
    if not path:
        raise ModelError(
            f"{type(model).__name__} is nothing but its output head", remedy="name what to compare: pairs: [...]"
        )
    return f"{path}:input"


def last_norm(model: nn.Module, example: Batch, tap: str) -> nn.modules.batchnorm._BatchNorm | None:
    """The batch norm that makes the feature at ``tap``; else the last one that gives a map of its shape."""
    outputs: list[tuple[nn.Module, Tensor]] = []

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        outputs.append((module, output.detach().clone()))

    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    handles = [m.register_forward_hook(hook) for m in norms]
    try:
        with untouched(model):
            feature = observe(model, example.to(device_of(model)).inputs, Needs(hidden=(tap,))).hidden[tap]
    finally:
        for handle in handles:
            handle.remove()
    alike = [(m, x) for m, x in outputs if x.shape == feature.shape]
    same = [m for m, x in alike if x.equal(feature)]
    found: Any = same[-1] if same else alike[-1][0] if alike else None
    return found


def _dry_run(model: nn.Module, example: Batch, handles: list[Any]) -> None:
    try:
        if getattr(model, "many", False):
            raise ModelError(
                "which of an ensemble's models to take a feature from is not said",
                remedy="name the pairs, with the member's number first: pairs: [{student: stages.1, "
                "teacher: 0.stages.1}]",
            )
        with untouched(model):
            observe(model, example.to(device_of(model)).inputs, Needs())
    finally:
        for handle in handles:
            handle.remove()
