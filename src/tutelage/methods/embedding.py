"""Embeddings of texts: the teacher's vector, and which texts are alike."""

from __future__ import annotations

from torch import Tensor, nn

from tutelage import losses
from tutelage.data.batch import Batch, Task
from tutelage.errors import CapabilityError, ModelError
from tutelage.methods.base import Method, Term
from tutelage.methods.text_terms import check_weights
from tutelage.students import Projector, build_projector, eval_no_grad
from tutelage.students.projectors import Shape, device_of
from tutelage.taps import Needs, Observation, observe
from tutelage.teachers.signal import Signal


class EmbeddingMethod(Method):
    r"""The teacher's embedding of a text for the student's: mean square, and the similarities within a batch.

    Models give embeddings ``[B, D]`` in place of logits. Teacher and student may read different texts
    (``Batch.teacher_inputs``): a sentence, and its translation for the student. No labels are learned from.

    Args:
        mse: weight of :math:`\tfrac1D \|e^S - e^T\|^2`. Where widths differ the student's go through a linear layer,
            which is trained along and not exported.
        similarity: weight of the squared gaps between cosines of all pairs of a micro-batch, for any widths. The
            paper has 0.
        task: what labels are.

    Raises:
        ConfigError: a weight below 0, or no term left.

    Reference: Reimers and Gurevych, Making Monolingual Sentence Embeddings Multilingual using Knowledge Distillation
    (EMNLP 2020), equation 1; the second term is ours, see :func:`tutelage.losses.cosine_matrix`.
    """

    def __init__(self, mse: float = 1.0, similarity: float = 1.0, *, task: Task = "classes") -> None:
        super().__init__()
        self.weights, self.task = check_weights(mse=mse, similarity=similarity), task
        self.projector: Projector | None = None

    def build(self, student: nn.Module, teacher: nn.Module | None, example: Batch, ids: Tensor | None = None) -> None:
        """Make the projector, where widths differ.

        Raises:
            ModelError: a model that gives no embeddings.
        """
        assert teacher is not None
        s, t = _shape("student", student, example), _shape("teacher", teacher, example.for_teacher())
        projects = "mse" in self.weights and s[-1] != t[-1]
        self.projector = build_projector(s, t, kind="linear") if projects else None

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Texts that count."""
        return dict.fromkeys(self.weights, _texts(batch).sum())

    def forward(self, student: Observation, batch: Batch, signal: Signal | None) -> dict[str, Term]:
        """The terms ``mse`` and ``similarity``, as far as they weigh anything."""
        assert student.logits is not None
        assert signal is not None
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
            f"labels are {list(batch.labels.shape)}, one for each token, and embeddings are of whole texts",
            remedy="use data with one label for each text, or none",
        )
    return batch.counted()


def _shape(who: str, model: nn.Module, example: Batch) -> Shape:
    with eval_no_grad(model):
        logits = observe(model, example.to(device_of(model)).inputs, Needs()).logits
    if logits is None or logits.ndim != 2:
        given = None if logits is None else list(logits.shape)
        raise ModelError(
            f"the {who} gives {given}, and an embedding is one vector for each text, [B, D]",
            where=who, remedy="build a model that pools its hidden states",
        )  # fmt: skip
    return tuple(logits.shape)
