"""Small causal language models, tokenizers and conversations, made on the spot."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

TEMPLATES = {
    "chatml": "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama": "{{ '<|begin|>' }}{% for m in messages %}{{ '<|head|>' + m['role'] + '<|/head|>\n\n' "
    "+ m['content']|trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}",
    "mistral": "{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + '</s>' }}{% endif %}{% endfor %}",
    "gemma": "{{ '<bos>' }}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<turn>' + role + '\n' + m['content']|trim + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}",
}
"""Chat templates in the forms of four families."""

SPECIAL = (
    "<|im_start|>", "<|im_end|>", "<|begin|>", "<|head|>", "<|/head|>", "<|eot|>", "<s>", "</s>", "<bos>", "<turn>",
    "<end>", "[INST]", "[/INST]",
)  # fmt: skip


def tokenizer(template: str | None = "chatml", *, end: str = "<|im_end|>", merges: int = 60) -> Any:
    """A byte-level BPE tokenizer trained on a few sentences; its padding is its end-of-sequence token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    made.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(SPECIAL) + merges, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIAL), show_progress=False,
    )  # fmt: skip
    made.train_from_iterator(texts(60), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=end, pad_token=end, padding_side="left",
        chat_template=None if template is None else TEMPLATES[template],
    )  # fmt: skip


def texts(count: int, seed: int = 0) -> list[str]:
    """Sentences with something to learn in them."""
    draw = random.Random(seed)
    names, things = ["Ann", "Ben", "Cleo", "Dan", "Eve"], ["apples", "pears", "plums", "nuts", "figs"]
    lines = []
    for _ in range(count):
        n, m = draw.randint(1, 9), draw.randint(1, 9)
        lines.append(f"{draw.choice(names)} has {n} {draw.choice(things)} and finds {m}: that makes {n + m}.")
    return lines


def conversations(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of ``messages``, of one or two turns."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        messages = []
        for _ in range(draw.randint(1, 2)):
            n, m = draw.randint(1, 9), draw.randint(1, 9)
            messages += [
                {"role": "user", "content": f"What is {n} and {m}?"},
                {"role": "assistant", "content": f"It is {n + m}."},
            ]
        rows.append({"messages": messages})
    return rows


def llama(
    folder: Path, *, layers: int = 4, hidden: int = 32, cutter: Any = None, vocabulary: int | None = None
) -> Path:
    """A folder with a causal language model of random weights and its tokenizer."""
    import transformers

    cutter = cutter or tokenizer()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary or len(cutter), hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=2 * hidden, max_position_embeddings=256,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=cutter.eos_token_id, pad_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    cutter.save_pretrained(folder)
    return folder
