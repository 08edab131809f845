"""Methods of language models."""

from collections.abc import Iterator
from typing import ClassVar, Literal

from tutelage.config.base import BelowOne, Count, CountOrZero, Fraction, HttpUrl, NotNegative, Positive, Section
from tutelage.config.methods.base import Layers, MethodOptions, labels_weight_misfit

Divergence = Literal["kl", "reverse_kl", "js", "skew_kl", "tvd"]


class TokenLossOptions(MethodOptions):
    """The soft labels and the next tokens, which several methods have."""

    divergence: Divergence = "kl"
    """D: ``kl``; ``reverse_kl`` (MiniLLM); ``js`` with ``beta`` (GKD); ``skew_kl`` with ``skew`` and ``reverse``
    (DistiLLM); ``tvd``."""
    temperature: Positive = 1.0
    """T of the soft labels."""
    alpha: NotNegative = 0.9
    """Weight of the soft labels; at most 1 unless ``hard`` is given."""
    hard: NotNegative | None = None
    """Weight of the next tokens. Default: 1 - alpha."""
    beta: Fraction | None = None
    """Of ``js``: 0 is like ``kl``, 1 like ``reverse_kl``. Default: 0.5."""
    skew: BelowOne | None = None
    """Of ``skew_kl``: the other side's share of the mixture. Default: 0.1."""
    reverse: bool | None = None
    """Of ``skew_kl``: from the student to the mixture. Default: from the teacher."""

    def misfits(self) -> Iterator[tuple[str, str]]:
        """Options of another divergence, or a negative weight of the labels."""
        for name, owner in (("beta", "js"), ("skew", "skew_kl"), ("reverse", "skew_kl")):
            if getattr(self, name) is not None and self.divergence != owner:
                yield name, f"{name!r} is for divergence {owner}, this is {self.divergence}; leave it out"
        yield from labels_weight_misfit(self.alpha, self.hard)


class TokenOptions(TokenLossOptions):
    """Language models, token by token: alpha * T^2 * D(teacher, student) + (1 - alpha) * CE with the next tokens.
    The logits of all tokens never exist at once."""

    accepts_remote_teacher: ClassVar[bool] = True
    kind: Literal["token"] = "token"
    """For causal language models of one tokenizer and data of task causal."""
    hidden: NotNegative = 0.0
    """Weight of 1 - cosine of mapped layers' hidden states, through linear layers if the widths differ."""
    layers: Literal["uniform", "last"] | Layers = "uniform"
    """The teacher's layer for each of the student's, for ``hidden``; or a list, counted from 1, where ``null`` leaves
    a layer out."""


class RolloutsOptions(Section):
    """A server that generates the student's answers. Every few steps it gets the student's weights, in a folder that
    it must be able to read."""

    url: HttpUrl
    """Its address, usually with ``/v1`` at the end."""
    kind: Literal["vllm", "openai"] = "vllm"
    """``vllm``: takes and returns token ids, and reloads its weights; start it with ``VLLM_SERVER_DEV_MODE=1``.
    ``openai``: any server with ``/v1/completions``, which takes and returns text and loads a model by the path of its
    folder, as ``transformers serve`` does."""
    model: str | None = None
    """The name of the model. Default: for ``vllm`` the first that it serves, for ``openai`` the student's folder."""
    every: Count | None = 10
    """Steps between updates of its weights; 1: before each step. ``null``: never, so its own model generates; for
    ``openai`` with ``model``."""
    folder: str | None = None
    """The folder for the weights. Default: a temporary folder of this machine."""
    key_env: str | None = None
    """Name of the environment variable with the API key. Default: no key is sent."""
    concurrency: Count = 16
    """Most requests in flight."""
    timeout: Positive = 300.0
    """Seconds for an answer, or for loading weights, while other processes wait."""
    max_retry_time: Positive = 200.0
    """Seconds without an answer after which the run stops."""

    def misfits(self) -> Iterator[tuple[str, str]]:
        """A fixed model name and weights that change."""
        if self.kind == "openai" and (self.every is None) != (self.model is not None):
            what = "leave 'model' out, or set every: null and name the model"
            yield "model", f"kind: openai names new weights by their folder: {what}"


