"""Embeddings of texts: the teacher's vector, and the similarities within a batch."""

from typing import Any

from torch import Tensor, nn

from tutelage import losses
from tutelage.config.methods.encoders import EmbeddingOptions
from tutelage.data.batch import Batch
from tutelage.errors import CapabilityError, ModelError
from tutelage.methods.base import Method, Term
from tutelage.methods.text_terms import nonzero_weights
from tutelage.students import Projector, build_projector, eval_no_grad
from tutelage.students.projectors import Shape, device_of
from tutelage.taps import Needs, Observation, observe
from tutelage.teachers.signal import Signal


class EmbeddingMethod(Method):
    r"""The student learns the teacher's embedding of a text: mean square, and the similarities within a batch.

    The terms are :math:`\tfrac1D \|e^S - e^T\|^2` and the squared gaps between cosines of all pairs of a micro-batch.
    Models return embeddings ``[B, D]`` in place of logits. Teacher and student may read different texts
    (``Batch.teacher_inputs``): a sentence, and its translation for the student. Labels are not used.

    Raises:
        ConfigError: both weights are 0.

    Reference: Reimers and Gurevych, Making Monolingual Sentence Embeddings Multilingual using Knowledge Distillation
    (EMNLP 2020), equation 1; the second term is :func:`tutelage.losses.cosine_matrix`.
    """

    Options = EmbeddingOptions
    options: EmbeddingOptions

    def __init__(self, options: EmbeddingOptions | None = None, /, **keywords: Any) -> None:
        super().__init__(options, **keywords)
        self.weights = nonzero_weights(mse=self.options.mse, similarity=self.options.similarity)
        self.projector: Projector | None = None

    def build(self, student: nn.Module, teacher: nn.Module | None, example: Batch, ids: Tensor | None = None) -> None:
        """Build the projector if the widths differ."""
        assert teacher is not None
        s, t = _shape("student", student, example), _shape("teacher", teacher, example.for_teacher())
        projects = "mse" in self.weights and s[-1] != t[-1]
        self.projector = build_projector(s, t, kind="linear") if projects else None

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Texts that count."""
        return dict.fromkeys(self.weights, _texts(batch).sum())

    def forward(self, student: Observation, batch: Batch, signal: Signal) -> dict[str, Term]:
        """The terms ``mse`` and ``similarity``, if they have a weight."""
        assert student.logits is not None
        s, t, mask = student.logits, signal.dense(), _texts(batch)
        terms: dict[str, Term] = {}
        if "mse" in self.weights:
            projected = s if self.projector is None else self.projector(s, t)
            terms["mse"] = Term(losses.hint(projected, t, mask=mask, reduction="sum"), mask.sum())
        if "similarity" in self.weights:
            terms["similarity"] = Term(losses.cosine_matrix(s, t, mask=mask, reduction="sum"), mask.sum())
        return terms


def _texts(batch: Batch) -> Tensor:
    """``[B]``, true at texts that count."""
    if batch.labels.ndim != 1:
        raise CapabilityError(
            f"labels are {list(batch.labels.shape)}, one for each token, and a text has one embedding",
            remedy="use data with one label for each text, or none",
        )
    return batch.counted()


def _shape(who: str, model: nn.Module, example: Batch) -> Shape:
    with eval_no_grad(model):
        logits = observe(model, example.to(device_of(model)).inputs, Needs()).logits
    if logits is None or logits.ndim != 2:
        shape = None if logits is None else list(logits.shape)
        raise ModelError(
            f"the {who} returns {shape}, and an embedding is one vector for each text, [B, D]",
            where=who, remedy="build a model that pools its hidden states",
        )  # fmt: skip
    return tuple(logits.shape)
