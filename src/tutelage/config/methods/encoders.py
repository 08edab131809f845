"""Methods of text encoders."""

from collections.abc import Iterator
from typing import Literal

from tutelage.config.base import BelowOne, Count, NotNegative, Positive
from tutelage.config.methods.base import Layers, MethodOptions, labels_weight_misfit


class TripleOptions(MethodOptions):
    """DistilBERT: 5 * T^2 * KL to the teacher's distribution of each token + 2 * CE with the masked tokens + 1 * the
    cosine distance of the last hidden states. A term with weight 0 is not computed."""

    kind: Literal["triple"] = "triple"
    """For models and data of masked language modelling."""
    mlm: NotNegative = 2.0
    """Weight of the cross-entropy with the masked tokens."""
    kd: NotNegative = 5.0
    """Weight of the soft labels."""
    cosine: NotNegative = 1.0
    """Weight of the last hidden states. If the widths differ, the student's go through a linear layer first."""
    temperature: Positive = 2.0
    """T of the soft labels."""
    positions: Literal["counted", "masked"] = "counted"
    """Positions of the soft labels: ``counted``, all tokens, as in the authors' code; ``masked``, those with a label,
    which cost about a seventh."""


class TinybertOptions(MethodOptions):
    """TinyBERT: embeddings, hidden states and attention of mapped layers first, then the predictions."""

    kind: Literal["tinybert"] = "tinybert"
    """For text encoders of one tokenizer, of any depths and widths."""
    layers: Literal["uniform", "last"] | Layers = "uniform"
    """The teacher's layer for each of the student's: ``uniform``, m * N / M, rounded; ``last``, the last M; or a
    list, counted from 1, where ``null`` leaves a layer out."""
    embedding: NotNegative = 1.0
    """Weight of the mean square between the inputs of the first layers."""
    hidden: NotNegative = 1.0
    """Weight of the mean square between the outputs of layers, summed over them; through linear layers if the widths
    differ."""
    attention: NotNegative = 1.0
    """Weight of the attention, summed over layers."""
    prediction: NotNegative = 1.0
    """Weight of the soft labels. 0 for TinyBERT's general distillation, of texts without labels."""
    temperature: Positive = 1.0
    """T of the soft labels."""
    stage1_fraction: BelowOne | None = None
    """Share of all steps that train the layers only; the other steps train the predictions only. Default: 0.87, the
    paper's 20 epochs of 23; 0: both together."""
    scores: Literal["scores", "probabilities"] = "scores"
    """``scores``: attention before the softmax and before any mask, by squares, as in the paper; ``probabilities``:
    after it, by KL."""
    heads: Literal["each", "mean"] = "each"
    """Attention head by head, or the mean over heads, whose numbers may then differ."""

    def misfits(self) -> Iterator[tuple[str, str]]:
        """Two stages without a loss for one of them."""
        if self.stage1_fraction and not (self.prediction and (self.embedding or self.hidden or self.attention)):
            what = f"stage1_fraction: {self.stage1_fraction:g}, and one of its two stages has no weight"
            yield "stage1_fraction", f"{what}; leave it out"


class MinilmOptions(MethodOptions):
    """MiniLM: the distributions of one layer's attention, or relations between its queries, keys and values. Needs no
    labels; depths and widths are free."""

    kind: Literal["minilm"] = "minilm"
    """For text encoders of one tokenizer."""
    version: Literal[1, 2] = 2
    """1: attention and relations of values; 2: relations of queries, of keys and of values."""
    layer: Count | None = None
    """The teacher's, counted from 1; the student's is its last. Default: the last. The paper uses 21 of 24 for
    BERT-large."""
    relation_heads: Count | None = None
    """Heads into which vectors are split. Default: in version 1 the teacher's attention heads, in version 2 the
    published 48; if that does not divide both widths, the largest divisor up to it (version 2: up to 64)."""
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
    """T of all distributions."""

    def misfits(self) -> Iterator[tuple[str, str]]:
        """Weights of terms that the other version has."""
        for name in ("queries", "keys") if self.version == 1 else ("attention",):
            if getattr(self, name) is not None:
                yield name, f"version {self.version} has no term {name!r}; leave it out"


class PatientOptions(MethodOptions):
    """Patient knowledge distillation: alpha * KD + (1 - alpha) * CE + beta * the distance of mapped layers' [CLS]
    states, each divided by its norm."""

    kind: Literal["patient"] = "patient"
    """For text encoders with the same first token."""
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
    """``authors``: mean over elements and layers, for which these weights are; ``paper``: their sums."""

    def misfits(self) -> Iterator[tuple[str, str]]:
        """A negative weight of the labels."""
        yield from labels_weight_misfit(self.alpha, self.hard)


class EmbeddingOptions(MethodOptions):
    """Sentence embeddings: the teacher's vector of a text, or of its source if the student reads a translation, and
    the similarities within a batch. Needs no labels."""

    kind: Literal["embedding"] = "embedding"
    """For models that return one vector for each text."""
    mse: NotNegative = 1.0
    """Weight of the mean square to the teacher's vector. If the widths differ, the student's go through a linear
    layer first."""
    similarity: NotNegative = 1.0
    """Weight of the squared gaps between the cosines of all pairs of a micro-batch, of any widths. The paper uses
    0."""
