"""Models from configs: small ones that show what a number of a config changes, and students with copied weights."""

import copy
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tutelage.errors import ModelError
from tutelage.students.layer_selection import find_layer_stack, require_config

Shape = tuple[int, ...]
Key = tuple[str, int]
"""A weight's name, with ``*`` for its layer number, and one of its dimensions."""

VOCABULARY_SIZE = 32


def replace_fields(config: Any, **numbers: Any) -> Any:
    """A copy of a config with other values of some fields."""
    new = copy.deepcopy(config)
    for name, value in numbers.items():
        setattr(new, name, value)
    return new


def layer_pattern(name: str, stack: str) -> str:
    """A weight's name with ``*`` for its layer number."""
    return re.sub(rf"^{re.escape(stack)}\.\d+\.", f"{stack}.*.", name)


def weight_shapes(kind: type[nn.Module], config: Any) -> dict[str, Shape] | None:
    """The shapes of all weights of a model, without memory for them; ``None`` if it cannot be built."""
    try:
        with torch.device("meta"):
            return {name: tuple(x.shape) for name, x in kind(config).state_dict().items()}
    except Exception:  # noqa: BLE001  families raise different errors
        return None


def shape_changes(before: Mapping[str, Shape], after: Mapping[str, Shape] | None) -> dict[Key, int] | None:
    """The change of each dimension that differs; ``None`` if the names or ranks of weights differ."""
    if after is None or {n: len(s) for n, s in before.items()} != {n: len(s) for n, s in after.items()}:
        return None
    return {
        (name, i): after[name][i] - size
        for name, shape in before.items()
        for i, size in enumerate(shape)
        if after[name][i] != size
    }


def size_fields(config: Any) -> dict[str, int]:
    """The fields of a config that are sizes."""
    return {k: v for k, v in config.to_dict().items() if type(v) is int and v > 0 and not k.endswith("_token_id")}


def field_of(config: Any, name: str) -> str:
    """The name of a field in this family's config."""
    return str(config.attribute_map.get(name, name))


class Probe(NamedTuple):
    """A model of the same class with at most two layers and a small vocabulary: class, config, path of its layers."""

    kind: type[nn.Module]
    config: Any
    path: str


def probe_config(model: nn.Module) -> Probe:
    """The probe of a model."""
    path, stack = find_layer_stack(model)
    config = config_for_layers(model, list(range(min(2, len(stack)))))
    return Probe(type(model), with_vocabulary_size(config, VOCABULARY_SIZE), path)


def config_for_layers(model: nn.Module, layers: list[int]) -> Any:
    """The config of a model with only these layers, also in lists with an entry for each layer.

    A list counts as one if it has as many entries as there are layers, and a model of one layer cannot be built with
    the full list, or is the same with the first entry only.
    """
    config = require_config(model)
    total = int(config.num_hidden_layers)
    short = replace_fields(config, num_hidden_layers=len(layers))
    lists = {
        name: value
        for name, value in config.to_dict().items()
        if isinstance(value, (list, tuple)) and len(value) == total and not name.endswith("_token_id")
    }
    lists.pop("architectures", None)
    if not lists:
        return short
    kind = type(model)
    first = replace_fields(with_vocabulary_size(config, VOCABULARY_SIZE), num_hidden_layers=1)
    full_shapes = weight_shapes(kind, first)
    for name in lists:
        short_list = replace_fields(first, **{name: [getattr(config, name)[0]]})
        if full_shapes is None or (
            weight_shapes(kind, short_list) == full_shapes and _same_outputs(kind, first, short_list)
        ):
            setattr(short, name, [getattr(config, name)[layer] for layer in layers])
    return short


def set_layer_kinds(model: nn.Module, config: Any, layers: list[int]) -> None:
    """Change numbers of a short config until its layers have the weights that these layers of the model have.

    Lists of layer numbers, such as ``mlp_only_layers``, are renumbered. Another number, such as
    ``first_k_dense_replace`` or ``moe_layer_interval``, is changed only if more layers match then.
    """
    path, stack = find_layer_stack(model)
    fields: dict[str, Any] = {k: getattr(config, k, None) for k in config.to_dict() if not k.endswith("_token_id")}
    for name, value in fields.items():
        if _counts_layers(name, value, len(stack)):
            setattr(config, name, [i for i, layer in enumerate(layers) if layer in value])
    wanted = [{k: tuple(x.shape) for k, x in stack[layer].state_dict().items()} for layer in layers]

    def matches() -> int:
        shapes = weight_shapes(type(model), config)
        if shapes is None:
            return -1
        own: list[dict[str, Shape]] = [{} for _ in layers]
        for name, shape in shapes.items():
            if name.startswith(f"{path}.") and (number := int(name[len(path) + 1 :].split(".")[0])) < len(layers):
                own[number][name.split(f"{path}.{number}.", 1)[1]] = shape
        return sum(a == b for a, b in zip(own, wanted, strict=True))

    best = matches()
    for name, value in fields.items():
        if best == len(layers):
            return
        if type(value) is not int or not 0 <= value <= len(stack) or name in SIZES_OF_A_STACK:
            continue
        result = value
        for candidate in dict.fromkeys((sum(layer < value for layer in layers), *range(len(layers) + 1))):
            setattr(config, name, candidate)
            if (now := matches()) > best:
                best, result = now, candidate
        setattr(config, name, result)


