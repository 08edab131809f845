"""A small language model that has learned nothing yet, as a folder that a recipe names: `student: hf:FOLDER`.

    python examples/fresh_student.py SmolLM2-135M-Instruct fresh-student

It has the tokenizer and chat template of the first folder, or hub id, and 12 million weights of its own, drawn anew:
9 of them are the vocabulary's.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM


def write(tokens: str, folder: Path) -> None:
    """Write model and tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(tokens)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=192, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=2,
        intermediate_size=512, max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"{model.num_parameters():,} weights in {folder}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python examples/fresh_student.py TOKENIZER FOLDER")
    write(sys.argv[1], Path(sys.argv[2]))
