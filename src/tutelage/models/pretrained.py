"""Models of texts: transformers' own by what is asked of them, and encoders of sentences."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.errors import CapabilityError, ConfigError, ModelError, require
from tutelage.files import silence_transformers

# torchao, which transformers imports wherever it is installed, has torch remark on how it registers its types
logging.getLogger("torch.utils._pytree").addFilter(lambda record: "register_constant" not in record.getMessage())

AUTO_CLASSES: dict[str, str] = {
    "images": "AutoModelForImageClassification",
    "classes": "AutoModelForSequenceClassification",
    "multi-label": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "tokens": "AutoModelForTokenClassification",
    "mlm": "AutoModelForMaskedLM",
    "causal": "AutoModelForCausalLM",
    "embedding": "AutoModel",
    "ranking": "AutoModel",
}
"""transformers' class for each task."""

PROBLEM_TYPES = {
    "classes": "single_label_classification", "multi-label": "multi_label_classification", "regression": "regression",
}  # fmt: skip
"""What transformers calls tasks of one output a text."""


def resolve_source(model: str) -> tuple[str, dict[str, str]]:
    """Where transformers finds a model: the id or folder of ``hf:``, or the folder of ``package:NAME/FOLDER``.

    Either may name a GGUF file at its end, which comes as the option ``gguf_file``.

    Raises:
        ModelError: no such package, no such folder in it, or no such file.
        MissingDependencyError: a GGUF file, and the package that reads it is not installed.
    """
    kind, _, name = model.partition(":")
    if kind != "package":
        return _of_file(name, model)
    package, _, inside = name.partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    if not places:
        raise ModelError(f"there is no installed package {package!r}", remedy=f"install it: pip install {package}")
    found = Path(places[0]) / inside
    if found.suffix == GGUF and found.is_file():
        return _of_file(str(found), model)
    if not (found / "config.json").is_file():
        known = [p.parent for p in Path(places[0]).rglob("config.json")] + list(Path(places[0]).rglob(f"*{GGUF}"))
        shown = sorted(str(p.relative_to(places[0])) for p in known)
        raise ModelError(
            f"package {package} has no folder {inside!r} with a model",
            remedy=f"it has: {', '.join(shown[:5]) or 'none'}",
        )
    return str(found), {}


GGUF = ".gguf"


def _of_file(name: str, model: str) -> tuple[str, dict[str, str]]:
    if not name.endswith(GGUF):
        return name, {}
    require("gguf", "language", f"the GGUF file {model}")
    source, _, file = name.rpartition("/")
    if Path(source or ".").is_dir() and not Path(name).is_file():
        known = sorted(p.name for p in Path(source or ".").glob(f"*{GGUF}"))
        raise ModelError(f"there is no file {name}", remedy=f"in that folder: {', '.join(known) or 'none'}")
    return source or ".", {"gguf_file": file}


def load_pretrained(model: str, task: str, classes: list[str] | None, options: dict[str, Any]) -> nn.Module:
    """A model of transformers with its weights, and an output layer for the task: its own where that fits, else new.

    ``fresh`` on the module names the parameters that did not come with the weights.

    Raises:
        ModelError: nothing of that name.
        MissingDependencyError: transformers is not installed.
    """
    require("transformers", "vision" if task == "images" else "text", f"the model {model}")
    import transformers

    source, file = resolve_source(model)
    options = {"dtype": torch.float32, **file, **options}
    config = transformers.AutoConfig.from_pretrained(source, **file)
    if task == "ranking" and any(a.endswith("ForSequenceClassification") for a in config.architectures or []):
        found, fresh = _loaded("AutoModelForSequenceClassification", source, options)
        return _marked(CrossEncoder(found), fresh)
    if task in ("images", *PROBLEM_TYPES, "tokens") and classes is not None:
        own = len(config.id2label) == len(classes) and _has_head(config)
        if not own or _names(config) is None:
            options |= {
                "num_labels": len(classes),
                "id2label": dict(enumerate(classes)),
                "label2id": {c: i for i, c in enumerate(classes)},
                "ignore_mismatched_sizes": True,  # a new head for other classes, as for fine-tuning
            }
        if task in PROBLEM_TYPES:
            options["problem_type"] = PROBLEM_TYPES[task]
    found, fresh = _loaded(AUTO_CLASSES[task], source, options)
    if file:
        found = _strip_gguf(found)
    return _marked(WRAPPERS[task](found), fresh) if task in WRAPPERS else _marked(found, fresh)


def _has_head(config: Any) -> bool:
    """Whether the weights hold an output layer for the config's labels."""
    return any("Classification" in a for a in config.architectures or [])


def _names(config: Any) -> list[str] | None:
    """Its label names in order; ``None`` where they are transformers' own LABEL_0, LABEL_1 ..."""
    names = [str(config.id2label[k]) for k in sorted(config.id2label, key=int)]
    return None if all(n == f"LABEL_{i}" for i, n in enumerate(names)) else names


def _loaded(kind: str, source: str, options: dict[str, Any]) -> tuple[nn.Module, list[str]]:
    import transformers

    with silence_transformers():
        model, info = getattr(transformers, kind).from_pretrained(source, output_loading_info=True, **options)
    mismatched = [key[0] if isinstance(key, tuple) else key for key in info.get("mismatched_keys", ())]
    return model, sorted({*info["missing_keys"], *mismatched})


