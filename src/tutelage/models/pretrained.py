"""Models of transformers with the head of a task, and wrappers for sentence embeddings and ranking."""

import copy
import importlib.util
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.errors import CapabilityError, ConfigError, ModelError, first_line, require
from tutelage.files import silence_transformers
from tutelage.models.sentence_modules import (
    DenseLayer,
    SentenceModules,
    ranking_prompts,
    read_score_activation,
    read_sentence_modules,
)

# transformers imports torchao where it is installed, and torch then warns about how torchao registers its types
logging.getLogger("torch.utils._pytree").addFilter(lambda record: "register_constant" not in record.getMessage())

AUTO_CLASSES = {
    "images": "AutoModelForImageClassification",
    **dict.fromkeys(("classes", "multi-label", "regression"), "AutoModelForSequenceClassification"),
    "tokens": "AutoModelForTokenClassification",
    "mlm": "AutoModelForMaskedLM",
    "causal": "AutoModelForCausalLM",
    **dict.fromkeys(("embedding", "ranking"), "AutoModel"),
}
"""The auto class of transformers for each task."""

PROBLEM_TYPES = {
    "classes": "single_label_classification", "multi-label": "multi_label_classification", "regression": "regression",
}  # fmt: skip
"""``config.problem_type`` for each task with one output per text."""


def resolve_source(model: str) -> tuple[str, dict[str, str]]:
    """The argument of ``from_pretrained`` for ``hf:ID``, ``hf:FOLDER`` or ``package:NAME/FOLDER``, and its options.

    The name may end in a GGUF file, which becomes the option ``gguf_file``.

    Raises:
        ModelError: there is no such package, folder or file.
        MissingDependencyError: the model is a GGUF file, and the package gguf is not installed.
    """
    kind, _, name = model.partition(":")
    if kind != "package":
        return _split_gguf(name, model)
    package, _, inside = name.partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    if not places:
        raise ModelError(f"there is no installed package {package!r}", remedy=f"install it: pip install {package}")
    path = Path(places[0]) / inside
    if path.suffix == GGUF and path.is_file():
        return _split_gguf(str(path), model)
    if not (path / "config.json").is_file():
        known = [p.parent for p in Path(places[0]).rglob("config.json")] + list(Path(places[0]).rglob(f"*{GGUF}"))
        names = sorted(str(p.relative_to(places[0])) for p in known)
        raise ModelError(
            f"package {package} has no folder {inside!r} with a model",
            remedy=f"it has: {', '.join(names[:5]) or 'none'}",
        )
    return str(path), {}


GGUF = ".gguf"


def _split_gguf(name: str, model: str) -> tuple[str, dict[str, str]]:
    if not name.endswith(GGUF):
        return name, {}
    require("gguf", "language", f"the GGUF file {model}")
    source, _, file = name.rpartition("/")
    if Path(source or ".").is_dir() and not Path(name).is_file():
        known = sorted(p.name for p in Path(source or ".").glob(f"*{GGUF}"))
        raise ModelError(f"there is no file {name}", remedy=f"in that folder: {', '.join(known) or 'none'}")
    return source or ".", {"gguf_file": file}


def load_pretrained(model: str, task: str, classes: list[str] | None, options: dict[str, Any]) -> nn.Module:
    """Load a model of transformers. Its output layer is the pretrained one where it fits the task, else a new one.

    The attribute ``fresh`` of the module lists the parameters that are newly initialised.

    Raises:
        ModelError: there is no such model.
        MissingDependencyError: transformers is not installed.
    """
    require("transformers", "vision" if task == "images" else "text", f"the model {model}")
    import transformers

    source, file = resolve_source(model)
    options = {"dtype": torch.float32, **file, **options}
    config = transformers.AutoConfig.from_pretrained(source, **file)
    if task == "ranking" and any(a.endswith("ForSequenceClassification") for a in config.architectures or []):
        module, fresh = _from_pretrained("AutoModelForSequenceClassification", source, options)
        return _with_fresh(CrossEncoder(module, read_score_activation(source, config.to_dict())), fresh)
    if task in ("images", *PROBLEM_TYPES, "tokens") and classes is not None:
        own = len(config.id2label) == len(classes) and _has_head(config)
        if not own or names_in(config) is None:
            options |= {
                "num_labels": len(classes),
                "id2label": dict(enumerate(classes)),
                "label2id": {c: i for i, c in enumerate(classes)},
                "ignore_mismatched_sizes": True,  # a new head for other classes
            }
        if task in PROBLEM_TYPES:
            options["problem_type"] = PROBLEM_TYPES[task]
    module, fresh = _from_pretrained(AUTO_CLASSES[task], source, options)
    if file:
        module = _strip_gguf(module)
    if task in WRAPPERS:
        module = WRAPPERS[task](module, read_sentence_modules(source))
        if not module.after.pooling.include_prompt and module.after.prompt:
            module.after.use_prompt(None, load_tokenizer(model))
    return _with_fresh(module, fresh)


