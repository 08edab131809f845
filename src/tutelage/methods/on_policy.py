"""Language models that learn from their own answers."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from tutelage import losses
from tutelage.config.methods.language import OnPolicyOptions
from tutelage.data.batch import IGNORE, Batch
from tutelage.errors import CapabilityError
from tutelage.methods.base import Term
from tutelage.methods.rollouts import RolloutClient
from tutelage.methods.text_terms import linear_head
from tutelage.methods.token import TokenMethod
from tutelage.students.sampling import Completion, sample_completions
from tutelage.taps import Observation
from tutelage.teachers.signal import Signal

OPENING = 0.25
"""The share of a text without a prompt that is the student's prompt."""


class OnPolicyMethod(TokenMethod):
    r"""Distillation on a mixture of the data and of the student's own answers, which the teacher scores.

    With probability :math:`\lambda` (``lmbda``) the answers of a batch are sampled from the current student,
    otherwise they are the data's. The loss of both is that of :class:`TokenMethod`; sampled answers have no hard
    labels. No gradient goes through the sampling. A conversation's prompt is everything before its last answer; that
    of a text that is learned from its first token is its first quarter.

    - ``replay_buffer``: the last answers are part of the method's state, and of its checkpoints.
    - ``long``: the weight of MiniLLM's long part, the gradient of a token's consequences,
      :math:`-\sum_t R_{t+1} \nabla\log p^S(y_t)`, with :math:`R_{t+1}` the mean of :math:`\log p^T(y)/p^S(y)` over
      the tokens after it.
    - ``mix``: answers are sampled from :math:`\tilde p = \alpha p^T + (1 - \alpha) p^S`, and each token's loss has
      the weight :math:`p^S(y_t) / \tilde p(y_t)`.
    - ``adaptive``: lambda grows by it, up to 1, at an evaluation whose loss is ``slack`` or more above the loss of
      its last increase (at first: of the first evaluation).

    Reference: Agarwal et al., On-Policy Distillation of Language Models (ICLR 2024), algorithm 1; Gu et al., MiniLLM
    (ICLR 2024), equations 3 to 6 and section 2.2, teacher-mixed sampling and length normalisation; the replay buffer
    and the adaptive lambda: Ko et al., DistiLLM (ICML 2024), section 3.2.
    """

    Options = OnPolicyOptions
    options: OnPolicyOptions
    takes_sparse = False
    generates_batches = True

    replay_tokens: Tensor
    replay_lengths: Tensor
    replay_count: Tensor
    current_lambda: Tensor
    loss_threshold: Tensor

    def __init__(self, options: OnPolicyOptions | None = None, /, **keywords: Any) -> None:
        super().__init__(options, **keywords)
        o = self.options
        self.rollouts = None if o.rollouts is None else RolloutClient(o.rollouts)
        self.needs_validation = o.adaptive > 0
        self._mixture: tuple[nn.Module, float] | None = None  # a tuple, so that the teacher is no submodule
        self._step, self._total = 0, 1
        if o.long:
            self.weights["long"] = o.long
        width = o.max_prompt_tokens + o.max_new_tokens
        self.register_buffer("replay_tokens", torch.zeros(o.replay_buffer, width, dtype=torch.int32))
        # the lengths of the prompt, and of prompt and answer
        self.register_buffer("replay_lengths", torch.zeros(o.replay_buffer, 2, dtype=torch.int32))
        self.register_buffer("replay_count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("current_lambda", torch.tensor(float(o.lmbda)))
        self.register_buffer("loss_threshold", torch.tensor(torch.inf))

    def build(self, student: nn.Module, teacher: nn.Module | None, example: Batch, ids: Tensor | None = None) -> None:
        """As :class:`TokenMethod`, and check that the student can generate text."""
        super().build(student, teacher, example, ids)
        if not callable(getattr(student, "generate", None)):
            raise CapabilityError(
                f"{type(student).__name__} has no generate(), so it cannot generate answers", remedy="use kind: token"
            )
        inputs = example.inputs if isinstance(example.inputs, dict) else {}
        if "attention_mask" not in inputs:
            raise CapabilityError(
                "several texts share a row, and this method needs one prompt in each",
                where="data.pack",
                remedy="leave pack out: the student's answers are not packed",
            )
        if example.teacher_inputs is not None:
            raise CapabilityError(
                "teacher and student have different tokenizers",
                remedy="use one tokenizer, or another method",
            )
        if self.mix:
            if teacher is None:
                raise CapabilityError(
                    "answers are sampled from student and teacher together, and there is no live teacher",
                    where="method.mix",
                    remedy="leave mix out, or use a live teacher",
                )
            self._mixture = teacher, self.mix
        if self.rollouts is not None:
            self.rollouts.copy_student(student)

    @property
    def mix(self) -> float:
        """The teacher's share of the sampling distribution."""
        return self.options.mix

    def check_generation(self, student: nn.Module, batch: Batch, longest_prompt: int | None) -> None:
        """Check that the server has room for the longest prompt and its answer, and samples from the student."""
        o, first = self.options, next(_prompts(batch, self.options.max_prompt_tokens))
        longest = min(len(first) if longest_prompt is None else longest_prompt, o.max_prompt_tokens)
        if self.rollouts is not None:
            self.rollouts.check(student, first, o.sampling_temperature, longest, o.max_new_tokens)

    def before_training(self, student: nn.Module, step: int, total: int) -> None:
        """Note the progress of the training, on which the share of replayed answers may depend."""
        self._step, self._total = step, total

    def after_step(self) -> None:
        """Count the step."""
        self._step += 1

    def after_validation(self, metrics: Mapping[str, Any]) -> None:
        """Increase lambda if the loss has grown."""
        if not self.options.adaptive:
            return
        loss = float(metrics["loss"])
        if torch.isinf(self.loss_threshold):
            self.loss_threshold.fill_(loss)
        elif loss >= float(self.loss_threshold) + self.options.slack:
            self.loss_threshold.fill_(loss)
            self.current_lambda.add_(self.options.adaptive).clamp_(max=1.0)

    # The answers ------------------------------------------------------------------------------------------------

    def prepare_batch(self, student: nn.Module, batch: Batch) -> Batch:
        """The batch, or with probability lambda its prompts with the student's answers, new or replayed."""
        o = self.options
        if self.rollouts is not None:
            first = next(_prompts(batch, o.max_prompt_tokens))
            self.rollouts.update(student, self._step, o.sampling_temperature, first)
        device, is_sharded = batch.labels.device, any(isinstance(m, FSDPModule) for m in student.modules())
        filled = min(int(self.replay_count), len(self.replay_tokens))
        enough, draws = torch.tensor(float(filled >= len(batch)), device=device), torch.rand(2, device=device)
        if is_sharded:  # processes that share a model must generate at the same steps
            torch.distributed.all_reduce(enough, torch.distributed.ReduceOp.MIN)
            torch.distributed.broadcast(draws, 0)
        own, replay = draws.tolist()
        if own >= float(self.current_lambda):
            return batch
        if enough and replay < (self._progress if o.replay_share == "rising" else o.replay_share):
            which = torch.randperm(filled)[: len(batch)]
            rows = [
                Completion(
                    self.replay_tokens[i, : int(self.replay_lengths[i, 1])].long(), int(self.replay_lengths[i, 0])
                )
                for i in which.to(self.replay_tokens.device)
            ]
            return _answer_batch(rows, device)
        counted = batch.mask.any(1).tolist() if batch.mask is not None else [True] * len(batch)
        prompts = list(_prompts(batch, o.max_prompt_tokens))
        options: dict[str, Any] = {"max_new_tokens": o.max_new_tokens, "temperature": o.sampling_temperature}
        if self.rollouts is None:
            rows = sample_completions(student, prompts, mixture=self._mixture, synced_gpus=is_sharded, **options)
        else:
            rows = self.rollouts.sample_completions(student, prompts, **options)
        for row, counts in zip(rows, counted, strict=True):
            if counts and len(self.replay_tokens):  # in place of the oldest
                place = int(self.replay_count) % len(self.replay_tokens)
                self.replay_tokens[place, : len(row.ids)] = row.ids.to(self.replay_tokens)
                self.replay_lengths[place] = torch.tensor([row.begin, len(row.ids)])
                self.replay_count += 1
        # a placeholder row, on a process without data left, stays one: no token of it counts
        rows = [
            row if counts else row._replace(begin=len(row.ids)) for row, counts in zip(rows, counted, strict=True)
        ]
        return _answer_batch(rows, device)

    # The loss ----------------------------------------------------------------------------------------------------

    @property
    def _progress(self) -> float:
        """The share of the training that is done."""
        return self._step / max(self._total, 1)

    def _masks(self, batch: Batch) -> dict[str, Tensor]:
        masks = super()._masks(batch)
        if "long" in self.weights:
            own = masks["soft"] & (batch.labels == IGNORE)
            # all tokens of an answer but its last have consequences
            masks["long"] = own & own.roll(-1, 1) & (torch.arange(own.shape[1], device=own.device) < own.shape[1] - 1)
        return masks

    def forward(self, student: Observation, batch: Batch, signal: Signal) -> dict[str, Term]:
        """The terms of :class:`TokenMethod`, and ``long``."""
        masks = self._masks(batch)
        if "long" not in masks and not self.mix:
            return self._terms(student, batch, signal, masks)
        assert student.head is not None
        assert signal.head is not None
        own = masks["soft"] & (batch.labels == IGNORE)
        assert isinstance(batch.inputs, dict)
        tokens = nn.functional.pad(batch.inputs["input_ids"][:, 1:], (0, 1))  # 0 after the last
        with torch.no_grad():
            mine, theirs = (
                -losses.linear_cross_entropy(h.inputs, linear_head(h), tokens, mask=own, reduction="none")
                for h in (student.head, signal.head)
            )
        log_ratio = (theirs - mine) * own
        weights = 1 / (self.mix * log_ratio.exp() + 1 - self.mix)  # 1 at tokens that are not sampled
        terms = self._terms(student, batch, signal, masks, weights if self.mix else None)
        if "long" not in masks:
            return terms
        mask, returns = masks["long"], weights * mean_after(log_ratio, own)
        total = losses.linear_cross_entropy(
            student.head.inputs, linear_head(student.head), tokens, token_weights=returns, mask=mask, reduction="sum",
        )  # fmt: skip
        terms["long"] = Term(total, mask.sum())
        return terms

    def formula(self) -> str:
        """The loss in one line."""
        o = self.options
        text = f"lambda={o.lmbda:g}, at most {o.max_new_tokens} tokens"
        if o.replay_buffer:
            share = "a rising share" if o.replay_share == "rising" else f"{o.replay_share:g}"
            text += f", {share} of them from the last {o.replay_buffer} answers"
        if o.adaptive:
            text += f", lambda grows by {o.adaptive:g} if the loss grows by {o.slack:g}"
        if self.rollouts is not None:
            text += f", generated by {self.rollouts.options.url}"
        source = f"answers of {1 - o.mix:g} student and {o.mix:g} teacher" if o.mix else "its own answers"
        return f"{super().formula()}, on {source} ({text})"


def mean_after(x: Tensor, mask: Tensor) -> Tensor:
    """``[B, L]``: for each position the mean of ``x`` over later positions that count; 0 if there are none."""
    counted = mask.to(x.dtype)
    sums = (x * counted).flip(1).cumsum(1).flip(1) - x * counted
    counts = counted.flip(1).cumsum(1).flip(1) - counted
    return sums / counts.clamp(min=1)


def _prompts(batch: Batch, max_tokens: int) -> Iterator[Tensor]:
    """The tokens of each row before its last answer; the first quarter of a row without a prompt."""
    assert isinstance(batch.inputs, dict)
    lengths = batch.inputs["attention_mask"].sum(1).tolist()
    counted = batch.counted()
    for ids, mask, length in zip(batch.inputs["input_ids"], counted, lengths, strict=True):
        starts = (mask & ~torch.cat([mask.new_zeros(1), mask[:-1]])).nonzero().flatten()
        begin = int(starts[-1]) + 1 if len(starts) else int(length)
        if begin <= 1:
            begin = max(int(length * OPENING), 1)
        yield ids[:begin][-max_tokens:]


def _answer_batch(rows: Sequence[Completion], device: torch.device) -> Batch:
    """Completions as a batch without labels, in which the tokens of the answers count."""
    width = max(len(ids) for ids, _ in rows)
    inputs = {
        k: torch.zeros(len(rows), width, dtype=torch.long, device=device) for k in ("input_ids", "attention_mask")
    }
    mask = torch.zeros(len(rows), width, dtype=torch.bool, device=device)
    for row, (ids, begin) in enumerate(rows):
        inputs["input_ids"][row, : len(ids)] = ids.to(device)
        inputs["attention_mask"][row, : len(ids)] = 1
        mask[row, begin - 1 : len(ids) - 1] = True
    return Batch(inputs, torch.full_like(inputs["input_ids"], IGNORE), mask=mask)
