"""Sections of a recipe's ``method``: one class for each kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from tutelage.config.base import Count, Fraction, Misfit, NotNegative, Positive, Section
from tutelage.config.models import ModelConfig
from tutelage.errors import suggest

SOFT_OBJECTIVES: dict[str, tuple[str, ...]] = {
    "binary_kd": (),
    "dist": ("beta", "gamma"),
    "dkd": ("alpha", "beta"),
    "js": ("beta",),
    "kd": ("standardize",),
    "margin_mse": (),
    "mlkd": ("temperatures", "instance", "batch", "classes"),
    "mse": (),
    "reverse_kl": (),
    "skew_kl": ("alpha", "reverse"),
    "soft_cross_entropy": (),
    "tvd": (),
}
"""Objectives on logits by name, each with its options."""

SOFT_TEMPERATURES: dict[str, float | None] = {
    "binary_kd": 4.0, "dist": 1.0, "dkd": 4.0, "js": 1.0, "kd": 4.0, "margin_mse": None, "mlkd": None, "mse": None,
    "reverse_kl": 1.0, "skew_kl": 1.0, "soft_cross_entropy": 4.0, "tvd": 1.0,
}  # fmt: skip
"""T of each where none is given; none for those that take none."""

SOFT_OF_TASK = {"classes": "kd", "multi-label": "binary_kd", "regression": "mse", "ranking": "margin_mse"}
"""The objective on logits that goes with what labels are, where none is given."""

FEATURE_OBJECTIVES: dict[str, tuple[str, ...]] = {
    "attention_kl": ("heads", "inputs", "temperature"),
    "attention_mse": ("heads",),
    "attention_transfer": ("variant",),
    "correlation": ("gamma", "order"),
    "crd": ("negatives", "temperature", "variant", "width", "momentum"),
    "factor_transfer": ("rate", "share", "variant"),
    "hint": (),
    "nst": ("kernel",),
    "overhaul": (),
    "pkt": ("variant",),
    "review": ("levels", "width"),
    "rkd_angle": (),
    "rkd_distance": (),
    "similarity": (),
    "value_relation": ("heads", "temperature"),
    "vid": ("variant",),
}
"""Objectives on a pair of hidden states by name, each with its options."""

PROJECTORS = ("auto", "conv1x1", "identity", "linear", "mlp")
"""Kinds of projectors."""


def _known(what: str, table: Mapping[str, Any]) -> AfterValidator:
    def check(name: str) -> str:
        if name not in table:
            raise ValueError(f"unknown {what} {name!r}{suggest(name, table)}; allowed: {', '.join(table)}")
        return name

    return AfterValidator(check)


FeatureObjective = Annotated[str, _known("objective", FEATURE_OBJECTIVES)]


class MethodConfig(Section):
    """What every method has."""

    taught: ClassVar[bool] = True
    """Whether it needs a teacher."""
    aligns: ClassVar[bool] = False
    """Whether teacher and student may cut texts into other tokens, which are then aligned."""
    served: ClassVar[bool] = False
    """Whether the likeliest next tokens, which a server gives, are enough of a teacher."""


class SoftConfig(MethodConfig):
    """Soft labels beside hard ones: what every method has."""

    temperature: Positive | None = None
    """T, of teacher and student alike. Default: 4 for ``dkd``, ``kd`` and ``soft_cross_entropy``, else 1; ``mse``,
    ``margin_mse`` and ``mlkd`` have none."""
    alpha: NotNegative = 0.9
    """Weight of the soft labels; at most 1 unless ``hard`` is given."""
    hard: NotNegative | None = None
    """Weight of the hard labels. Default: 1 - alpha."""
    soft: Annotated[str, _known("soft objective", SOFT_OBJECTIVES)] = "kd"
    """How the soft labels are compared: ``dist``, ``dkd``, ``js``, ``kd``, ``mlkd``, ``mse``, ``reverse_kl``,
    ``skew_kl``, ``soft_cross_entropy`` or ``tvd``. Where labels are several or numbers: ``binary_kd``, ``mse``.
    Where logits are a query's scores of passages, the relevant one first: ``margin_mse``."""
    soft_options: dict[str, Any] = Field(default_factory=dict)
    """Options of that: ``alpha`` and ``beta`` of dkd, ``standardize`` of kd, ``beta`` and ``gamma`` of dist ..."""

    @model_validator(mode="after")
    def _weighed(self) -> SoftConfig:
        if self.hard is None and self.alpha > 1:
            raise Misfit(
                f"alpha: {self.alpha:g} leaves {1 - self.alpha:g} for the labels; give at most 1, or 'hard' too",
                "alpha",
            )
        check_known_options(self.soft, self.soft_options, SOFT_OBJECTIVES, "soft_options")
        usual = SOFT_TEMPERATURES[self.soft]
        if self.temperature is not None and usual is None:
            raise Misfit(f"{self.soft} has no temperature, given {self.temperature:g}; leave it out", "temperature")
        self.temperature = self.temperature or usual
        return self


