"""The sections of a recipe's teacher: one, several as one, or one behind a server."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from tutelage.config.base import Count, NotNegative, Positive, Section, Seed
from tutelage.config.data import Augments
from tutelage.config.messages import Misfit
from tutelage.config.models import ModelConfig, ModelName
from tutelage.config.train import TrainConfig
from tutelage.errors import shorten


class CacheConfig(Section):
    """The teacher's word on disk: written in the first epoch or by ``tutelage cache``, then read."""

    path: str | None = None
    """Its folder. Default: ``runs/cache/`` and a name made of all that it depends on, so that runs with the same
    teacher, data and views share one, and others do not meet."""
    keep: Literal["dense", "topk", "sampled", "stochastic_rounding", "hidden"] = "dense"
    """How the teacher's logits are stored: ``dense``, all of them; ``topk``, the ``k`` largest and the probability
    mass of the others; ``sampled``, an unbiased sample of ``draws`` draws; ``stochastic_rounding``, ``draws`` times
    the probabilities, rounded at random, the most accurate for its size; ``hidden``, the input of the output
    head, whose weights are stored once: smaller than logits where there are more classes than hidden units, as in
    language models. ``topk``, ``sampled`` and ``stochastic_rounding`` are for the method's temperature only."""
    dtype: Literal["bf16", "fp16", "fp32"] = "fp16"
    """Of the numbers that are kept."""
    k: Count = 8
    """Classes a row, of ``topk``."""
    draws: Annotated[int, Field(ge=1, le=65_535)] = 64
    """Draws a row, of ``sampled`` and ``stochastic_rounding``."""
    head: Annotated[int, Field(ge=0)] = 0
    """Of ``sampled``: this many of the largest classes are kept exactly, and the draws are from the others."""
    power: Positive = 1.0
    """Of ``sampled``: draws are from p^power, with weights that make up for it. Other than 1 has more variance."""
    temperatures: list[Positive] = Field(default_factory=list)
    """At which ``topk``, ``sampled`` and ``stochastic_rounding`` keep the distribution. Default: the method's."""


def cache_section(given: Any) -> Any:
    """What ``true``, ``false``, a folder or a section means, as a section; ``None`` for no cache."""
    if isinstance(given, bool):
        return {} if given else None
    return {"path": given} if isinstance(given, str) else given


class InferenceConfig(Section):
    """How a teacher runs. What it says stays the same but for rounding; its figures are of it as it runs."""

    dtype: Literal["bf16", "fp16", "int8"] | None = None
    """Numbers that a copy of it computes in, whatever ``train.precision``: ``int8`` quantises linear layers, on CPUs;
    ``fp16`` is slow on most CPUs. Default: its own."""
    compile: bool | None = None
    """``torch.compile`` it. Default: no."""
    batch_size: Count | None = None
    """Most images that it takes at once; a longer batch is cut for it. Default: the student's batch."""
    device: str | None = None
    """Where it runs, such as ``cpu`` or ``cuda:1``. Default: where the student does."""


class TeacherInferenceConfig(InferenceConfig):
    """How the teacher runs; of an ensemble, what its members leave out."""

    overlap: bool = False
    """Compute the next batch's signal while the student trains on this one: on a GPU on a stream of its own, else in
    a thread, for which a core should be free. Without use where the teacher's word is remembered."""
    process: bool = False
    """The same from a process of its own, for a teacher whose Python holds the student up. Batches are copied."""
    sharded: bool = False
    """Where several processes train, each keeps a part of the teacher's blocks where it runs, and they gather one
    block at a time (FSDP2), for a teacher that does not fit each GPU. It stays whole in main memory. Not with a
    cache."""

    @model_validator(mode="after")
    def _one(self) -> TeacherInferenceConfig:
        if self.overlap and self.process:
            raise Misfit("a process of its own overlaps anyway; remove 'overlap'", "overlap")
        if self.sharded:
            given = {**self.model_dump(exclude_none=True), "dtype": self.dtype == "int8"}
            for key in ("overlap", "process", "compile", "batch_size", "device", "dtype"):
                if given.get(key):
                    raise Misfit(f"a sharded teacher runs on all processes at once, as it is; remove {key!r}", key)
        return self


