"""DistilBERT's triple loss: masked language modelling, soft labels, and the cosine of the last hidden states."""

from typing import Any

from torch import Tensor, nn

from tutelage import losses
from tutelage.config.methods.encoders import TripleOptions
from tutelage.data.batch import Batch
from tutelage.errors import CapabilityError
from tutelage.methods.base import Method, Term
from tutelage.methods.text_terms import (
    check_same_tokens,
    counted_tokens,
    freeze_unused,
    head_terms,
    linear_head,
    nonzero_weights,
    taps_only,
)
from tutelage.methods.transformer_layers import find_both_layers
from tutelage.students import Projector, build_projector
from tutelage.taps import Needs, Observation, count_tokens, vocabulary_head
from tutelage.teachers.signal import Signal


class TripleMethod(Method):
    r"""DistilBERT: :math:`5\,T^2\,\mathrm{KL}(p^T\|p^S) + 2\,\mathrm{CE}_{\mathrm{mlm}} + 1\,(1 - \cos(h^S, h^T))`.

    Logits over the vocabulary are computed for the positions that need them only, some at a time: ``[B, L, V]`` never
    exists. If the widths of the last hidden states differ, the student's go through a linear layer, which is trained
    and not exported.

    Raises:
        ConfigError: all weights are 0.

    Reference: Sanh et al., DistilBERT, a distilled version of BERT (2019), section 2; weights and T as in the
    authors' training script.
    """

    Options = TripleOptions
    compares_tokens = True
    options: TripleOptions
    needs: Needs | None = Needs(logits=False, head=True)
    student_needs = Needs(logits=False, head=True)

    def __init__(self, options: TripleOptions | None = None, /, **keywords: Any) -> None:
        super().__init__(options, **keywords)
        self.weights = nonzero_weights(mlm=self.options.mlm, kd=self.options.kd, cosine=self.options.cosine)
        self.projector: Projector | None = None
        self.taps: tuple[str, str] | None = None

    def adapt_student(self, student: nn.Module, teacher: nn.Module | None, example: Batch) -> nn.Module:
        """The student; its head is frozen if no term needs it."""
        self.build(student, teacher, example)
        return freeze_unused(student, example, self.student_needs, head=bool({"mlm", "kd"} & set(self.weights)))

    def build(self, student: nn.Module, teacher: nn.Module | None, example: Batch, ids: Tensor | None = None) -> None:
        """Find the heads and the last hidden states."""
        assert teacher is not None
        models = {"student": (student, {"mlm", "kd"}), "teacher": (teacher, {"kd"})}
        heads = {who: vocabulary_head(model) for who, (model, _) in models.items()}
        for who, (model, terms) in models.items():
            used = sorted(terms & set(self.weights))
            if used and heads[who] is None:
                raise CapabilityError(
                    f"the {who}, {type(model).__name__}, has no head over its vocabulary, and {' and '.join(used)} "
                    "need one",
                    where="method",
                    remedy="take a model for masked language modelling, train a head for it first, or set "
                    f"{' and '.join(f'{name}: 0' for name in used)}",
                )
        mine, theirs = heads["student"], heads["teacher"]
        if "kd" in self.weights and mine is not None and theirs is not None:
            sizes = (count_tokens(model) or head.out_features for model, head in ((student, mine), (teacher, theirs)))
            _check_vocabularies(*sizes)
        self.taps, self.projector = None, None
        if "cosine" in self.weights:
            s, t = find_both_layers(student, teacher, example)
            self.taps = (s.last, t.last)
            if s.width != t.width:
                self.projector = build_projector((1, 1, s.width), (1, 1, t.width), kind="linear")
        self.student_needs = taps_only(student, self.taps[:1] if self.taps else ())
        needs_teacher = {"kd", "cosine"} & set(self.weights)
        self.needs = taps_only(teacher, self.taps[1:] if self.taps else ()) if needs_teacher else None

    def _masks(self, batch: Batch) -> dict[str, Tensor]:
        """``[B, L]`` where each term counts."""
        masked_only = self.options.positions == "masked"
        if batch.labels.ndim != 2 and ("mlm" in self.weights or masked_only):
            raise CapabilityError(
                f"labels are {list(batch.labels.shape)}, one for each text, and this method needs one for each token",
                remedy="use data for masked language modelling, or set mlm: 0 and positions: counted",
            )
        return {
            name: batch.labelled() if name == "mlm" or (name == "kd" and masked_only) else counted_tokens(batch)
            for name in self.weights
        }

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """``mlm``: positions with a label; ``kd``: those, or all that count; ``cosine``: all that count."""
        return {name: mask.sum() for name, mask in self._masks(batch).items()}

    def forward(self, student: Observation, batch: Batch, signal: Signal) -> dict[str, Term]:
        """The terms ``mlm``, ``kd`` and ``cosine``, if they have a weight."""
        masks, terms = self._masks(batch), dict[str, Term]()
        targets: dict[str, losses.HardTargets | losses.SoftTargets] = {}
        if "mlm" in masks:
            targets["mlm"] = losses.HardTargets(batch.labels, masks["mlm"])
        if "kd" in masks:
            assert student.head is not None
            assert signal.head is not None
            theirs = signal.head
            check_same_tokens(student.head.inputs, theirs.inputs)
            _check_vocabularies(student.head.size, theirs.size)
            teacher = (theirs.inputs, linear_head(theirs))
            targets["kd"] = losses.SoftTargets(teacher, temperature=self.options.temperature, mask=masks["kd"])
        if targets:
            assert student.head is not None
            terms = head_terms(self, student.head, targets, {name: masks[name].sum() for name in targets})
        if self.taps is not None:
            s, t = student.hidden[self.taps[0]], signal.hidden[self.taps[1]]
            check_same_tokens(s, t)
            s, t = s[masks["cosine"]], t[masks["cosine"]]
            s = s if self.projector is None else self.projector(s, t)
            terms["cosine"] = Term(losses.cosine(s, t, reduction="sum"), masks["cosine"].sum())
        return terms

    def _formula_names(self) -> dict[str, str]:
        return {"kd": f"kd(T={self.options.temperature:g}, {self.options.positions})"}


class MaskedMethod(TripleMethod):
    """Masked language modelling alone: trains a teacher's head, and a baseline student.

    Reference: Devlin et al., BERT (2019), section 3.1, task 1.
    """

    needs = None
    compares_tokens = False

    def __init__(self) -> None:
        super().__init__(mlm=1.0, kd=0.0, cosine=0.0)

    def build(self, student: nn.Module, teacher: nn.Module | None, example: Batch, ids: Tensor | None = None) -> None:
        """Nothing to build."""


def _check_vocabularies(student: int, teacher: int) -> None:
    if student != teacher:
        raise CapabilityError(
            f"the student scores {student} tokens, the teacher {teacher}",
            remedy="soft labels need one vocabulary: build the student with the teacher's, or set kd: 0",
        )
