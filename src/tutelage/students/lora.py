"""Students of which a few low-rank matrices learn, on weights that stay as they are, in 4 bits if need be."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tutelage.errors import ConfigError, ModelError, require

ALL_LINEAR = "all-linear"
"""Every linear layer but the output head."""

BLOCK = 64
"""Weights that share a scale in 4 bits, as in QLoRA."""


def add_lora(
    model: nn.Module,
    *,
    rank: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: Literal["all-linear"] | Sequence[str] = ALL_LINEAR,
    bits: Literal[4] | None = None,
    seed: int = 0,
) -> nn.Module:
    r"""``model`` with :math:`\frac{\alpha}{r} B A` beside its linear layers; they alone learn. Changed in place.

    It starts as what it was, for B is zero. :func:`merge_lora` makes a plain model of it again.

    Args:
        model: any module with linear layers; best of transformers.
        rank: r.
        alpha: of the scale; default 2 r.
        dropout: before A.
        targets: names of linear layers, or the ends of their paths; or ``all-linear``: all but the output head. That
            one, by its name, takes adapters without dropout.
        bits: 4 keeps the weights beside which something learns in NF4 (QLoRA), and computes in the type of what
            comes in; but for the output head's, which stay as they are.
        seed: of A.

    Raises:
        MissingDependencyError: without peft, or for 4 bits bitsandbytes.
        ConfigError: no layer of such a name, or dropout before the output head.
        ModelError: the model is too small or of another kind than peft takes.

    Reference: Hu et al., LoRA (ICLR 2022), section 4.1; Dettmers et al., QLoRA (NeurIPS 2023), section 3.
    """
    require("peft", "language", "student.lora")
    from peft import LoraConfig, inject_adapter_in_model

    paths, head = _named(model, targets), _head(model)
    if head in paths and dropout:
        raise ConfigError(
            f"dropout {dropout:g} and an adapter of the output head, {head!r}",
            where="student.lora.dropout",
            remedy="set it to 0, or leave the head out: its scores are made a few tokens at a time, from one input",
        )
    if bits is not None:
        require("bitsandbytes", "language", "student.lora.bits")
        for path in (p for p in paths if p != head):
            parent, name = _parent(model, path)
            setattr(parent, name, NF4Linear(getattr(parent, name)))
    config = LoraConfig(r=rank, lora_alpha=2 * rank if alpha is None else alpha, lora_dropout=dropout,
                        target_modules=paths)  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            with warnings.catch_warnings():  # that it is tied, which is undone where they are merged
                warnings.filterwarnings("ignore", ".*tie_word_embeddings.*")
                found: nn.Module = inject_adapter_in_model(config, model)
        except ValueError as error:
            raise ModelError(f"{type(model).__name__} takes no adapters: {error}", where="student.lora") from None
    return found


def merge_lora(model: nn.Module) -> nn.Module:
    """``model`` without adapters: what they have learned is added to the weights. In place; without any, as it is."""
    found = list(_adapted(model))
    if not found:
        return model
    for path, layer in found:
        parent, name = _parent(model, path)
        base = layer.get_base_layer()
        plain = base.plain() if isinstance(base, NF4Linear) else base
        _untie(model, plain)
        with torch.no_grad():
            for adapter in layer.active_adapters:
                plain.weight += layer.get_delta_weight(adapter).to(plain.weight.dtype)
        setattr(parent, name, plain)
    if hasattr(model, "peft_config"):
        del model.peft_config
    return model.requires_grad_(True)


def _untie(model: nn.Module, head: nn.Linear) -> None:
    """Give a head whose weight is the input embedding's one of its own, if it is."""
    getter = getattr(model, "get_input_embeddings", None)
    embedding = getter() if callable(getter) else None
    if embedding is None or embedding.weight is not head.weight:
        return
    head.weight = nn.Parameter(head.weight.detach().clone())
    config: Any = model.config
    config.tie_word_embeddings = False


def has_adapters(model: nn.Module) -> bool:
    """Whether it is one that :func:`add_lora` made."""
    return next(_adapted(model), None) is not None


class NF4Linear(nn.Linear):
    """A linear layer whose weights are kept in 4 bits (NF4), and do not learn nor go into a state dict.

    Args:
        linear: the layer; its weights are read.
    """

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """As they are kept, two to a byte; peft looks where they are."""
        return self.packed

    packed: Tensor
    absmax: Tensor
    code: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)  # a linear layer to those who look for one, without its weights
        from bitsandbytes.functional import quantize_4bit

        packed, state = quantize_4bit(
            linear.weight.detach().float().contiguous(), blocksize=BLOCK, quant_type="nf4", compress_statistics=False
        )
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        for name, value in (("packed", packed), ("absmax", state.absmax), ("code", state.code)):
            self.register_buffer(name, value, persistent=False)

    def _state(self, dtype: torch.dtype) -> Any:
        from bitsandbytes.functional import QuantState

        shape = torch.Size((self.out_features, self.in_features))
        return QuantState(self.absmax, shape, self.code, BLOCK, "nf4", dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        from bitsandbytes import matmul_4bit

        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        found: Tensor = matmul_4bit(x, self.packed.t(), quant_state=self._state(x.dtype), bias=bias)
        return found

    def plain(self) -> nn.Linear:
        """The layer that it computes as, in float32."""
        from bitsandbytes.functional import dequantize_4bit

        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device=self.packed.device)
        with torch.no_grad():
            linear.weight.copy_(dequantize_4bit(self.packed, self._state(torch.float32)))
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Layers with adapters, by path."""
    for path, module in model.named_modules():
        if hasattr(module, "get_delta_weight") and hasattr(module, "get_base_layer"):
            yield path, module


def _named(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Paths of the linear layers that are meant."""
    linear = [path for path, m in model.named_modules() if isinstance(m, nn.Linear) and path]
    if isinstance(targets, str):
        return [path for path in linear if path != _head(model)]
    for target in targets:
        if not any(path == target or path.endswith(f".{target}") for path in linear):
            ends = sorted({path.rpartition(".")[2] for path in linear})
            raise ConfigError(
                f"no linear layer of {type(model).__name__} is called {target!r}",
                where="student.lora.targets",
                remedy=f"it has: {', '.join(ends[:12])}",
            )
    return [path for path in linear if any(path == t or path.endswith(f".{t}") for t in targets)]


def _head(model: nn.Module) -> str | None:
    """The path of the layer that scores a vocabulary, where the model says which."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return next((path for path, m in model.named_modules() if m is head), None) if head is not None else None


def _parent(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    above, _, name = path.rpartition(".")
    return model.get_submodule(above), name