def check_known_options(
    name: str, options: Mapping[str, Any], table: Mapping[str, tuple[str, ...]], key: str
) -> None:
    """Raise :class:`Misfit` where ``options`` holds one that ``name`` does not take."""
    for option in options:
        if option not in table[name]:
            raise Misfit(
                f"{name} has no option {option!r}{suggest(option, table[name])}; "
                f"its options: {', '.join(table[name]) or 'none'}",
                key,
            )


class LogitConfig(SoftConfig):
    """Soft labels of Hinton et al.: alpha * T^2 * KL(p_T || p_S) + (1 - alpha) * CE; or others on logits."""

    kind: Literal["logit"] = "logit"
    """Learns from the teacher's logits."""


class PairConfig(Section):
    """Two modules whose outputs are compared. What it leaves out is taken from the method."""

    student: str
    """Tap of the student, such as ``stages.1``; ``head:input`` for what goes into a module."""
    teacher: str
    """Tap of the teacher."""
    objective: FeatureObjective | None = None
    """What compares them."""
    weight: NotNegative | None = None
    """Weight of this pair."""
    projector: Literal[PROJECTORS] | None = None  # type: ignore[valid-type]
    """Kind of the projector."""
    norm: bool | None = None
    """Batch norm after the projector."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the objective."""


def _pairs(given: Any) -> Any:
    if given is None or given == "auto":
        return None
    if not isinstance(given, list) or not given:
        raise ValueError(f"{given!r} is no list of pairs; allowed: auto, or [{{student: PATH, teacher: PATH}}, ...]")
    return given


class FeatureConfig(SoftConfig):
    """Hidden states beside soft labels: alpha * kd + (1 - alpha) * ce + an objective over pairs, weighted."""

    kind: Literal["feature"]
    """Matches hidden states of teacher and student, through what the objective learns for that."""
    pairs: Annotated[list[PairConfig] | None, BeforeValidator(_pairs)] = None
    """``auto``, the default: what the objective's paper compares, as the table of objectives below says. Or a list of
    ``{student: TAP, teacher: TAP}``, each with ``objective``, ``weight``, ``projector``, ``norm`` and ``options``
    of its own where wanted. ``tutelage taps RECIPE`` lists what there is to tap."""
    objective: FeatureObjective = "hint"
    """One of the table of objectives below."""
    weight: NotNegative | None = None
    """Weight of each pair. Default: the published one of the objective, as the run prints it."""
    projector: Literal[PROJECTORS] = "auto"  # type: ignore[valid-type]
    """Brings the student's feature to the teacher's channels, for ``hint``. ``auto``: a linear one (``conv1x1`` on
    maps) where they differ. Sizes are matched by pooling or interpolation."""
    norm: bool = False
    """Batch norm after the projector."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the objective, as in the table below."""
    first: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of all steps in which the pairs alone are learned, up to the tapped modules; the rest then goes without
    them. The two stages of FitNets, each with its own optimizer and schedule. Default 0: both together."""

    @model_validator(mode="after")
    def _taken(self) -> FeatureConfig:
        check_known_options(self.objective, self.options, FEATURE_OBJECTIVES, "options")
        for pair in self.pairs or []:
            check_known_options(pair.objective or self.objective, pair.options, FEATURE_OBJECTIVES, "pairs")
        return self


class SimkdConfig(SoftConfig):
    """SimKD: the student's features, projected, go through the teacher's own classifier."""

    kind: Literal["simkd"]
    """The student gets a projector and the teacher's classifier in place of its own head, and exports with them."""
    alpha: NotNegative = 0.0
    """Weight of the soft labels beside it. Default 0, as in the paper."""
    hard: NotNegative | None = 0.0
    """Weight of the hard labels beside it. Default 0, as in the paper."""
    weight: NotNegative = 1.0
    """Weight of the squared distance to the teacher's features."""
    factor: Annotated[int, Field(ge=1)] = 2
    """By how much the projector's middle layer is narrower than the teacher's features."""
    variant: Literal["authors", "paper"] = "authors"
    """``authors``: mean over elements, to which the published numbers and weight 1 belong; ``paper``: their sum."""


