"""Small encoders, tokenizers and tables of texts, made on the spot."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

WORDS = {
    "sound": "music audio player codec mixer volume stereo song radio synth",
    "net": "server protocol packet router socket proxy firewall http dns mail",
    "math": "algebra matrix solver integral polynomial theorem prime vector calculus graph",
}
FILLER = "a the small fast library tool for with that provides and simple package"


def sentences(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of ``text`` and ``label``: words of one topic among words of none."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        label = list(WORDS)[i % len(WORDS)]
        topic, filler = WORDS[label].split(), FILLER.split()
        words = [draw.choice(topic if draw.random() < 0.4 else filler) for _ in range(draw.randint(4, 14))]
        rows.append({"text": " ".join([*words, draw.choice(topic)]), "label": label, "row": i})
    return rows


def table(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A JSON-lines file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tokenizer(drop: Sequence[str] = ()) -> Any:
    """A WordPiece tokenizer of these words and of letters, as BERT's."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.normalizers import Lowercase
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = sorted({w for text in (*WORDS.values(), FILLER) for w in text.split() if w not in drop and len(w) > 1})
    vocabulary = [*special, *letters, *(f"##{c}" for c in letters), *words]
    made = Tokenizer(WordPiece({w: i for i, w in enumerate(vocabulary)}, unk_token="[UNK]"))
    made.normalizer = Lowercase()  # type: ignore[assignment]
    made.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    made.post_processor = TemplateProcessing(  # type: ignore[assignment]
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def encoder(folder: Path, kind: str = "BertModel", *, layers: int = 2, hidden: int = 32, **config: Any) -> Path:
    """A folder with a BERT of random weights and its tokenizer."""
    import transformers

    cutter = config.pop("cutter", None) or tokenizer()
    torch.manual_seed(0)
    settings = transformers.BertConfig(
        vocab_size=len(cutter), hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=2 * hidden, max_position_embeddings=64, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, **config,
    )  # fmt: skip
    getattr(transformers, kind)(settings).save_pretrained(folder)
    cutter.save_pretrained(folder)
    return folder
