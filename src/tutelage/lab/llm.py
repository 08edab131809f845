"""What the experiment on closed teachers reads: answers, the same to other prompts, and a fresh student."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tutelage.config import Recipe
from tutelage.data import read_texts
from tutelage.errors import ConfigError, DataError, require
from tutelage.files import atomic_folder

VOCABULARY = 2048
"""Tokens of the student, whose tokenizer is made of the teacher's answers: a closed teacher's own is not needed."""

TEMPLATE = (
    "{% for m in messages %}{{ '<|turn|>' + m['role'] + '\n' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}"
)
"""Its chat template."""

MADE_OF = "made-of.json"
"""What tells the answers that a lab began with from others."""


def folder_of(out: Path) -> Path:
    """Where a lab keeps them."""
    return out / "data" / "llm"


def paths(out: Path, answers: str) -> dict[str, str]:
    """The files of an arm: to train on the teacher's answers (``own``) or on the shuffled ones (``other``)."""
    return {"train": str(folder_of(out) / f"{answers}.jsonl"), "test": str(folder_of(out) / "held.jsonl")}


def tokenizer_folder(out: Path) -> Path:
    """The student's tokenizer."""
    return folder_of(out) / "tokenizer"


def prepare(recipe: Recipe, out: Path) -> None:
    """Write what the arms read, or find it written.

    Raises:
        ConfigError: the lab began with other answers.
        DataError: the files hold no conversations, or too few.
    """
    require("transformers", "text", "the experiment on closed teachers")
    train, held = (conversations(recipe, split) for split in ("train", "test"))
    text = json.dumps([train, held], sort_keys=True)
    made_of = {"pairs": len(train), "held": len(held), "digest": hashlib.sha256(text.encode()).hexdigest()[:16]}
    file = folder_of(out) / MADE_OF
    if file.exists():
        if json.loads(file.read_text(encoding="utf-8")) != made_of:
            raise ConfigError(
                "the answers are not those that this lab began with", where="llm.data.path",
                remedy="give the same files, or choose another --out",
            )  # fmt: skip
        return
    with atomic_folder(folder_of(out)) as folder:
        for name, rows in (("own", train), ("other", shuffled(train)), ("held", held)):
            lines = (json.dumps({"messages": row}, ensure_ascii=False) + "\n" for row in rows)
            (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        tokenizer(train).save_pretrained(folder / "tokenizer")
        (folder / MADE_OF).write_text(json.dumps(made_of) + "\n", encoding="utf-8")


def known(out: Path) -> dict[str, Any]:
    """How many conversations a lab's arms have: ``pairs`` and ``held``."""
    found: dict[str, Any] = json.loads((folder_of(out) / MADE_OF).read_text(encoding="utf-8"))
    return found


def conversations(recipe: Recipe, split: str) -> list[list[dict[str, str]]]:
    """The conversations of a split that end with an answer.

    Raises:
        DataError: there are fewer than two.
    """
    data = recipe.data
    path = getattr(data, "path", None)
    if not isinstance(path, dict) or split not in path:
        raise DataError(
            f"there is no {split} split", where="llm.data.path",
            remedy="give what `tutelage generate` wrote: {train: FILE, test: FILE}",
        )  # fmt: skip
    raw = read_texts(
        data.source,
        path={"train": path[split]},
        options=None,
        text="messages",
        teacher_text=None,
        label=None,
        route=None,
    )
    rows = raw.splits["train"].columns["messages"]
    found = [[{"role": str(m["role"]), "content": str(m["content"])} for m in row] for row in rows]
    found = [row for row in found if len(row) > 1 and row[-1]["role"] == "assistant"]
    if len(found) < 2:
        raise DataError(
            f"{len(found)} conversations with an answer", where=str(path[split]),
            remedy="give what `tutelage generate` wrote, of two conversations or more",
        )  # fmt: skip
    return found


def shuffled(rows: Sequence[Sequence[Mapping[str, str]]]) -> list[list[dict[str, str]]]:
    """The same prompts and the same answers, each answer after another's prompt."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    after = dict(zip(order, [*order[1:], order[0]], strict=True))
    return [[*map(dict, row[:-1]), dict(rows[after[i]][-1])] for i, row in enumerate(rows)]


def tokenizer(rows: Sequence[Sequence[Mapping[str, str]]]) -> Any:
    """A byte-level BPE tokenizer of these conversations."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>", "<|turn|>"], show_progress=False,
    )  # fmt: skip
    made.train_from_iterator((m["content"] for row in rows for m in row), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|end|>", pad_token="<|end|>", chat_template=TEMPLATE
    )


def fresh(hidden: int = 128, layers: int = 4) -> nn.Module:
    """A causal language model that has learned nothing."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4, intermediate_size=3 * hidden, max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)
