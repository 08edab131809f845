"""The linear classifier of a model, found by what the logits depend on."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tutelage.data.batch import Batch
from tutelage.errors import ModelError
from tutelage.students.projectors import dry_run
from tutelage.taps import Needs, as_linear


class Classifier(NamedTuple):
    """``logits = features @ weight.T + bias``; the features are the inputs of the heads side by side."""

    paths: tuple[str, ...]
    """Modules of the linear layers."""
    taps: tuple[str, ...]
    """The features."""
    weight: Tensor
    """``[C, D]``."""
    bias: Tensor
    """``[C]``."""


def find_classifier(model: nn.Module, example: Batch) -> Classifier:
    """The classifier of a model: one linear layer, or several whose mean are the logits, as in a distilled DeiT.

    The linear layers with an output like the logits return random numbers instead, so the result does not depend on
    weights.

    Raises:
        ModelError: the logits are something else.
    """
    logits = dry_run(model, example, Needs()).logits
    assert logits is not None
    heads = _layers_like(model, example, logits)
    generator = torch.Generator().manual_seed(0)
    outputs = {path: torch.randn(logits.shape, generator=generator).to(logits) for path in heads}
    seen = _logits_with(model, example, outputs)
    chosen = [path for path in heads if torch.allclose(seen, outputs[path], atol=1e-5)][-1:]
    if not chosen and len(heads) > 1 and torch.allclose(seen, torch.stack(list(outputs.values())).mean(0), atol=1e-5):
        chosen = list(heads)
    if chosen:
        classifier = _joined(model, {path: heads[path] for path in chosen})
        hidden = dry_run(model, example, Needs(logits=False, hidden=classifier.taps)).hidden
        features = torch.cat([hidden[tap] for tap in classifier.taps], -1)
        computed = nn.functional.linear(features, classifier.weight, classifier.bias)
        if torch.allclose(computed, logits, rtol=1e-3, atol=1e-3 * float(logits.abs().max())):
            return classifier
    raise ModelError(
        f"the logits of {type(model).__name__} are not those of one linear layer, or the mean of several; its "
        "classifier cannot be reused",
        remedy="use another model, or a method without the teacher's classifier: kind: logit or feature",
    )


def _joined(model: nn.Module, inputs: dict[str, Tensor]) -> Classifier:
    """The mean of linear layers as one; ``inputs`` are theirs in one forward pass."""
    layers: list[Any] = [model.get_submodule(path) for path in inputs]
    weights = [layer.weight.detach() / len(layers) for layer in layers]
    zero = torch.zeros_like(weights[0][:, 0])
    bias = torch.stack([zero if layer.bias is None else layer.bias.detach() / len(layers) for layer in layers]).sum(0)
    paths, (first, *others) = tuple(inputs), inputs.values()
    if all(x.shape == first.shape and torch.equal(x, first) for x in others):  # heads on one feature
        return Classifier(paths, (f"{paths[0]}:input",), torch.stack(weights).sum(0), bias)
    return Classifier(paths, tuple(f"{path}:input" for path in paths), torch.cat(weights, 1), bias)


def _layers_like(model: nn.Module, example: Batch, logits: Tensor) -> dict[str, Tensor]:
    """The linear layers that run once with an output in the shape of the logits, with their inputs, in order."""
    calls: dict[str, list[Tensor]] = {}

    def watch(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.shape == logits.shape:
                calls.setdefault(path, []).append(args[0].detach())

        return hook

    handles = [m.register_forward_hook(watch(p)) for p, m in model.named_modules() if p and as_linear(m) is not None]
    try:
        dry_run(model, example, Needs())
    finally:
        for handle in handles:
            handle.remove()
    return {path: inputs[0] for path, inputs in calls.items() if len(inputs) == 1}


def _logits_with(model: nn.Module, example: Batch, outputs: dict[str, Tensor]) -> Tensor:
    """The logits if some modules return given outputs."""
    handles = [
        model.get_submodule(path).register_forward_hook(lambda *_, out=output: out)
        for path, output in outputs.items()
    ]
    try:
        logits = dry_run(model, example, Needs()).logits
    finally:
        for handle in handles:
            handle.remove()
    assert logits is not None
    return logits
