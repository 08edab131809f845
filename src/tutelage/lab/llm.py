"""Data and student of the lab's experiment on closed teachers: answers, and the same answers to other prompts."""

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
"""Tokens of the student. Its tokenizer is trained on the teacher's answers: a closed teacher's own is not needed."""

TEMPLATE = (
    "{% for m in messages %}{{ '<|turn|>' + m['role'] + '\n' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}"
)
"""Its chat template."""

MADE_OF = "made-of.json"
"""Counts and a digest of the answers that a lab started with."""


def data_folder(out: Path) -> Path:
    """Where a lab stores the data."""
    return out / "data" / "llm"


def prepare_data(recipe: Recipe, out: Path) -> None:
    """Write the data of the arms, unless it is there.

    Raises:
        ConfigError: the lab started with other answers.
        DataError: the files hold no conversations, or too few.
    """
    require("transformers", "text", "the experiment on closed teachers")
    train, held = (read_conversations(recipe, split) for split in ("train", "test"))
    text = json.dumps([train, held], sort_keys=True)
    made_of = {"pairs": len(train), "held": len(held), "digest": hashlib.sha256(text.encode()).hexdigest()[:16]}
    file = data_folder(out) / MADE_OF
    if file.exists():
        if json.loads(file.read_text(encoding="utf-8")) != made_of:
            raise ConfigError(
                "the answers are not those that this lab started with", where="llm.data.path",
                remedy="give the same files, or choose another --out",
            )  # fmt: skip
        return
    with atomic_folder(data_folder(out)) as folder:
        for name, rows in (("own", train), ("other", shuffle_answers(train)), ("held", held)):
            lines = (json.dumps({"messages": row}, ensure_ascii=False) + "\n" for row in rows)
            (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        train_tokenizer(train).save_pretrained(folder / "tokenizer")
        (folder / MADE_OF).write_text(json.dumps(made_of) + "\n", encoding="utf-8")


def read_counts(out: Path) -> dict[str, Any]:
    """How many conversations a lab's arms have: ``pairs`` and ``held``."""
    counts: dict[str, Any] = json.loads((data_folder(out) / MADE_OF).read_text(encoding="utf-8"))
    return counts


def read_conversations(recipe: Recipe, split: str) -> list[list[dict[str, str]]]:
    """The conversations of a split that end with an answer.

    Raises:
        DataError: there are fewer than two.
    """
    data = recipe.data
    path = getattr(data, "path", None)
    if not isinstance(path, dict) or split not in path:
        raise DataError(
            f"there is no {split} split", where="llm.data.path",
            remedy="give files of `tutelage generate`: {train: FILE, test: FILE}",
        )  # fmt: skip
    raw = read_texts(data.source, path={"train": path[split]}, options=None, columns=["messages"])
    rows = raw.splits["train"].columns["messages"]
    threads = [[{"role": str(m["role"]), "content": str(m["content"])} for m in row] for row in rows]
    threads = [thread for thread in threads if len(thread) > 1 and thread[-1]["role"] == "assistant"]
    if len(threads) < 2:
        raise DataError(
            f"{len(threads)} conversations with an answer", where=str(path[split]),
            remedy="give a file of `tutelage generate` with two conversations or more",
        )  # fmt: skip
    return threads


def shuffle_answers(rows: Sequence[Sequence[Mapping[str, str]]]) -> list[list[dict[str, str]]]:
    """The same prompts and answers, each answer after the prompt of another."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    after = dict(zip(order, [*order[1:], order[0]], strict=True))
    return [[*map(dict, row[:-1]), dict(rows[after[i]][-1])] for i, row in enumerate(rows)]


def train_tokenizer(rows: Sequence[Sequence[Mapping[str, str]]]) -> Any:
    """A byte-level BPE tokenizer of these conversations."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>", "<|turn|>"], show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator((m["content"] for row in rows for m in row), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>", chat_template=TEMPLATE
    )


def untrained_llama(hidden: int = 128, layers: int = 4) -> nn.Module:
    """A causal language model with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4, intermediate_size=3 * hidden, max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)
