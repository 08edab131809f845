"""A language model on this computer: what it answers, and how well it foresees the answers of another."""

from __future__ import annotations

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

BATCH = 16
"""Prompts at a time."""


class ChatModel:
    """A language model with its tokenizer.

    Args:
        name: ``hf:FOLDER``.

    Raises:
        ModelError: the tokenizer has no chat template, or there is no such model.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.tokenizer: Any = load_tokenizer(name)
        if not self.tokenizer.chat_template:
            raise ModelError(f"{name} has a tokenizer without chat template", remedy="give a model of conversations")
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        self.model: Any = load_pretrained(name, "causal", None, {}).to(self.device).eval()

    @torch.no_grad()
    def answers(self, threads: Sequence[Sequence[Message]], most: int, terminal: Terminal) -> list[str]:
        """What it answers, taking the most likely token each time.

        Args:
            threads: conversations whose last message is the user's.
            most: tokens of an answer.
            terminal: is told how far it is.
        """
        said: list[str] = []
        for start in range(0, len(threads), BATCH):
            batch = [list(thread) for thread in threads[start : start + BATCH]]
            inputs = self.tokenizer.apply_chat_template(
                batch, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
            ).to(self.device)
            found = self.model.generate(
                **inputs, do_sample=False, max_new_tokens=most, pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=self.tokenizer.eos_token_id,
            )  # fmt: skip
            said += self.tokenizer.batch_decode(found[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            terminal.say(f"{self.name}: {len(said)} of {len(threads)} answers")
        return [text.strip() for text in said]

    @torch.no_grad()
    def loss(self, threads: Sequence[Sequence[Message]], given: Sequence[str]) -> float:
        """Mean of ``-log p`` over all tokens of the given answers, their ends included."""
        total, count = 0.0, 0
        for thread, answer in zip(threads, given, strict=True):
            ids, learned = encode_learned([*thread, {"role": "assistant", "content": answer}], self.tokenizer)
            tokens = torch.tensor(ids, device=self.device)
            begins = len(learned) - learned[::-1].index(True)
            last = begins - learned[:begins][::-1].index(False)  # earlier turns of the conversation are not judged
            scores = self.model(input_ids=tokens[None]).logits[0, last - 1 : begins - 1].float()
            total += float(cross_entropy(scores, tokens[last:begins], reduction="sum"))
            count += begins - last
        return total / count