class MemberConfig(ModelConfig):
    """A member of an ensemble: a teacher of its own, trained first where it has no weights."""

    trained: bool | None = None
    """Whether the model comes with its weights. Default: with a ``checkpoint``, an ``hf:`` id, timm's
    ``pretrained`` or torchvision's ``weights`` it does."""
    seed: Seed | None = None
    """Of its weights and its order of images, where it is trained. Default: the first of ``seeds``, and each member
    of an ensemble the next."""
    trainable: Literal["all", "head"] | None = None
    """What of it is trained: ``head`` is what did not come with its weights, such as a new output layer. Default:
    all; of task ``mlm`` the head, which ties to embeddings that stay."""
    train: TrainConfig | None = None
    """Its own training, or fine-tuning where it has weights. What it leaves out is taken from the recipe's ``train``.
    Default: none with weights, the recipe's ``train`` without."""
    inference: InferenceConfig | None = None
    """How it runs."""

    @model_validator(mode="after")
    def _trained_once(self) -> MemberConfig:
        if self.train is not None and self.checkpoint is not None:
            raise Misfit(
                "teacher has both 'checkpoint' and 'train', and one with weights is not trained again; remove one",
                "checkpoint",
            )
        return self


Weights = list[NotNegative] | Literal["learned"]


class EnsembleConfig(Section):
    """How the members of an ensemble become one."""

    combine: Literal["probabilities", "logits"] | None = None
    """What of the members is averaged. Default: ``probabilities``."""
    weights: Weights | None = None
    """One for each member, or ``learned``: fitted on the validation split, by the cross-entropy of the ensemble with
    its labels. Default: all the same."""
    average_temperature: Positive | None = None
    """T at which probabilities are averaged. At the method's own T, the student gets the mean of what each member
    says at T. Default: 1."""


class ServedConfig(Section):
    """A teacher behind a server: the likeliest next tokens of each token that counts, by token ids. Its tokenizer is
    the student's, which ``data.tokenizer`` or the student brings; T is 1 and the divergence kl."""

    url: Annotated[str, Field(pattern=r"^https?://[^\s?#@]+$")]
    """Where it is: of vLLM with ``/v1`` at its end, as ``http://127.0.0.1:8000/v1``."""
    kind: Literal["vllm", "llama.cpp"] = "vllm"
    """``vllm``: all of a text in one request. ``llama.cpp``: its server says nothing of a prompt, so it is asked for
    one token after each beginning of a text; for small sets, or once for a cache."""
    model: str | None = None
    """Its name there. Default: the first that it serves."""
    k: Count = 20
    """How many of the likeliest tokens; all others are one outcome. vLLM gives 20 at most unless it is started with
    ``--max-logprobs``."""
    key_env: str | None = None
    """Name of the environment variable that holds the key, which never stands in a recipe. Default: none is sent."""
    concurrency: Count = 8
    """The most texts that are asked about at once."""
    timeout: Positive = 120.0
    """Seconds that one request may take."""
    max_retry_time: Positive = 300.0
    """Seconds after which a server that does not answer is given up; what is in a cache by then is kept."""