class OnPolicyOptions(TokenOptions):
    """Language models, trained on the student's own answers: with probability lambda the student generates the
    answers of a batch, and the teacher scores them (GKD). Not with a cache, nor with packed rows."""

    accepts_remote_teacher: ClassVar[bool] = False
    kind: Literal["on-policy"] = "on-policy"  # type: ignore[assignment]
    """For causal language models of one tokenizer and data of task causal with prompts: conversations, or pairs."""
    lmbda: Fraction = 0.5
    """Share of batches whose answers the student generates: 0 is like ``token``, 1 is all."""
    divergence: Divergence = "js"
    """D, as in ``token``. With ``reverse_kl`` and ``lmbda: 1`` MiniLLM's, of one step."""
    alpha: NotNegative = 1.0
    """Weight of the soft labels; at most 1 unless ``hard`` is given."""
    max_new_tokens: Count = 128
    """Most tokens that the student generates for a prompt."""
    max_prompt_tokens: Count = 512
    """Most tokens of a prompt; longer prompts are truncated at the start."""
    sampling_temperature: NotNegative = 1.0
    """Temperature of the student's sampling; 0 takes the most probable token."""
    replay_buffer: CountOrZero = 0
    """Size of the replay buffer, in answers (DistiLLM); 0: none."""
    replay_share: Fraction | Literal["rising"] = 0.5
    """Share of the student's batches that come from the replay buffer, once it holds enough; ``rising``: from 0 at
    the first step to 1 at the last (DistiLLM)."""
    long: NotNegative = 0.0
    """Weight of the part of MiniLLM's loss that rewards a token for the tokens after it. Needs ``divergence:
    reverse_kl``, ``temperature: 1``, ``sampling_temperature: 1`` and ``replay_buffer: 0``."""
    mix: BelowOne = 0.0
    """The teacher's share of the sampling distribution (MiniLLM: 0.2); each token's loss is
    weighted by the student's probability over the mixture's. Needs ``sampling_temperature: 1`` and
    ``replay_buffer: 0``."""
    adaptive: Fraction = 0.0
    """Increase of lambda at an evaluation whose loss is ``slack`` above that of the last increase (DistiLLM: 0.1,
    with ``lmbda: 0``). Needs validation data."""
    slack: NotNegative = 0.1
    """Of ``adaptive``: the smallest increase of the loss that counts, in nats."""
    rollouts: RolloutsOptions | None = None
    """A server that generates the answers. Default: the student does, in this process. See below."""

    def misfits(self) -> Iterator[tuple[str, str]]:
        """Keys that ``long`` and ``mix`` exclude."""
        yield from super().misfits()
        required = (self.divergence, self.temperature, self.sampling_temperature, self.replay_buffer)
        if self.long and required != ("reverse_kl", 1.0, 1.0, 0):
            what = "divergence: reverse_kl, temperature: 1, sampling_temperature: 1 and replay_buffer: 0"
            yield "long", f"'long' needs {what}"
        if self.mix and required[2:] != (1.0, 0):
            yield "mix", "'mix' needs sampling_temperature: 1 and replay_buffer: 0"
        for key in ("long", "mix"):
            if getattr(self, key) and self.rollouts is not None:
                yield "rollouts", f"{key!r} needs answers of the student itself; remove 'rollouts'"


class CrossTokenizerOptions(TokenLossOptions):
    """A language model whose teacher has another tokenizer: alpha * soft + (1 - alpha) * CE with the next tokens.
    Tokens of both are aligned by their bytes; chat templates and special tokens may differ."""

    cross_tokenizer: ClassVar[bool] = True
    kind: Literal["cross-tokenizer"] = "cross-tokenizer"
    """For causal language models and data of task causal, whose rows are not packed."""
    compare: Literal["spans", "uld"] = "spans"
    """``spans``: T^2 * D over the entries that both vocabularies have, where both predict the same one; elsewhere D
    of the span's probabilities, products over its tokens. ``uld``: sorted probabilities (Boizard et al.)."""
    alpha: Positive = 0.9
    """Weight of the soft labels; at most 1 unless ``hard`` is given."""
    rest: Literal["bucket", "uld"] = "bucket"
    """Of ``spans``: how to treat the entries that only one vocabulary has: ``bucket``, as one outcome; ``uld``: in
    addition, their sorted probabilities are compared."""

    def misfits(self) -> Iterator[tuple[str, str]]:
        """Keys of ``compare: spans`` for ``uld``."""
        yield from super().misfits()
        if self.compare == "uld" and (self.divergence, self.rest) != ("kl", "bucket"):
            yield "compare", "'divergence' and 'rest' are for compare: spans, this is uld; leave them out"


class SequenceOptions(MethodOptions):
    """Maximum likelihood of the next tokens: of a teacher's answers, sequence-level distillation (Alpaca). No teacher
    runs."""

    kind: Literal["sequence"] = "sequence"
    """For causal language models and data of task causal."""

    needs_teacher: ClassVar[bool] = False