def _peers(given: Any) -> Any:
    if isinstance(given, int) and not isinstance(given, bool):
        if given < 1:
            raise ValueError(f"{given} peers, and a student alone has nobody to learn from; give 1 or more")
        return [None] * given
    if not isinstance(given, list) or not given:
        raise ValueError(f"{given!r} is neither a number nor a list of models; for example 2, or [convnet, mlp]")
    return [{"model": one} if isinstance(one, str) else one for one in given]


class MutualConfig(MethodConfig):
    """Students that teach each other: of each, CE + weight * the mean over its peers of T^2 * KL(p_peer || p). Deep
    mutual learning; with `target: mean`, `refresh` and `burn_in` codistillation. The recipe's student is one of them,
    the one that is exported and compared with itself alone; its peers are saved in `models/` and measured too."""

    taught: ClassVar[bool] = False
    kind: Literal["mutual"]
    """Learns from peers that are trained along; the teacher, where there is one, is only compared with."""
    peers: Annotated[list[ModelConfig | None], BeforeValidator(_peers)] = 1  # type: ignore[assignment]
    """Whom the student learns with, beside itself: a number of copies of its architecture with other
    initialisations, or a list of models such as ``[{model: convnet, options: {widths: [8, 16]}}, mlp]``, where
    ``null`` is a copy. Default: one copy, so two students in all."""
    temperature: Positive = 1.0
    """T, of all students alike."""
    weight: NotNegative = 1.0
    """Of what the peers say."""
    target: Literal["each", "mean"] = "each"
    """``each``: the mean of the losses to each peer; ``mean``: the loss to the mean of their probabilities."""
    refresh: Count | None = None
    """Learn from copies of the peers that are renewed every so many steps. Default: from the peers as they are."""
    burn_in: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the steps in which the labels alone are learned."""


def _exits(given: Any) -> Any:
    if given is None or given == "auto":
        return None
    if not isinstance(given, list) or not given:
        raise ValueError(f"{given!r} is no list of taps; allowed: auto, or for example [stages.0, stages.1]")
    return given


class ByotConfig(MethodConfig):
    """Be your own teacher: exits at the student's stages learn from the labels and from its own deepest classifier.
    Exits are trained along, measured and not exported."""

    taught: ClassVar[bool] = False
    kind: Literal["byot"]
    """The network teaches itself; the teacher, where there is one, is only compared with."""
    exits: Annotated[list[str] | None, BeforeValidator(_exits)] = None
    """``auto``, the default: the last feature map of each resolution but the deepest. Or a list of taps, as
    ``tutelage taps RECIPE`` shows them."""
    alpha: Fraction = 0.3
    """Of an exit: (1 - alpha) * CE + alpha * KL to the deepest, without T^2."""
    temperature: Positive = 3.0
    """T of that KL."""
    hint: NotNegative = 0.03
    """Weight of the squared distance of an exit's feature to what goes into the student's head."""
    factor: Count = 4
    """By how much an exit's bottleneck is narrower than that."""


