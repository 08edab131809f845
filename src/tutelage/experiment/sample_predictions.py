"""Samples of the test split for the report: predictions on which models disagree, and generated texts."""

import base64
import hashlib
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tutelage.data.batch import IGNORE, Batch
from tutelage.data.preprocessing import Preprocessing
from tutelage.students.sampling import sample_completions
from tutelage.taps import Needs, observe

MOST_CLASSES = 1_000
"""With more classes than this, a run keeps no samples: their scores are most of the file."""
PIXELS = 64
"""The maximum side of an image; larger ones are scaled down."""
CHARACTERS = 1_000
"""The maximum length of a text."""
PAIRS = 12
"""The number of most frequent (teacher prediction, student prediction) pairs."""

DescribeSample = Callable[[Batch], dict[str, str]]
"""Renders a batch of one row for the report: an ``image`` (PNG as a data URI), a ``text``, or nothing."""


@dataclass
class Candidate:
    """A row that may be selected."""

    key: tuple[Any, ...]
    number: int
    row: Batch
    logits: dict[str, Tensor]


class Samples:
    """Selects samples of a split, batch by batch.

    Of the rows on which reference and student disagree, those come first where the student's distribution is
    furthest from the reference's (KL); of those on which they agree, some from the full split.
    """

    def __init__(self, reference: str, student: str, count: int) -> None:
        self.reference, self.student, self.count = reference, student, count
        self.n = 0
        self.disagreeing: list[Candidate] = []
        self.agreeing: list[Candidate] = []
        self.agree: dict[str, Tensor] = {}
        self.right = torch.zeros(2, 2, dtype=torch.int64)
        self.labels = self.confused = torch.zeros(0, dtype=torch.int64)

    def add(self, batch: Batch, logits: Mapping[str, Tensor]) -> None:
        """Add a batch.

        Args:
            logits: ``[B, C]`` of each model by its name, on the CPU.
        """
        theirs, mine = logits[self.reference].float(), logits[self.student].float()
        classes = mine.shape[-1]
        if not len(self.labels):
            self.labels = torch.zeros(classes, dtype=torch.int64)
            self.confused = torch.zeros(classes * classes, dtype=torch.int64)
            self.agree = {name: torch.zeros(classes + 1, dtype=torch.int64) for name in logits}
        predictions = {name: scores.argmax(-1) for name, scores in logits.items()}
        first, second = predictions[self.reference], predictions[self.student]
        known = batch.labels != IGNORE
        labels = batch.labels[known]
        self.labels += torch.bincount(labels, minlength=classes)
        for name, each in predictions.items():  # unlabelled rows count at the end
            self.agree[name] += torch.bincount(
                torch.where(known, batch.labels, classes)[each == first], minlength=classes + 1
            )
        right = torch.stack([first[known] == labels, second[known] == labels], 1).long()
        self.right += torch.bincount(right[:, 0] * 2 + right[:, 1], minlength=4).view(2, 2)
        self.confused += torch.bincount(first * classes + second, minlength=classes * classes)
        away = F.kl_div(mine.log_softmax(-1), theirs.log_softmax(-1), reduction="none", log_target=True).sum(-1)
        for at in range(len(batch)):
            number, same = self.n + at, bool(first[at] == second[at])
            key = (hashlib.sha256(str(number).encode()).hexdigest(),) if same else (-float(away[at]), number)
            rows = self.agreeing if same else self.disagreeing
            if len(rows) < self.count or key < rows[-1].key:
                row = {name: scores[at].float() for name, scores in logits.items()}
                rows.append(Candidate(key, number, batch.rows(at, at + 1).to("cpu"), row))
                rows.sort(key=lambda one: one.key)
                del rows[self.count :]
        self.n += len(batch)

    def chosen(self) -> list[Candidate]:
        """Two of three disagree, where there are so many; these come first."""
        many = min(len(self.disagreeing), max(self.count - len(self.agreeing), -(-2 * self.count // 3)))
        some = sorted(self.agreeing[: self.count - many], key=lambda one: one.number)
        return [*self.disagreeing[:many], *some]

    def as_json(self, show: DescribeSample) -> dict[str, Any]:
        """For the file."""
        classes = len(self.labels)
        pairs = self.confused.view(classes, classes).clone().fill_diagonal_(0).flatten()
        most = pairs.argsort(descending=True, stable=True)[:PAIRS]
        samples = []
        for one in self.chosen():
            label = int(one.row.labels[0])
            samples.append(
                {
                    "row": one.number, "label": None if label == IGNORE else label, **show(one.row),
                    "logits": {name: [float(f"{v:.5g}") for v in row.tolist()] for name, row in one.logits.items()},
                }
            )  # fmt: skip
        both = self.right.tolist()
        return {
            "n": self.n, "reference": self.reference, "student": self.student, "labelled": int(self.labels.sum()),
            "agree": {name: int(each.sum()) for name, each in self.agree.items() if name != self.reference},
            "right": {"both": both[1][1], "reference": both[1][0], "student": both[0][1], "neither": both[0][0]},
            "by_class": {
                "n": self.labels.tolist(),
                **{name: each[:-1].tolist() for name, each in self.agree.items() if name != self.reference},
            },
            "pairs": [[int(i) // classes, int(i) % classes, int(pairs[i])] for i in most if pairs[i] > 0],
            "samples": samples,
        }  # fmt: skip


def has_samples(batch: Batch, classes: int) -> bool:
    """Whether a row is of one class out of few enough to be shown."""
    return batch.task == "classes" and batch.labels.ndim == 1 and 1 < classes <= MOST_CLASSES


@torch.no_grad()
def collect_samples(
    test: Iterable[Batch],
    outputs: Iterable[Tensor] | None,
    students: Mapping[str, nn.Module],
    count: int,
    device: torch.device,
) -> Samples:
    """Samples of a split.

    Args:
        outputs: the teacher's logits of each batch. ``None``: no teacher; the last student is compared with the first
    """
    names = [*(["teacher"] if outputs is not None else []), *students]
    samples = Samples(names[0], names[-1], count)
    theirs = None if outputs is None else iter(outputs)
    for batch in test:
        logits = {} if theirs is None else {"teacher": next(theirs).cpu()}
        there = batch.to(device)
        for name, model in students.items():
            scores = observe(model, there.inputs, Needs()).logits
            assert scores is not None
            logits[name] = scores.float().cpu()
        samples.add(batch.to("cpu"), logits)
    return samples


def describe_image(batch: Batch) -> dict[str, str]:
    """Of images of one or three channels a picture, its darkest and lightest values as black and white."""
    x = batch.inputs
    if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[1] not in (1, 3):
        return {}
    x = x[0].float()
    low, high = float(x.min()), float(x.max())
    return {"image": png((x - low) / max(high - low, 1e-12))}


def normalised_image(preprocessing: Preprocessing) -> DescribeSample:
    """Shows images that were normalised so."""

    def show(batch: Batch) -> dict[str, str]:
        assert isinstance(batch.inputs, Tensor)
        return {"image": png(preprocessing.denormalise(batch.inputs)[0])}

    return show


def decoded_text(tokenizer: Any) -> DescribeSample:
    """Shows the text that a model reads, as its tokenizer has it."""

    def show(batch: Batch) -> dict[str, str]:
        ids = batch.inputs.get("input_ids") if isinstance(batch.inputs, dict) else None
        if ids is None:
            return {}
        return {"text": str(tokenizer.decode(ids[0], skip_special_tokens=True)).strip()[:CHARACTERS]}

    return show


def png(image: Tensor) -> str:
    """A PNG as a data URI, of an image ``[C, H, W]`` in [0, 1] of one or three channels."""
    longest = max(image.shape[1:])
    if longest > PIXELS:
        size = [max(1, round(side * PIXELS / longest)) for side in image.shape[1:]]
        image = F.interpolate(image[None], size=size, mode="area")[0]
    pixels = (image * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous()
    height, width, channels = pixels.shape
    lines = b"".join(b"\0" + bytes(line.flatten().tolist()) for line in pixels)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2 if channels == 3 else 0, 0, 0, 0)
    whole = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines, 9)) + chunk(b"IEND", b"")
    )
    return f"data:image/png;base64,{base64.b64encode(whole).decode()}"


OPENING = 0.25
"""The share of a text without a prompt that models continue."""
LONGEST = 32
"""The maximum number of tokens of that share."""
READ = 512
"""Only the last tokens of a longer prompt are read."""


class Opening(NamedTuple):
    """A text of the test split to continue."""

    prompt: Tensor
    rest: Tensor


def opening(batch: Batch) -> Opening | None:
    """Of a batch of one row; of packed texts the first is taken.

    The prompt of a conversation is all before its last answer; that of a text which is learned whole is its first
    quarter, at most :data:`LONGEST` tokens.
    """
    assert isinstance(batch.inputs, dict)
    ids, labels = batch.inputs["input_ids"][0], batch.labels[0]
    if "attention_mask" in batch.inputs:
        there = batch.inputs["attention_mask"][0].bool()
        ids, labels = ids[there], labels[there]
    elif "position_ids" in batch.inputs:
        begins = (batch.inputs["position_ids"][0] == 0).nonzero().flatten().tolist()
        stop = begins[1] if len(begins) > 1 else len(ids)
        ids, labels = ids[:stop], labels[:stop]
    learned = labels != IGNORE
    starts = (learned & ~torch.cat([learned.new_zeros(1), learned[:-1]])).nonzero().flatten()
    if not len(starts):
        return None
    begin = int(starts[-1]) + 1
    end = int(learned.nonzero().max()) + 2
    if begin <= 1:
        begin = max(min(int(len(ids) * OPENING), LONGEST), 1)
    return Opening(ids[:begin][-READ:], ids[begin:end])


def select_rows(test: Iterable[Batch], count: int) -> list[Batch]:
    """``count`` rows from the full split, each as a batch; they do not depend on the batch size."""
    selected: list[tuple[str, Batch]] = []
    number = 0
    for batch in test:
        for at in range(len(batch)):
            key, number = hashlib.sha256(str(number).encode()).hexdigest(), number + 1
            if len(selected) >= count and key > selected[-1][0]:
                continue
            row = batch.rows(at, at + 1)
            if opening(row) is not None and opening(row.for_teacher()) is not None:
                selected = sorted([*selected, (key, row)], key=lambda one: one[0])[:count]
    return [row for _, row in selected]


def generate_continuations(
    models: Mapping[str, tuple[nn.Module, Any]], rows: Sequence[Batch], most: int, device: torch.device
) -> list[dict[str, str]]:
    """The rows as texts: ``prompt``, ``data`` (how it goes on in the data), and each model's continuation by name."""
    texts: list[dict[str, str]] = [{} for _ in rows]
    for name, (model, tokenizer) in models.items():
        openings = [one for row in rows if (one := opening(row.for_teacher() if name == "teacher" else row))]
        first = next(model.parameters(), None)
        prompts = [one.prompt.to(device if first is None else first.device) for one in openings]
        outputs = sample_completions(model, prompts, max_new_tokens=most, temperature=0)
        for text, one, (ids, begin) in zip(texts, openings, outputs, strict=True):

            def decode(tokens: Tensor, tokenizer: Any = tokenizer) -> str:
                return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()

            text[name] = decode(ids[begin:])
            text.setdefault("prompt", decode(one.prompt))
            text.setdefault("data", decode(one.rest[:most]))
    return texts
