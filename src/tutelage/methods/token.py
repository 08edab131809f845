"""Language models: soft and hard labels token by token, without the scores of all tokens at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tutelage import losses
from tutelage.data.batch import Batch, Task
from tutelage.errors import CapabilityError, ConfigError
from tutelage.methods.base import Method, Term
from tutelage.methods.text_terms import check_same_tokens, check_weights, head_terms, linear_head, text_positions
from tutelage.methods.transformer_layers import check_layers, find_layers, mapped
from tutelage.students import build_projector, eval_no_grad
from tutelage.students.projectors import device_of
from tutelage.taps import Needs, Observation, observe, vocabulary_head
from tutelage.teachers.signal import Signal

Divergence = Literal["kl", "reverse_kl", "js", "skew_kl", "tvd"]


class TokenMethod(Method):
    r"""A language model taught token by token: :math:`\alpha\,T^2 D(p^T, p^S) + (1-\alpha)\,\mathrm{CE}`.

    Only tokens that count are compared, some at a time: scores ``[B, L, V]`` never exist
    (:func:`tutelage.losses.linear_sums`). The teacher may give its last hidden states and head, dense logits, or
    part of its distribution.

    Args:
        divergence: D. ``kl`` is the usual, of Hinton et al.; ``reverse_kl`` is MiniLLM's; ``js``, with ``beta``,
            GKD's; ``skew_kl``, with ``skew`` and ``reverse``, DistiLLM's; ``tvd`` that of Wen et al.
        temperature: T of the soft labels. Language models are mostly distilled at 1.
        alpha: weight of the soft labels; at most 1 unless ``hard`` is given.
        hard: weight of the next tokens of the data. Default: 1 - alpha.
        beta: of ``js``; default 0.5.
        skew: of ``skew_kl``, its mixture's share of the other side; default 0.1.
        reverse: of ``skew_kl``, from the student to the mixture.
        hidden: weight of 1 - cosine of mapped layers' hidden states, their mean; through linear layers where widths
            differ.
        layers: the teacher's layer for each of the student's: ``uniform``, ``last``, or a list, counted from 1,
            where ``None`` leaves a layer out.
        task: what labels are; tokens are ``classes``.

    Raises:
        ConfigError: a value out of range, or no term left.

    Reference: Hinton et al. (2015), equation 4, at each token; Kim and Rush, Sequence-Level Knowledge Distillation
    (EMNLP 2016), section 3.1, word-level; Gu et al., MiniLLM (ICLR 2024); Agarwal et al., GKD (ICLR 2024); Ko et al.,
    DistiLLM (ICML 2024).
    """

    takes_sparse = True
    needs: Needs | None = Needs(logits=False, head=True)
    student_needs: Needs | None = Needs(logits=False, head=True)

    def __init__(
        self,
        divergence: Divergence = "kl",
        temperature: float = 1.0,
        alpha: float = 0.9,
        hard: float | None = None,
        *,
        beta: float | None = None,
        skew: float | None = None,
        reverse: bool | None = None,
        hidden: float = 0.0,
        layers: str | Sequence[int | None] = "uniform",
        task: Task = "classes",
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise ConfigError(f"temperature={temperature}", remedy="must be above 0; 1 is usual for language models")
        if hard is None and alpha > 1:
            raise ConfigError(f"alpha={alpha}", remedy="must lie in [0, 1]; above 1 with hard=... only")
        try:
            losses.check_divergence(divergence, beta, skew, reverse)
        except ValueError as error:
            raise ConfigError(f"divergence={divergence!r}: {error}", remedy="see docs/recipes.md") from None
        check_layers(layers, ("uniform", "last"))
        self.divergence, self.temperature, self.layers, self.task = divergence, temperature, layers, task
        self.divergence_options: dict[str, Any] = {"beta": beta, "alpha": skew, "reverse": reverse}
        self.weights = check_weights(soft=alpha, ce=1.0 - alpha if hard is None else hard, hidden=hidden)
        self.pairs: list[tuple[str, str]] = []
        self.mapped: list[tuple[int, int]] = []
        self.projectors = nn.ModuleList()
        if not {"soft", "hidden"} & set(self.weights):
            self.needs = None

    def build(self, student: nn.Module, teacher: nn.Module | None, example: Batch, ids: Tensor | None = None) -> None:
        """Find the heads and the layers, and try whether packed texts stay apart.

        Raises:
            CapabilityError: a model without a head over the vocabulary, heads over different ones, or one that lets
                packed texts see each other.
            ModelError: no layers are found.
        """
        self.pairs, self.projectors = [], nn.ModuleList()
        heads = {"student": vocabulary_head(student)}
        if "soft" in self.weights and teacher is not None:
            heads["teacher"] = vocabulary_head(teacher)
        for who, head in heads.items():
            if head is None:
                model = student if who == "student" else teacher
                raise CapabilityError(
                    f"the {who}, {type(model).__name__}, has no head that scores a vocabulary",
                    where="method",
                    remedy="take a causal language model, or kind: logit",
                )
        check_packed_rows_are_separate("student", student, example)
        if teacher is not None:
            check_packed_rows_are_separate("teacher", teacher, example)
        if "hidden" in self.weights:
            assert teacher is not None
            mine, theirs = find_layers("student", student, example), find_layers("teacher", teacher, example)
            self.mapped = mapped(self.layers, mine, theirs)
            self.pairs = [(mine.layers[m - 1].state, theirs.layers[n - 1].state) for m, n in self.mapped]
            if mine.width != theirs.width:
                self.projectors.extend(
                    build_projector((1, 1, mine.width), (1, 1, theirs.width), kind="linear") for _ in self.pairs
                )
        taps = [tuple(dict.fromkeys(pair[i] for pair in self.pairs)) for i in range(2)]
        self.student_needs = Needs(logits=False, head=True, hidden=taps[0])
        if self.needs is not None:
            soft = "soft" in self.weights
            self.needs = Needs(
                logits=False, head=soft, hidden=taps[1], temperature=self.temperature if soft else None
            )

    def _masks(self, batch: Batch) -> dict[str, Tensor]:
        """``[B, L]`` where each term counts."""
        if batch.labels.ndim != 2:
            raise CapabilityError(
                f"labels are {list(batch.labels.shape)}, one for each text, and this method learns from tokens",
                remedy="use data of task causal",
            )
        counted = text_positions(batch)
        masks = {"soft": counted, "ce": batch.labelled() & counted, "hidden": counted}
        return {name: mask for name, mask in masks.items() if name in self.weights}

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """``soft`` and ``hidden``: tokens that count; ``ce``: those with a label."""
        return {name: mask.sum() for name, mask in self._masks(batch).items()}

    def forward(self, student: Observation, batch: Batch, signal: Signal | None) -> dict[str, Term]:
        """The terms ``soft``, ``ce`` and ``hidden``, as far as they weigh anything.

        Raises:
            CapabilityError: teacher and student do not read the same tokens, or score different vocabularies.
        """
        return self._terms(student, batch, signal, self._masks(batch))

    def _terms(
        self,
        student: Observation,
        batch: Batch,
        signal: Signal | None,
        masks: dict[str, Tensor],
        token_weights: Tensor | None = None,
    ) -> dict[str, Term]:
        """The terms, of tokens that count by ``masks``; the soft labels of each multiplied by ``token_weights``."""
        if batch.teacher_labels is not None and signal is not None:
            raise CapabilityError(
                "the teacher cuts texts into other tokens than the student",
                remedy="use one tokenizer, or kind: cross-tokenizer",
            )
        assert student.head is not None
        asked: dict[str, losses.HardTargets | losses.SoftTargets] = {}
        for name in ("soft", "ce"):
            if name in masks:
                asked[name] = (
                    losses.HardTargets(batch.labels, masks[name])
                    if name == "ce"
                    else losses.SoftTargets(
                        teaching(signal or Signal(), student.head.inputs, self.temperature),
                        self.divergence, self.temperature, mask=masks[name], token_weights=token_weights,
                        **self.divergence_options,
                    )
                )  # fmt: skip
        terms: dict[str, Term] = {}
        if asked:
            try:
                terms = head_terms(self, student.head, asked, {name: masks[name].sum() for name in asked})
            except ValueError as error:
                raise CapabilityError(str(error), remedy="both must score one vocabulary, in one order") from error
        if self.pairs:
            assert signal is not None
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

    def formula(self) -> str:
        """The loss in one line."""
        options = [
            f"T={self.temperature:g}",
            *(f"{k}={v}" for k, v in self.divergence_options.items() if v is not None),
        ]
        shown = {"soft": f"{self.divergence}({', '.join(options)})", "ce": "ce", "hidden": "hidden"}
        if self.mapped:
            shown["hidden"] += f" of layers {', '.join(f'{m}<-{n}' for m, n in self.mapped)}"
        return " + ".join(f"{weight:g} * {shown[name]}" for name, weight in self.weights.items())


class SequenceMethod(TokenMethod):
    r"""Maximum likelihood of the next token, :math:`-\frac{1}{N}\sum_t \log p^S(y_t \mid y_{<t})`, over what is to be
    learned: of a teacher's answers, sequence-level distillation; of other texts, plain language modelling.

    Reference: Kim and Rush, Sequence-Level Knowledge Distillation (EMNLP 2016), section 3.2, for whose mode of
    the teacher its answers stand; Taori et al., Alpaca (2023).
    """

    uses_unlabelled = True
    needs = None

    def __init__(self, *, task: Task = "classes") -> None:
        super().__init__(alpha=0.0, task=task)


def teaching(signal: Signal, student: Tensor, temperature: float) -> losses.TeacherDistribution:
    """What a teacher's signal says of ``[B, L]`` tokens, as the chunked losses take it.

    Args:
        signal: with a head, dense logits or part of the distribution.
        student: hidden states ``[B, L, D]``, of the same tokens.
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
    if signal.sparse is None:
        raise CapabilityError("the teacher said nothing of the next tokens", remedy="use a live teacher or a cache")
    sparse = signal.sparse
    check_same_tokens(student, sparse.index)
    if sparse.temperature != temperature:
        raise CapabilityError(
            f"the teacher's distributions are of T = {sparse.temperature:g}, the loss of T = {temperature:g}",
            remedy="a part of a distribution says nothing of another temperature: use that one, or make it anew",
        )
    return PARTS[sparse.kind](sparse.index, sparse.values)


PARTS: dict[str, type[losses.TopKTargets] | type[losses.SampledTargets]] = {
    "topk": losses.TopKTargets, "sampled": losses.SampledTargets,
}  # fmt: skip
"""What a part of a distribution is to the chunked losses."""


def check_packed_rows_are_separate(who: str, model: nn.Module, example: Batch) -> None:
    """Whether a model keeps the texts of packed rows apart, by a dry run; nothing where rows are not packed.

    Raises:
        CapabilityError: it does not.
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
        whole, alone = (
            observe(model, {k: v[row : row + 1, a:b].to(device) for k, v in inputs.items()}, needs).head
            for a, b in ((0, stop), (start, stop))
        )
    assert whole is not None
    assert alone is not None
    packed, own = whole.inputs[:, start:].float(), alone.inputs.float()
    if float((packed - own).norm()) > 1e-2 * float(own.norm()):
        raise CapabilityError(
            f"the {who}, {type(model).__name__}, lets the texts of a packed row see each other",
            where="data.pack",
            remedy="leave pack out; or load it with attn_implementation: sdpa",
        )