class SupervisedConfig(MethodConfig):
    """The labels alone, smoothed or not, in place of a teacher's: a control. Learns from labelled images only."""

    taught: ClassVar[bool] = False
    kind: Literal["supervised"]
    """Cross-entropy; the teacher, where there is one, is only compared with."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the target that is spread evenly over all classes; 0.1 is usual."""


class TeacherFreeConfig(MethodConfig):
    """Tf-KD: (1 - alpha) * CE + alpha * soft labels of a teacher that nobody trained. Learns from labelled images
    only."""

    taught: ClassVar[bool] = False
    kind: Literal["teacher-free"]
    """Soft labels made by hand, a control; the teacher, where there is one, is only compared with."""
    alpha: Fraction = 0.1
    """Weight of those soft labels."""
    temperature: Positive = 20.0
    """T at which they are softened; the paper has 20 or more."""
    correct: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.99
    """Probability of the label before that; the others share the rest. Above one over the number of classes."""
    variant: Literal["authors", "paper"] = "authors"
    """``authors``: KL(softmax(p / T) || student), the code to which the published numbers and alpha belong, close to
    label smoothing; ``paper``: T^2 * KL of both at T."""


def _layers(given: Any) -> Any:
    listed = isinstance(given, list) and given
    if not isinstance(given, str) and not listed:
        raise ValueError(f"{given!r} is neither the name of a map of layers nor a list such as [4, 8, 12]")
    return given


Layers = Annotated[list[Count | None], BeforeValidator(_layers)]


class TripleConfig(MethodConfig):
    """DistilBERT: 5 * T^2 * KL to the teacher's word for each token + 2 * CE with the masked ones + 1 * the cosine
    distance of the last hidden states. A term with weight 0 is not computed."""

    kind: Literal["triple"]
    """For models and data of masked language modelling."""
    mlm: NotNegative = 2.0
    """Weight of the cross-entropy with the masked tokens."""
    kd: NotNegative = 5.0
    """Weight of the soft labels."""
    cosine: NotNegative = 1.0
    """Weight of the last hidden states. Where widths differ the student's go through a linear layer first."""
    temperature: Positive = 2.0
    """T of the soft labels."""
    positions: Literal["counted", "masked"] = "counted"
    """Where soft labels are learned: ``counted``, at all tokens, as in the authors' code; ``masked``, where the
    labels are, which costs about a seventh."""


class TinybertConfig(MethodConfig):
    """TinyBERT: embeddings, hidden states and attention of mapped layers first, and then the predictions."""

    kind: Literal["tinybert"]
    """For text encoders of one tokenizer, of any depths and widths."""
    layers: Literal["uniform", "last"] | Layers = "uniform"
    """The teacher's layer for each of the student's: ``uniform``, m * N / M, rounded; ``last``, the last M; or a
    list, counted from 1, where ``null`` leaves a layer out."""
    embedding: NotNegative = 1.0
    """Weight of the mean square between what goes into the first layers."""
    hidden: NotNegative = 1.0
    """Weight of the mean square between what layers give, summed over them; through linear layers where widths
    differ."""
    attention: NotNegative = 1.0
    """Weight of the attention, summed over layers."""
    prediction: NotNegative = 1.0
    """Weight of the soft labels. 0 for TinyBERT's general distillation, of texts without labels."""
    temperature: Positive = 1.0
    """T of the soft labels."""
    first: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    """Share of all steps in which the layers alone are learned; the rest then goes without them. Default: 0.87, the
    paper's 20 epochs of 23; 0: both together."""
    scores: Literal["scores", "probabilities"] = "scores"
    """``scores``: attention before the softmax and before any mask, by squares, as in the paper; ``probabilities``:
    after it, by KL."""
    heads: Literal["each", "mean"] = "each"
    """Attention head by head, or the mean over heads, whose numbers may then differ."""

    @model_validator(mode="after")
    def _staged(self) -> TinybertConfig:
        if self.first and not (self.prediction and (self.embedding or self.hidden or self.attention)):
            raise Misfit(f"first: {self.first:g}, and one of its two stages weighs nothing; leave it out", "first")
        return self


