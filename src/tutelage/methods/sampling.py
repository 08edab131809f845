"""How a student goes on from prompts: by itself, or from a mixture with its teacher."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tutelage.students import eval_no_grad


class Completion(NamedTuple):
    """A prompt with an answer behind it.

    Attributes:
        ids: of both.
        begin: where the answer begins.
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
    r"""Draw an answer to each prompt, up to its end or ``max_new_tokens`` tokens.

    Args:
        student: of transformers; it writes in evaluation mode and without autograd.
        prompts: token ids, none of them empty.
        max_new_tokens: most tokens of an answer.
        temperature: of the softmax that is drawn from; 0 takes the likeliest token.
        mixture: a teacher and :math:`\alpha`: each token is drawn from
            :math:`\alpha\,p^T + (1 - \alpha)\,p^S`, at temperature 1.
        synced_gpus: whether all processes go on until the last of them is done, as those that share a model must.

    Reference: Gu et al., MiniLLM (ICLR 2024), section 2.2, teacher-mixed sampling.
    """
    device = prompts[0].device
    width = max(len(p) for p in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.long, device=device)
    seen = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        seen[row, width - len(prompt) :] = 1
    model: Any = student
    ends = ends_of(model)
    drawing: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        drawing = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    if mixture is not None:
        drawing["logits_processor"] = [_Mixture(*mixture, seen)]
    with eval_no_grad(student):
        said = model.generate(
            input_ids=ids, attention_mask=seen, max_new_tokens=max_new_tokens, pad_token_id=ends[0] if ends else 0,
            eos_token_id=ends or None, synced_gpus=synced_gpus, **drawing,
        )  # fmt: skip
    found = []
    for row, prompt in enumerate(prompts):
        answer = said[row, width : width + max_new_tokens]
        at_end = torch.isin(answer, torch.tensor(ends, device=device)).nonzero().flatten()
        stop = int(at_end[0]) + 1 if len(at_end) else len(answer)
        found.append(Completion(torch.cat([prompt, answer[:stop]]), len(prompt)))
    return found


class _Mixture:
    """What transformers asks for scores to draw from: log probabilities of the mixture with a teacher.

    Args:
        teacher: reads what is written along with the student.
        share: of the teacher, above 0 and below 1.
        seen: ``[B, L]``, 1 where the prompts are no padding.
    """

    def __init__(self, teacher: nn.Module, share: float, seen: Tensor) -> None:
        self.teacher: Any = teacher.to(seen.device)
        self.share, self.seen = share, seen
        takes = inspect.signature(self.teacher.forward).parameters
        self.name = "cache" if "cache" in takes else "past_key_values"  # as transformers has called it before
        self.read, self.cache = 0, None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``[B, V]``, from what was written and what the student says of the next token."""
        seen = F.pad(self.seen, (0, input_ids.shape[1] - self.seen.shape[1]), value=1)
        places = (seen.cumsum(-1) - 1).clamp(min=0)
        said = self.teacher(
            input_ids=input_ids[:, self.read :], attention_mask=seen, position_ids=places[:, self.read :],
            use_cache=True, **{self.name: self.cache},
        )  # fmt: skip
        self.read, self.cache = input_ids.shape[1], getattr(said, self.name)
        own, theirs = (x.float().log_softmax(-1) for x in (scores, said.logits[:, -1]))
        return torch.logaddexp(own + math.log1p(-self.share), theirs + math.log(self.share))


def ends_of(model: Any) -> list[int]:
    """Token ids at which the model stops."""
    for config in (getattr(model, "generation_config", None), model.config):
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            return [found] if isinstance(found, int) else list(found)
    return []
