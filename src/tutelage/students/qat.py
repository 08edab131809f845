"""Students that are trained as they will be used in eight bits: rounded in every forward pass, learning unrounded."""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tutelage.errors import ModelError, require
from tutelage.students.lora import has_adapters, merge_lora

Bits = Literal["int8"]

# its import has torch remark on how it registers its types
logging.getLogger("torch.utils._pytree").addFilter(lambda record: "register_constant" not in record.getMessage())


def add_fake_quantisers(model: nn.Module, bits: Bits = "int8") -> nn.Module:
    """``model`` with the weights and inputs of its linear layers and convolutions rounded as it runs. In place.

    Weights get a scale for each output, symmetric; inputs a range for each token (of images: for each image), as they
    come. Gradients pass straight through the rounding to float weights, and float weights are what the state dict
    holds. :func:`to_float_model` removes the fake quantisers again.

    Args:
        model: any module with linear layers or convolutions.
        bits: into how many.

    Raises:
        MissingDependencyError: without torchao.
        ModelError: there is nothing to round.

    Reference: Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
        Inference (CVPR 2018), section 3; linear layers are torchao's.
    """
    require("torchao", "export", "student.qat")
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig

    found = [path for path, module in model.named_modules() if _roundable(module) and path]
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no linear layer and no convolution to round inside it",
            where="student.qat",
            remedy="leave it out",
        )
    activation, weight = _settings()
    with torch.random.fork_rng(devices=[]):  # its layers are made anew, and their first weights thrown away
        quantize_(
            model,
            QATConfig(activation_config=activation, weight_config=weight, step="prepare"),
            filter_fn=lambda module, path: isinstance(module, nn.Linear) and path in found,
        )
    for path in found:
        layer = model.get_submodule(path)
        if isinstance(layer, nn.Conv2d):
            model.set_submodule(path, _alike(FakeQuantizedConv2d, layer))
    return model


def _roundable(module: nn.Module) -> bool:
    """Whether a layer is one whose weights are used in its own forward pass alone, and are rows of more than one."""
    if type(module) not in (nn.Linear, nn.Conv2d):  # nn.MultiheadAttention has a kind of its own
        return False
    weight: Any = module.weight
    return weight[0].numel() > 1


def _settings() -> tuple[Any, Any]:
    from torchao.quantization.qat import IntxFakeQuantizeConfig

    return (
        IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False),
        IntxFakeQuantizeConfig(torch.int8, "per_channel", is_symmetric=True),
    )


class FakeQuantizedConv2d(nn.Conv2d):
    """A convolution whose weights and inputs are rounded by torchao's quantisers, which know matrices alone."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        from torchao.quantization.qat import IntxFakeQuantizer

        activation, weight = _settings()
        self.activation_fake_quantizer = IntxFakeQuantizer(activation)
        self.weight_fake_quantizer = IntxFakeQuantizer(weight)

    def forward(self, x: Tensor) -> Tensor:
        """As the convolution, of rounded images with rounded weights."""
        x = self.activation_fake_quantizer(x.flatten(1)).view_as(x)
        weight = self.weight_fake_quantizer(self.weight.flatten(1)).view_as(self.weight)
        return self._conv_forward(x, weight, self.bias)


def _alike(kind: type[nn.Conv2d], conv: Any) -> nn.Conv2d:
    """A layer of another kind that has the very weights of a convolution."""
    made = kind(
        conv.in_channels, conv.out_channels, conv.kernel_size, stride=conv.stride, padding=conv.padding,
        dilation=conv.dilation, groups=conv.groups, bias=conv.bias is not None, padding_mode=conv.padding_mode,
        device="meta",
    )  # fmt: skip
    made.weight, made.bias = conv.weight, conv.bias
    return made.train(conv.training)


def to_float_model(model: nn.Module) -> nn.Module:
    """``model`` as an ordinary one: adapters added to its weights, and nothing rounded as it runs. In place."""
    if has_adapters(model):
        model = merge_lora(model)
    for path, layer in list(model.named_modules()):
        if isinstance(layer, FakeQuantizedConv2d):
            model.set_submodule(path, _alike(nn.Conv2d, layer))
        elif is_rounded_linear(layer):
            with torch.random.fork_rng(devices=[]):
                linear = layer.to_linear()
            model.set_submodule(path, linear.train(layer.training))
    return model


def is_quantisation_aware(model: nn.Module) -> bool:
    """Whether it is one that :func:`add_fake_quantisers` made."""
    return any(isinstance(m, FakeQuantizedConv2d) or is_rounded_linear(m) for m in model.modules())


def is_rounded_linear(module: nn.Module) -> bool:
    """Whether a layer is torchao's, without importing it."""
    return isinstance(module, nn.Linear) and type(module).__name__ == "FakeQuantizedLinear"
