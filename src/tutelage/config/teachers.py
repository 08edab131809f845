"""The sections of a recipe's teacher: one model, an ensemble, or a model behind a server."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from tutelage.config.base import Count, CountOrZero, HttpUrl, NotNegative, Positive, Section, Seed
from tutelage.config.data import Augments
from tutelage.config.models import ModelConfig, ModelName
from tutelage.config.train import TrainConfig
from tutelage.errors import shorten


class CacheConfig(Section):
    """Teacher outputs on disk: written in the first epoch or by ``tutelage cache``, then read."""

    path: str | None = None
    """The folder. Default: a folder in ``runs/cache/`` whose name is a hash of teacher, data and views, so that runs
    that share these share the cache."""
    keep: Literal["dense", "topk", "sampled", "stochastic_rounding", "hidden"] = "dense"
    """How logits are stored: ``dense``: all; ``topk``: the ``k`` largest and the probability mass of the rest;
    ``sampled``: an unbiased sample of ``draws`` draws; ``stochastic_rounding``: ``draws`` times the probabilities,
    rounded at random, the most accurate for its size; ``hidden``: the input of the output head, smaller than logits
    if there are more classes than hidden units. The three sparse forms hold one temperature each."""
    dtype: Literal["bf16", "fp16", "fp32"] = "fp16"
    """Type of the stored numbers."""
    k: Count = 8
    """For ``topk``: number of classes stored for each row."""
    draws: Annotated[int, Field(ge=1, le=65_535)] = 64
    """For ``sampled`` and ``stochastic_rounding``: number of draws for each row."""
    head: CountOrZero = 0
    """For ``sampled``: number of the largest classes that are stored exactly; draws are from the others."""
    power: Positive = 1.0
    """For ``sampled``: draws are from p^power, with importance weights. Values other than 1 have more variance."""
    temperatures: list[Positive] = Field(default_factory=list)
    """Temperatures at which ``topk``, ``sampled`` and ``stochastic_rounding`` store distributions. Default: the
    method's temperature."""


def cache_section(given: Any) -> Any:
    """``true``, ``false`` or a folder as a section; ``None`` for no cache."""
    if isinstance(given, bool):
        return {} if given else None
    return {"path": given} if isinstance(given, str) else given


class InferenceConfig(Section):
    """How a teacher runs. Its outputs change by rounding only, and its metrics are measured in this form."""

    dtype: Literal["bf16", "fp16", "int8"] | None = None
    """Compute type of the teacher's copy, independent of ``train.precision``. ``int8`` quantises linear layers, on
    CPUs; ``fp16`` is slow on most CPUs. Default: the type of its weights."""
    compile: bool | None = None
    """Use ``torch.compile``. Default: no."""
    batch_size: Count | None = None
    """Largest batch of the teacher; larger batches are split. Default: the student's batch."""
    device: str | None = None
    """The device, such as ``cpu`` or ``cuda:1``. Default: the student's."""


class TeacherInferenceConfig(InferenceConfig):
    """How the teacher runs; for an ensemble, the defaults of its members."""

    overlap: bool = False
    """Compute the teacher outputs of the next batch while the student trains: on a CUDA stream of its own, else in a
    thread, which needs a free core. No effect if the teacher outputs are in memory."""
    process: bool = False
    """Like ``overlap``, in a separate process, if the teacher's Python code slows the student down. Batches are
    copied."""
    sharded: bool = False
    """Shard a teacher that does not fit on one GPU over the training processes, which gather one block at a time
    (FSDP2). Main memory must hold all of it. Not with a cache."""

    def misfits(self) -> Iterator[tuple[str, str]]:
        """Keys that exclude each other."""
        if self.overlap and self.process:
            yield "overlap", "'process' includes 'overlap'; remove 'overlap'"
        if self.sharded:
            given = {**self.model_dump(exclude_none=True), "dtype": self.dtype == "int8"}
            for key in ("overlap", "process", "compile", "batch_size", "device", "dtype"):
                if given.get(key):
                    yield key, f"a sharded teacher runs on all processes and takes no {key!r}; remove it"


