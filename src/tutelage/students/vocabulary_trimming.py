"""Trims a vocabulary to a corpus: a smaller tokenizer with the same tokens for its texts, and the ids to keep."""

import json
import re
import string
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tutelage.errors import ConfigError, DataError, require, shorten

BATCH_SIZE = 1024
"""Texts that are tokenized at once."""

Model = dict[str, Any]
"""The part ``model`` of a tokenizer's JSON."""


def trim_tokenizer(tokenizer: Any, texts: Iterable[str], *, keep: Iterable[str] = ()) -> tuple[Any, Tensor]:
    """A tokenizer with only the tokens that a corpus needs, and the old ids of its tokens.

    It has the tokens of the texts, all special and added tokens, the tokens that these are merged from, and single
    characters (those of the corpus, ASCII, and all bytes of a byte-level tokenizer), which spell unseen words. The
    order of tokens does not change.

    Args:
        tokenizer: a fast tokenizer of transformers: WordPiece, BPE, Unigram or WordLevel. Not changed.
        texts: the corpus; read twice, the second time to verify that the new tokenizer gives the same tokens.
        keep: more tokens to keep, as the tokenizer spells them, such as ``##ing``.

    Returns:
        The new tokenizer, of the same class, and ``[K]`` int64 ascending: new id -> old id, for
        :func:`~tutelage.students.trim_embeddings`.

    Raises:
        ConfigError: a slow or unsupported tokenizer, or an unknown token to keep.
        DataError: no texts, other values than texts, or a text for which the new tokenizer gives other tokens.

    Reference: Abdaoui et al., Load What You Need: Smaller Versions of Multilingual BERT (2020), for WordPiece.
    """
    require("tokenizers", "text", "trimming a vocabulary")
    corpus, keep = _corpus(texts), [keep] if isinstance(keep, str) else list(keep)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(
            f"{type(tokenizer).__name__} is not a fast tokenizer", remedy="load it with AutoTokenizer.from_pretrained"
        )
    old = _copy(backend)
    description = json.loads(old.to_str())
    kind = description["model"].get("type", "WordPiece")
    if kind not in CLOSURES:
        raise ConfigError(f"a tokenizer of kind {kind} cannot be trimmed", remedy=f"known: {', '.join(CLOSURES)}")
    ids = old.get_vocab(with_added_tokens=True)
    if unknown_tokens := [token for token in keep if token not in ids]:
        raise ConfigError(
            f"keep: the tokenizer has no token {shorten(unknown_tokens[0])}",
            remedy="spell tokens as tokenizer.tokenize gives them",
        )
    used = {*keep, *(token["content"] for token in description["added_tokens"])}
    unknown, unk = [], description["model"].get("unk_token")
    for text, tokens in zip(corpus, _tokenize(old, corpus), strict=True):
        used.update(tokens)
        if unk in tokens:
            unknown.append(text)
    order = sorted(CLOSURES[kind](old, description, used & ids.keys(), unknown), key=ids.__getitem__)
    new_ids = {token: i for i, token in enumerate(order)}
    new = _rebuild(tokenizer, _renumber(json.loads(backend.to_str()), new_ids))
    if new.get_vocab() != new_ids:
        raise ConfigError(
            f"the ids of {type(tokenizer).__name__} cannot change: its class sets ids of its own",
            remedy="load it as transformers.PreTrainedTokenizerFast(tokenizer_file=...) and trim that",
        )
    _check_same_tokens(old, _copy(new.backend_tokenizer), corpus)
    return new, torch.tensor([ids[token] for token in order])


