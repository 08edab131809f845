"""The sections of a recipe's teacher: one model, an ensemble, or a model behind a server."""

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
    """Teacher outputs on disk: written in the first epoch or by ``tutelage cache``, then read."""

    path: str | None = None
    """The folder. Default: a folder in ``runs/cache/`` whose name is a hash of teacher, data and views, so that runs
    with the same ones share a cache."""
    keep: Literal["dense", "topk", "sampled", "stochastic_rounding", "hidden"] = "dense"
    """How the teacher's logits are stored: ``dense``, all of them; ``topk``, the ``k`` largest and the probability
    mass of the others; ``sampled``, an unbiased sample of ``draws`` draws; ``stochastic_rounding``, ``draws`` times
    the probabilities, rounded at random, the most accurate for its size; ``hidden``, the input of the output
    head, whose weights are stored once: smaller than logits where there are more classes than hidden units, as in
    language models. ``topk``, ``sampled`` and ``stochastic_rounding`` are for the method's temperature only."""
    dtype: Literal["bf16", "fp16", "fp32"] = "fp16"
    """Type of the stored numbers."""
    k: Count = 8
    """For ``topk``: stored classes for each row."""
    draws: Annotated[int, Field(ge=1, le=65_535)] = 64
    """For ``sampled`` and ``stochastic_rounding``: draws for each row."""
    head: Annotated[int, Field(ge=0)] = 0
    """For ``sampled``: this many of the largest classes are stored exactly; the draws are from the others."""
    power: Positive = 1.0
    """For ``sampled``: draws are from p^power, with importance weights. Values other than 1 have more variance."""
    temperatures: list[Positive] = Field(default_factory=list)
    """Temperatures at which ``topk``, ``sampled`` and ``stochastic_rounding`` store distributions. Default: that of
    the method."""


def cache_section(given: Any) -> Any:
    """``true``, ``false`` or a folder as a section; ``None`` for no cache."""
    if isinstance(given, bool):
        return {} if given else None
    return {"path": given} if isinstance(given, str) else given


class InferenceConfig(Section):
    """How a teacher runs. Its outputs change by rounding only, and its metrics are measured in this form."""

    dtype: Literal["bf16", "fp16", "int8"] | None = None
    """Type that a copy of the teacher computes in, independent of ``train.precision``. ``int8`` quantises linear
    layers, on CPUs; ``fp16`` is slow on most CPUs. Default: the type of its weights."""
    compile: bool | None = None
    """Whether to use ``torch.compile``. Default: no."""
    batch_size: Count | None = None
    """Largest batch of the teacher; larger batches are split. Default: the student's batch."""
    device: str | None = None
    """The device, such as ``cpu`` or ``cuda:1``. Default: the student's."""


class TeacherInferenceConfig(InferenceConfig):
    """How the teacher runs; for an ensemble, the defaults of its members."""

    overlap: bool = False
    """Compute the teacher outputs of the next batch while the student trains: on a CUDA stream of its own, else in a
    thread, which needs a free core. Without effect if the teacher outputs are in memory."""
    process: bool = False
    """The same in a separate process, if the teacher's Python code slows the student down. Batches are copied."""
    sharded: bool = False
    """Shard the teacher over the training processes, which gather one block at a time (FSDP2), for a teacher that
    does not fit on one GPU. Main memory holds all of it. Not with a cache."""

    @model_validator(mode="after")
    def _check_modes(self) -> TeacherInferenceConfig:
        if self.overlap and self.process:
            raise Misfit("'process' includes 'overlap'; remove 'overlap'", "overlap")
        if self.sharded:
            given = {**self.model_dump(exclude_none=True), "dtype": self.dtype == "int8"}
            for key in ("overlap", "process", "compile", "batch_size", "device", "dtype"):
                if given.get(key):
                    raise Misfit(f"a sharded teacher runs on all processes and takes no {key!r}; remove it", key)
        return self


