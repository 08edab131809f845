"""Models that are built only to find out what a number of their config does."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.students.layer_selection import config_of, layer_stack

Shape = tuple[int, ...]
Key = tuple[str, int]
"""A weight's name, with ``*`` for the number of its layer, and a dimension of it."""

WORDS = 32
"""Vocabulary of these models."""


def replace_fields(config: Any, **numbers: Any) -> Any:
    """A copy of a config with other values."""
    new = copy.deepcopy(config)
    for name, value in numbers.items():
        setattr(new, name, value)
    return new


def layer_pattern(name: str, stack: str) -> str:
    """A weight's name with ``*`` for the number of its layer."""
    return re.sub(rf"^{re.escape(stack)}\.\d+\.", f"{stack}.*.", name)


def weight_shapes(kind: type[nn.Module], config: Any) -> dict[str, Shape] | None:
    """The shapes of all weights of such a model; ``None`` where it cannot be built."""
    try:
        with torch.device("meta"):
            return {name: tuple(x.shape) for name, x in kind(config).state_dict().items()}
    except Exception:  # noqa: BLE001  families refuse numbers in ways of their own
        return None


def shape_changes(before: Mapping[str, Shape], after: Mapping[str, Shape] | None) -> dict[Key, int] | None:
    """By how much each dimension differs, of those that do; ``None`` where other weights are there."""
    if after is None or before.keys() != after.keys():
        return None
    if any(len(before[name]) != len(after[name]) for name in before):
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
    """What this family's config calls ``name``."""
    return str(config.attribute_map.get(name, name))


def probe_config(model: nn.Module) -> tuple[type[nn.Module], Any, str]:
    """Class, config and stack of a model like this one, of at most two layers and a small vocabulary."""
    path, stack = layer_stack(model)
    config = config_for_layers(model, list(range(min(2, len(stack)))))
    return type(model), with_vocabulary_size(config, WORDS), path


def config_for_layers(model: nn.Module, layers: list[int]) -> Any:
    """The config of a model with these of its layers: per-layer lists are cut along.

    A list is taken as one for each layer if it has as many entries as there are layers, and the model is the same, or
    cannot be built, without cutting it.
    """
    config = config_of(model)
    total = int(config.num_hidden_layers)
    short = replace_fields(config, num_hidden_layers=len(layers))
    found = {
        name: value
        for name, value in config.to_dict().items()
        if isinstance(value, (list, tuple)) and len(value) == total and not name.endswith("_token_id")
    }
    found.pop("architectures", None)
    if not found:
        return short
    kind = type(model)
    first = replace_fields(with_vocabulary_size(config, WORDS), num_hidden_layers=1)
    uncut = weight_shapes(kind, first)
    for name in found:
        cut = replace_fields(first, **{name: [getattr(config, name)[0]]})
        if uncut is None or (weight_shapes(kind, cut) == uncut and _alike(kind, first, cut)):
            setattr(short, name, [getattr(config, name)[layer] for layer in layers])
    return short


def with_vocabulary_size(config: Any, size: int) -> Any:
    """The config of the same model with another size of vocabulary; its special tokens are all token 0."""
    ids = {name: 0 for name in config.to_dict() if name.endswith("_token_id") and getattr(config, name) is not None}
    return replace_fields(config, vocab_size=size, **ids)


def _alike(kind: type[nn.Module], one: Any, other: Any) -> bool:
    """Whether two configs make the same of the same weights; also where neither says anything of token ids."""
    try:
        seen = [run_model(random_model(kind, config)) for config in (one, other)]
    except Exception:  # noqa: BLE001  a model may need other inputs
        return True
    return all(a.equal(b) for a, b in zip(*seen, strict=True))


def random_model(kind: type[nn.Module], config: Any) -> nn.Module:
    """Such a model with no weight that is 0 or 1, so that none can be forgotten unseen."""
    noise = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        model = kind(config).float().eval()
    with torch.no_grad():
        for p in model.parameters():
            scale = max(p.shape[-1], 1) ** -0.5 if p.ndim > 1 else 0.3
            p.copy_(torch.randn(p.shape, generator=noise) * scale + (0.5 if p.ndim == 1 else 0.0))
    return model


def run_model(model: nn.Module) -> list[Tensor]:
    """What a model says of two texts of seven words, tensors only."""
    words = torch.randint(1, WORDS, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        seen = model(input_ids=words)
    return [x for x in seen.to_tuple() if isinstance(x, Tensor)]