def _has_head(config: Any) -> bool:
    """Whether the weights include a classification head."""
    return any("Classification" in a for a in config.architectures or [])


def names_in(config: Any) -> list[str] | None:
    """The label names in a config, in order; ``None`` where they are the defaults LABEL_0, LABEL_1 ..."""
    names = [str(config.id2label[k]) for k in sorted(config.id2label, key=int)]
    return None if all(n == f"LABEL_{i}" for i, n in enumerate(names)) else names


def _from_pretrained(kind: str, source: str, options: dict[str, Any]) -> tuple[nn.Module, list[str]]:
    import transformers

    with silence_transformers():
        model, info = getattr(transformers, kind).from_pretrained(source, output_loading_info=True, **options)
    mismatched = [key[0] if isinstance(key, tuple) else key for key in info.get("mismatched_keys", ())]
    return model, sorted({*info["missing_keys"], *mismatched})


def _strip_gguf(model: nn.Module) -> nn.Module:
    """A copy of the model without the GGUF entries of its config, with which transformers refuses to save it."""
    known = model.config.to_dict()  # type: ignore[union-attr, operator]
    known.pop("quantization_config", None)
    config = type(model.config).from_dict(known)  # type: ignore[union-attr]
    config.dtype = torch.float32
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain


def _with_fresh(model: nn.Module, fresh: list[str]) -> nn.Module:
    prefix = getattr(model, "weights_prefix", "")
    model.fresh = [f"{prefix}{name}" for name in fresh]  # type: ignore[assignment]
    return model


def load_tokenizer(model: str) -> Any:
    """Load the tokenizer of a model ``hf:`` or ``package:``.

    Raises:
        ConfigError: the model has no tokenizer, or a slow one.
    """
    kind = model.partition(":")[0]
    if kind not in ("hf", "package"):
        raise ConfigError(
            f"model {model!r} has no tokenizer", where="data.tokenizer", remedy="name one, as hf:ID or hf:FOLDER"
        )
    require("transformers", "text", "a tokenizer")
    from transformers import AutoTokenizer

    source, file = resolve_source(model)
    try:
        with silence_transformers():
            tokenizer = AutoTokenizer.from_pretrained(source, **file)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{model} has no tokenizer: {first_line(error)}",
            where="data.tokenizer",
            remedy="name another, as hf:ID or hf:FOLDER",
        ) from None
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            f"{model} has a slow tokenizer",
            where="data.tokenizer",
            remedy="save a fast tokenizer (tokenizer.json) in the folder of the model",
        )
    return tokenizer


def read_class_names(model: str, checkpoint: str | None) -> list[str] | None:
    """The class names in the config of a transformers model; ``None`` where it has none."""
    source = checkpoint if checkpoint is not None and Path(checkpoint).is_dir() else resolve_source(model)[0]
    path = Path(source) / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    known = SimpleNamespace(**{"architectures": None, "id2label": {}, **config})
    return names_in(known) if _has_head(known) and known.id2label else None


def position_limit(model: nn.Module) -> int | None:
    """Tokens of the longest text that a model has learned position embeddings for; ``None`` without any."""
    limits = []
    for name, module in model.named_modules():
        learned = isinstance(module, nn.Embedding) and not type(module).__name__.startswith("Sinusoidal")
        if learned and name.rpartition(".")[2] in POSITIONS:
            first = int(module.padding_idx or -1) + 1  # RoBERTa counts from the number after its padding token's
            limits.append(int(module.num_embeddings) - int(getattr(module, "offset", first)))
    return min(limits, default=None)


POSITIONS = ("position_embeddings", "embed_positions", "wpe")
"""Names of embeddings of absolute positions in transformers."""


