"""Finds the taps of comparable features with one dry run of a model."""

from collections import Counter
from typing import Any

from torch import Tensor, nn

from tutelage.data.batch import Batch
from tutelage.errors import ModelError
from tutelage.students.projectors import dry_run
from tutelage.taps import Needs, find_module, output_head, parse_tap

Size = tuple[int, int]

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish)
"""Modules whose input is a feature before its activation."""


def find_stages(model: nn.Module, example: Batch) -> dict[Size, str]:
    """For each resolution of feature maps the path of the outermost module that gives the last one.

    Of nested modules it is the outermost that has one resolution only, such as a stage of a ResNet. Pooled maps of
    one pixel are excluded, and so are tensors that are not a downscaled image, such as the heads of an attention. A
    stem, a resolution with single layers only, is excluded if other resolutions have modules with submodules.
    """
    modules = {path: module for path, module in model.named_modules() if path}
    maps, _ = _feature_maps(model, example, modules, inputs=False)
    inside: dict[str, set[Size]] = {}
    for path, _, size in maps:
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            inside.setdefault(".".join(parts[:end]), set()).add(size)
    last: dict[Size, str] = {}
    for path, _, size in maps:  # in the order of execution, inner modules first
        if len(inside[path]) == 1 and size != (1, 1):
            last.pop(size, None)
            last[size] = path
    without_stem = {size: path for size, path in last.items() if next(modules[path].children(), None) is not None}
    return without_stem or last


def find_preactivations(model: nn.Module, example: Batch) -> dict[Size, str]:
    """For each resolution the tap of the last feature map before an activation module."""
    modules: dict[str, nn.Module] = {path: m for path, m in model.named_modules() if isinstance(m, ACTIVATIONS)}
    maps, calls = _feature_maps(model, example, modules, inputs=True)
    last: dict[Size, str] = {}
    for path, call, size in maps:
        if size != (1, 1):
            last.pop(size, None)
            last[size] = f"{path}@{call}:input" if calls[path] > 1 else f"{path}:input"
    stages = find_stages(model, example)
    return {size: tap for size, tap in last.items() if size in stages}


def _feature_maps(
    model: nn.Module, example: Batch, modules: dict[str, nn.Module], *, inputs: bool
) -> tuple[list[tuple[str, int, Size]], Counter[str]]:
    """Path, call number and size of the feature maps that modules get or give in a dry run; and the calls of each."""
    inputs_of = example.inputs.values() if isinstance(example.inputs, dict) else [example.inputs]
    image = next(((x.shape[2], x.shape[3]) for x in inputs_of if x.ndim == 4), None)
    calls: Counter[str] = Counter()
    maps: list[tuple[str, int, Size]] = []

    def record(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any = None) -> None:
            x = (args or [None])[0] if inputs else output
            if isinstance(x, Tensor) and x.ndim == 4 and _is_map(x, image):
                maps.append((path, calls[path], (x.shape[2], x.shape[3])))
            calls[path] += 1

        return hook

    if getattr(model, "many", False):
        raise ModelError(
            "automatic pairs are ambiguous with an ensemble: which of an ensemble's models has the feature?",
            remedy="set the pairs, with the member's number first: pairs: [{student: stages.1, teacher: 0.stages.1}]",
        )
    register = nn.Module.register_forward_pre_hook if inputs else nn.Module.register_forward_hook
    handles = [register(module, record(path)) for path, module in modules.items()]
    try:
        dry_run(model, example, Needs(logits=False))
    finally:
        for handle in handles:
            handle.remove()
    return maps, calls


def _is_map(x: Tensor, image: Size | None) -> bool:
    """Whether height and width are those of the image divided by one stride, within a border of two."""
    if image is None:
        return True
    if image[0] == image[1] and x.shape[2] != x.shape[3]:
        return False
    stride = max(round(image[0] / x.shape[2]), 1)
    return all(abs(x.shape[2 + i] * stride - image[i]) <= 2 * stride for i in range(2))


def find_embedding_tap(model: nn.Module) -> str:
    """The tap of the output head's input, such as ``head:input``; raises :class:`ModelError` if there is none."""
    head = output_head(model)
    path = next(path for path, module in model.named_modules() if module is head)
    if not path:
        raise ModelError(
            f"{type(model).__name__} consists of its output head only", remedy="set the taps to compare: pairs: [...]"
        )
    return f"{path}:input"


def find_last_norm(model: nn.Module, example: Batch, tap: str) -> nn.modules.batchnorm._BatchNorm | None:
    """The batch norm whose output is the feature at ``tap``; else the last one before it with that output shape."""
    outputs: list[tuple[nn.Module, Tensor]] = []
    reached: list[int] = []  # number of norms that have run, at each call of the tapped module

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        outputs.append((module, output.detach().clone()))

    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    handles = [m.register_forward_hook(hook) for m in norms]
    parsed, tapped = parse_tap(tap), find_module(model, tap)
    on: Any = tapped.register_forward_pre_hook if parsed.side == "input" else tapped.register_forward_hook
    handles.append(on(lambda *_: reached.append(len(outputs))))
    try:
        feature = dry_run(model, example, Needs(hidden=(tap,))).hidden[tap]
    finally:
        for handle in handles:
            handle.remove()
    before = outputs[: reached[-1 if parsed.call is None else parsed.call]]
    candidates = [(m, x) for m, x in before if x.shape == feature.shape]
    candidates = [(m, x) for m, x in candidates if x.equal(feature)] or candidates
    norm: Any = candidates[-1][0] if candidates else None
    return norm
