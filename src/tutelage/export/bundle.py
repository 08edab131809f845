"""A model with its tokenizer, label names and preprocessing."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.errors import CapabilityError, CheckpointError, ConfigError
from tutelage.export.image_files import known_preprocessing
from tutelage.models import MODEL_CARD, label_names, load_model, load_tokenizer
from tutelage.models.files import read_card
from tutelage.models.pretrained import BiEncoder, CrossEncoder, SentenceEncoder, load_pretrained
from tutelage.taps import scores_of
from tutelage.taps.heads import no_cache_arguments

IMAGE = "image"
"""Name of the input of an image classifier."""

Inputs = dict[str, Tensor]
"""Inputs of a model by name, rows first."""

TASKS = {
    "ForImageClassification": "images", "ForSequenceClassification": "classes", "ForTokenClassification": "tokens",
    "ForMaskedLM": "mlm", "ForCausalLM": "causal", "LMHeadModel": "causal", "Model": "embedding",
}  # fmt: skip
"""The task of a transformers model, by the end of its class name."""


@dataclass(frozen=True)
class ModelBundle:
    """A model with its tokenizer, label names and preprocessing.

    Attributes:
        model: the module, in evaluation mode, on the CPU.
        task: ``images``, or a text task.
        classes: label names in the order of the logits; empty if there are no labels.
        preprocessing: arguments of the preprocessing of images or texts.
        tokenizer: tokenizer of a text model.
        folder: folder of the model; ``None`` for a module of the caller.
        source: name of the model in messages and on its card.
    """

    model: nn.Module
    task: str
    classes: list[str] = field(default_factory=list)
    preprocessing: dict[str, Any] = field(default_factory=dict)
    tokenizer: Any = None
    folder: Path | None = None
    source: str = "a model"


def load_bundle(folder: str | Path) -> ModelBundle:
    """Load the model in a folder that a run or transformers saved.

    Raises:
        CheckpointError: the folder has no model, or one that only the caller's code can build.
        CapabilityError: models of this kind cannot be exported.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            "no such folder", where=str(folder), remedy="give a run directory, or the folder of a model"
        )
    if (folder / MODEL_CARD).exists():
        card = read_card(folder)
        by_config = card.get("task") is None and (folder / "config.json").exists()
        model, task = load_model(folder), _task_of(folder) if by_config else str(card.get("task") or "images")
    elif (folder / "config.json").exists():
        card, task = {}, _task_of(folder)
        model = load_pretrained(f"hf:{folder}", task, None, {}).eval()
    else:
        raise CheckpointError(
            f"holds no model: neither {MODEL_CARD} nor config.json",
            where=str(folder),
            remedy="give the directory of a finished run, or the folder of a model",
        )
    if isinstance(model, CrossEncoder):
        raise CapabilityError(
            "a cross-encoder encodes query and passage together; exporting it is not supported",
            where=str(folder),
            remedy="export its student",
        )
    if isinstance(model, BiEncoder):  # an export of a bi-encoder embeds one text
        model, task = SentenceEncoder(model.model, model.after).eval(), "embedding"
    known = {k: v for k, v in (card.get("preprocessing") or {}).items() if k not in ("tokenizer", "prompts")}
    preprocessing = known or _preprocessing(model, task, folder)
    if isinstance(model, SentenceEncoder) and model.after.prompt:
        preprocessing["prompt"] = model.after.prompt
    tokenizer = None if task == "images" else _tokenizer(folder)
    if tokenizer is not None:
        model.tokenizer = tokenizer  # which says how many outputs are tokens
    return ModelBundle(
        model=model,
        task=task,
        classes=list(card.get("classes") or label_names(model) or []) if task not in UNLABELLED else [],
        preprocessing=preprocessing,
        tokenizer=tokenizer,
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
    tasks = [task for end, task in TASKS.items() if names[0].endswith(end)]
    if not tasks:
        raise CapabilityError(
            f"holds a {names[0] or 'model without a class name'}, whose task is unknown",
            where=str(folder),
            remedy=f"supported are classes whose name ends in {', '.join(TASKS)}",
        )
    return tasks[0]


def _preprocessing(model: nn.Module, task: str, folder: Path) -> dict[str, Any]:
    """The preprocessing of a model without a card, from its other files; without ``mean`` if no file has it."""
    config = getattr(model, "config", None)
    if task == "images":
        if (files := known_preprocessing(f"hf:{folder}", {})) is not None:
            return files.preprocessing.to_dict()
        size = getattr(config, "image_size", None) or 224
        return {"size": size if isinstance(size, int) else size[0], "channels": getattr(config, "num_channels", 3)}
    limit = model.after.max_length if isinstance(model, SentenceEncoder) else None
    return {"max_length": limit or int(getattr(config, "max_position_embeddings", 512))}


def _tokenizer(folder: Path) -> Any:
    try:
        return load_tokenizer(f"hf:{folder}")
    except ConfigError as error:
        raise CheckpointError(
            f"has no tokenizer: {error.what}", where=str(folder), remedy="save the tokenizer in this folder"
        ) from None


def named_inputs(inputs: Tensor | Mapping[str, Tensor]) -> Inputs:
    """The inputs of a batch by name."""
    return {IMAGE: inputs} if isinstance(inputs, Tensor) else dict(inputs)


class TraceModule(nn.Module):
    """A module for tracing: positional inputs, and logits or embeddings as the only output."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names
        self._options = no_cache_arguments(model)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Logits ``[B, ..., C]``, without the padding of a vocabulary, or embeddings ``[B, D]``."""
        if self.names == (IMAGE,):
            return scores_of(self.model, inputs[0])
        return scores_of(self.model, dict(zip(self.names, inputs, strict=True)), self._options)

    @torch.no_grad()
    def run(self, inputs: Inputs) -> Tensor:
        """The outputs for inputs by name."""
        outputs: Tensor = self(*(inputs[name] for name in self.names))
        return outputs


def is_transformers(model: nn.Module) -> bool:
    """Whether transformers can load what the model saves."""
    own = model.model if isinstance(model, SentenceEncoder) else model
    return hasattr(own, "config") and callable(getattr(own, "save_pretrained", None))
