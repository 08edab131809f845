"""Output layers: the one of a model, what follows it, and which of its outputs are tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tutelage.errors import ModelError


class Adapter(NamedTuple):
    """A LoRA adapter: ``scale * b @ a`` is added to a weight."""

    a: Tensor
    """``[r, D]``."""
    b: Tensor
    """``[C, r]``."""
    scale: float


class Head(NamedTuple):
    """The output layer and its input."""

    inputs: Tensor
    """``[..., D]``."""
    weight: Tensor
    """``[C, D]``; ``[C, 0]`` if ``inputs`` are the logits, because no linear layer computes them."""
    bias: Tensor | None
    """``[C]``."""
    scale: float = 1.0
    """Factor of the layer's output."""
    softcap: float | None = None
    """c of c tanh(z / c), applied last; ``None`` for none."""
    adapter: Adapter | None = None
    """The LoRA adapter of the weight."""
    vocabulary: int | None = None
    """How many rows of the weight are tokens, if the others are padding."""

    @property
    def size(self) -> int:
        """The number of outputs, without padding."""
        return len(self.weight) if self.vocabulary is None else self.vocabulary

    @property
    def is_dense(self) -> bool:
        """Whether ``inputs`` are the logits."""
        return self.weight.shape[1] == 0

    def map(self, change: Callable[[Tensor], Tensor]) -> Head:
        """The head with ``change`` applied to each of its tensors."""
        bias = None if self.bias is None else change(self.bias)
        adapter = self.adapter and Adapter(change(self.adapter.a), change(self.adapter.b), self.adapter.scale)
        return self._replace(inputs=change(self.inputs), weight=change(self.weight), bias=bias, adapter=adapter)

    def merged(self) -> Head:
        """The head with its adapter merged into the weight."""
        if self.adapter is None:
            return self
        a, b, scale = self.adapter
        return self._replace(weight=self.weight + scale * b @ a, adapter=None)

    def scores(self, rows: slice | Tensor) -> Tensor:
        """Logits ``[n, C]`` of some of the inputs, without padding."""
        if self.is_dense:
            return self.inputs[rows]
        size = self.size
        raw = F.linear(self.inputs[rows], self.weight[:size], None if self.bias is None else self.bias[:size])
        if self.adapter is not None:
            low = F.linear(self.inputs[rows], self.adapter.a)
            raw = raw + self.adapter.scale * F.linear(low, self.adapter.b[:size])
        raw = raw if self.scale == 1.0 else raw * self.scale
        return raw if self.softcap is None else torch.tanh(raw / self.softcap) * self.softcap


def output_head(model: nn.Module) -> nn.Linear:
    """The layer that computes logits: the one that the model names, else its last linear layer.

    Raises:
        ModelError: there is no such layer.
    """
    for name in ("get_output_embeddings", "get_classifier"):
        getter = getattr(model, name, None)
        named = getter() if callable(getter) else None
        if (head := as_linear(named)) is not None:
            return head
        if isinstance(named, nn.Conv2d):
            raise ModelError(
                f"{type(model).__name__} has no linear output layer: its classifier is a convolution",
                remedy="this method needs a model whose last layer is nn.Linear",
            )
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise ModelError(
            f"{type(model).__name__} has no linear output layer",
            remedy="this method needs a model whose last layer is nn.Linear",
        )
    return linear[-1]


def as_linear(module: nn.Module | None) -> nn.Linear | None:
    """``module`` if it is a linear layer, also one with a LoRA adapter, which has the same attributes."""
    base = getattr(module, "get_base_layer", None)
    if not isinstance(base() if callable(base) else module, nn.Linear):
        return None
    linear: Any = module
    return linear


def adapter_of(head: nn.Module) -> Adapter | None:
    """The LoRA adapter of a linear layer.

    Raises:
        ModelError: it has several adapters, or one that is not a product of two matrices.
    """
    if not hasattr(head, "get_base_layer"):
        return None
    layer: Any = head
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1 or layer.disable_adapters or layer.merged or names[0] in layer.lora_variant:
        raise ModelError(
            f"the output head has the adapters {', '.join(names) or 'none'}; only one plain LoRA is supported",
            remedy="keep one LoRA adapter, active and not merged",
        )
    (name,) = names
    return Adapter(layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name]))


def no_cache_arguments(model: nn.Module) -> dict[str, bool]:
    """The argument that turns off a decoder's cache, which is not used and would make it ignore packed rows."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    caches = bool(getattr(getattr(model, "config", None), "use_cache", False))
    return {"use_cache": False} if caches and "use_cache" in inspect.signature(base.forward).parameters else {}


def logit_scaling(model: nn.Module) -> tuple[float, float | None]:
    """Scale and soft cap that a transformers language model applies to its head's output, from its config.

    Gemma has a cap, Cohere a factor, Granite a divisor.
    """
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", config)
    scale = 1.0
    for name, power in (("logit_scale", 1), ("logits_scaling", -1), ("lm_head_multiplier", 1)):
        factor = getattr(config, name, None)
        if isinstance(factor, (int, float)) and not isinstance(factor, bool) and factor:
            scale *= float(factor) ** power
    cap = getattr(config, "final_logit_softcapping", None)
    return scale, float(cap) if isinstance(cap, (int, float)) and cap else None


def vocabulary_head(model: nn.Module) -> nn.Linear | None:
    """The output layer over a vocabulary; ``None`` for a model without one."""
    getter = getattr(model, "get_output_embeddings", None)
    named = as_linear(getter() if callable(getter) else None)
    if named is not None:
        return named
    if callable(getter):  # a transformers model without one
        return None
    try:
        last = output_head(model)
    except ModelError:
        return None
    embedded = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    return last if embedded and last.out_features == max(e.num_embeddings for e in embedded) else None


_SIZES: WeakKeyDictionary[Any, tuple[int, int]] = WeakKeyDictionary()
"""The length and the size of the vocabulary of tokenizers that were seen, since the vocabulary is slow to read."""


def count_tokens(model: nn.Module) -> int | None:
    """How many of the outputs of a language model are tokens of ``model.tokenizer``; the others are padding.

    ``None`` if there is no padding, no tokenizer, or no output layer over a vocabulary.
    """
    tokenizer = getattr(model, "tokenizer", None)
    head = None if tokenizer is None else vocabulary_head(model)
    if tokenizer is None or head is None:
        return None
    length, size = _SIZES.get(tokenizer, (-1, 0))
    if length != len(tokenizer):
        size = max(tokenizer.get_vocab().values(), default=-1) + 1
        _SIZES[tokenizer] = len(tokenizer), size
    return size if 0 < size < head.out_features else None


def padding_outputs(model: nn.Module) -> list[int] | None:
    """The outputs of a language model that are no tokens, as ``generate(suppress_tokens=...)`` takes them."""
    size, head = count_tokens(model), vocabulary_head(model)
    return None if size is None or head is None else list(range(size, head.out_features))