class SentenceEncoder(nn.Module):
    """Text embeddings: the last hidden states of an encoder, pooled, and what its folder adds after that.

    Args:
        model: an encoder whose output has ``last_hidden_state``.
        modules: what comes after it. Default: the mean over the tokens that are not padding.

    Reference: Reimers and Gurevych, Sentence-BERT (EMNLP 2019), section 3.
    """

    weights_prefix = "model."

    def __init__(self, model: nn.Module, modules: SentenceModules | None = None) -> None:
        super().__init__()
        self.model, self.after = model, modules or SentenceModules()

    def with_encoder(self, model: nn.Module) -> "SentenceEncoder":
        """The same for another encoder, such as a part of this one, with copies of the layers behind the pooling.

        Raises:
            CapabilityError: a dense layer takes hidden states of another width.
        """
        dense = next((layer for layer in self.after.layers if isinstance(layer, DenseLayer)), None)
        config: Any = model.config
        width = len(self.after.pooling.modes) * config.hidden_size
        if dense is not None and dense.linear.in_features != width:
            raise CapabilityError(
                f"the teacher has a dense layer for {dense.linear.in_features} numbers, and the student's pooling "
                f"gives {width}",
                where="student.width",
                remedy="keep the width of the teacher, and cut layers instead",
            )
        return type(self)(model, copy.deepcopy(self.after))

    def read_layers(self, folder: Path) -> dict[str, Tensor]:
        """The weights of the dense layers in a saved folder, by their names in this module."""
        return self.after.tensors(folder, "after.")

    @property
    def config(self) -> Any:
        """The config of the encoder."""
        return self.model.config

    @property
    def _no_split_modules(self) -> Any:
        return getattr(self.model, "_no_split_modules", None)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **more: Tensor) -> Tensor:
        """Embeddings ``[B, D]``; of length 1 only if the model normalises them."""
        states = self.model(input_ids=input_ids, attention_mask=attention_mask, **more).last_hidden_state
        embeddings: Tensor = self.after(states, attention_mask)
        return embeddings

    def save_pretrained(self, folder: Path) -> None:
        """Save the encoder and the files that sentence-transformers reads."""
        self.model.save_pretrained(folder)  # type: ignore[operator]
        self.after.save(Path(folder), self.config.hidden_size)


def fewest_tokens(model: nn.Module) -> int:
    """The fewest tokens of a text: one more than those of a prompt that the pooling leaves out."""
    return 1 + (model.after.skip if isinstance(model, SentenceEncoder) else 0)


def _positive_and_negative(inputs: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The inputs of the two answers, without their prefix."""
    prefixes = ("positive_", "negative_")
    return [{k.removeprefix(p): v for k, v in inputs.items() if k.startswith(p)} for p in prefixes]


class BiEncoder(SentenceEncoder):
    """Scores of two answers to a query: dot products of the embeddings of query and answer.

    Raises:
        CapabilityError: the pooling leaves out a prompt, and queries and answers have different ones.
    """

    def __init__(self, model: nn.Module, modules: SentenceModules | None = None) -> None:
        super().__init__(model, modules)
        settings = self.after.settings
        if not self.after.pooling.include_prompt and any((settings.get("prompts") or {}).values()):
            raise CapabilityError(
                "its pooling leaves out the tokens of a prompt (include_prompt: false), which a student for ranking "
                "does not support",
                remedy="use an encoder whose pooling includes the prompt",
            )
        query, answer, _ = ranking_prompts(settings)
        if query or answer:
            settings["prompts"] = {**settings["prompts"], "query": query, "document": answer}

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **more: Tensor) -> Tensor:  # noqa: D102
        own = {k: v for k, v in more.items() if not k.startswith(("positive_", "negative_"))}
        query = super().forward(input_ids, attention_mask, **own)
        answers = [super(BiEncoder, self).forward(**side) for side in _positive_and_negative(more)]
        return torch.stack([(query * answer).sum(-1) for answer in answers], -1)


class CrossEncoder(nn.Module):
    """Scores of two answers to a query; the model reads query and answer together.

    Args:
        model: a model with one output for each pair.
        activation: applied to that output. Default: none.

    Raises:
        CapabilityError: the model has more than one output per pair.
    """

    weights_prefix = "model."

    def __init__(self, model: nn.Module, activation: nn.Module | None = None) -> None:
        super().__init__()
        labels = model.config.num_labels  # type: ignore[union-attr]
        if labels != 1:
            raise CapabilityError(
                f"a cross-encoder has one output for each pair, and this model has {labels}",
                remedy="use one that was trained to rank, with num_labels 1",
            )
        self.model, self.activation = model, activation or nn.Identity()

    def forward(self, **inputs: Tensor) -> Tensor:
        """Scores ``[B, 2]`` of the positive and the negative answer."""
        logits = torch.stack([self.model(**side).logits[:, 0] for side in _positive_and_negative(inputs)], -1)
        scores: Tensor = self.activation(logits)
        return scores


WRAPPERS: dict[str, type[SentenceEncoder]] = {
    "embedding": SentenceEncoder,
    "ranking": BiEncoder,
}
"""The wrapper around the model of a task."""
