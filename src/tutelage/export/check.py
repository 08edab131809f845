"""Whether an export answers as its source does, on real inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tutelage.errors import NumericsError
from tutelage.export.bundle import IMAGE, Inputs

TOLERANCE = 1e-4
"""Most by which any logit may differ."""

MIN_AGREEMENT = 0.5
"""What eight bits must at least keep: the share of equal answers, or the likeness of embeddings or numbers."""

ROWS = 256
"""Rows that are compared, where there are so many."""

Answer = Callable[[Inputs], Tensor]


def compare_outputs(
    source: Answer, export: Answer, batches: Sequence[Inputs], task: str, *, exact: bool
) -> dict[str, Any]:
    """Ask both the same, and say how far they are apart.

    Args:
        source: the model.
        export: what was written of it, in its runtime.
        batches: inputs.
        task: says what an answer is.
        exact: whether they are to agree to :data:`TOLERANCE`; else in their answers.

    Returns:
        ``rows``; ``max_difference`` of any output; ``agreement``: the share of equal predictions, of embeddings the
        mean cosine, of regression the correlation.

    Raises:
        NumericsError: they do not agree, or are not finite.
    """
    greatest, rows = 0.0, 0
    pairs: list[tuple[Tensor, Tensor]] = []
    for inputs in split_first_row(batches):
        theirs, ours = source(inputs).float(), export(inputs).float()
        if theirs.shape != ours.shape:
            raise NumericsError(
                f"the export gives {tuple(ours.shape)} where the student gives {tuple(theirs.shape)}", remedy=REMEDY
            )
        theirs, ours = drop_padding(theirs, inputs), drop_padding(ours, inputs)
        for who, values in (("student", theirs), ("export", ours)):
            if not bool(torch.isfinite(values).all()):
                raise NumericsError(f"the {who} gives NaN or infinity", remedy=REMEDY)
        if theirs.numel():
            greatest = max(greatest, float((theirs - ours).abs().max()))
        pairs.append(agreement(theirs, ours, task))
        rows += len(next(iter(inputs.values())))
    alike = _mean(pairs, task)
    found = {"rows": rows, "max_difference": greatest, "agreement": alike}
    if exact and greatest > TOLERANCE:
        raise NumericsError(
            f"the export differs from the student by up to {greatest:.2g} on {rows} inputs, more than {TOLERANCE:g}",
            remedy=REMEDY,
        )
    if not exact and alike < MIN_AGREEMENT:
        what = {"embedding": "cosine", "regression": "correlation"}.get(task, "share of equal answers")
        raise NumericsError(
            f"in eight bits the student is no longer itself: the {what} with it is {alike:.1%} on {rows} inputs",
            remedy="train it with its weights rounded (student.qat: int8), or export it whole: --to onnx",
        )
    return found


REMEDY = "nothing was written; another format may hold it: --to safetensors, onnx, torch-export"


def drop_padding(values: Tensor, inputs: Inputs) -> Tensor:
    """Outputs at tokens that are not padding; all of those that are of whole rows."""
    mask = inputs.get("attention_mask")
    if mask is not None and values.ndim == 3 and values.shape[:2] == mask.shape:
        return values[mask.bool()]
    return values


def agreement(theirs: Tensor, ours: Tensor, task: str) -> tuple[Tensor, Tensor]:
    """Of each answer, what is compared."""
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
    """The same rows, the first alone: one row and several must both do, and so must other numbers of tokens."""
    for i, inputs in enumerate(batches):
        if i == 0 and len(next(iter(inputs.values()))) > 1:
            yield {name: x[:1] for name, x in inputs.items()}
            yield {name: x[1:] for name, x in inputs.items()}
        else:
            yield inputs


def random_inputs(
    task: str, preprocessing: dict[str, Any], names: Sequence[str], vocabulary: int, rows: int = 64
) -> list[Inputs]:
    """Inputs made up, for a model without a run whose data could be read; always the same ones."""
    generator = torch.Generator().manual_seed(0)
    if task == "images":
        size, channels = int(preprocessing["size"]), int(preprocessing["channels"])
        return [
            {IMAGE: torch.randn(16, channels, size, size, generator=generator)} for _ in range(max(1, rows // 16))
        ]
    longest = max(min(int(preprocessing.get("max_length", 64)), 64), 2)
    found = []
    for i in range(max(1, rows // 16)):
        length = max(2, longest - 5 * i)
        ids = torch.randint(0, vocabulary, (16, length), generator=generator)
        mask = (torch.arange(length) < torch.randint(1, length + 1, (16, 1), generator=generator)).long()
        given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
        found.append({name: given[name] for name in names})
    return found
