"""A student with its teacher's classifier: the student's body, a projector, and the teacher's last layer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.data.batch import Arguments, Batch
from tutelage.students.classifiers import Classifier, find_classifier
from tutelage.students.feature_sites import find_embedding_tap, find_stages
from tutelage.students.projectors import device_of, dry_run, feature_shapes
from tutelage.taps import Needs, evaluating, observe, scores_of


class ReusedHead(nn.Module):
    """A model whose features, projected, go through the classifier of another model.

    All arguments but the model are plain values, so that it can be rebuilt without the other model.

    Args:
        model: gives the features; its output heads are replaced by identities.
        tap: the feature in ``model``, ``[B, C, H, W]`` or ``[..., C]``.
        inputs: channels of the feature.
        outputs: channels of the classifier's input.
        classes: rows of the classifier.
        maps: whether the feature is a map, which is convolved, and averaged over positions before the classifier.
        factor: ``outputs`` divided by the width of the projector's middle layer.
        signed: whether the classifier's input can be negative; the projector's last layer is then linear.
        heads: the modules of the output heads. Default: the last linear layer.

    Reference: Chen et al., Knowledge Distillation with the Reused Teacher Classifier (CVPR 2022), section 3.2 and
    figure 2: 1x1, 3x3 and 1x1 convolutions, each with batch norm and ReLU.
    """

    def __init__(
        self, model: nn.Module, *, tap: str, inputs: int, outputs: int, classes: int, maps: bool, factor: int = 2,
        signed: bool = False, heads: Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.card = {
            "tap": tap, "inputs": inputs, "outputs": outputs, "classes": classes, "maps": maps, "factor": factor,
            "signed": signed, **({} if heads is None else {"heads": list(heads)}),
        }  # fmt: skip
        self.tap, self.maps = tap, maps
        for path in [find_embedding_tap(model).removesuffix(":input")] if heads is None else heads:
            model.set_submodule(path, nn.Identity())
        self.model = model
        middle = max(outputs // factor, 1)
        last = _layer(middle, outputs, 1, maps)
        if signed:  # neither norm nor ReLU
            last = [nn.Conv2d(middle, outputs, 1) if maps else nn.Linear(middle, outputs)]
        self.projector = nn.Sequential(*_layer(inputs, middle, 1, maps), *_layer(middle, middle, 3, maps), *last)
        self.head = nn.Linear(outputs, classes)

    def forward(self, *inputs: Any, **named: Tensor) -> Tensor:
        """Logits ``[..., classes]``."""
        arguments: Any = named or (
            inputs[0] if len(inputs) == 1 else Arguments({str(i): x for i, x in enumerate(inputs)})
        )
        feature = observe(self.model, arguments, Needs(logits=False, hidden=(self.tap,))).hidden[self.tap]
        projected = self.projector(feature)
        out: Tensor = self.head(projected.mean((2, 3)) if self.maps else projected)
        return out

    @property
    def _no_split_modules(self) -> Any:
        """The inner model's, by which accelerate shards it."""
        return getattr(self.model, "_no_split_modules", None)


def _layer(inputs: int, outputs: int, size: int, maps: bool) -> list[nn.Module]:
    """Convolution (on vectors: linear), norm and ReLU."""
    if maps:
        convolution = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
    return [nn.Linear(inputs, outputs, bias=False), nn.LayerNorm(outputs), nn.ReLU()]


def reuse_head(
    student: nn.Module, teacher: nn.Module, example: Batch, *, factor: int = 2
) -> tuple[ReusedHead, tuple[str, ...]]:
    """``student`` with its teacher's frozen classifier, and the taps of the teacher's features to compare with.

    Features are the last feature maps of both models if the teacher's logits are its classifier of the mean of its
    map, as in a ResNet; else the inputs of their heads. Several heads of a teacher are one classifier of their inputs
    side by side; a student with several gives the input of its first one.

    Args:
        student: becomes part of the result.
        teacher: its classifier is copied.
        example: a few samples, for a dry run of both.
        factor: see :class:`ReusedHead`.

    Raises:
        ModelError: the logits of a model are not those of a linear classifier.
    """
    classifier, own = find_classifier(teacher, example.for_teacher()), find_classifier(student, example)
    maps = [
        next(reversed(find_stages(model, batch).values()), None)
        for model, batch in ((student, example), (teacher, example.for_teacher()))
    ]
    both = maps[0] is not None and maps[1] is not None and _averaged(teacher, classifier, example, maps[1])
    mine, others = (str(maps[0]), (str(maps[1]),)) if both else (own.taps[0], classifier.taps)
    shape = feature_shapes(student, example, [mine])[mine]
    inputs = dry_run(teacher, example.for_teacher(), Needs(logits=False, hidden=others)).hidden.values()
    classes, width = classifier.weight.shape
    reused = ReusedHead(
        student, tap=mine, inputs=shape[1] if both else shape[-1], outputs=width, classes=classes, maps=both,
        factor=factor, signed=any(bool((x < 0).any()) for x in inputs), heads=own.paths,
    )  # fmt: skip
    with torch.no_grad():
        reused.head.weight.copy_(classifier.weight)
        reused.head.bias.copy_(classifier.bias)
    reused.to(device_of(student))
    _freeze_unreached(reused, example)
    reused.head.requires_grad_(False)
    return reused, others


def _freeze_unreached(reused: ReusedHead, example: Batch) -> None:
    """Freeze the parameters of the student after the tapped feature, which have no effect."""
    inputs = example.to(device_of(reused)).inputs
    with evaluating(reused), torch.enable_grad():
        scores_of(reused, inputs).sum().backward()
    for parameter in reused.parameters():
        parameter.requires_grad_(parameter.requires_grad and parameter.grad is not None)
    reused.zero_grad(set_to_none=True)


def _averaged(model: nn.Module, classifier: Classifier, example: Batch, tap: str) -> bool:
    """Whether the logits are those of the classifier for the mean of the map at ``tap``."""
    if len(classifier.taps) > 1:
        return False
    hidden = dry_run(model, example.for_teacher(), Needs(logits=False, hidden=(tap, *classifier.taps))).hidden
    mean, feature = hidden[tap].mean((2, 3)), hidden[classifier.taps[0]]
    return mean.shape == feature.shape and torch.allclose(mean, feature, rtol=1e-3, atol=1e-4)
