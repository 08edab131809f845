"""What methods on texts share: which tokens count, the head over a vocabulary, and the terms of the outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from tutelage import losses
from tutelage.config import LOGIT_LOSSES, SOFT_OF_TASK
from tutelage.data.batch import Batch, Task
from tutelage.errors import CapabilityError, ConfigError
from tutelage.methods.base import Method, Term
from tutelage.methods.label_losses import label_loss
from tutelage.methods.logit import logit_loss
from tutelage.students.projectors import device_of
from tutelage.taps import Head, Needs, evaluating, observe, vocabulary_head
from tutelage.teachers.signal import Signal

# Which tokens count ------------------------------------------------------------------------------------------------


def seen_tokens(batch: Batch) -> Tensor:
    """``[B, L]``, true at what is no padding, by the attention mask; all where there is none.

    Raises:
        CapabilityError: the batch is no texts.
    """
    inputs = batch.inputs if isinstance(batch.inputs, dict) else {}
    attention = inputs.get("attention_mask")
    if attention is not None and attention.ndim == 2:
        return attention.bool()
    tokens = next((x for x in inputs.values() if x.ndim >= 2), None)
    if tokens is None:
        raise CapabilityError(
            "this method compares the tokens of texts, and the batch has none",
            remedy="give batches with input_ids and attention_mask",
        )
    return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)


def text_positions(batch: Batch) -> Tensor:
    """``[B, L]``, true at tokens that count: never padding, and of texts with a label for each token or masked ones
    what the batch's mask leaves (so no special tokens)."""
    seen, counted = seen_tokens(batch), batch.counted()
    return seen & (counted if counted.ndim == 2 else counted.unsqueeze(-1))


def counted_outputs(batch: Batch) -> Tensor:
    """Positions of the logits that count, in the shape of the labels; of tokens never padding."""
    return batch.counted() if batch.labels.ndim == 1 else text_positions(batch)


def linear_head(head: Head) -> losses.LinearHead:
    """A head that was seen, as the chunked losses take it."""
    beside = None if head.adapter is None else losses.LoRA(*head.adapter)
    return losses.LinearHead(head.weight, head.bias, head.scale, head.softcap, beside)


def head_terms(
    method: Method,
    head: Head,
    asked: Mapping[str, losses.HardTargets | losses.SoftTargets | losses.CrossVocabularyTargets],
    counts: Mapping[str, Tensor],
) -> dict[str, Term]:
    """Terms of what a head scores, from one projection and with one gradient, by what the engine will multiply each.

    Args:
        method: whose terms they are.
        head: the student's.
        asked: the losses, by term.
        counts: how many tokens each term averages over.

    Raises:
        ValueError: as :func:`tutelage.losses.linear_sums`.
    """
    shares = method.loss_scales or {name: method.weights[name] / counts[name].clamp(min=1) for name in asked}
    weights = [shares[name] for name in asked]
    sums = losses.linear_sums(head.inputs, linear_head(head), list(asked.values()), weights=weights)
    return {name: Term(total, counts[name]) for name, total in zip(asked, sums, strict=True)}


def quiet_needs(model: nn.Module, taps: Sequence[str]) -> Needs:
    """Taps and nothing else; where the model has a head over a vocabulary, that is not run."""
    return Needs(logits=False, head=vocabulary_head(model) is not None, hidden=tuple(dict.fromkeys(taps)))


def freeze_unreached(student: nn.Module, example: Batch, needs: Needs, *, head: bool = False) -> nn.Module:
    """``student``, with what no tap (nor ``head``) depends on frozen, such as all that is behind the tapped layers.

    It would get no gradient anyway; distributed wrappers wait for one of everything that is not frozen. The exported
    student is a fresh one, with nothing frozen.
    """
    learned = [p for p in student.parameters() if p.requires_grad]
    with evaluating(student), torch.enable_grad():
        observed = observe(student, example.to(device_of(student)).inputs, needs)
    parts = list(observed.hidden.values())
    if observed.head is not None and head:
        parts += [x for x in observed.head if isinstance(x, Tensor)]
    gradients = torch.autograd.grad([x.float().sum() for x in parts], learned, allow_unused=True)
    for parameter, gradient in zip(learned, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)
    return student


