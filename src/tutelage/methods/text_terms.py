"""Helpers of methods on texts: which tokens count, the vocabulary head, and the terms of the outputs."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from tutelage import losses
from tutelage.config import LOGIT_LOSSES, SOFT_OF_TASK, LogitOptions
from tutelage.data.batch import Batch, Task
from tutelage.errors import CapabilityError, ConfigError
from tutelage.methods.base import Method, Term
from tutelage.methods.logit import LogitMethod
from tutelage.students.projectors import device_of
from tutelage.taps import Head, Needs, evaluating, observe, vocabulary_head


def non_padding(batch: Batch) -> Tensor:
    """``[B, L]``, true at tokens that are not padding, by the attention mask; all true without a mask.

    Raises:
        CapabilityError: the batch contains no texts.
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


def counted_tokens(batch: Batch) -> Tensor:
    """``[B, L]``, true at tokens that count: no padding, and no token or text that the batch's mask excludes."""
    present, counted = non_padding(batch), batch.counted()
    return present & (counted if counted.ndim == 2 else counted.unsqueeze(-1))


def check_same_tokens(student: Tensor, teacher: Tensor) -> None:
    """Raise :class:`CapabilityError` if the hidden states ``[B, L, ...]`` have different numbers of tokens."""
    if student.shape[:2] != teacher.shape[:2]:
        raise CapabilityError(
            f"the student reads {student.shape[1]} tokens of a text, the teacher {teacher.shape[1]}",
            remedy="this method compares token by token: use one tokenizer and one text, or kind: embedding",
        )


def linear_head(head: Head) -> losses.LinearHead:
    """An observed head, as the chunked losses take it."""
    lora = None if head.adapter is None else losses.LoRA(*head.adapter)
    return losses.LinearHead(head.weight, head.bias, head.scale, head.softcap, lora, head.vocabulary)


def head_terms(
    method: Method,
    head: Head,
    targets: Mapping[str, losses.HardTargets | losses.SoftTargets | losses.CrossVocabularyTargets],
    counts: Mapping[str, Tensor],
) -> dict[str, Term]:
    """Terms of a head's logits from one projection, with one gradient for the weights that the engine will apply.

    Args:
        method: the owner of the terms.
        head: the student's.
        targets: by term.
        counts: how many tokens each term averages over.

    Raises:
        ValueError: as :func:`tutelage.losses.linear_sums`.
    """
    scales = method.loss_scales or {name: method.weights[name] / counts[name].clamp(min=1) for name in targets}
    weights = [scales[name] for name in targets]
    sums = losses.linear_sums(head.inputs, linear_head(head), list(targets.values()), weights=weights)
    return {name: Term(total, counts[name]) for name, total in zip(targets, sums, strict=True)}


def taps_only(model: nn.Module, taps: Sequence[str]) -> Needs:
    """Needs of taps alone; a head over a vocabulary is not run."""
    return Needs(logits=False, head=vocabulary_head(model) is not None, hidden=tuple(dict.fromkeys(taps)))


def freeze_unused(student: nn.Module, example: Batch, needs: Needs | None, *, head: bool = False) -> nn.Module:
    """``student``, with the parameters frozen on which no tap (nor ``head``) depends, such as later layers.

    They get no gradient, and distributed wrappers wait for the gradient of every parameter that is not frozen. The
    exported student is a fresh one, with nothing frozen.
    """
    parameters = [p for p in student.parameters() if p.requires_grad]
    with evaluating(student), torch.enable_grad():
        observed = observe(student, example.to(device_of(student)).inputs, needs)
    outputs = list(observed.hidden.values())
    if observed.head is not None and head:
        outputs += [x for x in observed.head if isinstance(x, Tensor) and x.requires_grad]
    gradients = torch.autograd.grad([x.float().sum() for x in outputs], parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)
    return student


def nonzero_weights(**weights: float) -> dict[str, float]:
    """The weights other than 0; raises :class:`ConfigError` if there are none."""
    nonzero = {name: weight for name, weight in weights.items() if weight}
    if not nonzero:
        raise ConfigError(f"{', '.join(weights)} are all 0", remedy="give at least one term a weight above 0")
    return nonzero


class OutputTerms(LogitMethod):
    """Soft labels and hard labels as a part of a method on texts. A term with weight 0 is not computed.

    Args:
        task: the kind of labels.
        alpha: weight of the soft labels.
        hard: weight of the hard labels.
        temperature: T of the soft labels of classes.
        soft: the loss on logits of classes; other tasks have their own.
        name: of the soft term; default: that of its loss.
    """

    def __init__(
        self, task: Task, alpha: float, hard: float, temperature: float, soft: str = "kd", name: str | None = None
    ) -> None:
        soft = soft if task == "classes" else SOFT_OF_TASK[task]
        t = None if LOGIT_LOSSES[soft].temperature is None else temperature
        super().__init__(LogitOptions(soft=soft, alpha=alpha, hard=hard, temperature=t), task=task)
        self.soft_term = name or soft
        weights = {self.soft_term: alpha, self.labels.term: hard}
        self.weights = {term: weight for term, weight in weights.items() if weight}

    def _mask(self, batch: Batch) -> Tensor:
        """Positions of the logits that count, in the shape of the labels; never padding."""
        return batch.counted() if batch.labels.ndim == 1 else counted_tokens(batch)