def _copy(backend: Any) -> Any:
    """A copy without truncation and padding."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(backend.to_str())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _corpus(texts: Iterable[str]) -> Sequence[str]:
    if isinstance(texts, str):
        raise DataError("texts is one text, not a list of texts", remedy="give a list: [text]")
    corpus = texts if isinstance(texts, Sequence) else list(texts)
    if not len(corpus):
        raise DataError(
            "there are no texts to trim the vocabulary to", remedy="give the texts that the student will see"
        )
    return corpus


def _tokenize(tokenizer: Any, corpus: Sequence[str]) -> Iterator[list[str]]:
    names = {i: token for token, i in tokenizer.get_vocab(with_added_tokens=True).items()}
    for start in range(0, len(corpus), BATCH_SIZE):
        rows = list(corpus[start : start + BATCH_SIZE])
        wrong = next((i for i, row in enumerate(rows) if not isinstance(row, str)), None)
        if wrong is not None:
            raise DataError(f"text {start + wrong} is a {type(rows[wrong]).__name__}", remedy="give strings")
        for encoding in tokenizer.encode_batch_fast(rows):
            yield [names[i] for i in encoding.ids]


def _check_same_tokens(old: Any, new: Any, corpus: Sequence[str]) -> None:
    """Raise :class:`DataError` if a text of the corpus has other tokens than before."""
    for i, (before, after) in enumerate(zip(_tokenize(old, corpus), _tokenize(new, corpus), strict=True)):
        if before != after:
            raise DataError(
                f"text {i} has other tokens with the new tokenizer, so this tokenizer cannot be trimmed exactly",
                remedy=f"keep more tokens: keep={sorted(set(before))[:20]}",
            )


def _letters(tokens: Iterable[str], vocabulary: Iterable[str], prefix: str = "", suffix: str = "") -> set[str]:
    """Tokens with one character of ``tokens`` or ASCII: bare, and in the middle and at the end of a word."""
    letters = {*string.printable, *(letter for token in tokens for letter in token)}
    spelled = {form for letter in letters for form in (letter, prefix + letter, letter + suffix)}
    return spelled & set(vocabulary)


def _word_piece(tokenizer: Any, description: Model, used: set[str], unknown: Sequence[str]) -> set[str]:
    model = description["model"]
    vocabulary, prefix = model["vocab"], model["continuing_subword_prefix"]
    tokens = used | {model["unk_token"]} | _letters(used, vocabulary, prefix)
    # A word is unknown if its end has no token. It stays unknown only if the tokens of its beginning stay.
    split = tokenizer.pre_tokenizer
    for text in unknown:
        normal = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
        for word in [word for word, _ in split.pre_tokenize_str(normal)] if split else [normal]:
            tokens |= _greedy(word, vocabulary, prefix)
    return tokens


def _greedy(word: str, vocabulary: dict[str, int], prefix: str) -> set[str]:
    """The longest tokens from the left, until there is none."""
    tokens: set[str] = set()
    start = 0
    while start < len(word):
        spelled = ((prefix if start else "") + word[start:stop] for stop in range(len(word), start, -1))
        token = next((piece for piece in spelled if piece in vocabulary), None)
        if token is None:
            return tokens
        tokens.add(token)
        start += len(token) - (len(prefix) if start else 0)
    return tokens


def _bpe(tokenizer: Any, description: Model, used: set[str], unknown: Sequence[str]) -> set[str]:
    """Also the intermediate tokens of merges from the characters of each token."""
    model = description["model"]
    vocabulary = model["vocab"]
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    is_byte_level = "ByteLevel" in json.dumps([description["pre_tokenizer"], description["normalizer"]])
    tokens = used | _letters(used, vocabulary, prefix, suffix) | _byte_tokens(vocabulary)
    if is_byte_level:
        tokens |= {token for token in vocabulary if len(token) == 1}
    if model.get("unk_token") is not None:
        tokens.add(model["unk_token"])
    ranks = {merge: rank for rank, merge in enumerate(_merges(model))}
    for token in list(tokens & vocabulary.keys()):
        tokens |= _merge_steps(token, ranks, prefix, suffix) & vocabulary.keys()
    return tokens


def _merges(model: Model) -> list[tuple[str, str]]:
    return [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]


def _merge_steps(token: str, ranks: dict[tuple[str, str], int], prefix: str, suffix: str) -> set[str]:
    """All tokens that occur while the characters of ``token`` are merged."""
    inner = bool(prefix) and token.startswith(prefix) and len(token) > len(prefix)
    ends = bool(suffix) and token.endswith(suffix) and len(token) > len(suffix)
    letters = token[len(prefix) if inner else 0 : len(token) - len(suffix) if ends else None]
    parts = [(prefix if i or inner else "") + letter for i, letter in enumerate(letters)]
    if ends and parts:
        parts[-1] += suffix
    tokens = set(parts)
    while len(parts) > 1:
        last = len(ranks)
        at = min(range(len(parts) - 1), key=lambda i: ranks.get((parts[i], parts[i + 1]), last))
        if (parts[at], parts[at + 1]) not in ranks:
            break
        parts[at : at + 2] = [_join(parts[at], parts[at + 1], prefix)]
        tokens.add(parts[at])
    return tokens


def _join(left: str, right: str, prefix: str) -> str:
    return left + (right[len(prefix) :] if prefix and right.startswith(prefix) else right)


def _byte_tokens(vocabulary: Iterable[str]) -> set[str]:
    return {token for token in vocabulary if re.fullmatch(r"<0x[0-9A-F]{2}>", token)}


def _unigram(tokenizer: Any, description: Model, used: set[str], unknown: Sequence[str]) -> set[str]:
    """Also the least likely token, which determines the cost of an unknown character."""
    model = description["model"]
    scores = dict(model["vocab"])
    tokens = used | _letters(used, scores) | _byte_tokens(scores) | {min(scores, key=lambda token: scores[token])}
    return tokens if model.get("unk_id") is None else tokens | {model["vocab"][model["unk_id"]][0]}


CLOSURES: dict[str, Callable[[Any, Model, set[str], Sequence[str]], set[str]]] = {
    "BPE": _bpe,
    "Unigram": _unigram,
    "WordLevel": lambda _, description, used, unknown: (
        used | {description["model"]["unk_token"]} & description["model"]["vocab"].keys()
    ),
    "WordPiece": _word_piece,
}
"""By kind: (tokenizer, its JSON, tokens that occur, texts with an unknown word) -> tokens to keep."""


def _renumber(description: Model, ids: dict[str, int]) -> Model:
    """The tokenizer's JSON with the tokens in ``ids`` and their new ids only."""
    model = description["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {token: i for token, i in sorted(ids.items(), key=lambda x: x[1]) if token in model["vocab"]}
    else:
        if model.get("unk_id") is not None:
            model["unk_id"] = ids[model["vocab"][model["unk_id"]][0]]
        model["vocab"] = [row for row in model["vocab"] if row[0] in ids]
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        merges = [(left, right, _join(left, right, prefix)) for left, right in _merges(model)]
        model["merges"] = [[left, right] for left, right, token in merges if {left, right, token} <= ids.keys()]
    for token in description["added_tokens"]:
        token["id"] = ids[token["content"]]
    description["added_tokens"].sort(key=lambda token: token["id"])
    if description.get("padding"):
        description["padding"]["pad_id"] = ids[description["padding"]["pad_token"]]
    description["post_processor"] = _processor(description.get("post_processor"), ids)
    return description


def _processor(part: Any, ids: dict[str, int]) -> Any:
    """The post-processor with new ids: pairs of token and id, and ``ids`` with their ``tokens``."""
    if isinstance(part, list):
        if len(part) == 2 and isinstance(part[0], str) and type(part[1]) is int and part[0] in ids:
            return [part[0], ids[part[0]]]
        return [_processor(item, ids) for item in part]
    if isinstance(part, dict):
        if isinstance(part.get("ids"), list) and isinstance(part.get("tokens"), list):
            return {**part, "ids": [ids[token] for token in part["tokens"]]}
        return {key: _processor(value, ids) for key, value in part.items()}
    return part


def _rebuild(tokenizer: Any, description: Model) -> Any:
    """A tokenizer of the same class and settings, loaded from files."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for name in set(tokenizer.vocab_files_names.values()) - {"tokenizer.json"}:
            (Path(folder) / name).unlink(missing_ok=True)
        (Path(folder) / "tokenizer.json").write_text(json.dumps(description), encoding="utf-8")
        settings = Path(folder) / "tokenizer_config.json"
        known = json.loads(settings.read_text(encoding="utf-8"))
        known.pop("added_tokens_decoder", None)  # its ids are the old ones; tokenizer.json has the same tokens
        settings.write_text(json.dumps(known), encoding="utf-8")
        new = type(tokenizer).from_pretrained(folder)
    new.name_or_path = tokenizer.name_or_path
    return new
