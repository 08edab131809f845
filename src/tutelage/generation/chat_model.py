"""A local chat model: its answers, and its loss on the answers of another model."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from tutelage.data.chat import encode_learned
from tutelage.errors import ModelError
from tutelage.generation.requests import Message
from tutelage.models import load_tokenizer
from tutelage.models.pretrained import load_pretrained
from tutelage.progress import Terminal
from tutelage.taps import count_tokens, padding_outputs

BATCH_SIZE = 16
"""Prompts in a batch."""


class ChatModel:
    """A language model with its tokenizer; raises :class:`ModelError` for a tokenizer without a chat template."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.tokenizer: Any = load_tokenizer(name)
        if not self.tokenizer.chat_template:
            raise ModelError(f"the tokenizer of {name} has no chat template", remedy="give a chat model")
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        self.model: Any = load_pretrained(name, "causal", None, {}).to(self.device).eval()
        self.model.tokenizer = self.tokenizer

    @torch.no_grad()
    def generate(self, threads: Sequence[Sequence[Message]], max_tokens: int, terminal: Terminal) -> list[str]:
        """Its answers to conversations, whose last message is the user's, by greedy decoding."""
        answers: list[str] = []
        for start in range(0, len(threads), BATCH_SIZE):
            batch = [list(thread) for thread in threads[start : start + BATCH_SIZE]]
            inputs = self.tokenizer.apply_chat_template(
                batch, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
            ).to(self.device)
            tokens = self.model.generate(
                **inputs, do_sample=False, max_new_tokens=max_tokens, pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=self.tokenizer.eos_token_id, suppress_tokens=padding_outputs(self.model),
            )  # fmt: skip
            new_tokens = tokens[:, inputs["input_ids"].shape[1] :]
            answers += self.tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
            terminal.say(f"{self.name}: {len(answers)} of {len(threads)} answers")
        return [text.strip() for text in answers]

    @torch.no_grad()
    def loss(self, threads: Sequence[Sequence[Message]], answers: Sequence[str]) -> float:
        """Mean of ``-log p`` over all tokens of the given answers, their end tokens included."""
        total, count = 0.0, 0
        for thread, answer in zip(threads, answers, strict=True):
            ids, mask = encode_learned([*thread, {"role": "assistant", "content": answer}], self.tokenizer)
            tokens = torch.tensor(ids, device=self.device)
            end = len(mask) - mask[::-1].index(True)
            start = end - mask[:end][::-1].index(False)  # the last answer only, not those of earlier turns
            logits = self.model(input_ids=tokens[None]).logits[0, start - 1 : end - 1, : count_tokens(self.model)]
            total += float(cross_entropy(logits.float(), tokens[start:end], reduction="sum"))
            count += end - start
        return total / count
