"""Sampling of answers from a student, or from a mixture with its teacher."""

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tutelage.students.projectors import eval_no_grad
from tutelage.taps import count_tokens, padding_outputs


class Completion(NamedTuple):
    """A prompt and its answer.

    Attributes:
        ids: token ids of both.
        begin: the position of the answer's first token.
    """

    ids: Tensor
    begin: int


def sample_completions(
    student: nn.Module,
    prompts: Sequence[Tensor],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    mixture: tuple[nn.Module, float] | None = None,
    synced_gpus: bool = False,
) -> list[Completion]:
    r"""Sample an answer to each prompt, up to its end or ``max_new_tokens`` tokens.

    Tokens come from the softmax of the logits at ``temperature``, whatever the model's ``generation_config`` says.
    The padding of a vocabulary has no probability.

    Args:
        student: a transformers model; runs in evaluation mode and without autograd.
        prompts: token ids, at least one each.
        max_new_tokens: most tokens of an answer.
        temperature: of the sampling; 0 takes the most probable token.
        mixture: a teacher and :math:`\alpha`: each token is sampled from
            :math:`\alpha\,p^T + (1 - \alpha)\,p^S`, at temperature 1.
        synced_gpus: whether all processes continue until the last of them is done, as those that share a model must.

    Reference: Gu et al., MiniLLM (ICLR 2024), section 2.2, teacher-mixed sampling.
    """
    device = prompts[0].device
    width = max(len(p) for p in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.long, device=device)
    attention_mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        attention_mask[row, width - len(prompt) :] = 1
    model: Any = student
    ends = ends_of(model)
    options: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        options = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    if mixture is not None:
        options["logits_processor"] = [_MixtureProcessor(*mixture, attention_mask)]
    with eval_no_grad(student), _plain_generation(model):
        output = model.generate(
            input_ids=ids, attention_mask=attention_mask, max_new_tokens=max_new_tokens,
            pad_token_id=ends[0] if ends else 0, eos_token_id=ends or None, synced_gpus=synced_gpus,
            suppress_tokens=padding_outputs(model), **options,
        )  # fmt: skip
    completions = []
    for row, prompt in enumerate(prompts):
        answer = output[row, width : width + max_new_tokens]
        at_end = torch.isin(answer, torch.tensor(ends, device=device)).nonzero().flatten()
        stop = int(at_end[0]) + 1 if len(at_end) else len(answer)
        completions.append(Completion(torch.cat([prompt, answer[:stop]]), len(prompt)))
    return completions


@contextmanager
def _plain_generation(model: Any) -> Iterator[None]:
    """Without the model's own settings for generation, such as a penalty, which change the distribution."""
    from transformers import GenerationConfig

    before = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


class _MixtureProcessor:
    """A logits processor of transformers: log probabilities of the mixture with a teacher.

    Args:
        teacher: reads the same tokens as the student.
        share: of the teacher, above 0 and below 1.
        attention_mask: ``[B, L]``, of the prompts.
    """

    def __init__(self, teacher: nn.Module, share: float, attention_mask: Tensor) -> None:
        self.teacher: Any = teacher.to(attention_mask.device)
        self.share, self.attention_mask = share, attention_mask
        parameters = inspect.signature(self.teacher.forward).parameters
        self.name = "cache" if "cache" in parameters else "past_key_values"  # its name before
        self.read, self.cache, self.vocabulary = 0, None, count_tokens(teacher)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``[B, V]``, from the tokens so far and the student's logits of the next token."""
        mask = F.pad(self.attention_mask, (0, input_ids.shape[1] - self.attention_mask.shape[1]), value=1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        output = self.teacher(
            input_ids=input_ids[:, self.read :], attention_mask=mask, position_ids=positions[:, self.read :],
            use_cache=True, **{self.name: self.cache},
        )  # fmt: skip
        self.read, self.cache = input_ids.shape[1], getattr(output, self.name)
        own, theirs = (x.float().log_softmax(-1) for x in (scores, output.logits[:, -1, : self.vocabulary]))
        width = max(own.shape[-1], theirs.shape[-1])
        own, theirs = (F.pad(x, (0, width - x.shape[-1]), value=-math.inf) for x in (own, theirs))
        mixed = torch.logaddexp(own + math.log1p(-self.share), theirs + math.log(self.share))
        return mixed[:, : scores.shape[-1]]


def ends_of(model: Any) -> list[int]:
    """The token ids that end a text."""
    for config in (getattr(model, "generation_config", None), model.config):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return [ids] if isinstance(ids, int) else list(ids)
    return []