class MemberConfig(ModelConfig):
    """A member of an ensemble: a teacher, which is trained first if it has no weights."""

    trained: bool | None = None
    """Whether the model comes with its weights. Default: with a ``checkpoint``, an ``hf:`` id, timm's
    ``pretrained`` or torchvision's ``weights`` it does."""
    seed: Seed | None = None
    """Seed of its initialisation and order of samples, if it is trained. Default: the first of ``seeds``, plus the
    number of the member."""
    trainable: Literal["all", "head"] | None = None
    """Which weights are trained: ``head``: those that were not loaded, such as a new output layer. Default: all; for
    task ``mlm`` the head, which is tied to frozen embeddings."""
    train: TrainConfig | None = None
    """Its own training, or fine-tuning where it has weights. What it leaves out is taken from the recipe's ``train``.
    Default: none with weights, the recipe's ``train`` without."""
    inference: InferenceConfig | None = None
    """How it runs. See below."""

    @model_validator(mode="after")
    def _check_training(self) -> MemberConfig:
        if self.train is not None and self.checkpoint is not None:
            raise Misfit(
                "teacher has both 'checkpoint' and 'train', and a checkpoint is not trained again; remove one",
                "checkpoint",
            )
        return self


Weights = list[NotNegative] | Literal["learned"]


class EnsembleConfig(Section):
    """How the outputs of an ensemble are averaged."""

    combine: Literal["probabilities", "logits"] | None = None
    """Average the members' probabilities or logits. Default: ``probabilities``."""
    weights: Weights | None = None
    """One for each member, or ``learned``: fitted on the validation split by the cross-entropy of the ensemble.
    Default: equal weights."""
    average_temperature: Positive | None = None
    """T at which probabilities are averaged. With the T of the method, the student gets the mean of the members'
    distributions at T. Default: 1."""


class RemoteTeacherConfig(Section):
    """A teacher behind a server, which returns the most probable next tokens as token ids. Student and teacher share
    a tokenizer: ``data.tokenizer``, or the student's. Needs T = 1 and divergence kl."""

    url: Annotated[str, Field(pattern=r"^https?://[^\s?#@]+$")]
    """The URL; of vLLM with ``/v1`` at the end, as ``http://127.0.0.1:8000/v1``."""
    kind: Literal["vllm", "llama.cpp"] = "vllm"
    """``vllm``: one request for each text. ``llama.cpp``: its server does not score prompts, so there is one request
    for each token of a text; for small data sets, or to fill a cache once."""
    model: str | None = None
    """The model's name on the server. Default: the first that it lists."""
    k: Count = 20
    """Number of most probable tokens; all others are one outcome. vLLM returns 20 at most unless it is started with
    ``--max-logprobs``."""
    key_env: str | None = None
    """Name of the environment variable with the API key; a recipe never holds a key. Default: no key is sent."""
    concurrency: Count = 8
    """Most requests in flight."""
    timeout: Positive = 120.0
    """Timeout of a request, in seconds."""
    max_retry_time: Positive = 300.0
    """Seconds of retries after which the run fails if the server does not answer; a cache keeps the rows so far."""