SIZES_OF_A_STACK = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")


def _counts_layers(name: str, value: Any, total: int) -> bool:
    """Whether a field of a config is a list of layer numbers."""
    is_numbers = isinstance(value, (list, tuple)) and all(type(i) is int and 0 <= i < total for i in value)
    return bool(is_numbers and value and sorted(set(value)) == list(value) and re.search("layer|idx|ind", name))


def with_vocabulary_size(config: Any, size: int) -> Any:
    """The config with another vocabulary size; all special tokens become token 0."""
    ids = {name: 0 for name in config.to_dict() if name.endswith("_token_id") and getattr(config, name) is not None}
    return replace_fields(config, vocab_size=size, **ids)


def _same_outputs(kind: type[nn.Module], one: Any, other: Any) -> bool:
    """Whether models of two configs have the same outputs for the same weights; true if they do not run."""
    try:
        both = [run_model(random_model(kind, config)) for config in (one, other)]
    except Exception:  # noqa: BLE001  a model may need other inputs
        return True
    return all(a.equal(b) for a, b in zip(*both, strict=True))


def random_model(kind: type[nn.Module], config: Any) -> nn.Module:
    """A model whose weights are all random, also biases and norms, so that every weight matters."""
    noise = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        model = kind(config).float().eval()
    with torch.no_grad():
        for p in model.parameters():
            scale = max(p.shape[-1], 1) ** -0.5 if p.ndim > 1 else 0.3
            p.copy_(torch.randn(p.shape, generator=noise) * scale + (0.5 if p.ndim == 1 else 0.0))
    return model


def run_model(model: nn.Module, vocabulary: int = VOCABULARY_SIZE, **options: Any) -> list[Tensor]:
    """The output tensors of a model for two texts of seven tokens."""
    tokens = torch.randint(1, vocabulary, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        output = model(input_ids=tokens.to(next(model.parameters()).device), **options)
    return [x for x in output.to_tuple() if isinstance(x, Tensor)]


def build_from_config(model: nn.Module, config: Any, seed: int = 0) -> nn.Module:
    """A model of the same class with random weights, in the dtype, on the device and in the mode of ``model``."""
    try:
        type(config).from_dict(config.to_dict())  # the config must also load
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            new: Any = type(model)(config)
    except Exception as error:
        raise ModelError(
            f"transformers cannot build {type(model).__name__} with these sizes: {' '.join(str(error).split())}",
            remedy="choose other sizes",
        ) from error
    first = next(model.parameters())
    new = new.to(first.device).train(model.training)
    for p in new.parameters():  # not buffers: the frequencies of rotary positions need their full precision
        p.data = p.data.to(first.dtype)
    if getattr(model, "generation_config", None) is not None:
        new.generation_config = copy.deepcopy(model.generation_config)
    student: nn.Module = new
    return student


def copy_weights(
    student: nn.Module, teacher: nn.Module, source: Callable[[str], str], select: Callable[[str, Tensor], Tensor]
) -> list[str]:
    """Copy the teacher's weights into the student; returns the student's names that the teacher does not have.

    ``source`` maps a name of the student to a name of the teacher; ``select`` maps that name and its value to the
    part to copy.
    """
    theirs, missing = teacher.state_dict(), []
    with torch.no_grad():
        for name, destination in student.state_dict().items():
            value = theirs.get(source(name))
            if value is None:
                missing.append(name)
                continue
            part = select(source(name), value)
            if part.shape != destination.shape:
                raise ModelError(
                    f"{name} of the student has shape {list(destination.shape)}, and the part of the teacher's "
                    f"{list(value.shape)} has {list(part.shape)}",
                    remedy="use a teacher whose weights have the sizes that its config states",
                )
            destination.copy_(part)
    return missing
