"""``tutelage predict``: what an exported model says of images or texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from tutelage.data.images import to_pixels
from tutelage.errors import CheckpointError, DataError, require
from tutelage.export.bundle import IMAGE, Inputs
from tutelage.export.runtimes import Export, open_export

EXTENSIONS = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
"""Files of a folder that are taken for images."""

BATCH = 16
"""Inputs that are asked together."""

T = TypeVar("T")


def predict(
    export: str | Path | Export,
    inputs: Iterable[str | Path],
    *,
    top: int = 5,
    tokens: int = 64,
) -> list[dict[str, Any]]:
    """What an exported model says of each input, in order.

    Args:
        export: its folder, or what :func:`open_export` opened.
        inputs: image files and folders of them, or texts.
        top: labels for each, the likeliest first.
        tokens: most that a causal language model writes.

    Returns:
        For each input a mapping with ``input`` and, by task: ``labels``, pairs of label and probability;
        ``values``, numbers by name; ``words``, label and probability of each; ``masks``, of each masked token the
        likeliest; ``embedding``; ``text``, what was written.

    Raises:
        CheckpointError: no export there.
        DataError: an input that is no image, or empty.
        MissingDependencyError: what the export's runtime needs is not installed.
    """
    return list(iter_predictions(export, inputs, top=top, tokens=tokens))


def iter_predictions(
    export: str | Path | Export, inputs: Iterable[str | Path], *, top: int = 5, tokens: int = 64
) -> Iterator[dict[str, Any]]:
    """:func:`predict`, one after another."""
    opened = export if isinstance(export, Export) else open_export(export)
    task = opened.manifest["task"]
    if task == "images":
        for paths in _blocks(list_image_files(inputs)):
            pixels = torch.stack([read_image(path, opened.manifest["preprocessing"]) for path in paths])
            for path, row in zip(paths, opened.run({IMAGE: pixels}), strict=True):
                yield {"input": str(path), "labels": top_labels(row.softmax(-1), opened.manifest["classes"], top)}
        return
    given = [str(text) for text in inputs]
    empty = [i for i, text in enumerate(given) if not text.strip()]
    if not given or empty:
        raise DataError(
            f"text {empty[0] + 1} of {len(given)} is empty" if empty else "there is no text",
            remedy="give texts, --file FILE with one a line, or - for standard input",
        )
    if opened.tokenizer is None:
        raise CheckpointError("has no tokenizer", where=str(opened.folder), remedy="export the model again")
    for texts in _blocks(given):
        yield from TASKS[task](opened, texts, top, tokens)


def _blocks(items: Iterable[T]) -> Iterator[list[T]]:
    rest = iter(items)
    while block := list(islice(rest, BATCH)):
        yield block


# Images ------------------------------------------------------------------------------------------------


def list_image_files(inputs: Iterable[str | Path]) -> list[Path]:
    """Files, and those in folders, sorted.

    Raises:
        DataError: one that is not there, or a folder without images.
    """
    found: list[Path] = []
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS)
            if not inside:
                raise DataError(
                    "holds no image", where=str(path), remedy=f"files must end in {', '.join(sorted(EXTENSIONS))}"
                )
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise DataError("no such file", where=str(path), remedy="give image files, or folders of them")
    if not found:
        raise DataError("there is no input", remedy="give image files, or folders of them")
    return found


def read_image(path: Path, preprocessing: dict[str, Any]) -> Tensor:
    """An image as the model takes it, ``[C, H, W]``.

    Raises:
        DataError: it is no image, or broken.
    """
    require("PIL", "vision", "reading an image")
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            pixels = to_pixels(
                image, preprocessing["channels"], preprocessing["size"], preprocessing.get("crop", 1.0)
            )
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "is not an image" if isinstance(error, UnidentifiedImageError) else f"cannot be decoded: {error}"
        raise DataError(reason, where=str(path), remedy="give a PNG, JPEG, WebP, BMP, GIF or TIFF file") from None
    mean, std = (torch.tensor(preprocessing[k]).view(-1, 1, 1) for k in ("mean", "std"))
    return pixels.float().mul_(1 / 255).sub_(mean).div_(std)


def top_labels(scores: Tensor, names: Sequence[str], top: int) -> list[dict[str, Any]]:
    """The likeliest labels of a row."""
    best = scores.topk(min(top, len(scores)))
    return [
        {"label": names[i] if i < len(names) else str(i), "probability": float(p)}
        for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


# Texts -------------------------------------------------------------------------------------------------


def tokenize_texts(export: Export, texts: Sequence[str]) -> Inputs:
    """Token ids and what goes with them, padded to the longest."""
    cutter = export.tokenizer
    if cutter.pad_token_id is None:
        cutter.pad_token = cutter.eos_token
    columns: list[list[str]] = [list(texts)]
    if export.manifest.get("pairs"):
        columns = [list(side) for side in zip(*(_pair(text) for text in texts), strict=True)]
    said = cutter(
        *columns, truncation=True, max_length=export.manifest["preprocessing"].get("max_length"), padding=True,
        padding_side="right", return_tensors="pt",
    )  # fmt: skip
    return {name: said[name] for name in export.names}


def _pair(text: str) -> tuple[str, str]:
    first, tab, second = text.partition("\t")
    if not tab or not second.strip():
        raise DataError(
            f"{text[:60]!r} is one text, and the model reads two together",
            remedy="put a tab between the two",
        )
    return first, second


def _classes(export: Export, texts: Sequence[str], top: int, tokens: int) -> Iterator[dict[str, Any]]:
    for text, row in zip(texts, export.run(tokenize_texts(export, texts)), strict=True):
        yield {"input": text, "labels": top_labels(row.softmax(-1), export.manifest["classes"], top)}


def _multi_label(export: Export, texts: Sequence[str], top: int, tokens: int) -> Iterator[dict[str, Any]]:
    for text, row in zip(texts, export.run(tokenize_texts(export, texts)), strict=True):
        yield {"input": text, "labels": top_labels(row.sigmoid(), export.manifest["classes"], top)}


def _regression(export: Export, texts: Sequence[str], top: int, tokens: int) -> Iterator[dict[str, Any]]:
    names = export.manifest["classes"]
    for text, row in zip(texts, export.run(tokenize_texts(export, texts)), strict=True):
        yield {"input": text, "values": {n: float(x) for n, x in zip(names, row.flatten(), strict=False)}}


def _tokens(export: Export, texts: Sequence[str], top: int, tokens: int) -> Iterator[dict[str, Any]]:
    """Each word's label is that of its first token, as in training."""
    for text in texts:
        words = text.split()
        said = export.tokenizer(
            words, is_split_into_words=True, truncation=True, return_tensors="pt",
            max_length=export.manifest["preprocessing"].get("max_length"),
        )  # fmt: skip
        logits = export.run({name: said[name] for name in export.names})[0]
        places: dict[int, int] = {}
        for at, word in enumerate(said.word_ids(0)):
            if word is not None:
                places.setdefault(word, at)
        found = [
            {"word": words[w], **top_labels(logits[at].softmax(-1), export.manifest["classes"], 1)[0]}
            for w, at in places.items()
        ]
        yield {"input": text, "words": found}


