"""Quantisation-aware training: every forward pass rounds weights and inputs, and float weights are trained."""

import logging
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tutelage.errors import ModelError, require
from tutelage.students.lora import has_adapters, merge_lora
from tutelage.students.scaled_outputs import ScaledLinear

Bits = Literal["int8"]

# torchao's import logs how torch registers its types
logging.getLogger("torch.utils._pytree").addFilter(lambda record: "register_constant" not in record.getMessage())


def add_fake_quantisers(model: nn.Module, bits: Bits = "int8") -> nn.Module:
    """Simulate int8 for the weights and inputs of linear layers and convolutions. Changes ``model`` in place.

    Weights have one symmetric scale per output; inputs have a dynamic range per token (per image for convolutions).
    Gradients pass straight through the rounding to the float weights, which are also what the state dict contains.
    :func:`to_float_model` removes the fake quantisers.

    Args:
        model: any module with linear layers or convolutions.
        bits: the simulated format.

    Raises:
        MissingDependencyError: torchao is not installed.
        ModelError: there is no layer to quantise.

    Reference: Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
        Inference (CVPR 2018), section 3; linear layers are torchao's.
    """
    require("torchao", "export", "student.qat")
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig

    paths = [path for path, module in model.named_modules() if _is_quantisable(module) and path]
    if not paths:
        raise ModelError(
            f"{type(model).__name__} contains no linear layer and no convolution to quantise",
            where="student.qat",
            remedy="remove it",
        )
    activation, weight = _settings()
    config = QATConfig(activation_config=activation, weight_config=weight, step="prepare")
    with torch.random.fork_rng(devices=[]):  # torchao creates new layers with random weights first
        quantize_(model, config, filter_fn=lambda m, path: isinstance(m, nn.Linear) and path in paths)
    for path in paths:
        layer = model.get_submodule(path)
        if isinstance(layer, nn.Conv2d):
            model.set_submodule(path, _convert(layer, FakeQuantizedConv2d))
    return model


def _is_quantisable(module: nn.Module) -> bool:
    """Whether only the layer itself reads its weight, and a row of it has more than one number."""
    if type(module) not in (nn.Linear, nn.Conv2d):  # nn.MultiheadAttention uses a subclass
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
    """A convolution with torchao's fake quantisers, which take matrices only."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        from torchao.quantization.qat import IntxFakeQuantizer

        activation, weight = _settings()
        self.activation_fake_quantizer = IntxFakeQuantizer(activation)
        self.weight_fake_quantizer = IntxFakeQuantizer(weight)

    def forward(self, x: Tensor) -> Tensor:
        """The convolution of rounded images with rounded weights."""
        x = self.activation_fake_quantizer(x.flatten(1)).view_as(x)
        weight = self.weight_fake_quantizer(self.weight.flatten(1)).view_as(self.weight)
        return self._conv_forward(x, weight, self.bias)


def _convert(conv: Any, kind: type[nn.Conv2d]) -> nn.Conv2d:
    """A layer of class ``kind`` with the parameters of a convolution."""
    layer = kind(
        conv.in_channels, conv.out_channels, conv.kernel_size, stride=conv.stride, padding=conv.padding,
        dilation=conv.dilation, groups=conv.groups, bias=conv.bias is not None, padding_mode=conv.padding_mode,
        device="meta",
    )  # fmt: skip
    layer.weight, layer.bias = conv.weight, conv.bias
    return layer.train(conv.training)


def to_float_model(model: nn.Module) -> nn.Module:
    """Merge adapters and the scale of outputs into the weights, and remove fake quantisers. In place."""
    if has_adapters(model):
        model = merge_lora(model)
    for path, layer in list(model.named_modules()):
        if isinstance(layer, FakeQuantizedConv2d):
            model.set_submodule(path, _convert(layer, nn.Conv2d))
        elif isinstance(layer, ScaledLinear):
            model.set_submodule(path, layer.to_linear())
        elif _is_fake_quantised_linear(layer):
            with torch.random.fork_rng(devices=[]):
                linear = layer.to_linear()
            model.set_submodule(path, linear.train(layer.training))
    return model


def is_quantisation_aware(model: nn.Module) -> bool:
    """Whether the model has fake quantisers."""
    return any(isinstance(m, FakeQuantizedConv2d) or _is_fake_quantised_linear(m) for m in model.modules())


def _is_fake_quantised_linear(module: nn.Module) -> Any:
    """Whether a layer is torchao's, without an import of torchao."""
    return isinstance(module, nn.Linear) and type(module).__name__ == "FakeQuantizedLinear"
