"""The sections that name a model."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from tutelage.config.base import Count, Positive, Section
from tutelage.config.messages import Misfit
from tutelage.errors import shorten, suggest

MODELS = (
    "convnet", "mlp", "resnet", "timm:NAME", "torchvision:NAME", "hf:ID", "package:NAME/FOLDER",
    "package.module:callable",
)  # fmt: skip
"""What ``model`` can be."""

LAYER_MAPS = ("every-other", "first", "influence", "last", "linspace")
"""Which layers of its teacher a student keeps, by name."""


def known_model(name: str) -> str:
    """``name``; raises ``ValueError`` where no model can be called so."""
    kind, _, rest = name.partition(":")
    if name not in MODELS[:3] and not (kind and rest):
        raise ValueError(f"unknown model {shorten(name)}{suggest(name, MODELS)}; allowed: {', '.join(MODELS)}")
    return name


def known_student(name: str) -> str:
    """The same of a student, which can be a part of its teacher too."""
    if name == "teacher":
        return name
    kind, _, rest = name.partition(":")
    if name not in MODELS[:3] and not (kind and rest):
        names = ("teacher", *MODELS)
        raise ValueError(f"unknown model {shorten(name)}{suggest(name, names)}; allowed: {', '.join(names)}")
    return name


ModelName = Annotated[str, AfterValidator(known_model)]
"""The name of a model."""


class ModelConfig(Section):
    """A model by name."""

    model: ModelName
    """``mlp``, ``convnet``, ``resnet``, ``timm:NAME``, ``torchvision:NAME``, ``hf:ID`` (or a folder),
    ``package:NAME/FOLDER`` (a folder inside an installed Python package) or ``pkg.module:callable``."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Passed to the model's constructor."""
    checkpoint: str | None = None
    """Weights: a safetensors file, a torch file readable with ``weights_only``, or a folder that a run exported."""


def _map(given: Any) -> Any:
    if isinstance(given, str) and given not in LAYER_MAPS:
        raise ValueError(
            f"unknown map {shorten(given)}{suggest(given, LAYER_MAPS)}; allowed: {', '.join(LAYER_MAPS)}, or a list"
        )
    return given


class LoraConfig(Section):
    """LoRA: low-rank matrices beside linear layers learn, all else stays. What is exported has them added in."""

    rank: Count = 16
    """r."""
    alpha: Positive | None = None
    """Scale, over r. Default: 2 r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Before the first matrix."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Names of linear layers (``[q_proj, v_proj]``); ``all-linear``: all but the output head. With the head
    (``lm_head``) and tied embeddings, what is exported is no longer tied."""
    bits: Literal[4] | None = None
    """``4``: the weights that stay are kept in NF4 (QLoRA); needs bitsandbytes."""


def _lora(given: Any) -> Any:
    return {"rank": given} if isinstance(given, int) and not isinstance(given, bool) else given


class StudentConfig(ModelConfig):
    """A model by name, or a part of its teacher."""

    model: Annotated[str, AfterValidator(known_student)]
    """As ``teacher.model``; or ``teacher``: cut from a transformers model by the keys below, which goes on as one."""
    layers: Count | None = None
    """How many of the teacher's layers are kept. Default: as ``map`` says, else all."""
    map: Annotated[str | list[Annotated[int, Field(ge=0)]] | None, BeforeValidator(_map)] = None
    """Which: ``every-other`` (DistilBERT: layer l is the teacher's layer 2l), ``first``, ``last``, ``linspace``,
    ``influence`` (those that change their input most on 256 training texts), or a list, from 0. Default:
    ``every-other``."""
    width: Count | None = None
    """Hidden size, of the teacher's heads that weigh most. Default: the teacher's."""
    heads: Count | None = None
    """Attention heads, in families whose heads have a size of their own; in others ``width`` decides."""
    intermediate: Count | None = None
    """Units of the feed-forward layers. Default: the teacher's."""
    embedding: Count | None = None
    """Rank of the token embeddings, in families that can have one of its own (ELECTRA, DeBERTa)."""
    vocabulary: Literal["corpus"] | None = None
    """``corpus``: only the tokens of the training texts are kept, and the tokenizer is rebuilt. Default: all."""
    initial: Literal["teacher", "random"] = "teacher"
    """Whether it starts from the teacher's weights."""
    lora: Annotated[LoraConfig | None, BeforeValidator(_lora)] = None
    """``lora: 16`` is short for ``lora: {rank: 16}``. Default: all weights learn."""
    qat: Literal["int8"] | None = None
    """``int8``: weights and inputs of its linear layers and convolutions are rounded to eight bits in every forward
    pass, in training and where its figures are measured, so that ``tutelage export --to int8`` costs little
    (quantisation-aware distillation; needs torchao). What is saved is an ordinary model. Default: none
    is."""

    @model_validator(mode="after")
    def _cut(self) -> StudentConfig:
        if self.qat is not None and self.lora is not None:
            raise Misfit("'qat' rounds weights that learn, and beside adapters these stay; remove one", "qat")
        if self.model != "teacher":
            for key in ("layers", "map", "width", "heads", "intermediate", "embedding", "vocabulary"):
                if getattr(self, key) is not None:
                    raise Misfit(f"{key!r} is for a part of the teacher, model: teacher; remove it", key)
            if self.initial != "teacher":
                raise Misfit("'initial' is for a part of the teacher, model: teacher; remove it", "initial")
        elif self.options or self.checkpoint is not None:
            key = "options" if self.options else "checkpoint"
            raise Misfit(f"{key!r} is for a model of its own, and this one is cut from its teacher; remove it", key)
        return self