class TeacherConfig(MemberConfig, EnsembleConfig):
    """The teacher, or the members of an ensemble: each trained first where it has no weights of its own."""

    model: ModelName | None = None  # type: ignore[assignment]
    """``mlp``, ``convnet``, ``resnet``, ``timm:NAME``, ``torchvision:NAME``, ``hf:ID`` or ``pkg.module:callable``; or
    none, and ``members``."""
    endpoint: ServedConfig | None = None
    """In the place of ``model``: one behind a server. See below."""
    members: Annotated[list[MemberConfig], Field(min_length=2)] | None = None
    """Teachers that speak as one. Those without weights are trained first, each with a seed of its own; what their
    ``train`` leaves out is taken from ``teacher.train``, then from ``train``."""
    route: dict[str, int | list[int]] | None = None
    """For each value of the column ``data.route`` the member that teaches such images, numbered from 0, or a list of
    several. Default: all teach all."""
    inference: TeacherInferenceConfig | None = None
    """How it runs."""
    augment: Augments | None = None
    """Augmentations of its own training. Default: those of ``data``."""
    cache: Annotated[CacheConfig | None, BeforeValidator(cache_section)] = None
    """Keep the teacher's word on disk: ``true``, a folder, or a section. See below."""
    mode: Literal["eval", "train_bn"] = "eval"
    """``train_bn``: normalise by the statistics of the batch, without moving the running ones."""

    @model_validator(mode="after")
    def _one_or_many(self) -> TeacherConfig:
        given = [key for key in ("model", "members", "endpoint") if getattr(self, key) is not None]
        if len(given) != 1:
            what = f"both {given[0]!r} and {given[1]!r}" if given else "neither 'model' nor 'members' nor 'endpoint'"
            raise Misfit(f"the teacher has {what}; give one", given[1] if given else "model")
        if self.endpoint is not None:
            for key in ("options", "checkpoint", "trained", "train", "seed", "trainable", "inference", "augment"):
                if getattr(self, key) not in (None, {}):
                    raise Misfit(f"{key!r} is of a model in this process, and this one is behind a server", key)
            if self.mode != "eval":
                raise Misfit("'mode' is of a model in this process, and this one is behind a server", "mode")
        if (
            self.cache is not None
            and self.inference is not None
            and (self.inference.overlap or self.inference.process)
        ):
            key = "process" if self.inference.process else "overlap"
            raise Misfit(f"a teacher whose word is read from disk is not asked ahead; remove {key!r}", "inference")
        if self.inference is not None and self.inference.sharded:
            asked = {
                "cache": self.cache is not None,
                "members": self.members is not None,
                "mode": self.mode != "eval",
            }
            for key, there in asked.items():
                if there:
                    raise Misfit(f"all processes ask a sharded teacher at once, as it is; remove {key!r}", key)
        if self.members is None:
            for key in ("combine", "weights", "average_temperature", "route"):
                if getattr(self, key) is not None:
                    raise Misfit(f"{key!r} is for an ensemble, and there are no 'members'; remove it", key)
            return self
        for key in ("options", "checkpoint", "trained", "train", "seed"):
            if getattr(self, key) not in (None, {}):
                raise Misfit(f"{key!r} is of a single teacher; give it to each of 'members'", key)
        many = len(self.members)
        if isinstance(self.weights, list):
            if len(self.weights) != many:
                raise Misfit(f"{len(self.weights)} weights for {many} members; give one for each", "weights")
            if not sum(self.weights):
                raise Misfit("all weights are 0; at least one must be above", "weights")
        if self.average_temperature is not None and self.combine == "logits":
            raise Misfit("logits are averaged as they are; remove 'average_temperature'", "average_temperature")
        if self.route is not None:
            self._routed(self.route, many)
        return self

    def _routed(self, route: dict[str, int | list[int]], many: int) -> None:
        if self.weights == "learned":
            raise Misfit(
                "weights are learned of members that teach all images; remove 'route' or 'weights'", "weights"
            )
        if self.mode == "train_bn":
            raise Misfit("a routed member sees parts of batches only, and train_bn needs all; use mode: eval", "mode")
        taught = {value: [those] if isinstance(those, int) else those for value, those in route.items()}
        for value, those in taught.items():
            if not those or not all(0 <= m < many for m in those):
                raise Misfit(
                    f"route {shorten(value)} names {shorten(those)}; allowed: 0 to {many - 1}",
                    "route",
                )
            if isinstance(self.weights, list) and not any(self.weights[m] for m in those):
                raise Misfit(f"no member with a weight above 0 teaches route {shorten(value)}; give one", "route")
        idle = sorted(set(range(many)) - {m for those in taught.values() for m in those})
        if idle:
            raise Misfit(f"no route leads to member {idle[0]}; give it one, or remove it", "route")

    @property
    def each(self) -> list[MemberConfig]:
        """The members; a single teacher is its only one."""
        return [self] if self.members is None else self.members