class TeacherConfig(MemberConfig, EnsembleConfig):
    """The teacher, or the members of an ensemble. Models without weights are trained first."""

    model: ModelName | None = None  # type: ignore[assignment]
    """``mlp``, ``convnet``, ``resnet``, ``timm:NAME``, ``torchvision:NAME``, ``hf:ID`` or ``pkg.module:callable``; or
    none, and ``members``."""
    endpoint: RemoteTeacherConfig | None = None
    """A teacher behind a server, in place of ``model``. See below."""
    members: Annotated[list[MemberConfig], Field(min_length=2)] | None = None
    """The members of an ensemble. Those without weights are trained first, each with its own seed; keys that their
    ``train`` leaves out are taken from ``teacher.train``, then from ``train``."""
    route: dict[str, int | list[int]] | None = None
    """For each value of the column ``data.route`` the number, from 0, of the member that teaches these samples, or a
    list of numbers. Default: all members teach all samples."""
    inference: TeacherInferenceConfig | None = None
    """How it runs. See below."""
    augment: Augments | None = None
    """Augmentations of the teacher's training. Default: those of ``data``."""
    cache: Annotated[CacheConfig | None, BeforeValidator(cache_section)] = None
    """Store the teacher outputs on disk: ``true``, a folder, or a section. See below."""
    mode: Literal["eval", "train_bn"] = "eval"
    """``train_bn``: normalise by the statistics of the batch, without moving the running ones."""

    @model_validator(mode="after")
    def _check_teacher(self) -> TeacherConfig:
        given = [key for key in ("model", "members", "endpoint") if getattr(self, key) is not None]
        if len(given) != 1:
            what = f"both {given[0]!r} and {given[1]!r}" if given else "neither 'model' nor 'members' nor 'endpoint'"
            raise Misfit(f"the teacher has {what}; give one", given[1] if given else "model")
        if self.endpoint is not None:
            for key in ("options", "checkpoint", "trained", "train", "seed", "trainable", "inference", "augment"):
                if getattr(self, key) not in (None, {}):
                    raise Misfit(f"{key!r} is for a local model, and this teacher is behind a server; remove it", key)
            if self.mode != "eval":
                raise Misfit("'mode' is for a local model, and this teacher is behind a server; remove it", "mode")
        if (
            self.cache is not None
            and self.inference is not None
            and (self.inference.overlap or self.inference.process)
        ):
            key = "process" if self.inference.process else "overlap"
            raise Misfit(
                f"with a cache the teacher outputs are read from disk, without prefetching; remove {key!r}",
                "inference",
            )
        if self.inference is not None and self.inference.sharded:
            conflicts = {
                "cache": self.cache is not None,
                "members": self.members is not None,
                "mode": self.mode != "eval",
            }
            for key, there in conflicts.items():
                if there:
                    raise Misfit(f"a sharded teacher runs on all processes and takes no {key!r}; remove it", key)
        if self.members is None:
            for key in ("combine", "weights", "average_temperature", "route"):
                if getattr(self, key) is not None:
                    raise Misfit(f"{key!r} is for an ensemble, and there are no 'members'; remove it", key)
            return self
        for key in ("options", "checkpoint", "trained", "train", "seed"):
            if getattr(self, key) not in (None, {}):
                raise Misfit(f"{key!r} is for a single teacher; give it to each of 'members'", key)
        many = len(self.members)
        if isinstance(self.weights, list):
            if len(self.weights) != many:
                raise Misfit(f"{len(self.weights)} weights for {many} members; give one for each", "weights")
            if not sum(self.weights):
                raise Misfit("all weights are 0; at least one must be above", "weights")
        if self.average_temperature is not None and self.combine == "logits":
            raise Misfit(
                "logits are averaged without a temperature; remove 'average_temperature'", "average_temperature"
            )
        if self.route is not None:
            self._check_route(self.route, many)
        return self

    def _check_route(self, route: dict[str, int | list[int]], many: int) -> None:
        if self.weights == "learned":
            raise Misfit(
                "learned weights need members that teach all samples; remove 'route' or 'weights'", "weights"
            )
        if self.mode == "train_bn":
            raise Misfit(
                "a routed member gets a part of each batch, and train_bn needs all of it; use mode: eval", "mode"
            )
        members = {value: [those] if isinstance(those, int) else those for value, those in route.items()}
        for value, those in members.items():
            if not those or not all(0 <= m < many for m in those):
                raise Misfit(
                    f"route {shorten(value)} names {shorten(those)}; allowed: 0 to {many - 1}",
                    "route",
                )
            if isinstance(self.weights, list) and not any(self.weights[m] for m in those):
                raise Misfit(f"no member with a weight above 0 teaches route {shorten(value)}; give one", "route")
        idle = sorted(set(range(many)) - {m for those in members.values() for m in those})
        if idle:
            raise Misfit(f"member {idle[0]} has no route; add one, or remove the member", "route")

    @property
    def each(self) -> list[MemberConfig]:
        """The members; a single teacher is its only one."""
        return [self] if self.members is None else self.members
