"""Compare the outputs of an export with those of its source."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tutelage.errors import NumericsError
from tutelage.export.bundle import IMAGE, Inputs

TOLERANCE = 1e-4
"""Maximum difference of any logit of an exact export."""

MIN_AGREEMENT = 0.5
"""Minimum agreement of an int8 export: share of equal predictions, mean cosine, or correlation."""

ROWS = 256
"""Maximum number of rows that are compared."""

Forward = Callable[[Inputs], Tensor]


def compare_outputs(
    source: Forward, export: Forward, batches: Sequence[Inputs], task: str, *, exact: bool,
    least: float = MIN_AGREEMENT,
) -> dict[str, Any]:  # fmt: skip
    """Compare the outputs of the model and of its export.

    With ``exact`` all outputs must agree within :data:`TOLERANCE`, else the agreement must be at least ``least``.

    Returns:
        ``rows``; ``max_difference`` of any output; ``agreement``: the share of equal predictions, of embeddings the
        mean cosine, of regression the correlation.

    Raises:
        NumericsError: the outputs differ too much, or are not finite.
    """
    greatest, rows = 0.0, 0
    pairs: list[tuple[Tensor, Tensor]] = []
    for inputs in split_first_row(batches):
        theirs, ours = source(inputs).float(), export(inputs).float()
        if theirs.shape != ours.shape:
            raise NumericsError(
                f"the export returns {tuple(ours.shape)} where the student returns {tuple(theirs.shape)}",
                remedy=REMEDY,
            )
        theirs, ours = drop_padding(theirs, inputs), drop_padding(ours, inputs)
        for who, values in (("student", theirs), ("export", ours)):
            if not bool(torch.isfinite(values).all()):
                raise NumericsError(f"the {who} returns NaN or infinity", remedy=REMEDY)
        if theirs.numel():
            greatest = max(greatest, float((theirs - ours).abs().max()))
        pairs.append(agreement(theirs, ours, task))
        rows += len(next(iter(inputs.values())))
    mean = _mean(pairs, task)
    result = {"rows": rows, "max_difference": greatest, "agreement": mean}
    if exact and greatest > TOLERANCE:
        raise NumericsError(
            f"the export differs from the student by up to {greatest:.2g} on {rows} inputs, more than {TOLERANCE:g}",
            remedy=REMEDY,
        )
    if not exact and mean < least:
        what = {"embedding": "cosine", "regression": "correlation"}.get(task, "share of equal predictions")
        raise NumericsError(
            f"int8 changes the student too much: the {what} is {mean:.1%} on {rows} inputs",
            remedy="train with quantisation (student.qat: int8), or export float weights: --to onnx",
        )
    return result


REMEDY = "nothing was written; try another format: --to safetensors, onnx, torch-export"


def drop_padding(values: Tensor, inputs: Inputs) -> Tensor:
    """The outputs at tokens that are not padding; outputs per row are returned unchanged."""
    mask = inputs.get("attention_mask")
    if mask is not None and values.ndim == 3 and values.shape[:2] == mask.shape:
        return values[mask.bool()]
    return values


def agreement(theirs: Tensor, ours: Tensor, task: str) -> tuple[Tensor, Tensor]:
    """The agreement of each output; for regression the two values, which are correlated later."""
    if task == "regression":
        return theirs.flatten(), ours.flatten()
    if task == "embedding":
        return torch.nn.functional.cosine_similarity(theirs, ours, dim=-1), torch.empty(0)
    if task == "multi-label":
        return ((theirs > 0) == (ours > 0)).float().flatten(), torch.empty(0)
    return (theirs.argmax(-1) == ours.argmax(-1)).float().flatten(), torch.empty(0)


def _mean(pairs: Sequence[tuple[Tensor, Tensor]], task: str) -> float:
    first, second = (torch.cat(side) for side in zip(*pairs, strict=True))
    if task != "regression":
        return float(first.mean())
    if len(first) < 2 or float(first.std()) == 0.0 or float(second.std()) == 0.0:
        return float(torch.allclose(first, second, atol=0.1))
    return float(torch.corrcoef(torch.stack([first, second]))[0, 1])


def split_first_row(batches: Sequence[Inputs]) -> Iterator[Inputs]:
    """The batches, with the first row on its own: an export must accept one row and several."""
    for i, inputs in enumerate(batches):
        if i == 0 and len(next(iter(inputs.values()))) > 1:
            yield {name: x[:1] for name, x in inputs.items()}
            yield {name: x[1:] for name, x in inputs.items()}
        else:
            yield inputs


def random_inputs(
    task: str, preprocessing: dict[str, Any], names: Sequence[str], vocabulary: int, rows: int = 64, shortest: int = 1
) -> list[Inputs]:
    """Random inputs from a fixed seed, for a model without data; texts have at least ``shortest`` tokens."""
    generator = torch.Generator().manual_seed(0)
    if task == "images":
        size, channels = int(preprocessing["size"]), int(preprocessing["channels"])
        return [
            {IMAGE: torch.randn(16, channels, size, size, generator=generator)} for _ in range(max(1, rows // 16))
        ]
    longest = max(min(int(preprocessing.get("max_length", 64)), 64), 2)
    batches = []
    for i in range(max(1, rows // 16)):
        length = max(2, shortest, longest - 5 * i)
        ids = torch.randint(0, vocabulary, (16, length), generator=generator)
        mask = (torch.arange(length) < torch.randint(shortest, length + 1, (16, 1), generator=generator)).long()
        inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
        batches.append({name: inputs[name] for name in names})
    return batches
