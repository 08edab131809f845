"""Three small networks for images of about 8x8 to 64x64 pixels.

They need no other package and no download. They map ``[B, channels, height, width]`` to logits
``[B, classes]``. The last layer is linear and named ``head``; all but :class:`MLP` have their stages in ``stages``.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
    )


class MLP(nn.Module):
    """Fully connected layers with ReLU on the flattened image.

    Args:
        classes: number of classes.
        channels: channels of the image.
        size: height and width of the image, in pixels.
        hidden: width of each hidden layer.
    """

    def __init__(self, *, classes: int, channels: int, size: int, hidden: Sequence[int] = (64,)) -> None:
        super().__init__()
        widths = [channels * size * size, *hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for i, o in pairwise(widths):
            layers += [nn.Linear(i, o), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, classes]``."""
        out: Tensor = self.head(self.body(x))
        return out


class ConvNet(nn.Module):
    """Stages of 3x3 convolution, batch norm and ReLU; each stage after the first halves the image.

    Args:
        classes: number of classes.
        channels: channels of the image.
        size: unused, since the network takes any size; all three networks have the same arguments.
        widths: channels of each stage.
        depth: convolutions in each stage.
        stem_stride: stride of the first convolution; 2 makes the network about 4 times faster.
    """

    def __init__(
        self,
        *,
        classes: int,
        channels: int,
        size: int = 0,
        widths: Sequence[int] = (32, 64, 128),
        depth: int = 2,
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        stages, width = [], channels
        for i, w in enumerate(widths):
            layers: list[nn.Module] = []
            for j in range(depth):
                stride = (stem_stride if i == 0 else 2) if j == 0 else 1
                layers += [*_conv(width, w, stride), nn.ReLU()]
                width = w
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, classes]``."""
        out: Tensor = self.head(self.stages(x).mean(dim=(2, 3)))
        return out


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., 2016), 1x1 where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, outputs, stride)
        self.conv2 = _conv(outputs, outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()  # modules, so that taps can read their inputs

    def forward(self, x: Tensor) -> Tensor:
        """``[B, outputs, H / stride, W / stride]``."""
        out: Tensor = self.relu2(self.shortcut(x) + self.conv2(self.relu1(self.conv1(x))))
        return out


class ResNet(nn.Module):
    """The residual network of the CIFAR papers: a 3x3 stem and stages of basic blocks.

    With ``blocks=n`` and three stages it has 6n+2 layers: n=3 is ResNet20, n=9 ResNet56.

    Args:
        classes: number of classes.
        channels: channels of the image.
        size: unused, since the network takes any size; all three networks have the same arguments.
        blocks: basic blocks in each stage.
        widths: channels of each stage; the stem has as many as the first stage.

    Reference: He et al., Deep Residual Learning for Image Recognition (2016), section 4.2.
    """

    def __init__(
        self,
        *,
        classes: int,
        channels: int,
        size: int = 0,
        blocks: int = 1,
        widths: Sequence[int] = (16, 32, 64),
    ) -> None:
        super().__init__()
        self.stem = _conv(channels, widths[0])
        stages, width = [], widths[0]
        for i, w in enumerate(widths):
            stage = [BasicBlock(width, w, stride=2 if i > 0 else 1)]
            stage += [BasicBlock(w, w, stride=1) for _ in range(blocks - 1)]
            stages.append(nn.Sequential(*stage))
            width = w
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, classes]``."""
        x = self.stages(torch.relu(self.stem(x)))
        out: Tensor = self.head(x.mean(dim=(2, 3)))
        return out
