"""``tutelage predict``: predictions of an exported model for images or texts."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from tutelage.data.image_files import IMAGE_EXTENSIONS, describe_skipped, find_images, open_image
from tutelage.data.preprocessing import Preprocessing
from tutelage.data.tokens import tokenize
from tutelage.errors import CheckpointError, DataError, shorten
from tutelage.export.bundle import IMAGE, Inputs
from tutelage.export.runtimes import Export, open_export
from tutelage.taps import padding_outputs

BATCH = 16
"""Inputs per batch."""

T = TypeVar("T")


def predict(
    export: str | Path | Export, inputs: Iterable[str | Path], *, top: int = 5, tokens: int = 64
) -> list[dict[str, Any]]:
    """The predictions of an exported model, in the order of the inputs.

    Args:
        export: the folder of an export, or an opened export (:func:`open_export`).
        inputs: image files and folders of them, or texts.
        top: number of labels for each input, most likely first.
        tokens: maximum number of tokens that a causal language model generates.

    Returns:
        For each input a mapping with ``input`` and, by task: ``labels``, pairs of label and probability; ``values``,
        numbers by name; ``words``, label and probability of each word; ``masks``, the most likely tokens for each
        mask; ``embedding``; ``text``, the generated text.

    Raises:
        CheckpointError: the folder is not an export.
        DataError: an input is empty or not an image.
        MissingDependencyError: the runtime of the export is not installed.
    """
    return list(iter_predictions(export, inputs, top=top, tokens=tokens))


def iter_predictions(
    export: str | Path | Export, inputs: Iterable[str | Path], *, top: int = 5, tokens: int = 64,
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """:func:`predict` as an iterator; ``say`` receives a line on what is skipped in a folder."""
    opened = export if isinstance(export, Export) else open_export(export)
    task = opened.manifest["task"]
    if task == "images":
        for paths in _batches(list_image_files(inputs, say)):
            pixels = torch.stack([read_image(path, opened.manifest["preprocessing"]) for path in paths])
            for path, row in zip(paths, opened.run({IMAGE: pixels}), strict=True):
                yield {"input": str(path), "labels": top_labels(row.softmax(-1), opened.manifest["classes"], top)}
        return
    texts = [str(text) for text in inputs]
    empty = [i for i, text in enumerate(texts) if not text.strip()]
    if not texts or empty:
        raise DataError(
            f"text {empty[0] + 1} of {len(texts)} is empty" if empty else "there is no text",
            remedy="give texts, --file FILE with one per line, or - for standard input",
        )
    if opened.tokenizer is None:
        raise CheckpointError("has no tokenizer", where=str(opened.folder), remedy="export the model again")
    for batch in _batches(texts):
        yield from TASKS[task](opened, batch, top, tokens)


def _batches(items: Iterable[T]) -> Iterator[list[T]]:
    rest = iter(items)
    while batch := list(islice(rest, BATCH)):
        yield batch


def list_image_files(inputs: Iterable[str | Path], say: Callable[[str], None]) -> list[Path]:
    """The given files, and the image files of the given folders, sorted; ``say`` receives what is skipped.

    Raises:
        DataError: a path does not exist, or a folder has no image.
    """
    files: list[Path] = []
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            skipped = Counter[str]()
            inside = find_images(path, skipped)
            if note := describe_skipped(skipped, path):
                say(note)
            if not inside:
                remedy = f"files must end in {', '.join(sorted(IMAGE_EXTENSIONS))}"
                raise DataError("holds no image", where=str(path), remedy=remedy)
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise DataError("no such file", where=str(path), remedy="give image files, or folders of them")
    if not files:
        raise DataError("there is no input", remedy="give image files, or folders of them")
    return files


def read_image(path: Path, preprocessing: dict[str, Any]) -> Tensor:
    """An image, resized, cropped and normalised, ``[C, H, W]``.

    Raises:
        DataError: the file is not an image, or is damaged.
        CheckpointError: the model's files do not say how images are prepared.
    """
    if "mean" not in preprocessing:
        raise CheckpointError(
            "no file says how its images are prepared",
            remedy="put the preprocessor_config.json of the model into its folder",
        )
    own = Preprocessing.from_dict(preprocessing)
    return own.normalise(own.pixels(open_image(path))[None])[0]


def top_labels(probabilities: Tensor, names: Sequence[str], top: int) -> list[dict[str, Any]]:
    """The most likely labels of a row."""
    best = probabilities.topk(min(top, len(probabilities)))
    return [
        {"label": names[i] if i < len(names) else str(i), "probability": float(p)}
        for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def tokenize_texts(export: Export, texts: Sequence[str]) -> Inputs:
    """Token ids and the other inputs, padded to the longest text."""
    tokenizer = export.tokenizer
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    columns: list[list[str]] = [list(texts)]
    if export.manifest.get("pairs"):
        columns = [list(side) for side in zip(*(_split_pair(text) for text in texts), strict=True)]
    columns[0] = [export.manifest["preprocessing"].get("prompt", "") + text for text in columns[0]]
    encoding = tokenizer(
        *columns, truncation=True, max_length=export.manifest["preprocessing"].get("max_length"), padding=True,
        padding_side="right", return_tensors="pt",
    )  # fmt: skip
    return {name: encoding[name] for name in export.names}


def _split_pair(text: str) -> tuple[str, str]:
    first, tab, second = text.partition("\t")
    if not tab or not second.strip():
        raise DataError(
            f"{shorten(text)} is one text, and the model reads pairs", remedy="put a tab between the two texts"
        )
    return first, second


def _for_each_text(convert: Callable[[Export, Tensor, int], dict[str, Any]]) -> Any:
    """A task with one output row per text."""

    def predictions(export: Export, texts: Sequence[str], top: int, tokens: int) -> Iterator[dict[str, Any]]:
        for text, row in zip(texts, export.run(tokenize_texts(export, texts)), strict=True):
            yield {"input": text, **convert(export, row, top)}

    return predictions


def _classes(export: Export, row: Tensor, top: int) -> dict[str, Any]:
    probabilities = row.sigmoid() if export.manifest["task"] == "multi-label" else row.softmax(-1)
    return {"labels": top_labels(probabilities, export.manifest["classes"], top)}


def _regression(export: Export, row: Tensor, top: int) -> dict[str, Any]:
    return {"values": dict(zip(export.manifest["classes"], row.flatten().tolist(), strict=False))}


def _tokens(export: Export, texts: Sequence[str], top: int, tokens: int) -> Iterator[dict[str, Any]]:
    """The label of a word is that of its first token, in the window where it counts, as in training."""
    most = export.manifest["preprocessing"].get("max_length") or export.tokenizer.model_max_length
    for text in texts:
        words = text.split()
        windows = tokenize([[words]], export.tokenizer, max_length=most, words=True)
        rows = np.arange(len(windows))
        inputs = windows.inputs(rows)
        logits = export.run({name: inputs[name] for name in export.names})
        assert windows.words is not None
        numbers, counts = windows.padded(windows.words, rows, -1), ~windows.padded(windows.special, rows, True)
        first: dict[int, Tensor] = {}
        for row, place in np.argwhere(counts).tolist():
            first.setdefault(int(numbers[row, place]), logits[row, place])
        labels = [
            {"word": word, **top_labels(first[w].softmax(-1), export.manifest["classes"], 1)[0]}
            for w, word in enumerate(words)
            if w in first
        ]
        yield {"input": text, "words": labels}


def _masked(export: Export, texts: Sequence[str], top: int, tokens: int) -> Iterator[dict[str, Any]]:
    tokenizer = export.tokenizer
    for text in texts:
        inputs = tokenize_texts(export, [text])
        positions = (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero().flatten().tolist()
        if not positions:
            raise DataError(
                f"no {tokenizer.mask_token} in {shorten(text)}: there is nothing to predict",
                remedy=f"put {tokenizer.mask_token} in place of a word",
            )
        best = export.run(inputs)[0][positions].softmax(-1).topk(top)
        yield {
            "input": text,
            "masks": [
                [{"label": tokenizer.decode([i]).strip(), "probability": p} for p, i in zip(values, ids, strict=True)]
                for values, ids in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ],
        }


def _causal(export: Export, texts: Sequence[str], top: int, tokens: int) -> Iterator[dict[str, Any]]:
    for text in texts:
        yield {"input": text, "text": _generate(export, text, tokens)}


@torch.no_grad()
def _generate(export: Export, text: str, tokens: int) -> str:
    """The greedy continuation of a text, or the answer to it if the tokenizer has a chat template.

    An exported graph has no key-value cache: each token is computed from all tokens before it.
    """
    from tutelage.data.chat import render_conversation

    tokenizer = export.tokenizer
    if tokenizer.chat_template:
        prompt = render_conversation([{"role": "user", "content": text}], tokenizer, prompt=True)
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    else:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
    end, start = tokenizer.eos_token_id, ids.shape[1]
    if not tokenizer.chat_template and end is not None and start > 1 and int(ids[0, -1]) == end:
        ids, start = ids[:, :-1], start - 1
    max_positions = export.manifest.get("positions")
    model: Any = export.model
    if model is not None and callable(getattr(model, "generate", None)):
        ids = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, num_beams=1,
            eos_token_id=end, pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end,
            suppress_tokens=padding_outputs(model),
        )  # fmt: skip
        return str(tokenizer.decode(ids[0, start:], skip_special_tokens=True))
    for _ in range(tokens):
        if max_positions is not None and ids.shape[1] >= max_positions:
            break
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        token = export.run({name: inputs[name] for name in export.names})[:, -1].argmax(-1, keepdim=True)
        if int(token) == end:
            break
        ids = torch.cat([ids, token], 1)
    return str(tokenizer.decode(ids[0, start:], skip_special_tokens=True))


TASKS = {
    "classes": _for_each_text(_classes), "multi-label": _for_each_text(_classes),
    "regression": _for_each_text(_regression),
    "embedding": _for_each_text(lambda export, row, top: {"embedding": row.tolist()}),
    "tokens": _tokens, "mlm": _masked, "causal": _causal,
}  # fmt: skip
"""The predictions of each text task."""
