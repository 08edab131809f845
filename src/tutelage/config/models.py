"""The sections that name a model."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from tutelage.config.base import BelowOne, Count, CountOrZero, Positive, Section, known_source
from tutelage.errors import shorten, suggest

MODELS = (
    "convnet", "mlp", "resnet", "timm:NAME", "torchvision:NAME", "hf:ID", "package:NAME/FOLDER",
    "package.module:callable",
)  # fmt: skip
"""What ``model`` can be."""

LAYER_MAPS = ("every-other", "first", "influence", "last", "linspace")
"""Which layers of its teacher a student keeps, by name."""

known_model = known_source("model", MODELS)
known_student = known_source("model", ("teacher", *MODELS))
ModelName = Annotated[str, AfterValidator(known_model)]
"""The name of a model."""


class ModelConfig(Section):
    """A model by name."""

    model: ModelName
    """``mlp``, ``convnet``, ``resnet``, ``timm:NAME``, ``torchvision:NAME``, ``hf:ID`` (or a folder),
    ``package:NAME/FOLDER`` (a folder inside an installed Python package) or ``pkg.module:callable``."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the model's constructor."""
    checkpoint: str | None = None
    """Weights: a safetensors file, a torch file readable with ``weights_only``, or a folder that a run exported."""


def _map(given: Any) -> Any:
    if isinstance(given, str) and given not in LAYER_MAPS:
        raise ValueError(
            f"unknown map {shorten(given)}{suggest(given, LAYER_MAPS)}; allowed: {', '.join(LAYER_MAPS)}, or a list"
        )
    return given


class LoraConfig(Section):
    """LoRA: train low-rank matrices beside linear layers; the other weights are frozen. The exported model has the
    matrices merged into its weights."""

    rank: Count = 16
    """Rank r of the matrices."""
    alpha: Positive | None = None
    """Scale of the matrices' product, before the division by r. Default: 2 r."""
    dropout: BelowOne = 0.0
    """Dropout rate in front of the first matrix."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Names of linear layers (``[q_proj, v_proj]``); ``all-linear``: all except the output head. With the head
    (``lm_head``) as a target, the exported model's embeddings are no longer tied."""
    bits: Literal[4] | None = None
    """``4``: the frozen weights are stored in NF4 (QLoRA); needs bitsandbytes."""


def _lora(given: Any) -> Any:
    return {"rank": given} if isinstance(given, int) and not isinstance(given, bool) else given


class StudentConfig(ModelConfig):
    """A model by name, or a model cut out of its teacher."""

    model: Annotated[str, AfterValidator(known_student)]
    """As ``teacher.model``; or ``teacher``: a smaller transformers model, cut out of the teacher by the keys
    below."""
    layers: Count | None = None
    """Number of the teacher's layers to keep. Default: as many as ``map`` selects, else all."""
    map: Annotated[str | list[CountOrZero] | None, BeforeValidator(_map)] = None
    """Which layers to keep: ``every-other`` (DistilBERT: layer l is the teacher's layer 2l), the default; ``first``,
    ``last``, ``linspace``, ``influence`` (those that change their input most on 256 training texts), or a list,
    counted from 0."""
    width: Count | None = None
    """Hidden size; the teacher's most important heads are kept. Default: the teacher's."""
    heads: Count | None = None
    """Number of attention heads, for families with a head size of its own; for others ``width`` sets it."""
    intermediate: Count | None = None
    """Number of units of the feed-forward layers. Default: the teacher's."""
    embedding: Count | None = None
    """Rank of the token embeddings, for families with an embedding size of its own (ELECTRA, DeBERTa)."""
    vocabulary: Literal["corpus"] | None = None
    """``corpus``: only the tokens of the training texts are kept, and the tokenizer is rebuilt. Default: all."""
    initial: Literal["teacher", "random"] = "teacher"
    """Whether the student starts from the teacher's weights."""
    lora: Annotated[LoraConfig | None, BeforeValidator(_lora)] = None
    """Train with LoRA; ``lora: 16`` is short for ``lora: {rank: 16}``. Default: all weights are trained."""
    qat: Literal["int8"] | None = None
    """``int8``: quantisation-aware training (needs torchao). Inputs and weights of linear layers and convolutions are
    rounded to int8 in every forward pass, also when metrics are measured; float weights are saved."""

    def misfits(self) -> Iterator[tuple[str, str]]:
        """Keys of a part of the teacher for another model, or the other way round."""
        if self.qat is not None and self.lora is not None:
            yield "qat", "'qat' rounds trained weights, and with 'lora' these are frozen; remove one"
        if self.model != "teacher":
            for key in ("layers", "map", "width", "heads", "intermediate", "embedding", "vocabulary", "initial"):
                if getattr(self, key) not in (None, "teacher"):
                    yield key, f"{key!r} is for a part of the teacher, model: teacher; remove it"
        elif self.options or self.checkpoint is not None:
            key = "options" if self.options else "checkpoint"
            yield key, f"{key!r} is for a model of its own, and this one is cut out of its teacher; remove it"
