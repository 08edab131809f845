"""Language models taught on what the student itself writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from tutelage import losses
from tutelage.data.batch import IGNORE, Batch, Task
from tutelage.errors import CapabilityError, ConfigError
from tutelage.methods.base import Term
from tutelage.methods.rollouts import Rollouts
from tutelage.methods.sampling import Completion, sample_completions
from tutelage.methods.text_terms import linear_head
from tutelage.methods.token import Divergence, TokenMethod
from tutelage.taps import Observation
from tutelage.teachers.signal import Signal

OPENING = 0.25
"""The share of a text without a prompt, one that is learned from its first token, which the student goes on from."""


class OnPolicyMethod(TokenMethod):
    r"""Distillation on a mixture of the data and of answers that the student gives, which the teacher scores.

    With probability :math:`\lambda` the answers of a batch are the student's own, drawn from it as it is at that
    step; else they are the data's. The loss of either is :class:`TokenMethod`'s. No gradient goes through the
    drawing.

    A conversation's prompt is all before its last answer; that of a text which is learned whole is its first quarter.

    Args:
        lmbda: :math:`\lambda`, the share of batches that the student writes.
        divergence: as in :class:`TokenMethod`, as are ``temperature``, ``hard``, ``beta``, ``skew``, ``reverse``,
            ``hidden``, ``layers`` and ``task``.
        temperature: T of the loss.
        alpha: weight of the soft labels. What the student wrote has no hard ones.
        hard: weight of the data's next tokens. Default: 1 - alpha.
        beta: of ``js``.
        skew: of ``skew_kl``.
        reverse: of ``skew_kl``.
        hidden: weight of the hidden states.
        layers: mapped.
        max_new_tokens: most tokens that the student writes for a prompt.
        max_prompt_tokens: most tokens of a prompt; of a longer one its last are read.
        sampling_temperature: temperature at which the student writes; 0 takes the likeliest token.
        replay_buffer: how many answers are kept; 0: none. They are part of the method's state, so of its checkpoints.
        replay_share: the share of batches that the student writes which are instead drawn from those kept, once there
            are as many as a batch; ``rising``: from none of them at the beginning of the training to all at its end.
        long: weight of MiniLLM's long part, the gradient of what a token leads to,
            :math:`-\sum_t R_{t+1} \nabla\log p^S(y_t)`, with :math:`R_{t+1}` the mean of
            :math:`\log p^T(y)/p^S(y)` over the tokens after it; for ``reverse_kl`` at T = 1, whose own gradient is
            the part of one step. Only on answers just written, at ``sampling_temperature`` 1.
        mix: the teacher's share of the distribution that answers are drawn from, :math:`\alpha` of MiniLLM's
            :math:`\tilde p = \alpha p^T + (1 - \alpha) p^S`. Each token's loss then weighs
            :math:`p^S(y_t) / \tilde p(y_t)`. Only on answers just written, at ``sampling_temperature`` 1.
        adaptive: by how much lambda grows, up to 1, at an evaluation whose loss is above that at which it grew last
            (first: that of the first evaluation) by ``slack`` or more. DistiLLM: 0.1, from ``lmbda`` 0.
        slack: in nats.
        rollouts: arguments of :class:`Rollouts`, a server that writes in the student's place. Default: the student
            writes in this process.
        task: what labels are.

    Raises:
        ConfigError: a value out of range.

    Reference: Agarwal et al., On-Policy Distillation of Language Models (ICLR 2024), algorithm 1; Gu et al., MiniLLM
    (ICLR 2024), equations 3 to 6 and section 2.2, teacher-mixed sampling and length normalisation; the replay buffer
    and how lambda adapts: Ko et al., DistiLLM (ICML 2024), section 3.2.
    """

    takes_sparse = False
    generates_batches = True

    def __init__(
        self,
        lmbda: float = 0.5,
        divergence: Divergence = "js",
        temperature: float = 1.0,
        alpha: float = 1.0,
        hard: float | None = None,
        *,
        beta: float | None = None,
        skew: float | None = None,
        reverse: bool | None = None,
        hidden: float = 0.0,
        layers: str | Sequence[int | None] = "uniform",
        max_new_tokens: int = 128,
        max_prompt_tokens: int = 512,
        sampling_temperature: float = 1.0,
        replay_buffer: int = 0,
        replay_share: float | Literal["rising"] = 0.5,
        long: float = 0.0,
        mix: float = 0.0,
        adaptive: float = 0.0,
        slack: float = 0.1,
        rollouts: Mapping[str, Any] | None = None,
        task: Task = "classes",
    ) -> None:
        super().__init__(
            divergence, temperature, alpha, hard, beta=beta, skew=skew, reverse=reverse, hidden=hidden, layers=layers,
            task=task,
        )  # fmt: skip
        shares = {
            "lmbda": lmbda,
            "replay_share": 0.0 if replay_share == "rising" else replay_share,
            "mix": mix,
            "adaptive": adaptive,
        }
        for name, value in shares.items():
            if not 0 <= value <= 1:
                raise ConfigError(f"{name}={value}", remedy="must lie in [0, 1]: a share")
        least_of = {
            "max_new_tokens": 1,
            "max_prompt_tokens": 1,
            "replay_buffer": 0,
            "sampling_temperature": 0,
            "long": 0,
            "slack": 0,
        }
        for name, least in least_of.items():
            if not locals()[name] >= least:
                raise ConfigError(f"{name}={locals()[name]}", remedy=f"must be {least} or more")
        if long and (divergence, temperature, sampling_temperature, replay_buffer) != ("reverse_kl", 1.0, 1.0, 0):
            raise ConfigError(
                f"long={long} with divergence={divergence!r}, temperature={temperature:g}, "
                f"sampling_temperature={sampling_temperature:g}, replay_buffer={replay_buffer}",
                remedy="MiniLLM's long part belongs to reverse_kl on what was just written: "
                "temperature 1, sampling_temperature 1, replay_buffer 0",
            )
        if mix and ((sampling_temperature, replay_buffer) != (1.0, 0) or mix == 1):
            raise ConfigError(
                f"mix={mix:g} with sampling_temperature={sampling_temperature:g}, replay_buffer={replay_buffer}",
                remedy="weights of mixed answers are known of what was just written: below 1, "
                "sampling_temperature 1, replay_buffer 0",
            )
        if rollouts is not None and (long or mix):
            raise ConfigError(
                f"rollouts with long={long:g}, mix={mix:g}",
                remedy="both know the probabilities of what the student itself has just written; leave rollouts out",
            )
        self.rollouts = None if rollouts is None else Rollouts(**rollouts)
        self.lmbda, self.max_new_tokens, self.max_prompt_tokens = lmbda, max_new_tokens, max_prompt_tokens
        self.sampling_temperature, self.replay_share, self.mix, self.adaptive, self.slack = (
            sampling_temperature,
            replay_share,
            mix,
            adaptive,
            slack,
        )
        self.needs_validation = adaptive > 0
        self._mixed: tuple[nn.Module, float] | None = None  # no part of what is trained
        self._step, self._total = 0, 1
        if long:
            self.weights["long"] = long
        self.register_buffer(
            "kept", torch.zeros(replay_buffer, max_prompt_tokens + max_new_tokens, dtype=torch.int32)
        )
        self.register_buffer(
            "spans", torch.zeros(replay_buffer, 2, dtype=torch.int32)
        )  # of each the prompt, and the whole
        self.register_buffer("written", torch.zeros((), dtype=torch.int64))

        self.register_buffer("share", torch.tensor(float(lmbda)))
        self.register_buffer("bar", torch.tensor(torch.inf))  # a loss above it moves lambda

    kept: Tensor
    spans: Tensor
    written: Tensor
    share: Tensor
    bar: Tensor

    def build(self, student: nn.Module, teacher: nn.Module | None, example: Batch, ids: Tensor | None = None) -> None:
        """As :class:`TokenMethod`, and see that the student can write.

        Raises:
            CapabilityError: it cannot, rows are packed, or the teacher reads other tokens.
        """
        super().build(student, teacher, example, ids)
        name = type(student).__name__
        if not callable(getattr(student, "generate", None)):
            raise CapabilityError(f"{name} has no generate(), so it cannot write", remedy="use kind: token")
        inputs = example.inputs if isinstance(example.inputs, dict) else {}
        if "attention_mask" not in inputs:
            raise CapabilityError(
                "several texts share a row, and a prompt is to be a row's only one",
                where="data.pack",
                remedy="leave pack out: answers that the student writes are not packed",
            )
        if example.teacher_inputs is not None:
            raise CapabilityError(
                "the teacher reads other tokens than the student writes",
                remedy="use one tokenizer, or another method",
            )

        if self.mix:
            if teacher is None:
                raise CapabilityError(
                    "answers are drawn from student and teacher together, and the teacher is no model at hand",
                    where="method.mix",
                    remedy="leave mix out, or use a live teacher",
                )
            self._mixed = teacher, self.mix
        if self.rollouts is not None:
            self.rollouts.shape(student)

    def check_generation(self, student: nn.Module, batch: Batch) -> None:
        """Whether the server takes the student's weights and writes.

        Raises:
            EndpointError: it does not.
        """
        if self.rollouts is not None:
            self.rollouts.check(student, next(_prompts(batch, self.max_prompt_tokens)), self.sampling_temperature)

    def before_training(self, student: nn.Module, step: int, total: int) -> None:
        """Where the training stands, of which the share of kept answers may be a function."""
        self._step, self._total = step, total

    def after_step(self) -> None:
        """One further."""
        self._step += 1

    def after_validation(self, metrics: Mapping[str, Any]) -> None:
        """Lambda grows where the loss has."""
        if not self.adaptive:
            return
        loss = float(metrics["loss"])
        if torch.isinf(self.bar):
            self.bar.fill_(loss)
        elif loss >= float(self.bar) + self.slack:
            self.bar.fill_(loss)
            self.share.add_(self.adaptive).clamp_(max=1.0)

    # What the student writes -------------------------------------------------------------------------------------

    def prepare_batch(self, student: nn.Module, batch: Batch) -> Batch:
        """With probability lambda the batch with answers of the student's own, new or kept."""
        if self.rollouts is not None:
            self.rollouts.take(student, self._step, self.sampling_temperature)
        device, synced_gpus = batch.labels.device, any(isinstance(m, FSDPModule) for m in student.modules())
        filled = min(int(self.written), len(self.kept))
        enough, draws = torch.tensor(float(filled >= len(batch)), device=device), torch.rand(2, device=device)
        if synced_gpus:  # who shares the parts of one model writes when all do
            torch.distributed.all_reduce(enough, torch.distributed.ReduceOp.MIN)
            torch.distributed.broadcast(draws, 0)
        own, again = draws.tolist()
        if own >= float(self.share):
            return batch
        if enough and again < (self._done if self.replay_share == "rising" else self.replay_share):
            which = torch.randperm(filled)[: len(batch)]
            rows = [
                Completion(self.kept[i, : int(self.spans[i, 1])].long(), int(self.spans[i, 0]))
                for i in which.to(self.kept.device)
            ]
            return _answered(rows, device)
        counted = batch.mask.any(1).tolist() if batch.mask is not None else [True] * len(batch)
        prompts = list(_prompts(batch, self.max_prompt_tokens))
        if self.rollouts is None:
            rows = sample_completions(
                student, prompts, max_new_tokens=self.max_new_tokens, temperature=self.sampling_temperature,
                mixture=self._mixed,
                synced_gpus=synced_gpus,
            )  # fmt: skip
        else:
            rows = self.rollouts.sample_completions(
                student, prompts, max_new_tokens=self.max_new_tokens, temperature=self.sampling_temperature
            )
        for row, counts in zip(rows, counted, strict=True):
            if counts and len(self.kept):
                self._keep(*row)
        # A row that stands in for none, on a process that had none left, goes on standing for none.
        rows = [
            row if counts else row._replace(begin=len(row.ids)) for row, counts in zip(rows, counted, strict=True)
        ]
        return _answered(rows, device)

    def _keep(self, ids: Tensor, begin: int) -> None:
        """In place of the oldest."""
        place = int(self.written) % len(self.kept)
        self.kept[place, : len(ids)] = ids.to(self.kept)
        self.spans[place] = torch.tensor([begin, len(ids)])
        self.written += 1

    # The loss ----------------------------------------------------------------------------------------------------

    @property
    def _done(self) -> float:
        """The part of the training that is behind."""
        return self._step / max(self._total, 1)

    def _masks(self, batch: Batch) -> dict[str, Tensor]:
        masks = super()._masks(batch)
        if "long" in self.weights:
            own = masks["soft"] & (batch.labels == IGNORE)
            # All but an answer's last token lead to something.
            masks["long"] = own & own.roll(-1, 1) & (torch.arange(own.shape[1], device=own.device) < own.shape[1] - 1)
        return masks

    def forward(self, student: Observation, batch: Batch, signal: Signal | None) -> dict[str, Term]:
        """The terms of :class:`TokenMethod`, and ``long``."""
        masks = self._masks(batch)
        if "long" not in masks and not self.mix:
            return self._terms(student, batch, signal, masks)
        assert student.head is not None
        assert signal is not None
        assert signal.head is not None
        own = masks["soft"] & (batch.labels == IGNORE)
        tokens = next_tokens(batch)
        with torch.no_grad():
            mine, theirs = (
                -losses.linear_cross_entropy(h.inputs, linear_head(h), tokens, mask=own, reduction="none")
                for h in (student.head, signal.head)
            )
        ahead = (theirs - mine) * own
        weights = 1 / (self.mix * ahead.exp() + 1 - self.mix)  # 1 where nothing was drawn
        terms = self._terms(student, batch, signal, masks, weights if self.mix else None)
        if "long" not in masks:
            return terms
        mask, lead = masks["long"], weights * after_mean(ahead, own)
        total = losses.linear_cross_entropy(
            student.head.inputs, linear_head(student.head), tokens, token_weights=lead, mask=mask, reduction="sum",
        )  # fmt: skip
        terms["long"] = Term(total, mask.sum())
        return terms

    def formula(self) -> str:
        """The loss in one line."""
        drawn = f"lambda={self.lmbda:g}, at most {self.max_new_tokens} tokens"
        share = "a rising share" if self.replay_share == "rising" else f"{self.replay_share:g}"
        kept = f", {share} of them from the last {len(self.kept)} answers" if len(self.kept) else ""
        grows = f", lambda grows by {self.adaptive:g} where the loss does by {self.slack:g}" if self.adaptive else ""
        whose = f"answers of {1 - self.mix:g} student and {self.mix:g} teacher" if self.mix else "its own answers"
        served = f", written by {self.rollouts.url}" if self.rollouts is not None else ""
        return f"{super().formula()}, on {whose} ({drawn}{kept}{grows}{served})"


