"""Int8 linear layers for teachers on a CPU.

torch's own ``torch.ao.quantization.quantize_dynamic`` does the same and is about to be removed from torch.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from tutelage.errors import CapabilityError


class Int8Linear(nn.Module):
    """A linear layer with int8 weights, one scale per output, and inputs that are quantised dynamically.

    Both are symmetric: the largest magnitude of a row becomes 127. Sums are int32, outputs float32.
    """

    quantised: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        quantised, scale = _quantise_rows(linear.weight.detach().float())
        self.register_buffer("quantised", quantised.t().contiguous())
        self.register_buffer("scale", scale.flatten())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float())

    @property
    def weight(self) -> Tensor:
        """The dequantised weights in float32; torch's transformer layers read them."""
        return self.quantised.t().float() * self.scale.unsqueeze(1)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        quantised, scale = _quantise_rows(x.reshape(-1, self.in_features).float())
        out = torch._int_mm(quantised, self.quantised).float().mul_(scale).mul_(self.scale)
        if self.bias is not None:
            out += self.bias
        return out.view(*x.shape[:-1], self.out_features)


def _quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as integers from -127 to 127, and the scale ``[N, 1]`` of each."""
    scale = x.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    return (x / scale).round_().to(torch.int8), scale


def quantise_linear_layers(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with linear layers as :class:`Int8Linear`; raises :class:`CapabilityError` without any.

    The output projection of ``nn.MultiheadAttention`` stays, since that module uses its weights directly.
    """
    result = copy.deepcopy(model)
    if isinstance(result, nn.Linear):
        return Int8Linear(result)
    paths = [
        path
        for path, module in result.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)
    ]
    if not paths:
        raise CapabilityError(
            f"dtype is int8, and {type(model).__name__} has no linear layer to quantise",
            remedy="set dtype: bf16, or remove dtype",
        )
    layers: dict[int, Int8Linear] = {}
    for path in paths:
        layer = result.get_submodule(path)
        if isinstance(layer, nn.Linear):
            result.set_submodule(path, layers.setdefault(id(layer), Int8Linear(layer)))
    return result.eval()