class MinilmConfig(MethodConfig):
    """MiniLM: the distributions of one layer's attention, or relations between its queries, keys and values. Learns
    from texts without labels; depths and widths are free."""

    kind: Literal["minilm"]
    """For text encoders of one tokenizer."""
    version: Literal[1, 2] = 2
    """1: attention and relations of values; 2: relations of queries, of keys and of values."""
    layer: Count | None = None
    """The teacher's, counted from 1; the student's is its last. Default: the last. The paper has 21 of 24 for
    BERT-large."""
    relation_heads: Count | None = None
    """Heads into which vectors are split. Default: in version 1 the teacher's heads of attention, in version 2 the
    published 48; where that does not divide both widths, the most up to it (64) that does."""
    attention: NotNegative | None = None
    """Weight of the attention, in version 1. Default: 1."""
    queries: NotNegative | None = None
    """Weight of the relations of queries, in version 2. Default: 1."""
    keys: NotNegative | None = None
    """Weight of the relations of keys, in version 2. Default: 1."""
    values: NotNegative | None = None
    """Weight of the relations of values. Default: 1."""
    heads: Literal["each", "mean"] = "each"
    """Attention head by head, or the mean over heads, whose numbers may then differ."""
    temperature: Positive = 1.0
    """T of all these distributions."""

    @model_validator(mode="after")
    def _versioned(self) -> MinilmConfig:
        for name in ("queries", "keys") if self.version == 1 else ("attention",):
            if getattr(self, name) is not None:
                raise Misfit(f"version {self.version} has no term {name!r}; leave it out", name)
        return self


class PatientConfig(MethodConfig):
    """Patient knowledge distillation: alpha * KD + (1 - alpha) * CE + beta * the distance of mapped layers' [CLS]
    states, each divided by its norm."""

    kind: Literal["patient"]
    """For text encoders that read the same first token."""
    layers: Literal["skip", "last"] | Layers = "skip"
    """The teacher's layer for each of the student's but its last: ``skip``, m * N / M; ``last``, those before the
    teacher's last; or a list, counted from 1, where ``null`` leaves a layer out."""
    temperature: Positive = 10.0
    """T of the soft labels. The paper searched 5, 10 and 20."""
    alpha: NotNegative = 0.5
    """Weight of the soft labels; at most 1 unless ``hard`` is given. The paper searched 0.2, 0.5 and 0.7."""
    hard: NotNegative | None = None
    """Weight of the hard labels. Default: 1 - alpha."""
    beta: NotNegative = 100.0
    """Weight of the states. The paper searched 10, 100, 500 and 1000."""
    variant: Literal["authors", "paper"] = "authors"
    """``authors``: mean over elements and layers, to which these weights belong; ``paper``: their sums."""

    @model_validator(mode="after")
    def _weighed(self) -> PatientConfig:
        if self.hard is None and self.alpha > 1:
            raise Misfit(
                f"alpha: {self.alpha:g} leaves {1 - self.alpha:g} for the labels; give at most 1, or 'hard' too",
                "alpha",
            )
        return self


class EmbeddingConfig(MethodConfig):
    """Sentence embeddings: the teacher's vector of a text, or of its source where the student reads a translation,
    and the similarities within a batch. Learns from texts without labels."""

    kind: Literal["embedding"]
    """For models that give one vector for each text."""
    mse: NotNegative = 1.0
    """Weight of the mean square to the teacher's vector. Where widths differ the student's go through a linear layer
    first."""
    similarity: NotNegative = 1.0
    """Weight of the squared gaps between the cosines of all pairs of a micro-batch, of any widths. The paper has
    0."""


