"""DistilBERT's triple loss: masked language modelling, soft labels, and the direction of the last hidden states."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from tutelage import losses
from tutelage.data.batch import Batch, Task
from tutelage.errors import CapabilityError, ConfigError
from tutelage.methods.base import Method, Term
from tutelage.methods.text_terms import (
    check_same_tokens,
    check_weights,
    freeze_unreached,
    head_terms,
    linear_head,
    quiet_needs,
    text_positions,
)
from tutelage.methods.transformer_layers import find_layers
from tutelage.students import Projector, build_projector
from tutelage.taps import Head, Needs, Observation, vocabulary_head
from tutelage.teachers.signal import Signal


class TripleMethod(Method):
    r"""DistilBERT: :math:`5\,T^2\,\mathrm{KL}(p^T\|p^S) + 2\,\mathrm{CE}_{\mathrm{mlm}} + 1\,(1 - \cos(h^S, h^T))`.

    Scores of the vocabulary are made for the positions that need them and no others, some at a time: ``[B, L, V]``
    never exists. A term with weight 0 is not computed.

    Args:
        mlm: weight of the cross-entropy with the masked tokens; over positions with a label.
        kd: weight of the soft labels.
        cosine: weight of the last hidden states; over positions that count. Where widths differ the student's go
            through a linear layer, which is trained along and not exported.
        temperature: T.
        positions: where soft labels are learned: ``counted``, all positions that count, as in the authors' code;
            ``masked``, those with a label, which are a seventh of them.
        task: what labels are; masked tokens are ``classes``.

    Raises:
        ConfigError: a value out of range, or no term left.

    Reference: Sanh et al., DistilBERT, a distilled version of BERT (2019), section 2; weights and T as in the
    authors' training script.
    """

    needs: Needs | None = Needs(logits=False, head=True)
    student_needs = Needs(logits=False, head=True)

    def __init__(
        self,
        mlm: float = 2.0,
        kd: float = 5.0,
        cosine: float = 1.0,
        temperature: float = 2.0,
        *,
        positions: Literal["counted", "masked"] = "counted",
        task: Task = "classes",
    ) -> None:
        super().__init__()
        self.weights = check_weights(mlm=mlm, kd=kd, cosine=cosine)
        if not temperature > 0:
            raise ConfigError(f"temperature={temperature}", remedy="must be above 0; DistilBERT has 2")
        if positions not in ("counted", "masked"):
            raise ConfigError(f"positions={positions!r}", remedy="allowed: counted, masked")
        self.temperature, self.positions, self.task = temperature, positions, task
        self.projector: Projector | None = None
        self.taps: tuple[str, str] | None = None

    def adapt_student(self, student: nn.Module, teacher: nn.Module | None, example: Batch) -> nn.Module:
        """The student, with a head that is not learned from frozen."""
        self.build(student, teacher, example)
        return freeze_unreached(student, example, self.student_needs, head=bool({"mlm", "kd"} & set(self.weights)))

    def build(self, student: nn.Module, teacher: nn.Module | None, example: Batch, ids: Tensor | None = None) -> None:
        """Find the heads and the last hidden states.

        Raises:
            CapabilityError: a model without a head over the vocabulary, or heads over different ones.
            ModelError: no hidden states are found.
        """
        assert teacher is not None
        heads = {"student": vocabulary_head(student), "teacher": vocabulary_head(teacher)}
        wanted = {"student": {"mlm", "kd"}, "teacher": {"kd"}}
        for who, head in heads.items():
            used = sorted(wanted[who] & set(self.weights))
            if used and head is None:
                raise CapabilityError(
                    f"the {who}, {type(student if who == 'student' else teacher).__name__}, has no head that scores "
                    f"its vocabulary, and {' and '.join(used)} need one",
                    where="method",
                    remedy=f"take a model for masked language modelling, train a head for it first, or set "
                    f"{' and '.join(f'{name}: 0' for name in used)}",
                )
        mine, theirs = heads["student"], heads["teacher"]
        if "kd" in self.weights and mine is not None and theirs is not None:
            _check_vocabularies(mine.out_features, theirs.out_features)
        self.taps, self.projector = None, None
        if "cosine" in self.weights:
            s, t = find_layers("student", student, example), find_layers("teacher", teacher, example.for_teacher())
            self.taps = (s.last, t.last)
            if s.width != t.width:
                self.projector = build_projector((1, 1, s.width), (1, 1, t.width), kind="linear")
        self.student_needs = quiet_needs(student, self.taps[:1] if self.taps else ())
        asks = {"kd", "cosine"} & set(self.weights)
        self.needs = quiet_needs(teacher, self.taps[1:] if self.taps else ()) if asks else None

    def _masks(self, batch: Batch) -> dict[str, Tensor]:
        """``[B, L]`` where each term counts."""
        if batch.labels.ndim != 2 and ("mlm" in self.weights or self.positions == "masked"):
            raise CapabilityError(
                f"labels are {list(batch.labels.shape)}, one for each text, and masked tokens have one each",
                remedy="use data for masked language modelling, or set mlm: 0 and positions: counted",
            )
        masks: dict[str, Tensor] = {}
        for name in self.weights:
            labelled = name == "mlm" or (name == "kd" and self.positions == "masked")
            masks[name] = batch.labelled() if labelled else text_positions(batch)
        return masks

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """``mlm``: positions with a label; ``kd``: those, or all that count; ``cosine``: all that count."""
        return {name: mask.sum() for name, mask in self._masks(batch).items()}

    def forward(self, student: Observation, batch: Batch, signal: Signal | None) -> dict[str, Term]:
        """The terms ``mlm``, ``kd`` and ``cosine``, as far as they weigh anything.

        Raises:
            CapabilityError: teacher and student do not read the same tokens, or score different vocabularies.
        """
        masks, terms = self._masks(batch), dict[str, Term]()
        if {"mlm", "kd"} & set(masks):
            assert student.head is not None
            terms = self._of_head(student.head, None if signal is None else signal.head, batch.labels, masks)
        if self.taps is not None:
            assert signal is not None
            s, t = student.hidden[self.taps[0]], signal.hidden[self.taps[1]]
            check_same_tokens(s, t)
            s, t = s[masks["cosine"]], t[masks["cosine"]]
            s = s if self.projector is None else self.projector(s, t)
            terms["cosine"] = Term(losses.cosine(s, t, reduction="sum"), masks["cosine"].sum())
        return terms

    def _of_head(self, mine: Head, theirs: Head | None, labels: Tensor, masks: dict[str, Tensor]) -> dict[str, Term]:
        """``mlm`` and ``kd``, as far as wanted."""
        terms: dict[str, losses.HardTargets | losses.SoftTargets] = {}
        if "mlm" in masks:
            terms["mlm"] = losses.HardTargets(labels, masks["mlm"])
        if "kd" in masks:
            assert theirs is not None
            check_same_tokens(mine.inputs, theirs.inputs)
            _check_vocabularies(mine.weight.shape[0], theirs.weight.shape[0])
            said = (theirs.inputs, linear_head(theirs))
            terms["kd"] = losses.SoftTargets(said, temperature=self.temperature, mask=masks["kd"])
        return head_terms(self, mine, terms, {name: masks[name].sum() for name in terms})

    def formula(self) -> str:
        """The loss in one line."""
        shown: dict[str, Any] = {"kd": f"(T={self.temperature:g}, {self.positions})"}
        return " + ".join(f"{weight:g} * {name}{shown.get(name, '')}" for name, weight in self.weights.items())


class MaskedMethod(TripleMethod):
    """Masked language modelling alone: how a teacher's head is trained, and a student without its teacher.

    Reference: Devlin et al., BERT (2019), section 3.1, task 1.
    """

    needs = None

    def __init__(self) -> None:
        super().__init__(mlm=1.0, kd=0.0, cosine=0.0)

    def build(self, student: nn.Module, teacher: nn.Module | None, example: Batch, ids: Tensor | None = None) -> None:
        """Nothing depends on the models."""


def _check_vocabularies(student: int, teacher: int) -> None:
    if student != teacher:
        raise CapabilityError(
            f"the student scores {student} tokens, the teacher {teacher}",
            remedy="soft labels need one vocabulary: build the student with the teacher's, or set kd: 0",
        )