def next_tokens(batch: Batch) -> Tensor:
    """``[B, L]``, the token behind each position; 0 behind the last."""
    assert isinstance(batch.inputs, dict)
    return nn.functional.pad(batch.inputs["input_ids"][:, 1:], (0, 1))


def after_mean(x: Tensor, mask: Tensor) -> Tensor:
    """``[B, L]``: for each position the mean of ``x`` over those after it that count, 0 where there is none."""
    counted = mask.to(x.dtype)
    sums = (x * counted).flip(1).cumsum(1).flip(1) - x * counted
    counts = counted.flip(1).cumsum(1).flip(1) - counted
    return sums / counts.clamp(min=1)


def _prompts(batch: Batch, max_tokens: int) -> Iterator[Tensor]:
    """Of each row the tokens before its last answer; of one without a prompt its first quarter."""
    assert isinstance(batch.inputs, dict)
    lengths = batch.inputs["attention_mask"].sum(1).tolist()
    counted = batch.counted()
    for ids, mask, length in zip(batch.inputs["input_ids"], counted, lengths, strict=True):
        starts = (mask & ~torch.cat([mask.new_zeros(1), mask[:-1]])).nonzero().flatten()
        begin = int(starts[-1]) + 1 if len(starts) else int(length)
        if begin <= 1:
            begin = max(int(length * OPENING), 1)
        yield ids[:begin][-max_tokens:]


def _answered(rows: Sequence[Completion], device: torch.device) -> Batch:
    """Rows of tokens, whose answers begin at the given places, as a batch without labels."""
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
