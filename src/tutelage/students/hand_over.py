"""A student as a plain transformers model for a server, and checks that the server uses its weights."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.files import silence_transformers, wrap_write_errors
from tutelage.students.qat import to_float_model

BLEND = 0.3
"""Share of the next row in each row of a changed matrix. Larger values amplify rounding errors."""


def plain_model(template: nn.Module, state: dict[str, Tensor]) -> Any:
    """A copy of ``template`` with the given weights, adapters merged, in evaluation mode."""
    template.load_state_dict(state)
    return to_float_model(copy.deepcopy(template)).eval()


def change_weights(model: Any) -> None:
    """Change all matrices of ``model``, so that a server which ignores one of them gives other log-probabilities.

    The rows of the token embedding and of the output head move by one place.
    """
    ends = [id(part.weight) for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part]
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim >= 2 and weight.is_floating_point():
                rolled = weight.roll(1, 0)
                weight.copy_(rolled if id(weight) in ends else weight.lerp(rolled, BLEND))


def prompt_log_probs(model: nn.Module, ids: Sequence[int]) -> Tensor:
    """``[L - 1]``: the log-probability of each of the tokens but the first."""
    tokens = torch.tensor([list(ids)])
    with torch.no_grad():
        log_probs: Tensor = model(input_ids=tokens).logits[0, :-1].float().log_softmax(-1)
    return log_probs.gather(-1, tokens[0, 1:, None])[:, 0]


def write_plain_model(model: Any, folder: Path, ends: list[int], temperature: float, *, untie: bool) -> None:
    """Write model and tokenizer, with settings that sample from the softmax at ``temperature``.

    Args:
        model: of :func:`plain_model`; changed in place.
        ends: ids of the tokens that end a text.
        untie: write the output head even if it is the token embedding. vLLM for CPUs keeps a packed copy of the head
            and updates it from the head's own weights only.
    """
    head = model.get_output_embeddings()
    if untie and head is not None and head.weight is model.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
        for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
            config.tie_word_embeddings = False
    if hasattr(model, "generation_config"):
        from transformers import GenerationConfig

        sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
        model.generation_config = GenerationConfig(do_sample=temperature > 0, eos_token_id=ends or None, **sampling)
    with wrap_write_errors(folder), silence_transformers():
        model.save_pretrained(folder)
        if (tokenizer := getattr(model, "tokenizer", None)) is not None:
            tokenizer.save_pretrained(folder)


def shape_of(model: Any) -> dict[str, int]:
    """Layers, hidden size and rows of the token embedding, as far as the model states them."""
    config = model.config.get_text_config()
    names = {"layers": "num_hidden_layers", "hidden size": "hidden_size", "vocabulary": "vocab_size"}
    return {name: int(value) for name, key in names.items() if (value := getattr(config, key, None)) is not None}


def prompt_text(tokenizer: Any, ids: list[int]) -> str:
    """The text that a server with this tokenizer reads as these tokens, or the closest one.

    It omits the tokens that the tokenizer adds to the front of every text.
    """
    text: str = tokenizer.decode(ids, skip_special_tokens=False)
    prefix = list(tokenizer("")["input_ids"])
    for size in range(len(prefix), 0, -1):
        rest: str = tokenizer.decode(ids[size:], skip_special_tokens=False)
        if ids[:size] == prefix[:size] and list(tokenizer(rest)["input_ids"])[: len(ids)] == ids:
            return rest
    return text
