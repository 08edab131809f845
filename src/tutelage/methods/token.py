"""Language models: soft and hard labels token by token, without the logits of all tokens at once."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tutelage import losses
from tutelage.config import MethodOptions
from tutelage.config.methods.language import SequenceOptions, TokenOptions
from tutelage.data.batch import Batch
from tutelage.errors import CapabilityError
from tutelage.methods.base import Method, Term
from tutelage.methods.text_terms import check_same_tokens, counted_tokens, head_terms, linear_head, nonzero_weights
from tutelage.methods.transformer_layers import find_both_layers, map_layers
from tutelage.students import build_projector, eval_no_grad
from tutelage.students.projectors import device_of
from tutelage.taps import Needs, Observation, observe, vocabulary_head
from tutelage.teachers.signal import Signal


class TokenMethod(Method):
    r"""A language model that learns token by token: :math:`\alpha\,T^2 D(p^T, p^S) + (1-\alpha)\,\mathrm{CE}`.

    Only tokens that count are compared, some at a time: logits ``[B, L, V]`` never exist
    (:func:`tutelage.losses.linear_sums`). The teacher may provide its last hidden states and head, dense logits, or
    top-k or sampled outputs. ``hidden`` adds the mean of 1 - cosine over mapped layers' hidden states, through linear
    layers if the widths differ.

    Raises:
        ConfigError: all weights are 0.

    Reference: Hinton et al. (2015), equation 4, at each token; Kim and Rush, Sequence-Level Knowledge Distillation
    (EMNLP 2016), section 3.1, word-level; Gu et al., MiniLLM (ICLR 2024); Agarwal et al., GKD (ICLR 2024); Ko et al.,
    DistiLLM (ICML 2024).
    """

    Options: ClassVar[type[MethodOptions]] = TokenOptions
    options: Any
    takes_sparse = True
    needs: Needs | None = Needs(logits=False, head=True)
    student_needs: Needs | None = Needs(logits=False, head=True)

    def __init__(self, options: MethodOptions | None = None, /, **keywords: Any) -> None:
        super().__init__(options, **keywords)
        self.weights = nonzero_weights(**self._option_weights())
        self.pairs: list[tuple[str, str]] = []
        self.layer_map: list[tuple[int, int]] = []
        self.projectors = nn.ModuleList()
        if not {"soft", "hidden"} & set(self.weights):
            self.needs = None

    def _option_weights(self) -> dict[str, float]:
        """The weight of each term, by the options."""
        o = self.options
        return {
            "soft": o.alpha,
            "ce": 1.0 - o.alpha if o.hard is None else o.hard,
            "hidden": getattr(o, "hidden", 0.0),
        }

    @property
    def _divergence(self) -> dict[str, Any]:
        """The arguments of a soft target that the options set."""
        o = self.options
        return {
            "divergence": o.divergence, "temperature": o.temperature, "beta": o.beta, "alpha": o.skew,
            "reverse": o.reverse,
        }  # fmt: skip

    def build(self, student: nn.Module, teacher: nn.Module | None, example: Batch, ids: Tensor | None = None) -> None:
        """Find the heads and the layers, and check that the texts of packed rows are separate."""
        self.pairs, self.projectors = [], nn.ModuleList()
        models = {"student": student} if teacher is None else {"student": student, "teacher": teacher}
        for who, model in models.items():
            if (who == "student" or "soft" in self.weights) and vocabulary_head(model) is None:
                raise CapabilityError(
                    f"the {who}, {type(model).__name__}, has no head over a vocabulary",
                    where="method",
                    remedy="take a causal language model, or kind: logit",
                )
        for who, model in models.items():
            check_packed_rows_are_separate(who, model, example)
        if "hidden" in self.weights:
            mine, theirs = find_both_layers(student, teacher, example)
            self.layer_map = map_layers(self.options.layers, mine, theirs)
            self.pairs = [(mine.layers[m - 1].output, theirs.layers[n - 1].output) for m, n in self.layer_map]
            if mine.width != theirs.width:
                self.projectors.extend(
                    build_projector((1, 1, mine.width), (1, 1, theirs.width), kind="linear") for _ in self.pairs
                )
        taps = [tuple(dict.fromkeys(pair[i] for pair in self.pairs)) for i in range(2)]
        self.student_needs = Needs(logits=False, head=True, hidden=taps[0])
        if self.needs is not None:
            soft = "soft" in self.weights
            temperature = self.options.temperature if soft else None
            self.needs = Needs(logits=False, head=soft, hidden=taps[1], temperature=temperature)

    def _masks(self, batch: Batch) -> dict[str, Tensor]:
        """``[B, L]`` where each term counts."""
        if batch.labels.ndim != 2:
            raise CapabilityError(
                f"labels are {list(batch.labels.shape)}, one for each text, and this method needs one for each token",
                remedy="use data of task causal",
            )
        counted = counted_tokens(batch)
        masks = {"soft": counted, "ce": batch.labelled() & counted, "hidden": counted}
        return {name: mask for name, mask in masks.items() if name in self.weights}

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """``soft`` and ``hidden``: tokens that count; ``ce``: those with a label."""
        return {name: mask.sum() for name, mask in self._masks(batch).items()}

    def forward(self, student: Observation, batch: Batch, signal: Signal) -> dict[str, Term]:
        """The terms ``soft``, ``ce`` and ``hidden``, if they have a weight."""
        return self._terms(student, batch, signal, self._masks(batch))

    def _terms(
        self,
        student: Observation,
        batch: Batch,
        signal: Signal,
        masks: dict[str, Tensor],
        token_weights: Tensor | None = None,
    ) -> dict[str, Term]:
        """The terms over the tokens of ``masks``; ``token_weights`` multiply the soft term of each token."""
        if batch.teacher_labels is not None and self.needs is not None:
            raise CapabilityError(
                "teacher and student have different tokenizers",
                remedy="use one tokenizer, or kind: cross-tokenizer",
            )
        assert student.head is not None
        targets: dict[str, losses.HardTargets | losses.SoftTargets] = {}
        if "soft" in masks:
            teacher = teacher_distribution(signal, student.head.inputs, self.options.temperature)
            targets["soft"] = losses.SoftTargets(
                teacher, **self._divergence, mask=masks["soft"], token_weights=token_weights
            )
        if "ce" in masks:
            targets["ce"] = losses.HardTargets(batch.labels, masks["ce"])
        terms: dict[str, Term] = {}
        if targets:
            try:
                terms = head_terms(self, student.head, targets, {name: masks[name].sum() for name in targets})
            except ValueError as error:
                raise CapabilityError(
                    str(error), remedy="both need one vocabulary, in one order; padding is known by `model.tokenizer`"
                ) from error
        if self.pairs:
            mask = masks["hidden"]
            parts = []
            for i, (mine, theirs) in enumerate(self.pairs):
                s, t = student.hidden[mine], signal.hidden[theirs]
                check_same_tokens(s, t)
                s, t = s[mask], t[mask]
                s = self.projectors[i](s, t) if len(self.projectors) else s
                parts.append(losses.cosine(s, t, reduction="sum"))
            terms["hidden"] = Term(torch.stack(parts).mean(), mask.sum())
        return terms

    def _formula_names(self) -> dict[str, str]:
        names = {}
        if "soft" in self.weights:
            o = self.options
            options = {"beta": o.beta, "alpha": o.skew, "reverse": o.reverse}
            arguments = [f"T={o.temperature:g}", *(f"{k}={v}" for k, v in options.items() if v is not None)]
            names["soft"] = f"{o.divergence}({', '.join(arguments)})"
        if self.layer_map:
            names["hidden"] = f"hidden of layers {', '.join(f'{m}<-{n}' for m, n in self.layer_map)}"
        return names


class SequenceMethod(TokenMethod):
    r"""Maximum likelihood of the next token: :math:`-\frac{1}{N}\sum_t \log p^S(y_t \mid y_{<t})`.

    On a teacher's answers this is sequence-level distillation; on other texts, plain language modelling.

    Reference: Kim and Rush, Sequence-Level Knowledge Distillation (EMNLP 2016), section 3.2, where the answers stand
    for the mode of the teacher; Taori et al., Alpaca (2023).
    """

    Options = SequenceOptions
    uses_unlabelled = True
    needs = None

    def _option_weights(self) -> dict[str, float]:
        return {"ce": 1.0}


def teacher_distribution(signal: Signal, student: Tensor, temperature: float) -> losses.TeacherDistribution:
    """A teacher's signal for ``[B, L]`` tokens, as the chunked losses take it.

    Args:
        signal: with a head, dense logits, or top-k or sampled outputs.
        student: hidden states ``[B, L, D]`` of the same tokens.
        temperature: of the loss.

    Raises:
        CapabilityError: the signal has none of them, is of other tokens, or of another temperature.
    """
    if signal.head is not None:
        check_same_tokens(student, signal.head.inputs)
        return signal.head.inputs, linear_head(signal.head)
    if signal.logits is not None:
        check_same_tokens(student, signal.logits)
        return signal.logits
    sparse = signal.sparse
    if sparse is None:
        raise CapabilityError(
            "the teacher gives no distribution of the next tokens", remedy="use a live teacher or a cache"
        )
    check_same_tokens(student, sparse.index)
    if sparse.temperature != temperature:
        raise CapabilityError(
            f"the teacher's outputs are for T = {sparse.temperature:g}, the loss has T = {temperature:g}",
            remedy="the temperature of top-k and sampled outputs cannot change: use theirs, or compute them again",
        )
    return SPARSE_TARGETS[sparse.kind](sparse.index, sparse.values)


SPARSE_TARGETS: dict[str, type[losses.TopKTargets] | type[losses.SampledTargets]] = {
    "topk": losses.TopKTargets, "sampled": losses.SampledTargets,
}  # fmt: skip
"""The targets of each kind of sparse outputs."""


def check_packed_rows_are_separate(who: str, model: nn.Module, example: Batch) -> None:
    """Check by a dry run that the texts of a packed row do not attend to each other.

    Raises:
        CapabilityError: they do.
    """
    inputs = example.inputs if isinstance(example.inputs, dict) else {}
    positions = inputs.get("position_ids")
    if positions is None or "attention_mask" in inputs:
        return
    starts = (positions == 0).nonzero()
    row, start = next(((int(r), int(c)) for r, c in starts if c > 0), (-1, -1))
    if row < 0:
        return
    stop = next((int(c) for r, c in starts if r == row and c > start), positions.shape[1])
    device, needs = device_of(model), Needs(logits=False, head=True)
    with eval_no_grad(model):
        full, alone = (
            observe(model, {k: v[row : row + 1, a:b].to(device) for k, v in inputs.items()}, needs).head
            for a, b in ((0, stop), (start, stop))
        )
    assert full is not None
    assert alone is not None
    packed, separate = full.inputs[:, start:].float(), alone.inputs.float()
    if float((packed - separate).norm()) > 1e-2 * float(separate.norm()):
        raise CapabilityError(
            f"in the {who}, {type(model).__name__}, the texts of a packed row attend to each other",
            where="data.pack",
            remedy="leave pack out; or load it with attn_implementation: sdpa",
        )