def check_same_tokens(student: Tensor, teacher: Tensor) -> None:
    """Raise :class:`CapabilityError` where the two hidden states ``[B, L, ...]`` are not of the same tokens."""
    if student.shape[:2] != teacher.shape[:2]:
        raise CapabilityError(
            f"the student reads {student.shape[1]} tokens of a text, the teacher {teacher.shape[1]}",
            remedy="token by token both must read the same: use one tokenizer and one text, or kind: embedding",
        )


# What the outputs say ---------------------------------------------------------------------------------


def check_weights(**weights: float) -> dict[str, float]:
    """Those above 0; raises :class:`ConfigError` for one below, and where none is left."""
    for name, weight in weights.items():
        if not weight >= 0:
            raise ConfigError(f"{name}={weight}", remedy="must be 0 or more: a weight; 0 leaves the term out")
    kept = {name: weight for name, weight in weights.items() if weight}
    if not kept:
        raise ConfigError(
            f"{', '.join(weights)} are all 0", remedy="give at least one a weight, or nothing is learned"
        )
    return kept


class Outputs:
    """Terms of the logits: soft labels, and hard ones. One that weighs nothing is not computed.

    Args:
        task: what labels are.
        alpha: weight of the soft labels.
        hard: weight of the hard ones.
        temperature: T of the soft labels of classes.
        soft: the loss on logits of classes; of the other tasks it is their own.
        name: of the soft term; default its loss's.
    """

    def __init__(
        self, task: Task, alpha: float, hard: float, temperature: float, soft: str = "kd", name: str | None = None
    ) -> None:
        self.labels = label_loss(task)
        self.soft = soft if task == "classes" else SOFT_OF_TASK[task]
        self.loss = logit_loss(self.soft)
        self.temperature = None if LOGIT_LOSSES[self.soft].temperature is None else temperature
        self.name = self.soft if name is None else name
        given = {self.name: alpha, self.labels.term: hard}
        self.weights = {term: weight for term, weight in given.items() if weight}

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Outputs that count, and those with a label."""
        counts = {self.name: counted_outputs(batch), self.labels.term: batch.labelled()}
        return {term: counts[term].sum() for term in self.weights}

    def __call__(self, logits: Tensor | None, signal: Signal, batch: Batch) -> dict[str, Term]:
        """The terms; none, where nothing weighs.

        Raises:
            CapabilityError: teacher and student score different classes, or not in the shape of the labels.
        """
        if not self.weights:
            return {}
        assert logits is not None
        counts = self.counts(batch)
        terms: dict[str, Term] = {}
        if self.name in self.weights:
            teacher = signal.dense()
            if teacher.shape != logits.shape:
                raise CapabilityError(
                    f"the student's logits are {tuple(logits.shape)}, the teacher's {tuple(teacher.shape)}",
                    remedy="both must score the same classes in the same order",
                )
            options = {} if self.temperature is None else {"temperature": self.temperature}
            loss = self.loss(logits, teacher, mask=counted_outputs(batch), reduction="sum", **options)
            terms[self.name] = Term(loss, counts[self.name])
        if self.labels.term in self.weights:
            terms[self.labels.term] = Term(self.labels.loss(logits, batch, 0.0), counts[self.labels.term])
        return terms

    def formula(self) -> str:
        """The terms in one line; empty, where nothing weighs."""
        shown = "" if self.temperature is None else f"(T={self.temperature:g})"
        return " + ".join(f"{w:g} * {n}{shown if n == self.name else ''}" for n, w in self.weights.items())