def _strip_gguf(model: nn.Module) -> nn.Module:
    """The same model with nothing of the file that it was read from, which transformers would not let it be saved."""
    known = model.config.to_dict()  # type: ignore[union-attr, operator]
    known.pop("quantization_config", None)  # or whoever loads it would be told of a file that is not there
    config = type(model.config).from_dict(known)  # type: ignore[union-attr]
    config.dtype = torch.float32
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain


def _marked(model: nn.Module, fresh: list[str]) -> nn.Module:
    prefix = getattr(model, "weights_prefix", "")
    model.fresh = [f"{prefix}{name}" for name in fresh]  # type: ignore[assignment]
    return model


def load_tokenizer(model: str) -> Any:
    """The tokenizer beside a model, ``hf:`` or ``package:``.

    Raises:
        ConfigError: the model is of another kind, or has none.
    """
    kind = model.partition(":")[0]
    if kind not in ("hf", "package"):
        raise ConfigError(
            f"model {model!r} brings no tokenizer", where="data.tokenizer", remedy="name one, as hf:ID or hf:FOLDER"
        )
    require("transformers", "text", "a tokenizer")
    from transformers import AutoTokenizer

    source, file = resolve_source(model)
    try:
        with silence_transformers():
            found = AutoTokenizer.from_pretrained(source, **file)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"{model} has no tokenizer: {reason}",
            where="data.tokenizer",
            remedy="name another, as hf:ID or hf:FOLDER",
        ) from None
    if not getattr(found, "is_fast", False):
        raise ConfigError(
            f"{model} has a slow tokenizer",
            where="data.tokenizer",
            remedy="save a fast one: tokenizer.json beside it",
        )
    return found


def read_class_names(model: str, checkpoint: str | None) -> list[str] | None:
    """The class names that a transformers model was trained with; ``None`` where it has no such names."""
    source = checkpoint if checkpoint is not None and Path(checkpoint).is_dir() else resolve_source(model)[0]
    path = Path(source) / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    known = SimpleNamespace(**{"architectures": None, "id2label": {}, **config})
    return _names(known) if _has_head(known) and known.id2label else None


# Encoders of sentences ---------------------------------------------------------------------------------


class SentenceEncoder(nn.Module):
    """One embedding for each text: the mean of an encoder's last hidden states over tokens that are not padding.

    Args:
        model: gives ``last_hidden_state``.

    Reference: Reimers and Gurevych, Sentence-BERT (EMNLP 2019), section 3, MEAN.
    """

    weights_prefix = "model."

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def config(self) -> Any:
        """Of the model inside."""
        return self.model.config

    @property
    def _no_split_modules(self) -> Any:
        return getattr(self.model, "_no_split_modules", None)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **more: Tensor) -> Tensor:
        """Embeddings ``[B, D]``, not normalised."""
        states = self.model(input_ids=input_ids, attention_mask=attention_mask, **more).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(states.dtype)
        return (states * weight).sum(1) / weight.sum(1).clamp(min=1)

    def save_pretrained(self, folder: Path) -> None:
        """Save the model inside, and what sentence-transformers reads beside it."""
        self.model.save_pretrained(folder)  # type: ignore[operator]
        parts: list[dict[str, Any]] = [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        ]
        pooling = {"word_embedding_dimension": self.config.hidden_size, "pooling_mode_mean_tokens": True}
        (Path(folder) / "modules.json").write_text(json.dumps(parts, indent=1), encoding="utf-8")
        (Path(folder) / "1_Pooling").mkdir(exist_ok=True)
        (Path(folder) / "1_Pooling" / "config.json").write_text(json.dumps(pooling, indent=1), encoding="utf-8")


class BiEncoder(SentenceEncoder):
    """Scores of two answers to a query: the product of its embedding with each of theirs."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **more: Tensor) -> Tensor:  # noqa: D102
        own = {k: v for k, v in more.items() if not k.startswith(("positive_", "negative_"))}
        query = super().forward(input_ids, attention_mask, **own)
        sides = [
            super(BiEncoder, self).forward(**{k.removeprefix(side): v for k, v in more.items() if k.startswith(side)})
            for side in ("positive_", "negative_")
        ]
        return torch.stack([(query * side).sum(-1) for side in sides], -1)


class CrossEncoder(nn.Module):
    """Scores of two answers to a query, each read together with it.

    Raises:
        CapabilityError: the model gives more than one score for a pair.
    """

    weights_prefix = "model."

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if model.config.num_labels != 1:  # type: ignore[union-attr]
            raise CapabilityError(
                f"a cross-encoder gives one score for a pair, this one {model.config.num_labels}",  # type: ignore[union-attr]
                remedy="use one that was trained to rank, with num_labels 1",
            )
        self.model = model

    def forward(self, **inputs: Tensor) -> Tensor:
        """Scores ``[B, 2]`` of the answer and of the other."""
        sides = [
            self.model(**{k.removeprefix(side): v for k, v in inputs.items() if k.startswith(side)}).logits[:, 0]
            for side in ("positive_", "negative_")
        ]
        return torch.stack(sides, -1)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {"embedding": SentenceEncoder, "ranking": BiEncoder}
"""What is put around a model for a task."""