class TokenConfig(MethodConfig):
    """Language models, token by token: alpha * T^2 * D(teacher, student) + (1 - alpha) * CE with the next tokens.
    The scores of all tokens never exist at once."""

    served: ClassVar[bool] = True
    kind: Literal["token"]
    """For causal language models of one tokenizer and data of task causal."""
    divergence: Literal["kl", "reverse_kl", "js", "skew_kl", "tvd"] = "kl"
    """D: ``kl``; ``reverse_kl`` (MiniLLM's); ``js`` with ``beta`` (GKD's); ``skew_kl`` with ``skew`` and ``reverse``
    (DistiLLM's); ``tvd``."""
    temperature: Positive = 1.0
    """T of the soft labels."""
    alpha: NotNegative = 0.9
    """Weight of the soft labels; at most 1 unless ``hard`` is given."""
    hard: NotNegative | None = None
    """Weight of the next tokens. Default: 1 - alpha."""
    beta: Fraction | None = None
    """Of ``js``: 0 is like ``kl``, 1 like ``reverse_kl``. Default: 0.5."""
    skew: Fraction | None = None
    """Of ``skew_kl``: the other side's share of the mixture. Default: 0.1."""
    reverse: bool | None = None
    """Of ``skew_kl``: from the student to the mixture. Default: from the teacher."""
    hidden: NotNegative = 0.0
    """Weight of 1 - cosine of mapped layers' hidden states, through linear layers where widths differ."""
    layers: Literal["uniform", "last"] | Layers = "uniform"
    """The teacher's layer for each of the student's, of ``hidden``; or a list, counted from 1, where ``null`` leaves
    a layer out."""

    @model_validator(mode="after")
    def _weighed(self) -> TokenConfig:
        check_divergence(self)
        return self


