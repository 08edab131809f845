"""Linear layers in eight bits, for teachers on a CPU.

torch's own ``torch.ao.quantization.quantize_dynamic`` does the same and is about to be removed from torch.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from tutelage.errors import CapabilityError


class Int8Linear(nn.Module):
    """A linear layer whose weights are int8, a scale for each output, and whose inputs are quantised as they come.

    Both are symmetric: the largest magnitude of a row is 127. Sums are int32, everything outside is float32.
    """

    whole: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        whole, scale = _whole(linear.weight.detach().float())
        self.register_buffer("whole", whole.t().contiguous())
        self.register_buffer("scale", scale.flatten())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float())

    @property
    def weight(self) -> Tensor:
        """The weights as they count, in float32: torch's transformer layers ask for them."""
        return self.whole.t().float() * self.scale.unsqueeze(1)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        whole, scale = _whole(x.reshape(-1, self.in_features).float())
        out = torch._int_mm(whole, self.whole).float().mul_(scale).mul_(self.scale)
        if self.bias is not None:
            out += self.bias
        return out.view(*x.shape[:-1], self.out_features)


def _whole(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as whole numbers from -127 to 127, and the scale ``[N, 1]`` of each."""
    scale = x.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    return (x / scale).round_().to(torch.int8), scale


def quantise_linear_layers(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with its linear layers as :class:`Int8Linear`; the model itself stays as it is.

    The output of ``nn.MultiheadAttention`` is left, since that uses its weights directly.

    Raises:
        CapabilityError: there is no linear layer.
    """
    made = copy.deepcopy(model)
    if isinstance(made, nn.Linear):
        return Int8Linear(made)
    found = [
        path
        for path, module in made.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)
    ]
    if not found:
        raise CapabilityError(
            f"dtype int8, but {type(model).__name__} has no linear layer to quantise",
            remedy="use dtype: bf16, or none",
        )
    done: dict[int, Int8Linear] = {}
    for path in found:
        layer = made.get_submodule(path)
        if isinstance(layer, nn.Linear):
            done.setdefault(id(layer), Int8Linear(layer))
            made.set_submodule(path, done[id(layer)])
    return made.eval()