def _masked(export: Export, texts: Sequence[str], top: int, tokens: int) -> Iterator[dict[str, Any]]:
    cutter = export.tokenizer
    for text in texts:
        inputs = tokenize_texts(export, [text])
        where = (inputs["input_ids"][0] == cutter.mask_token_id).nonzero().flatten().tolist()
        if not where:
            raise DataError(
                f"no {cutter.mask_token} in {text[:60]!r}: there is nothing to guess",
                remedy=f"put {cutter.mask_token} where a word is to be guessed",
            )
        logits = export.run(inputs)[0]
        yield {
            "input": text,
            "masks": [
                [
                    {"label": cutter.decode([int(i)]).strip(), "probability": float(p)}
                    for p, i in zip(*(x.tolist() for x in logits[at].softmax(-1).topk(top)), strict=True)
                ]
                for at in where
            ],
        }


def _embedding(export: Export, texts: Sequence[str], top: int, tokens: int) -> Iterator[dict[str, Any]]:
    for text, row in zip(texts, export.run(tokenize_texts(export, texts)), strict=True):
        yield {"input": text, "embedding": [float(x) for x in row]}


def _causal(export: Export, texts: Sequence[str], top: int, tokens: int) -> Iterator[dict[str, Any]]:
    for text in texts:
        yield {"input": text, "text": generate_text(export, text, tokens)}


@torch.no_grad()
def generate_text(export: Export, text: str, tokens: int) -> str:
    """What a causal language model writes behind a text, or answers to it, always its likeliest next token.

    A tokenizer with a chat template is given the text as a user's message. A graph keeps nothing between tokens: each
    is computed from the whole text before it.
    """
    from tutelage.data.chat import render_conversation

    cutter = export.tokenizer
    if cutter.chat_template:
        prompt = render_conversation([{"role": "user", "content": text}], cutter, prompt=True)
        ids = cutter(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    else:
        ids = cutter(text, return_tensors="pt")["input_ids"]
    end, start = cutter.eos_token_id, ids.shape[1]
    if not cutter.chat_template and end is not None and start > 1 and int(ids[0, -1]) == end:
        ids, start = ids[:, :-1], start - 1
    longest = export.manifest.get("positions")
    model: Any = export.model
    if model is not None and callable(getattr(model, "generate", None)):
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, num_beams=1,
            eos_token_id=end, pad_token_id=cutter.pad_token_id if cutter.pad_token_id is not None else end,
        )  # fmt: skip
        return str(cutter.decode(found[0, start:], skip_special_tokens=True))
    for _ in range(tokens):
        if longest is not None and ids.shape[1] >= longest:
            break
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        token = export.run({name: given[name] for name in export.names})[:, -1].argmax(-1, keepdim=True)
        if int(token) == end:
            break
        ids = torch.cat([ids, token], 1)
    return str(cutter.decode(ids[0, start:], skip_special_tokens=True))


TASKS = {
    "classes": _classes, "multi-label": _multi_label, "regression": _regression, "tokens": _tokens,
    "mlm": _masked, "embedding": _embedding, "causal": _causal,
}  # fmt: skip
"""What is said of texts, by task."""