class OnPolicyConfig(TokenConfig):
    """Language models, taught on what the student itself writes: with probability lambda a batch's answers are its
    own, and the teacher scores them (GKD). Not with a cache, nor with packed rows."""

    served: ClassVar[bool] = False
    kind: Literal["on-policy"]  # type: ignore[assignment]
    """For causal language models of one tokenizer and data of task causal with prompts: conversations, or pairs."""
    lmbda: Fraction = 0.5
    """Share of batches that the student writes: 0 is like ``token``, 1 is all."""
    divergence: Literal["kl", "reverse_kl", "js", "skew_kl", "tvd"] = "js"
    """D, as in ``token``. With ``reverse_kl`` and ``lmbda: 1`` MiniLLM's, of one step."""
    alpha: NotNegative = 1.0
    """Weight of the soft labels; at most 1 unless ``hard`` is given."""
    max_new: Count = 128
    """Most tokens that the student writes for a prompt."""
    max_prompt: Count = 512
    """Most tokens of a prompt; of a longer one its last are read."""
    sampling: NotNegative = 1.0
    """Temperature at which it writes; 0 takes the likeliest token."""
    replay: Annotated[int, Field(ge=0)] = 0
    """How many answers are kept and used again (DistiLLM); 0: none."""
    reuse: Fraction | Literal["rising"] = 0.5
    """Share of what it writes that is drawn from those kept, once there are enough; ``rising``: from 0 at the first
    step to 1 at the last (DistiLLM)."""
    long: NotNegative = 0.0
    """Weight of MiniLLM's long part, what a token leads to; for ``reverse_kl`` at temperature, sampling 1 and replay
    0."""
    mix: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The teacher's share of the distribution that answers are drawn from (MiniLLM: 0.2); each token's loss is
    weighted by the student's probability over the mixture's. For sampling 1 and replay 0."""
    adaptive: Fraction = 0.0
    """By how much lambda grows at an evaluation whose loss is ``slack`` above that at which it grew last (DistiLLM:
    0.1, with ``lmbda: 0``). Needs validation data."""
    slack: NotNegative = 0.1
    """Of ``adaptive``, in nats."""

    @model_validator(mode="after")
    def _long(self) -> OnPolicyConfig:
        alone = (self.divergence, self.temperature, self.sampling, self.replay)
        if self.long and alone != ("reverse_kl", 1.0, 1.0, 0):
            raise Misfit(
                "'long' belongs to divergence: reverse_kl with temperature: 1, sampling: 1 and replay: 0", "long"
            )
        if self.mix and (self.sampling, self.replay) != (1.0, 0):
            raise Misfit("'mix' goes with sampling: 1 and replay: 0", "mix")
        return self


class CrossTokenizerConfig(MethodConfig):
    """A language model taught by one with another tokenizer: alpha * soft + (1 - alpha) * CE with the next tokens.
    Tokens of both are aligned by the bytes that they stand for; what chat templates and tokenizers put around a text
    may differ."""

    aligns: ClassVar[bool] = True
    kind: Literal["cross-tokenizer"]
    """For causal language models and data of task causal, whose rows are not packed."""
    compare: Literal["spans", "uld"] = "spans"
    """``spans``: T^2 * D over the entries that both vocabularies have, where both go on with the same one; where not,
    D of the probabilities of the stretch of text, products over its tokens. ``uld``: sorted probabilities (Boizard et
    al.), whatever tokens they are of."""
    divergence: Literal["kl", "reverse_kl", "js", "skew_kl", "tvd"] = "kl"
    """D, of ``spans``; as for ``token``."""
    temperature: Positive = 1.0
    """T of the soft labels."""
    alpha: Positive = 0.9
    """Weight of the soft labels; at most 1 unless ``hard`` is given."""
    hard: NotNegative | None = None
    """Weight of the next tokens. Default: 1 - alpha."""
    rest: Literal["bucket", "uld"] = "bucket"
    """Of ``spans``: what the entries are that only one vocabulary has: ``bucket``, one outcome; ``uld``: besides,
    their sorted probabilities are compared."""
    beta: Fraction | None = None
    """Of ``js``. Default: 0.5."""
    skew: Fraction | None = None
    """Of ``skew_kl``. Default: 0.1."""
    reverse: bool | None = None
    """Of ``skew_kl``: from the student to the mixture."""

    @model_validator(mode="after")
    def _weighed(self) -> CrossTokenizerConfig:
        check_divergence(self)
        if self.compare == "uld" and (self.divergence, self.rest) != ("kl", "bucket"):
            raise Misfit("'divergence' and 'rest' are for compare: spans, this is uld; leave them out", "compare")
        return self


def check_divergence(config: TokenConfig | CrossTokenizerConfig) -> None:
    """Raise where an option is of another divergence, or the weights leave nothing for the labels."""
    for name, owner in (("beta", "js"), ("skew", "skew_kl"), ("reverse", "skew_kl")):
        if getattr(config, name) is not None and config.divergence != owner:
            raise Misfit(f"{name!r} is for divergence {owner}, this is {config.divergence}; leave it out", name)
    if config.hard is None and config.alpha > 1:
        raise Misfit(
            f"alpha: {config.alpha:g} leaves {1 - config.alpha:g} for the labels; give at most 1, or 'hard' too",
            "alpha",
        )


class SequenceConfig(MethodConfig):
    """Maximum likelihood of the next tokens: of a teacher's answers, sequence-level distillation (Alpaca). No teacher
    is asked."""

    kind: Literal["sequence"]
    """For causal language models and data of task causal."""

    taught: ClassVar[bool] = False


METHOD_KINDS: dict[str, type[MethodConfig]] = {
    "byot": ByotConfig,
    "cross-tokenizer": CrossTokenizerConfig,
    "embedding": EmbeddingConfig,
    "feature": FeatureConfig,
    "logit": LogitConfig,
    "minilm": MinilmConfig,
    "mutual": MutualConfig,
    "on-policy": OnPolicyConfig,
    "patient": PatientConfig,
    "sequence": SequenceConfig,
    "simkd": SimkdConfig,
    "supervised": SupervisedConfig,
    "teacher-free": TeacherFreeConfig,
    "tinybert": TinybertConfig,
    "token": TokenConfig,
    "triple": TripleConfig,
}
"""Every method that a recipe can name, with its options."""
