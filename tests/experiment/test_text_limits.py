"""Texts longer than a model's positions are refused before training, wherever in the data they are."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tutelage.config import build_recipe
from tutelage.errors import ConfigError
from tutelage.experiment.recipe_source import load_data, recipe_spec
from tutelage.models.pretrained import position_limit
from tutelage.progress import Terminal

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

SMALL: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
}  # fmt: skip


def folder(place: Path) -> str:
    """A BERT of 16 positions with a tokenizer of 50 words."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(50))]
    words_of = tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    own = tokenizers.Tokenizer(words_of)
    own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=own, **special).save_pretrained(place)
    labels = {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}
    torch.manual_seed(0)
    config = transformers.BertConfig(**SMALL, max_position_embeddings=16, **labels)
    transformers.BertForSequenceClassification(config).save_pretrained(place)
    return f"hf:{place}"


@pytest.mark.parametrize(("words", "limit", "refused"), [(40, 64, True), (40, 16, False), (12, 64, False)])
def test_a_long_text_late_in_the_data_is_refused(words: int, limit: int, refused: bool, tmp_path: Path) -> None:
    rows = [f"{' '.join(['w1'] * (words if i == 57 else 5))},{'ab'[i % 2]}" for i in range(60)]
    (tmp_path / "t.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    model = folder(tmp_path / "bert")
    raw = {
        "name": "x", "data": {"source": "table", "path": str(tmp_path / "t.csv"), "max_length": limit},
        "teacher": {"model": model, "train": {"epochs": 1}}, "student": {"model": model}, "method": {"kind": "logit"},
        "train": {"epochs": 1},
    }  # fmt: skip
    recipe = build_recipe(raw)
    spec = recipe_spec(recipe, load_data(recipe, Terminal(speaks=False)))
    if not refused:
        spec.source.build_teacher(0)
        return
    with pytest.raises(ConfigError, match=r"the longest text has 4[0-2] tokens.* has 16 positions") as caught:
        spec.source.build_student(0)
    assert caught.value.where == "data.max_length"
    assert caught.value.remedy == "set data.max_length=16"


@pytest.mark.parametrize(("name", "options", "expected"), [
    ("BertModel", {"max_position_embeddings": 16}, 16),
    ("RobertaModel", {"max_position_embeddings": 18, "pad_token_id": 1}, 16),
    ("GPT2Model", {"n_positions": 16}, 16),
    ("OPTModel", {"max_position_embeddings": 16}, 16),
    ("LlamaModel", {"max_position_embeddings": 16}, None),
])  # fmt: skip
def test_the_limit_is_that_of_learned_positions(name: str, options: dict[str, Any], expected: int | None) -> None:
    config = getattr(transformers, name.replace("Model", "Config"))(**{**SMALL, **options})
    model = getattr(transformers, name)(config).eval()
    assert position_limit(model) == expected
    with torch.no_grad():
        model(torch.full((1, 16), 5))
        if expected is not None:
            with pytest.raises((IndexError, RuntimeError)):
                model(torch.full((1, 17), 5))
