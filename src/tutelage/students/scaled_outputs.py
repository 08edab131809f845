"""Models of regression whose output layer is trained in units of the targets' standard deviation."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tutelage.data.targets import TargetScale


class ScaledLinear(nn.Linear):
    """A linear layer with outputs ``(W x + b) * scale + shift``, whose weights stay near 1 whatever the scale is."""

    scale: Tensor
    shift: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """``[..., C]`` in the targets' units."""
        return F.linear(x, self.weight, self.bias) * self.scale.to(x.dtype) + self.shift.to(x.dtype)

    def to_linear(self) -> nn.Linear:
        """The plain layer with the same outputs, in place of this one."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        with torch.no_grad():
            linear.weight = nn.Parameter(self.weight * self.scale[:, None], self.weight.requires_grad)
            if self.bias is not None:
                linear.bias = nn.Parameter(self.bias * self.scale + self.shift, self.bias.requires_grad)
        return linear.train(self.training)


def scale_outputs(model: nn.Module, scale: TargetScale | None) -> nn.Module:
    """Make the output layer of ``model`` a :class:`ScaledLinear`, in place; :func:`to_float_model` undoes it.

    A new output layer (of ``model.fresh``, or of a model without this list) starts around the targets' mean; the
    outputs of a trained one do not change. A layer without bias is scaled, not shifted. A model whose last linear
    layer has another number of outputs than there are targets stays as it is.
    """
    path, layer = next(((p, m) for p, m in reversed(list(model.named_modules())) if type(m) is nn.Linear), ("", None))
    if scale is None or layer is None or not path or layer.out_features != len(scale.mean):
        return model
    fresh: Any = getattr(model, "fresh", None)
    scaled = ScaledLinear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    scaled.weight, scaled.bias = layer.weight, layer.bias
    size = scale.std.to(layer.weight)
    shift = torch.zeros_like(size) if layer.bias is None else scale.mean.to(layer.weight)
    scaled.register_buffer("scale", size, persistent=False)
    scaled.register_buffer("shift", shift, persistent=False)
    if fresh is not None and f"{path}.weight" not in fresh:
        with torch.no_grad():
            layer.weight /= size[:, None]
            if layer.bias is not None:
                layer.bias.sub_(shift).div_(size)
    model.set_submodule(path, scaled.train(layer.training))
    return model