class MemberConfig(ModelConfig):
    """A member of an ensemble: a teacher, which is trained first if it has no weights."""

    trained: bool | None = None
    """Whether the model comes with weights. Default: yes with a ``checkpoint``, an ``hf:`` id, timm's ``pretrained``
    or torchvision's ``weights``."""
    seed: Seed | None = None
    """Seed of its initialisation and order of samples, if it is trained. Default: the first of ``seeds``, plus the
    number of the member."""
    trainable: Literal["all", "head"] | None = None
    """Which weights are trained: ``all``, or ``head``: those that were not loaded, such as a new output layer.
    Default: all; for task ``mlm`` the head, which is tied to frozen embeddings."""
    train: TrainConfig | None = None
    """Training, or fine-tuning of a model with weights; missing keys are taken from the recipe's ``train``. Default:
    no training with weights, the recipe's ``train`` without."""
    inference: InferenceConfig | None = None
    """How it runs. See below."""

    def misfits(self) -> Iterator[tuple[str, str]]:
        """Both a checkpoint and a training."""
        if self.train is not None and self.checkpoint is not None:
            yield (
                "checkpoint",
                ("teacher has both 'checkpoint' and 'train', and a checkpoint is not trained again; remove one"),
            )


Weights = list[NotNegative] | Literal["learned"]


class EnsembleConfig(Section):
    """How the outputs of an ensemble are averaged."""

    combine: Literal["probabilities", "logits"] | None = None
    """Average the members' probabilities or logits. Default: ``probabilities``."""
    weights: Weights | None = None
    """One weight for each member, or ``learned``: fitted on the validation split by the cross-entropy of the
    ensemble. Default: equal weights."""
    average_temperature: Positive | None = None
    """T at which probabilities are averaged. With the method's T, the student gets the mean of the members'
    distributions at T. Default: 1."""


class RemoteTeacherConfig(Section):
    """A teacher behind a server, which returns the most probable next tokens as token ids. Student and teacher share
    a tokenizer: ``data.tokenizer``, or the student's. Needs T = 1 and divergence kl."""

    url: HttpUrl
    """Address of the server; for vLLM it ends in ``/v1``, as in ``http://127.0.0.1:8000/v1``."""
    kind: Literal["vllm", "llama.cpp"] = "vllm"
    """``vllm``: one request for each text. ``llama.cpp``: its server does not score prompts, so there is one request
    for each token; use it for small data sets, or to fill a cache once."""
    model: str | None = None
    """Name of the model on the server. Default: the first model that the server lists."""
    k: Count = 20
    """Number of most probable tokens; all others are one outcome. vLLM returns at most 20 unless it is started with
    ``--max-logprobs``."""
    key_env: str | None = None
    """Name of the environment variable with the API key; a recipe never holds a key. Default: no key is sent."""
    concurrency: Count = 8
    """Most requests in flight."""
    timeout: Positive = 120.0
    """Timeout of a request, in seconds."""
    max_retry_time: Positive = 300.0
    """Seconds of retries after which the run fails if the server does not answer. A cache keeps the rows so far."""


