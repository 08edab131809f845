"""Finds the taps of comparable features with one dry run of a model."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from tutelage.data.batch import Batch
from tutelage.errors import ModelError
from tutelage.students.projectors import Shape, dry_run, feature_shapes
from tutelage.taps import Needs, find_module, output_head, parse_tap

Size = tuple[int, int]

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish)
"""Modules whose input is a feature before its activation."""


def find_stages(model: nn.Module, example: Batch, *, any_layout: bool = False) -> dict[Size, str]:
    """For each resolution of feature maps the path of the outermost module that gives the last one.

    Of nested modules it is the outermost that has one resolution only, such as a stage of a ResNet. Pooled maps of
    one pixel are excluded, and so are tensors that are not a downscaled image, such as the heads of an attention. A
    stem, a resolution with single layers only, is excluded if other resolutions have modules with submodules, or if
    the rest of the model reads tokens, as the patch embedding of a ViT.

    Args:
        any_layout: also maps with the channels last, as those of Swin; see :func:`find_channels_last`.
    """
    modules = {path: module for path, module in model.named_modules() if path}
    seen = _run_with_hooks(model, example, modules, inputs=False)
    maps = [one for one in seen.maps if any_layout or not one.channels_last]
    inside: dict[str, set[Size]] = {}
    for path, _, size, _ in maps:
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            inside.setdefault(".".join(parts[:end]), set()).add(size)
    stages, layers = dict[Size, str](), dict[Size, str]()
    for path, _, size, _ in maps:  # in the order of execution, inner modules first
        if len(inside[path]) == 1 and size != (1, 1):
            by_size = layers if next(modules[path].children(), None) is None else stages
            by_size.pop(size, None)
            by_size[size] = path
    if not seen.tokens:
        return stages or layers
    begin = seen.tokens[0][1]  # a hybrid has maps after its first tokens, or of several resolutions
    return stages if len(stages) > 1 or any(one in seen.maps[begin:] for one in maps) else {}


def find_token_stage(model: nn.Module, example: Batch) -> str | None:
    """The path of the last module with submodules that gives a feature for each patch of an image, as in a ViT."""
    modules = {path: module for path, module in model.named_modules() if path}
    tokens = _run_with_hooks(model, example, modules, inputs=False).tokens
    return tokens[-1][0] if tokens else None


def find_preactivations(model: nn.Module, example: Batch) -> dict[Size, str]:
    """For each resolution the tap of the last feature map before an activation module."""
    modules: dict[str, nn.Module] = {path: m for path, m in model.named_modules() if isinstance(m, ACTIVATIONS)}
    seen = _run_with_hooks(model, example, modules, inputs=True)
    last: dict[Size, str] = {}
    for path, call, size, channels_last in seen.maps:
        if size != (1, 1) and not channels_last:
            last.pop(size, None)
            last[size] = f"{path}@{call}:input" if seen.calls[path] > 1 else f"{path}:input"
    stages = find_stages(model, example)
    return {size: tap for size, tap in last.items() if size in stages}


class _Map(NamedTuple):
    """A feature map: the module, the number of its call, height and width, and whether the channels are last."""

    path: str
    call: int
    size: Size
    channels_last: bool


class _Seen(NamedTuple):
    """What a dry run shows: feature maps, the calls of each module, and modules with a feature for each patch."""

    maps: list[_Map]
    calls: Counter[str]
    tokens: list[tuple[str, int]]
    """Each with the number of maps before it."""


def _run_with_hooks(model: nn.Module, example: Batch, modules: dict[str, nn.Module], *, inputs: bool) -> _Seen:
    image = image_size(example)
    seen = _Seen([], Counter(), [])

    def record(path: str, has_parts: bool) -> Any:
        def hook(module: nn.Module, args: Any, output: Any = None) -> None:
            x = (args or [None])[0] if inputs else output
            of_attention = isinstance(module, (nn.Softmax, nn.Dropout))  # which gives no map, whatever its size
            if isinstance(x, Tensor) and x.ndim == 4 and len(x) == len(example) and not of_attention:
                fits = [is_map_size((x.shape[i], x.shape[i + 1]), image) for i in (2, 1)]
                if any(fits):
                    at = 2 if fits[0] else 1
                    size = (x.shape[at], x.shape[at + 1])
                    seen.maps.append(_Map(path, seen.calls[path], size, not fits[0]))
            x = x[0] if isinstance(x, tuple) and x else x
            if isinstance(x, Tensor) and x.ndim == 3 and has_parts and len(x) == len(example):
                is_grid = _is_token_grid(x.shape[1], image)
                seen.tokens.extend([(path, len(seen.maps))] if is_grid else [])
            seen.calls[path] += 1

        return hook

    if getattr(model, "many", False):
        raise ModelError(
            "automatic pairs are ambiguous with an ensemble: which of an ensemble's models has the feature?",
            remedy="set the pairs, with the member's number first: pairs: [{student: stages.1, teacher: 0.stages.1}]",
        )
    register = nn.Module.register_forward_pre_hook if inputs else nn.Module.register_forward_hook
    handles = [register(m, record(path, next(m.children(), None) is not None)) for path, m in modules.items()]
    try:
        dry_run(model, example, Needs(logits=False))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def image_size(example: Batch) -> Size | None:
    """Height and width of the images of a batch; ``None`` without images."""
    inputs = example.inputs.values() if isinstance(example.inputs, dict) else [example.inputs]
    return next(((x.shape[2], x.shape[3]) for x in inputs if x.ndim == 4), None)


def is_map_size(size: Size, image: Size | None) -> bool:
    """Whether height and width are those of the image divided by one stride, within a border of two."""
    if image is None:
        return True
    if image[0] == image[1] and size[0] != size[1]:
        return False
    stride = max(round(image[0] / max(size[0], 1)), 1)
    return all(abs(size[i] * stride - image[i]) <= 2 * stride for i in range(2))


PREFIX_TOKENS = 5
"""The largest number of tokens before those of the patches: a class token and four registers."""


def _is_token_grid(tokens: int, image: Size | None) -> bool:
    """Whether so many tokens are the patches of an image, with a few tokens before them."""
    if image is None:
        return False
    grids = {(image[0] // stride) * (image[1] // stride) for stride in range(2, min(image) // 2 + 1)}
    return any(tokens - more in grids for more in range(PREFIX_TOKENS + 1))


def find_channels_last(model: nn.Module, example: Batch, taps: Sequence[str]) -> dict[str, bool]:
    """Whether each feature map ``[B, ., ., .]`` has its channels last, by its size and that of the image.

    A map of as many channels as rows is told by a run on larger images, of which the channels do not change. Features
    that are no maps count as not.

    Raises:
        ModelError: the model takes no larger images.
    """
    image, shapes = image_size(example), feature_shapes(model, example, taps)
    fits = {tap: [len(x) == 4 and is_map_size((x[i], x[i + 1]), image) for i in (2, 1)] for tap, x in shapes.items()}
    unclear = [tap for tap, (first, last) in fits.items() if image is not None and first and last]
    is_feature = {tap: last and not first for tap, (first, last) in fits.items()}
    if unclear:
        is_feature |= _larger_images(model, example, {tap: shapes[tap] for tap in unclear})
    return is_feature


def _larger_images(model: nn.Module, example: Batch, shapes: dict[str, Shape]) -> dict[str, bool]:
    def larger(x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2) if x.ndim == 4 else x

    inputs = example.inputs
    doubled = {k: larger(x) for k, x in inputs.items()} if isinstance(inputs, dict) else larger(inputs)
    tap = next(iter(shapes))
    try:
        there = feature_shapes(model, replace(example, inputs=doubled), [*shapes])
    except Exception as error:
        raise ModelError(
            f"cannot tell the channel axis of {tap!r}: its shape is {list(shapes[tap])}, and "
            f"{type(model).__name__} cannot run on images of another size",
            remedy="set method.pairs, with student_channels and teacher_channels (first or last) for each pair",
        ) from error
    return {tap: there[tap][3] == shape[3] and there[tap][1] != shape[1] for tap, shape in shapes.items()}


def to_channels_first(x: Tensor, is_last: bool) -> Tensor:
    """``[B, C, H, W]`` from a map with its channels last; other features as they are."""
    return x.movedim(-1, 1) if is_last else x


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
