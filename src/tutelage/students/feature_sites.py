"""Where in a model a feature is worth comparing, found by one dry run."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tutelage.data.batch import Batch
from tutelage.errors import ModelError
from tutelage.students.projectors import device_of, eval_no_grad
from tutelage.taps import Needs, find_module, observe, output_head, parse_tap

Size = tuple[int, int]

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish)
"""Modules whose input is a feature before its activation."""


def find_stages(model: nn.Module, example: Batch) -> dict[Size, str]:
    """For each resolution the path of the module that gives the last feature map of it.

    Of modules inside each other it is the outermost that keeps to one resolution, such as a whole stage of a
    ResNet. Maps of one pixel are left out: those are pooled; and so is what is not the image made smaller, such as
    the heads of an attention. So is a stem: a resolution of single layers, where others have modules of several.
    """
    seen: list[tuple[str, Size]] = []
    image = _image(example)

    def keep(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == 4 and _is_map(output, image):
                seen.append((path, (output.shape[2], output.shape[3])))

        return hook

    _dry_run(model, example, [m.register_forward_hook(keep(path)) for path, m in model.named_modules() if path])
    inside: dict[str, set[Size]] = {}
    for path, size in seen:
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            inside.setdefault(".".join(parts[:end]), set()).add(size)
    found: dict[Size, str] = {}
    for path, size in seen:  # hooks fire innermost and earliest first: the last one stays, and comes last
        if len(inside[path]) == 1 and size != (1, 1):
            found.pop(size, None)
            found[size] = path
    return _without_stem(model, found)


def _without_stem(model: nn.Module, found: dict[Size, str]) -> dict[Size, str]:
    """Without a resolution at which there is no more than a layer, where others have whole stages."""
    modules = dict(model.named_modules())
    whole = {size: path for size, path in found.items() if next(modules[path].children(), None) is not None}
    return whole or found


def _image(example: Batch) -> Size | None:
    """Height and width of the image that the example holds, if it holds one."""
    inputs = example.inputs.values() if isinstance(example.inputs, dict) else [example.inputs]
    found = next((x for x in inputs if x.ndim == 4), None)
    return None if found is None else (found.shape[2], found.shape[3])


def _is_map(x: Tensor, image: Size | None) -> bool:
    """Whether it is as high and wide as the image over one stride, give or take a border of two."""
    if image is None:
        return True
    if image[0] == image[1] and x.shape[2] != x.shape[3]:
        return False
    stride = max(round(image[0] / x.shape[2]), 1)
    return all(abs(x.shape[2 + i] * stride - image[i]) <= 2 * stride for i in range(2))


def find_preactivations(model: nn.Module, example: Batch) -> dict[Size, str]:
    """For each resolution the tap of the last feature map in front of an activation module."""
    calls: dict[str, int] = {}
    seen: list[tuple[str, int, Size]] = []
    image = _image(example)

    def keep(path: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            call = calls[path] = calls.get(path, -1) + 1
            if args and isinstance(args[0], Tensor) and args[0].ndim == 4 and _is_map(args[0], image):
                seen.append((path, call, (args[0].shape[2], args[0].shape[3])))

        return hook

    modules = [(path, m) for path, m in model.named_modules() if isinstance(m, ACTIVATIONS)]
    _dry_run(model, example, [m.register_forward_pre_hook(keep(path)) for path, m in modules])
    found: dict[Size, str] = {}
    for path, call, size in seen:
        if size != (1, 1):
            found.pop(size, None)
            found[size] = f"{path}@{call}:input" if calls[path] else f"{path}:input"
    kept = find_stages(model, example)
    return {size: tap for size, tap in found.items() if size in kept}


def find_embedding_tap(model: nn.Module) -> str:
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


def find_last_norm(model: nn.Module, example: Batch, tap: str) -> nn.modules.batchnorm._BatchNorm | None:
    """The batch norm that makes the feature at ``tap``; else the last one before it that gives a map of its shape."""
    outputs: list[tuple[nn.Module, Tensor]] = []
    known = parse_tap(tap)
    reached: list[int] = []  # norms that had run, at each call of the tapped module

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        outputs.append((module, output.detach().clone()))

    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    def mark(*_: Any) -> None:
        reached.append(len(outputs))

    handles = [m.register_forward_hook(hook) for m in norms]
    tapped = find_module(model, tap)
    on = tapped.register_forward_pre_hook if known.side == "input" else tapped.register_forward_hook
    handles.append(on(mark))
    try:
        with eval_no_grad(model):
            feature = observe(model, example.to(device_of(model)).inputs, Needs(hidden=(tap,))).hidden[tap]
    finally:
        for handle in handles:
            handle.remove()
    before = outputs[: reached[-1 if known.call is None else known.call]]
    alike = [(m, x) for m, x in before if x.shape == feature.shape]
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
        with eval_no_grad(model):
            observe(model, example.to(device_of(model)).inputs, Needs(logits=False))
    finally:
        for handle in handles:
            handle.remove()
