"""Small encoders, batches and methods for tests of the methods of text encoders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)

from tutelage.data import Batch
from tutelage.methods import (
    DistillationModule,
    EmbeddingMethod,
    LogitMethod,
    Method,
    MinilmMethod,
    PatientMethod,
    TinybertMethod,
    TripleMethod,
    prepare_method,
)
from tutelage.teachers import LiveTeacher

PAD, CLS, SEP, MASK, VOCABULARY = 0, 1, 2, 3, 40


LENGTHS = (9, 6, 4)


Terms = dict[str, Tensor]


def config(width: int = 16, layers: int = 2, heads: int = 2, **more: Any) -> BertConfig:
    return BertConfig(
        vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=2 * width, max_position_embeddings=32, initializer_range=0.3, **more,
    )  # fmt: skip


def make(kind: Any = BertForMaskedLM, seed: int = 0, **sizes: Any) -> nn.Module:
    torch.manual_seed(seed)
    model: nn.Module = kind(config(**sizes))
    for name, parameter in model.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def batch(task: str = "mlm", extra: int = 0, seed: int = 0) -> Batch:
    """Texts [CLS] ... [SEP] and ``extra`` more padding than they need."""
    generator = torch.Generator().manual_seed(seed)
    width = max(LENGTHS)
    ids = torch.randint(5, VOCABULARY, (len(LENGTHS), width), generator=generator)
    classes = torch.randint(3, (len(LENGTHS), width), generator=generator)
    place, ends = torch.arange(width), torch.tensor(LENGTHS).unsqueeze(-1)
    ids = ids.masked_fill(place >= ends, PAD).masked_fill(place == ends - 1, SEP).masked_fill(place == 0, CLS)
    inner = (place > 0) & (place < ends - 1)
    labels = torch.full_like(ids, -100)
    if task == "mlm":
        chosen = inner & (place % 3 == 1)
        labels, ids = ids.where(chosen, labels), ids.masked_fill(chosen, MASK)
    if task == "tokens":
        labels = classes.where(inner, labels)
    seen = (place < ends).long()
    ids, labels, seen, inner = (
        F.pad(x, (0, extra), value=v) for x, v in ((ids, PAD), (labels, -100), (seen, 0), (inner, False))
    )  # fmt: skip
    inputs = {"input_ids": ids, "attention_mask": seen}
    if task in ("mlm", "tokens"):
        return Batch(inputs, labels, mask=inner)
    return Batch(inputs, classes[:, 0] if task == "texts" else torch.full((len(ids),), -100))


def seen(student: nn.Module, teacher: nn.Module, method: Method, b: Batch) -> Terms:
    """Means of the terms of a built method."""
    module = DistillationModule(student, method)
    terms = module(b, None if method.needs is None else LiveTeacher(teacher).signal(b, method.needs))
    module.close()
    counts = method.counts(b)
    assert set(terms) == set(counts) == set(method.weights)
    assert all(int(terms[name].count) == int(count) for name, count in counts.items())
    return {name: term.sum / term.count for name, term in terms.items()}


def fit(method: Method, student: nn.Module, teacher: nn.Module, b: Batch) -> Method:
    return prepare_method(method, student, teacher, b, seed=0)


class Pooled(nn.Module):
    """A sentence encoder: the mean over tokens, in place of logits."""

    def __init__(self, seed: int, width: int) -> None:
        super().__init__()
        self.encoder = make(BertModel, seed, width=width)
        self.encoder.pooler = None  # nobody would use it

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.encoder(input_ids, attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).float()
        return (states * weights).sum(1) / weights.sum(1)


CASES: dict[str, tuple[Callable[[], Method], Any, str]] = {
    "triple": (TripleMethod, BertForMaskedLM, "mlm"),
    "triple-masked": (lambda: TripleMethod(positions="masked"), BertForMaskedLM, "mlm"),
    "tinybert": (lambda: TinybertMethod(prediction=0), BertForMaskedLM, "mlm"),
    "tinybert-texts": (lambda: TinybertMethod(stage1_fraction=0), BertForSequenceClassification, "texts"),
    "tinybert-tokens": (lambda: TinybertMethod(stage1_fraction=0), BertForTokenClassification, "tokens"),
    "tinybert-kl": (lambda: TinybertMethod(prediction=0, scores="probabilities"), BertForMaskedLM, "mlm"),
    "minilm-1": (lambda: MinilmMethod(version=1), BertForMaskedLM, "plain"),
    "minilm-2": (MinilmMethod, BertForMaskedLM, "mlm"),
    "patient": (PatientMethod, BertForSequenceClassification, "texts"),
    "patient-tokens": (PatientMethod, BertForTokenClassification, "tokens"),
    "logit-texts": (LogitMethod, BertForSequenceClassification, "texts"),
    "logit-tokens": (LogitMethod, BertForTokenClassification, "tokens"),
    "embedding": (EmbeddingMethod, None, "plain"),
    "triple-cosine": (lambda: TripleMethod(kd=0, mlm=0), BertForMaskedLM, "mlm"),
}


def models(kind: Any) -> tuple[nn.Module, nn.Module]:
    if kind is None:
        return Pooled(1, 16), Pooled(2, 24)
    more = {} if kind is BertForMaskedLM else {"num_labels": 3}
    return make(kind, 1, layers=2, **more), make(kind, 2, layers=4, width=24, **more)
