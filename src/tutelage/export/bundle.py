"""What is exported: a model with all that its use needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.errors import CapabilityError, CheckpointError, ConfigError
from tutelage.models import MODEL_CARD, label_names, load_model, load_tokenizer
from tutelage.models.files import read_card
from tutelage.models.pretrained import AUTO_CLASSES, BiEncoder, CrossEncoder, SentenceEncoder, load_pretrained
from tutelage.taps import logits_of
from tutelage.taps.observe import no_cache_arguments

IMAGE = "image"
"""What the input of an image classifier is called."""

Inputs = dict[str, Tensor]
"""What a model is given, by name, rows first."""

TASKS = {
    "ForImageClassification": "images", "ForSequenceClassification": "classes", "ForTokenClassification": "tokens",
    "ForMaskedLM": "mlm", "ForCausalLM": "causal", "LMHeadModel": "causal", "Model": "embedding",
}  # fmt: skip
"""What a transformers model is for, by how the name of its class ends."""


@dataclass(frozen=True)
class ModelBundle:
    """A model with all that its use needs.

    Attributes:
        model: in evaluation mode, on the CPU.
        task: ``images``, or a task of texts.
        classes: label names in the order of the logits; none where there are no labels.
        preprocessing: what is done to an image or a text first.
        tokenizer: of texts.
        folder: where it was read from; ``None`` for a module of the caller's.
        source: what it is called in messages and on its card.
    """

    model: nn.Module
    task: str
    classes: list[str] = field(default_factory=list)
    preprocessing: dict[str, Any] = field(default_factory=dict)
    tokenizer: Any = None
    folder: Path | None = None
    source: str = "a model"


def load_bundle(folder: str | Path) -> ModelBundle:
    """The model in a folder that a run exported, or that transformers saved.

    Raises:
        CheckpointError: no model there, or one that only its owner's code can build.
        CapabilityError: a model of a kind that cannot be exported.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            "no such folder", where=str(folder), remedy="give the folder of a run, or of a model that a run exported"
        )
    if (folder / MODEL_CARD).exists():
        card = read_card(folder)
        unsaid = card.get("task") is None and (folder / "config.json").exists()  # a module of the caller's own
        model, task = load_model(folder), _task_of(folder) if unsaid else str(card.get("task") or "images")
    elif (folder / "config.json").exists():
        card, task = {}, _task_of(folder)
        model = load_pretrained(f"hf:{folder}", task, None, {}).eval()
    else:
        raise CheckpointError(
            f"holds no model: neither {MODEL_CARD} nor config.json",
            where=str(folder),
            remedy="give the folder of a finished run, or of a model that a run exported",
        )
    if isinstance(model, CrossEncoder):
        raise CapabilityError(
            "a cross-encoder reads two answers beside their query, and cannot be exported",
            where=str(folder),
            remedy="export the encoder that it taught",
        )
    if isinstance(model, BiEncoder):  # of a ranking, what is used is one side: the embedding of a text
        model, task = SentenceEncoder(model.model).eval(), "embedding"
    given = card.get("preprocessing") or {}
    return ModelBundle(
        model=model,
        task=task,
        classes=list(card.get("classes") or label_names(model) or []) if task not in UNLABELLED else [],
        preprocessing={k: v for k, v in given.items() if k != "tokenizer"} or _longest(model, task),
        tokenizer=None if task == "images" else _tokenizer(folder),
        folder=folder,
        source=str(folder),
    )


UNLABELLED = ("mlm", "causal", "embedding", "ranking")
"""Tasks without label names."""


def _task_of(folder: Path) -> str:
    try:
        names = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or [""]
    except (ValueError, OSError) as error:
        raise CheckpointError(f"config.json cannot be read: {error}", where=str(folder)) from None
    found = [task for end, task in TASKS.items() if names[0].endswith(end)]
    if not found:
        raise CapabilityError(
            f"holds a {names[0] or 'model without a name'}, whose task is not known",
            where=str(folder),
            remedy=f"known are models whose class ends in {', '.join(TASKS)}",
        )
    return found[0]


def _longest(model: nn.Module, task: str) -> dict[str, Any]:
    """Of a model that no run trained: how many tokens it takes, or pixels."""
    config = getattr(model, "config", None)
    if task == "images":
        size = getattr(config, "image_size", None) or 224
        return {
            "size": size if isinstance(size, int) else size[0],
            "channels": getattr(config, "num_channels", 3),
            "crop": 1.0,
            "mean": [0.5] * getattr(config, "num_channels", 3),
            "std": [0.5] * getattr(config, "num_channels", 3),
        }
    return {"max_length": int(getattr(config, "max_position_embeddings", 512))}


def _tokenizer(folder: Path) -> Any:
    try:
        return load_tokenizer(f"hf:{folder}")
    except ConfigError as error:
        raise CheckpointError(
            f"has no tokenizer beside its model: {error.what}", where=str(folder), remedy="save it there"
        ) from None


def named_inputs(given: Tensor | Mapping[str, Tensor]) -> Inputs:
    """The inputs of a batch by name."""
    return {IMAGE: given} if isinstance(given, Tensor) else dict(given)


class TraceModule(nn.Module):
    """A model with its inputs by position and its logits (or embeddings) alone: what a graph is drawn of.

    Args:
        model: any that a run trains.
        names: of its inputs, in order; ``image`` for a single tensor.
    """

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names
        self._options = no_cache_arguments(model)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Logits ``[B, ..., C]`` or embeddings ``[B, D]``."""
        if self.names == (IMAGE,):
            return logits_of(self.model(inputs[0]))
        return logits_of(self.model(**dict(zip(self.names, inputs, strict=True)), **self._options))

    @torch.no_grad()
    def run(self, inputs: Inputs) -> Tensor:
        """The same of inputs by name."""
        found: Tensor = self(*(inputs[name] for name in self.names))
        return found


def is_transformers(model: nn.Module) -> bool:
    """Whether transformers loads what the model saves of itself."""
    own = model.model if isinstance(model, SentenceEncoder) else model
    return hasattr(own, "config") and callable(getattr(own, "save_pretrained", None))


def auto_class(task: str) -> str:
    """transformers' class for a task."""
    return AUTO_CLASSES[task]