class TeacherConfig(MemberConfig, EnsembleConfig):
    """The teacher, or the members of an ensemble. Models without weights are trained first."""

    model: ModelName | None = None  # type: ignore[assignment]
    """``mlp``, ``convnet``, ``resnet``, ``timm:NAME``, ``torchvision:NAME``, ``hf:ID`` or ``pkg.module:callable``.
    Left out with ``members`` or ``endpoint``."""
    endpoint: RemoteTeacherConfig | None = None
    """A teacher behind a server, in place of ``model``. See below."""
    members: Annotated[list[MemberConfig], Field(min_length=2)] | None = None
    """Members of an ensemble. Those without weights are trained first, each with its own seed; keys missing in their
    ``train`` come from ``teacher.train``, then from ``train``."""
    route: dict[str, int | list[int]] | None = None
    """For each value of the column ``data.route`` the index, from 0, of the member that teaches these samples, or a
    list of indices. Default: all members teach all samples."""
    inference: TeacherInferenceConfig | None = None
    """How it runs. See below."""
    augment: Augments | None = None
    """Augmentations of the teacher's training. Default: those of ``data``."""
    cache: Annotated[CacheConfig | None, BeforeValidator(cache_section)] = None
    """Store the teacher outputs on disk: ``true``, a folder, or a section. See below."""
    mode: Literal["eval", "train_bn"] = "eval"
    """``train_bn``: batch norm uses the statistics of the batch; the running ones do not change."""

    def misfits(self) -> Iterator[tuple[str, str]]:
        """Keys of another kind of teacher, and keys that exclude each other."""
        yield from super().misfits()
        given = [key for key in ("model", "members", "endpoint") if getattr(self, key) is not None]
        if len(given) != 1:
            what = f"both {given[0]!r} and {given[1]!r}" if given else "neither 'model' nor 'members' nor 'endpoint'"
            yield given[1] if given else "model", f"the teacher has {what}; give one"
        local = ("options", "checkpoint", "trained", "train", "seed", "trainable", "inference", "augment", "mode")
        for key in local if self.endpoint is not None else ():
            if getattr(self, key) not in (None, {}, "eval"):
                yield key, f"{key!r} is for a local model, and this teacher is behind a server; remove it"
        inference = self.inference or TeacherInferenceConfig()
        if self.cache is not None and (inference.overlap or inference.process):
            key = "process" if inference.process else "overlap"
            what = f"with a cache the teacher outputs are read from disk, without prefetching; remove {key!r}"
            yield "inference", what
        for key in ("cache", "members", "mode") if inference.sharded else ():
            if getattr(self, key) not in (None, "eval"):
                yield key, f"a sharded teacher runs on all processes and takes no {key!r}; remove it"
        if self.members is None:
            for key in ("combine", "weights", "average_temperature", "route"):
                if getattr(self, key) is not None:
                    yield key, f"{key!r} is for an ensemble, and there are no 'members'; remove it"
            return
        for key in ("options", "checkpoint", "trained", "train", "seed"):
            if getattr(self, key) not in (None, {}):
                yield key, f"{key!r} is for a single teacher; give it to each of 'members'"
        many = len(self.members)
        if isinstance(self.weights, list):
            if len(self.weights) != many:
                yield "weights", f"{len(self.weights)} weights for {many} members; give one for each"
            if not sum(self.weights):
                yield "weights", "all weights are 0; at least one must be above"
        if self.average_temperature is not None and self.combine == "logits":
            what = "logits are averaged without a temperature; remove 'average_temperature'"
            yield "average_temperature", what
        if self.route is not None:
            yield from self._misfits_of_route(self.route, many)

    def _misfits_of_route(self, route: dict[str, int | list[int]], many: int) -> Iterator[tuple[str, str]]:
        if self.weights == "learned":
            yield "weights", "learned weights need members that teach all samples; remove 'route' or 'weights'"
        if self.mode == "train_bn":
            yield "mode", "a routed member gets a part of each batch, and train_bn needs all of it; use mode: eval"
        members = {value: [those] if isinstance(those, int) else those for value, those in route.items()}
        for value, those in members.items():
            if not those or not all(0 <= m < many for m in those):
                yield f"route.{value}", f"route {shorten(value)} names {shorten(those)}; allowed: 0 to {many - 1}"
                return
            if isinstance(self.weights, list) and not any(self.weights[m] for m in those if m < len(self.weights)):
                yield f"route.{value}", f"no member with a weight above 0 teaches route {shorten(value)}; give one"
        idle = sorted(set(range(many)) - {m for those in members.values() for m in those})
        if idle:
            yield "route", f"member {idle[0]} has no route; add one, or remove the member"

    @property
    def each(self) -> list[MemberConfig]:
        """The members; a single teacher is its only one."""
        return [self] if self.members is None else self.members
