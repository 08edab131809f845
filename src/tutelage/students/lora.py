"""LoRA and QLoRA: students that train low-rank matrices only, on frozen weights."""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from tutelage.errors import ConfigError, ModelError, require, shorten
from tutelage.students.scaled_outputs import ScaledLinear

ALL_LINEAR = "all-linear"
"""Every linear layer but the output head."""

BLOCK = 64
"""Number of 4-bit weights with one scale, as in QLoRA."""


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
    r"""Add trainable :math:`\frac{\alpha}{r} B A` to linear layers and freeze all other weights, in place.

    Outputs do not change at first, since B is zero. :func:`merge_lora` merges the matrices into the weights.

    Args:
        model: any module with linear layers.
        rank: r.
        alpha: numerator of the scale; default 2 r.
        dropout: before A.
        targets: names of linear layers, or the ends of their paths; or ``all-linear``: all but the output head. The
            output head takes adapters without dropout.
        bits: 4: store adapted weights as NF4 (QLoRA) and compute in the dtype of the input; the output head stays as
            it is.
        seed: of A.

    Raises:
        MissingDependencyError: peft is not installed, or bitsandbytes for 4 bits.
        ConfigError: no layer has such a name, or dropout before the output head.
        ModelError: peft does not support the model.

    Reference: Hu et al., LoRA (ICLR 2022), section 4.1; Dettmers et al., QLoRA (NeurIPS 2023), section 3.
    """
    require("peft", "language", "student.lora")
    from peft import LoraConfig, inject_adapter_in_model

    paths, head = _target_paths(model, targets), _head_path(model)
    if head in paths and dropout:
        raise ConfigError(
            f"dropout is {dropout:g}, and there is an adapter of the output head, {head!r}",
            where="student.lora.dropout",
            remedy="set it to 0, or remove the head from targets: its logits are computed in chunks without dropout",
        )
    if bits is not None:
        require("bitsandbytes", "language", "student.lora.bits")
        for path in (p for p in paths if p != head):
            model.set_submodule(path, NF4Linear(cast(nn.Linear, model.get_submodule(path))))
    # with a transformers config, peft takes the names of shared experts for those of the experts in one tensor
    holder = nn.ModuleDict({"model": model}) if stacked_weights(model) else model
    prefix = "" if holder is model else "model."
    config = LoraConfig(r=rank, lora_alpha=2 * rank if alpha is None else alpha, lora_dropout=dropout,
                        target_modules=[prefix + path for path in paths])  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            with warnings.catch_warnings():  # merge_lora unties the weights that the warning is about
                warnings.filterwarnings("ignore", ".*tie_word_embeddings.*")
                inject_adapter_in_model(config, holder)
        except ValueError as error:
            raise ModelError(
                f"peft cannot add adapters to {type(model).__name__}: {error}",
                where="student.lora", remedy="choose other targets, or train without student.lora",
            ) from None  # fmt: skip
    return model


def merge_lora(model: nn.Module) -> nn.Module:
    """Merge adapters into the weights and remove them, in place."""
    layers = list(_adapted_layers(model))
    if not layers:
        return model
    for path, layer in layers:
        base = layer.get_base_layer()
        linear = base.dequantise() if isinstance(base, NF4Linear) else base
        linear = linear.to_linear() if isinstance(linear, ScaledLinear) else linear
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
        if embedding is not None and embedding.weight is linear.weight:  # tied: the head gets a weight of its own
            linear.weight = nn.Parameter(linear.weight.detach().clone())
            cast(Any, model).config.tie_word_embeddings = False
        with torch.no_grad():
            for adapter in layer.active_adapters:
                linear.weight += layer.get_delta_weight(adapter).to(linear.weight.dtype)
        model.set_submodule(path, linear)
    if hasattr(model, "peft_config"):
        del model.peft_config
    return model.requires_grad_(True)


def has_adapters(model: nn.Module) -> bool:
    """Whether the model has adapters."""
    return next(_adapted_layers(model), None) is not None


class NF4Linear(nn.Linear):
    """A linear layer with frozen 4-bit weights (NF4), which are not part of the state dict."""

    packed: Tensor
    absmax: Tensor
    code: Tensor

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The packed weights, two in a byte; peft reads their device."""
        return self.packed

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which creates float weights
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
        out: Tensor = matmul_4bit(x, self.packed.t(), quant_state=self._state(x.dtype), bias=bias)
        return out

    def dequantise(self) -> nn.Linear:
        """The layer with dequantised float32 weights."""
        from bitsandbytes.functional import dequantize_4bit

        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device=self.packed.device)
        with torch.no_grad():
            linear.weight.copy_(dequantize_4bit(self.packed, self._state(torch.float32)))
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear


def _adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, module in model.named_modules():
        if hasattr(module, "get_delta_weight") and hasattr(module, "get_base_layer"):
            yield path, module


def _target_paths(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    linear = [path for path, m in model.named_modules() if path and _is_linear(m)]
    if isinstance(targets, str):
        if paths := [path for path in linear if path != _head_path(model)]:
            return paths
        raise ConfigError(
            f"{type(model).__name__} has no linear layer except its output head",
            where="student.lora",
            remedy="train without student.lora",
        )
    matches = {target: [path for path in linear if f".{path}".endswith(f".{target}")] for target in targets}
    for target, paths in matches.items():
        if not paths:
            ends, experts = sorted({path.rpartition(".")[2] for path in linear}), stacked_weights(model)
            note = f"; {' and '.join(experts)} hold all experts in one tensor and take no adapters" if experts else ""
            raise ConfigError(
                f"no linear layer of {type(model).__name__} is called {shorten(target)}",
                where="student.lora.targets",
                remedy=f"it has: {', '.join(ends[:12])}{note}",
            )
    return [path for path in linear if any(path in paths for paths in matches.values())]


def _is_linear(module: nn.Module) -> bool:
    """Whether a layer is linear and called as such; nn.MultiheadAttention reads the weight of its own subclass."""
    return isinstance(module, (NF4Linear, ScaledLinear)) or (
        isinstance(module, nn.Linear)
        and type(module).forward is nn.Linear.forward
        and type(module).__name__ != "NonDynamicallyQuantizableLinear"
    )


def describe_adapters(model: nn.Module) -> str:
    """How many parameters are trained, in which layers, and which experts have no adapters."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    names = sorted({path.rpartition(".")[2] for path, _ in _adapted_layers(model)})
    experts = stacked_weights(model)
    frozen = f"; {' and '.join(experts)} hold all experts in one tensor and stay frozen" if experts else ""
    return f"{trainable:,} trainable parameters in {', '.join(names)}{frozen}"


def stacked_weights(model: nn.Module) -> list[str]:
    """The names of weights that hold all experts of a layer in one tensor."""
    layers = [m for m in model.modules() if not isinstance(m, (nn.modules.conv._ConvNd, nn.Embedding, nn.Linear))]
    own = ((name, p) for m in layers for name, p in m.named_parameters(recurse=False))
    return sorted({name for name, p in own if p.ndim == 3 and min(p.shape) > 1})


def _head_path(model: nn.Module) -> str | None:
    """The path of the output head of a language model."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return next((path for path, m in model.named_modules() if m is head), None) if head is not None else None
