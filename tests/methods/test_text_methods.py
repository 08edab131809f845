"""Methods of text encoders: terms are the papers', padding and special tokens never count, and misfits say so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ElectraConfig,
    ElectraForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

import tutelage
from tutelage import losses
from tutelage.config import METHOD_KINDS, build_recipe
from tutelage.data import Batch
from tutelage.errors import CapabilityError, ConfigError, ModelError
from tutelage.losses import chunked
from tutelage.losses.heads import HeadProjection
from tutelage.methods import (
    METHODS,
    DistillationModule,
    EmbeddingMethod,
    LogitMethod,
    Method,
    MinilmMethod,
    PatientMethod,
    TinybertMethod,
    TripleMethod,
    prepare_method,
    prepare_student,
)
from tutelage.methods.transformer_layers import find_layers, mapped
from tutelage.taps import Needs, observe
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


def hf(model: nn.Module, b: Batch) -> Any:
    """All that transformers itself says, with attention computed plainly."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(**b.inputs, output_hidden_states=True, output_attentions=True)
    model.set_attn_implementation(before)
    return found


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


# Terms are the papers' -------------------------------------------------------------------------------------


def test_triple_is_what_transformers_outputs_give() -> None:
    student, teacher, b = make(seed=1), make(seed=2, layers=4), batch()
    means = seen(student, teacher, fit(TripleMethod(), student, teacher, b), b)
    s, t = hf(student, b), hf(teacher, b)
    torch.testing.assert_close(
        means["mlm"], F.cross_entropy(s.logits.flatten(0, 1), b.labels.flatten(), ignore_index=-100)
    )
    p, log_q = (t.logits[b.mask] / 2).softmax(-1), (s.logits[b.mask] / 2).log_softmax(-1)
    torch.testing.assert_close(means["kd"], 4 * F.kl_div(log_q, p, reduction="batchmean"))
    a, c = s.hidden_states[-1][b.mask], t.hidden_states[-1][b.mask]
    torch.testing.assert_close(means["cosine"], F.cosine_embedding_loss(a, c, torch.ones(len(a))))
    masked = seen(student, teacher, fit(TripleMethod(positions="masked"), student, teacher, b), b)
    where = b.labels != -100
    p, log_q = (t.logits[where] / 2).softmax(-1), (s.logits[where] / 2).log_softmax(-1)
    torch.testing.assert_close(masked["kd"], 4 * F.kl_div(log_q, p, reduction="batchmean"))


def test_tinybert_is_what_transformers_outputs_give_with_padding_left_out() -> None:
    student, teacher, b = make(seed=1), make(seed=2, layers=4), batch()
    method = fit(TinybertMethod(prediction=0), student, teacher, b)
    means = seen(student, teacher, method, b)
    s, t = hf(student, b), hf(teacher, b)
    gap = (s.hidden_states[0] - t.hidden_states[0])[b.mask].square().mean()
    torch.testing.assert_close(means["embedding"], gap)
    gaps = [(s.hidden_states[m] - t.hidden_states[2 * m])[b.mask].square().mean() for m in (1, 2)]
    torch.testing.assert_close(means["hidden"], gaps[0] + gaps[1])
    by_hand = 0.0
    for m in (1, 2):  # text by text, so that no padding and none of its -inf can come in
        gaps = []
        for row, length in enumerate(LENGTHS):
            scores = []
            for model, layer in ((student, m), (teacher, 2 * m)):
                own = model.bert.encoder.layer[layer - 1].attention.self
                states = hf(model, b).hidden_states[layer - 1][row, :length]
                q, k = (f(states).view(length, 2, 8).transpose(0, 1) for f in (own.query, own.key))
                scores.append(q @ k.mT / 8**0.5)
            gaps.append((scores[0] - scores[1]).square().mean((0, 2))[1 : length - 1])
        by_hand = by_hand + torch.cat(gaps).mean()
    torch.testing.assert_close(means["attention"], by_hand)
    assert method.formula().endswith("of layers 1<-2, 2<-4")


def attention_by_hand(s: Any, t: Any, b: Batch, m: int, n: int) -> Tensor:
    p, q = t.attentions[n - 1], s.attentions[m - 1]
    kl = (p * (p.clamp(min=1e-30).log() - q.clamp(min=1e-30).log())).sum(-1).mean(1)
    return kl[b.mask].mean()


@pytest.mark.parametrize("method", [TinybertMethod(prediction=0, scores="probabilities"), MinilmMethod(1)])
def test_attention_is_what_transformers_outputs_give(method: Method) -> None:
    student, teacher, b = make(seed=1, layers=1), make(seed=2, layers=4), batch()
    method = fit(method, student, teacher, b)
    means = seen(student, teacher, method, b)
    torch.testing.assert_close(means["attention"], attention_by_hand(hf(student, b), hf(teacher, b), b, 1, 4))


@pytest.mark.parametrize("layer", [None, 3])
def test_minilm_relations_by_hand(layer: int | None) -> None:
    student, teacher, b = make(seed=1, width=24, heads=3), make(seed=2, layers=4), batch()
    method = fit(MinilmMethod(layer=layer), student, teacher, b)
    assert method.relation_heads == 8  # the most that divides 24 and 16
    means = seen(student, teacher, method, b)
    for name, part in (("queries", "query"), ("keys", "key"), ("values", "value")):
        found = []
        for row, length in enumerate(LENGTHS):
            log_p = []
            for model, n in ((student, 2), (teacher, layer or 4)):
                states = hf(model, b).hidden_states[n - 1][row, :length]
                x = getattr(model.bert.encoder.layer[n - 1].attention.self, part)(states)
                x = x.view(length, 8, -1).transpose(0, 1)
                log_p.append((x @ x.mT / x.shape[-1] ** 0.5).log_softmax(-1))
            kl = (log_p[1].exp() * (log_p[1] - log_p[0])).sum(-1).mean(0)
            found.append(kl[1 : length - 1])
        torch.testing.assert_close(means[name], torch.cat(found).mean())


@pytest.mark.parametrize("variant", ["authors", "paper"])
def test_patient_is_what_transformers_outputs_give(variant: Any) -> None:
    kind = BertForSequenceClassification
    student = make(kind, 1, layers=3, num_labels=3)
    teacher, b = make(kind, 2, layers=6, num_labels=3), batch("texts")
    means = seen(student, teacher, fit(PatientMethod(variant=variant), student, teacher, b), b)
    s, t = hf(student, b), hf(teacher, b)
    gaps = []
    for m, n in ((1, 2), (2, 4)):
        x, y = (F.normalize(o.hidden_states[i][:, 0], dim=-1) for o, i in ((s, m), (t, n)))
        gaps.append((x - y).square())
    stacked = torch.stack(gaps)
    by_hand = stacked.mean() if variant == "authors" else stacked.sum((0, 2)).mean()
    torch.testing.assert_close(means["patient"], by_hand)
    torch.testing.assert_close(means["kd"], losses.kd(s.logits, t.logits, temperature=10.0))
    torch.testing.assert_close(means["ce"], F.cross_entropy(s.logits, b.labels))


def test_embeddings_are_the_teachers_of_another_text() -> None:
    student, teacher, b = Pooled(1, 16), Pooled(2, 24), batch("plain")
    b = replace(b, teacher_inputs=batch("plain", extra=2, seed=5).inputs)
    method = fit(EmbeddingMethod(), student, teacher, b)
    means = seen(student, teacher, method, b)
    s, t = student(**b.inputs), teacher(**b.teacher_inputs)
    torch.testing.assert_close(means["mse"], F.mse_loss(method.projector(s, t), t))
    a, c = (F.normalize(x, dim=-1) for x in (s, t))
    off = ~torch.eye(len(b), dtype=torch.bool)
    torch.testing.assert_close(means["similarity"], (a @ a.T - c @ c.T)[off].square().mean())


def test_margin_mse_trains_a_bi_encoder_on_a_cross_encoder() -> None:
    class Scores(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.body = Pooled(seed, 16)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            query, *passages = (
                self.body(ids, seen) for ids, seen in zip(input_ids.unbind(1), attention_mask.unbind(1), strict=True)
            )
            return torch.stack([(query * passage).sum(-1) for passage in passages], -1)

    texts = [batch("plain", seed=i).inputs for i in range(3)]
    inputs = {k: torch.stack([t[k] for t in texts], 1) for k in texts[0]}
    b = Batch(inputs, torch.full((3,), -100))
    student, teacher = Scores(1), Scores(2)
    method = LogitMethod(soft="margin_mse", alpha=1.0)
    means = seen(student, teacher, method, b)
    s, t = student(**inputs), teacher(**inputs)
    torch.testing.assert_close(means["margin_mse"], F.mse_loss(s[:, 0] - s[:, 1], t[:, 0] - t[:, 1]))
    shifted = losses.margin_mse(s + 5, t - torch.arange(3.0).unsqueeze(-1))
    torch.testing.assert_close(shifted, means["margin_mse"])
    with pytest.raises(ValueError, match="fewer than two passages"):
        losses.margin_mse(s[:, :1], t[:, :1])


# Padding and special tokens ------------------------------------------------------------------------------------


CASES: dict[str, tuple[Callable[[], Method], Any, str]] = {
    "triple": (TripleMethod, BertForMaskedLM, "mlm"),
    "triple-masked": (lambda: TripleMethod(positions="masked"), BertForMaskedLM, "mlm"),
    "tinybert": (lambda: TinybertMethod(prediction=0), BertForMaskedLM, "mlm"),
    "tinybert-texts": (lambda: TinybertMethod(stage1_fraction=0), BertForSequenceClassification, "texts"),
    "tinybert-tokens": (lambda: TinybertMethod(stage1_fraction=0), BertForTokenClassification, "tokens"),
    "tinybert-kl": (lambda: TinybertMethod(prediction=0, scores="probabilities"), BertForMaskedLM, "mlm"),
    "minilm-1": (lambda: MinilmMethod(1), BertForMaskedLM, "plain"),
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


@pytest.mark.parametrize("name", CASES)
def test_more_padding_changes_neither_a_term_nor_a_gradient(name: str) -> None:
    factory, kind, task = CASES[name]
    student, teacher = models(kind)
    method = fit(factory(), student, teacher, batch(task))
    found = []
    for extra in (0, 7):
        student.zero_grad()
        method.zero_grad()
        b = batch(task, extra)
        means = seen(student, teacher, method, b)
        torch.stack([method.weights[n] * v for n, v in means.items()]).sum().backward()
        learned = (*student.parameters(), *method.parameters())
        found.append((means, [p.grad.clone() for p in learned if p.grad is not None]))
    (means, gradients), (padded, again) = found
    assert gradients
    assert any(float(g.abs().max()) > 1e-4 for g in gradients)
    for term in means:
        torch.testing.assert_close(padded[term], means[term], rtol=1e-4, atol=1e-6)
    for a, c in zip(gradients, again, strict=True):
        torch.testing.assert_close(c, a, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", [n for n, (_, _, task) in CASES.items() if task in ("mlm", "tokens")])
def test_what_is_said_at_special_tokens_and_padding_never_counts(name: str) -> None:
    factory, kind, task = CASES[name]
    student, teacher = models(kind)
    b = batch(task)
    method = fit(factory(), student, teacher, b)
    observed, signal = observe(student, b.inputs, method.student_needs), LiveTeacher(teacher).signal(b, method.needs)
    before = method(observed, b, signal)
    assert b.mask is not None
    special = ~b.mask
    keys = special & (b.inputs["attention_mask"] == 0)  # queries see the keys of special tokens, as the model does
    for tap, state in observed.hidden.items():
        parts = "attention.self" in tap
        first = "patient" in name
        if not first:
            state[keys if parts else special] = 1e4
    for out in (observed.logits, observed.head and observed.head.inputs):
        if out is not None:
            out[special] = 1e4
    after = method(observed, b, signal)
    for term in before:
        torch.testing.assert_close(after[term].sum, before[term].sum)
    if task == "mlm":
        expected = int(b.mask.sum())
        assert all(int(v.count) == expected for n, v in before.items() if n != "mlm" and "masked" not in name)


def test_a_text_with_nothing_that_counts_gives_zero_and_no_nan() -> None:
    for factory, kind, task in CASES.values():
        student, teacher = models(kind)
        b = batch(task)
        method = fit(factory(), student, teacher, b)
        empty = b.rows(0, 0)
        module = DistillationModule(student, method)
        terms = module(empty, LiveTeacher(teacher).signal(empty, method.needs))
        torch.stack([t.sum for t in terms.values()]).sum().backward()
        assert all(float(t.sum.detach()) == 0.0 and int(t.count) == 0 for t in terms.values())
        assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in student.parameters())
        module.close()


@pytest.mark.parametrize("name", CASES)
def test_all_that_is_not_frozen_gets_a_gradient_as_distributed_wrappers_want(name: str) -> None:
    factory, kind, task = CASES[name]
    student, teacher = models(kind)
    b = batch(task)
    method = factory()
    modes = [m.training for m in student.train().modules()]
    student = prepare_student(method, student, teacher, b.rows(0, 2), seed=0)
    assert modes == [m.training for m in student.modules()]
    sum(seen(student, teacher, fit(method, student, teacher, b), b).values()).backward()
    for path, parameter in (*student.named_parameters(), *method.named_parameters()):
        assert (parameter.grad is not None) == parameter.requires_grad, path


def test_no_minus_infinity_of_a_mask_is_compared_whatever_computes_attention() -> None:
    student, teacher, b = make(seed=1), make(seed=2, layers=4), batch(extra=3)
    for factory in (lambda: TinybertMethod(prediction=0), lambda: MinilmMethod(1)):
        found = []
        for implementation in ("sdpa", "eager"):
            for model in (student, teacher):
                model.set_attn_implementation(implementation)
            means = seen(student, teacher, fit(factory(), student, teacher, b), b)
            found.append(means["attention"].detach())
        torch.testing.assert_close(*found)
        assert found[0].isfinite()
        assert float(found[0]) < 100  # one pair of -10000 and another number would be millions


def test_dropout_of_the_students_attention_is_not_compared() -> None:
    student, teacher, b = (
        make(seed=1, attention_probs_dropout_prob=0.9, hidden_dropout_prob=0.0),
        make(seed=2),
        batch(),
    )
    method = fit(TinybertMethod([1, None], prediction=0, hidden=0, embedding=0), student, teacher, b)
    evaluated = seen(student, teacher, method, b)["attention"]
    torch.testing.assert_close(seen(student.train(), teacher, method, b)["attention"], evaluated)


# Memory, and what weighs nothing -----------------------------------------------------------------------------------


def in_chunks(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """Let so many tokens go together."""
    monkeypatch.setattr(chunked, "CHUNK", {"cpu": 0})
    monkeypatch.setattr(chunked, "FEWEST", tokens)


def test_scores_of_the_vocabulary_exist_for_some_positions_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = make(seed=1), make(seed=2, layers=4, width=24)
    b = batch()
    method = fit(TripleMethod(), student, teacher, b)
    rows: list[int] = []
    made = HeadProjection.project

    def watched(self: HeadProjection, which: Any) -> Tensor:
        scores = made(self, which)
        rows.append(len(scores))
        return scores

    monkeypatch.setattr(HeadProjection, "project", watched)
    found = []
    for chunk in (None, 4):
        if chunk is not None:
            in_chunks(monkeypatch, chunk)
        student.zero_grad()
        rows.clear()
        means = seen(student, teacher, method, b)
        assert sum(rows) == 2 * int(b.mask.sum())  # the student's and the teacher's, each once
        assert max(rows) > 4 if chunk is None else max(rows) == 4
        sum(means.values()).backward()
        found.append((means, [p.grad.clone() for p in student.parameters() if p.grad is not None]))
    for a, c in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(a, c)
    assert all(torch.allclose(found[0][0][n], found[1][0][n]) for n in found[0][0])
    assert method.student_needs.head
    assert not method.student_needs.logits


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_made_in_parts_are_those_of_all_scores_at_once(
    dtype: torch.dtype | None, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher, b = make(seed=1, tie_word_embeddings=tied), make(seed=2), batch()
    method = fit(TripleMethod(cosine=0), student, teacher, b)
    in_chunks(monkeypatch, 4)
    gradients = []
    for parts in (True, False):
        student.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            if parts:
                means = seen(student, teacher, method, b)
                loss = 2 * means["mlm"] + 5 * means["kd"]
            else:
                with torch.no_grad():
                    said = teacher(**b.inputs).logits
                logits = student(**b.inputs).logits
                loss = 2 * losses.cross_entropy(logits, b.labels, mask=b.mask)
                loss = loss + 5 * losses.kd(logits, said, temperature=2.0, mask=b.mask)
        (0.5 * loss).backward()
        gradients.append({n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any(name.startswith("cls.predictions") and name.endswith("bias") for name in gradients[0])
    for name, gradient in gradients[1].items():
        scale = float(gradient.norm()) + 0.1  # of some, such as biases of keys, nothing but noise is there
        close = 1e-5 if dtype is None else 2e-2
        assert float((gradients[0][name] - gradient).norm()) < close * scale, name


@pytest.mark.parametrize("factory", [lambda: TripleMethod(kd=0), lambda: TinybertMethod(prediction=0), MinilmMethod])
def test_no_method_of_hidden_states_runs_a_head_over_the_vocabulary(factory: Callable[[], Method]) -> None:
    student, teacher, b = make(seed=1), make(seed=2), batch()
    method = fit(factory(), student, teacher, b)
    sizes: list[int] = []
    for model in (student, teacher):
        model.cls.predictions.decoder.register_forward_hook(lambda m, a, out: sizes.append(out.shape[-1]))
    seen(student, teacher, method, b)
    assert sizes == [16, 16]  # what goes in comes out


@pytest.mark.parametrize(
    ("method", "never"),
    [
        (lambda: TripleMethod(kd=0), ["Soft"]),
        (lambda: TripleMethod(mlm=0), ["Hard"]),
        (lambda: TripleMethod(cosine=0), ["cosine"]),
        (lambda: TinybertMethod(attention=0, prediction=0), ["attention_mse", "soft_cross_entropy"]),
        (lambda: TinybertMethod(embedding=0, hidden=0, prediction=0), ["hint"]),
        (lambda: MinilmMethod(1, attention=0), ["attention_kl"]),
        (lambda: MinilmMethod(1, values=0), ["value_relation"]),
    ],
)  # fmt: skip
def test_a_term_that_weighs_nothing_is_not_computed(
    method: Callable[[], Method], never: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher, b = make(seed=1), make(seed=2), batch()

    def refuse(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("computed")

    for name in never:
        monkeypatch.setattr(losses, name, refuse)
    ready = fit(method(), student, teacher, b)
    assert seen(student, teacher, ready, b)


def test_what_a_weight_of_zero_switches_off_is_not_asked_for() -> None:
    student, teacher, b = make(BertForMaskedLM, 1), make(BertModel, 2), batch()
    without_head = fit(TripleMethod(kd=0), student, teacher, b)
    assert set(seen(student, teacher, without_head, b)) == {"mlm", "cosine"}
    alone = fit(TripleMethod(kd=0, cosine=0), student, teacher, b)
    assert alone.needs is None
    assert not alone.student_needs.hidden
    assert set(seen(student, teacher, alone, b)) == {"mlm"}
    patient = fit(PatientMethod(beta=0), student, student, b)
    assert not patient.needs.hidden


# Widths, heads and layers --------------------------------------------------------------------------------


def test_widths_that_differ_get_projectors_that_are_trained_and_no_student() -> None:
    b = batch()
    student, teacher = make(seed=1), make(seed=2, width=24, heads=2)
    method = fit(TinybertMethod(prediction=0), student, teacher, b)
    shapes = {name: tuple(p.body.weight.shape) for name, p in method.hidden.projectors.items()}
    assert shapes == {"embedding": (24, 16), "hidden": (24, 16)}
    sum(seen(student, teacher, method, b).values()).backward()
    assert all(p.grad is not None for p in method.parameters())
    equal = fit(TinybertMethod(prediction=0), student, make(seed=3), b)
    assert not list(equal.parameters())
    triple = fit(TripleMethod(), student, teacher, b)
    assert triple.projector.body.weight.shape == (24, 16)
    assert not list(fit(MinilmMethod(), student, teacher, b).parameters())


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (lambda: TinybertMethod(prediction=0), "2 heads of attention, the teacher's layer 1 has 4(.|\n)*heads: mean"),
        (lambda: MinilmMethod(1), "2 heads of attention, the teacher 4(.|\n)*version: 2"),
    ],
)  # fmt: skip
def test_heads_that_differ_are_refused_or_averaged(method: Callable[[], Method], says: str) -> None:
    student, teacher, b = make(seed=1), make(seed=2, heads=4), batch()
    with pytest.raises(ModelError, match=says):
        fit(method(), student, teacher, b)
    for other in (TinybertMethod(prediction=0, heads="mean"), MinilmMethod(1, heads="mean"), MinilmMethod(2)):
        assert all(float(v.detach()) > 0 for v in seen(student, teacher, fit(other, student, teacher, b), b).values())


def test_maps_of_layers() -> None:
    b = batch()

    def found(layers: Any, student: int, teacher: int, **more: Any) -> list[tuple[int, int]]:
        mine = find_layers("student", make(layers=student), b)
        return mapped(layers, mine, find_layers("teacher", make(layers=teacher), b), **more)

    assert found("uniform", 3, 6) == [(1, 2), (2, 4), (3, 6)]
    assert found("uniform", 2, 5) == [(1, 3), (2, 5)]
    assert found("last", 2, 5) == [(1, 4), (2, 5)]
    assert found("skip", 3, 6, but_last=True) == [(1, 2), (2, 4)]
    assert found("last", 3, 6, but_last=True) == [(1, 4), (2, 5)]
    assert found([None, 3], 2, 5) == [(2, 3)]
    with pytest.raises(ModelError, match=r"give 2 numbers from 1 to 4"):
        found([1, 2, 3], 2, 4)
    with pytest.raises(ModelError, match=r"give 2 numbers from 1 to 4"):
        found([1, 5], 2, 4)
    with pytest.raises(ModelError, match="no layer is left"):
        found("skip", 1, 4, but_last=True)
    with pytest.raises(ModelError, match="4 layers, the teacher 2"):
        found("last", 4, 2)


SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 32, "max_position_embeddings": 40, "pad_token_id": PAD,
}  # fmt: skip
FAMILIES: dict[str, tuple[Callable[[], nn.Module], str, bool]] = {
    "bert": (lambda: BertForMaskedLM(BertConfig(**SIZES)), "attention.self.value", True),
    "roberta": (lambda: RobertaForMaskedLM(RobertaConfig(**SIZES)), "attention.self.value", True),
    "electra": (lambda: ElectraForMaskedLM(ElectraConfig(**SIZES, embedding_size=12)), "self.value", True),
    "distilbert": (
        lambda: DistilBertForMaskedLM(
            DistilBertConfig(
                vocab_size=VOCABULARY, dim=24, n_layers=3, n_heads=4, hidden_dim=32, max_position_embeddings=40
            )
        ),
        "attention.v_lin",
        True,
    ),
    "albert": (lambda: AlbertForMaskedLM(AlbertConfig(**SIZES, embedding_size=12)), "attention.value@2", True),
    "modernbert": (
        lambda: ModernBertForMaskedLM(
            ModernBertConfig(
                **SIZES, global_attn_every_n_layers=2, local_attention=8, cls_token_id=CLS, sep_token_id=SEP,
                bos_token_id=CLS, eos_token_id=SEP,
            )
        ),
        "attn.Wqkv",
        False,
    ),
    "deberta": (
        lambda: DebertaV2ForMaskedLM(
            DebertaV2Config(**SIZES, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8)
        ),
        "value_proj",
        False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_queries_keys_and_values_are_found_in_any_family(family: str) -> None:
    torch.manual_seed(0)
    factory, value, plain = FAMILIES[family]
    model, b = factory().eval(), batch()
    training = {name: m.training for name, m in model.named_modules()}
    stack = find_layers("teacher", model, b)
    (attention,) = stack.attentions([3])
    assert attention.values.tap.endswith(value)
    assert (attention.plain, attention.heads) == (plain, 4)
    assert len({attention.queries, attention.keys, attention.values}) == 3
    taps = (stack.embeddings, *(layer.state for layer in stack.layers), stack.last)
    with torch.no_grad():
        observed = observe(model, b.inputs, Needs(hidden=tuple(dict.fromkeys(taps)))).hidden
        said = model(**b.inputs, output_hidden_states=True).hidden_states
    for tap, state in zip(taps[:-2], said, strict=False):
        torch.testing.assert_close(observed[tap], state)
    torch.testing.assert_close(observed[stack.last], said[-1])
    assert training == {name: m.training for name, m in model.named_modules()}
    method = fit(MinilmMethod(), make(seed=4), model, b)
    assert set(seen(make(seed=4), model, method, b)) == {"queries", "keys", "values"}
    if not plain:
        for refused in (MinilmMethod(1), TinybertMethod(prediction=0)):
            with pytest.raises(ModelError, match="rotary or relative positions"):
                fit(refused, make(seed=4), model, b)
        fit(TinybertMethod(prediction=0, attention=0), make(seed=4), model, b)


def test_values_of_a_fused_layer_are_what_attention_takes_in() -> None:
    torch.manual_seed(0)
    model, b = FAMILIES["modernbert"][0]().eval(), batch()
    part = find_layers("teacher", model, b).attentions([1])[0]
    assert [(p.start, p.stop) for p in (part.queries, part.keys, part.values)] == [(0, 24), (24, 48), (48, 72)]


# Training -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_every_method_trains_and_its_terms_fall(name: str) -> None:
    factory, kind, task = CASES[name]
    student, teacher = models(kind)
    b = batch(task)
    method = fit(factory(), student, teacher, b)
    module = DistillationModule(student, method)
    signal = LiveTeacher(teacher).signal(b, method.needs)
    optimizer = torch.optim.Adam(module.parameters(), lr=5e-3)
    totals: list[float] = []
    first: dict[str, float] = {}
    for _ in range(30):
        terms = module(b, signal)
        means = {n: t.sum / t.count.clamp(min=1) for n, t in terms.items()}
        first = first or {n: float(v.detach()) for n, v in means.items()}
        loss = torch.stack([method.weights[n] * v for n, v in means.items()]).sum()
        totals.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    module.close()
    assert totals[-1] < 0.9 * totals[0]
    pulled = {"ce", "prediction", *(["kd"] if "patient" in name else [])}  # what weighs little beside the others
    assert all(float(v.detach()) < first[n] for n, v in means.items() if n not in pulled)


def train(teacher: nn.Module, loader: list[Batch]) -> None:
    """A teacher must be better than chance."""
    optimizer = torch.optim.Adam(teacher.parameters(), lr=5e-3)
    for b in loader * 10:
        optimizer.zero_grad()
        F.cross_entropy(teacher(**b.inputs).logits.flatten(0, -2), b.labels.flatten()).backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("method", "task", "terms"),
    [
        (TripleMethod(), "mlm", {"mlm", "kd", "cosine"}),
        (TinybertMethod(stage1_fraction=0.5), "texts", {"embedding", "hidden", "attention", "prediction"}),
        (PatientMethod(), "texts", {"kd", "ce", "patient"}),
    ],
    ids=["triple", "tinybert", "patient"],
)  # fmt: skip
def test_distill_takes_every_stage(method: Method, task: str, terms: set[str], tmp_path: Path) -> None:
    kind = BertForMaskedLM if task == "mlm" else BertForSequenceClassification
    student, teacher = models(kind)
    loader = [batch(task, seed=i) for i in range(3)]
    train(teacher, loader)
    run = tutelage.distill(
        teacher, student, loader, eval_data=loader, method=method, epochs=4, lr=5e-3, baseline=False,
        out=tmp_path / "run", verbose=False, train={"log_every": 1},
    )  # fmt: skip
    logged = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert all(f'"{term}"' in logged for term in terms)
    assert type(run.student) is kind
    assert not any("projector" in name for name, _ in run.student.named_parameters())


def test_the_engine_says_before_how_terms_are_weighted_so_one_gradient_serves_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Shares of a micro-batch are not those of the step; terms that are weighted otherwise are projected twice."""
    student, teacher = make(seed=1), make(seed=2)
    loader = [batch(seed=i) for i in range(4)]
    for b in loader[::2]:
        b.labels[0] = -100  # uneven
    train(teacher, loader)
    factors: list[Tensor | None] = []
    common = chunked._common

    def watched(*args: Any) -> Tensor | None:
        factors.append(common(*args))
        return factors[-1]

    monkeypatch.setattr(chunked, "_common", watched)
    tutelage.distill(
        teacher, student, loader, eval_data=loader, method=TripleMethod(cosine=0), epochs=2, baseline=False,
        out=tmp_path / "run", verbose=False, train={"accumulate": 2}
    )  # fmt: skip
    assert len(factors) == 2 * 2 * len(loader)  # epochs, and parts of each batch
    assert all(factor is not None for factor in factors)


# What is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "student", "teacher", "task", "error", "says"),
    [
        (TripleMethod(), BertForMaskedLM, BertModel, "mlm", CapabilityError, "the teacher, BertModel, has no head"),
        (TripleMethod(), BertModel, BertForMaskedLM, "mlm", CapabilityError, "the student(.|\n)*kd: 0 and mlm: 0"),
        (TripleMethod(), BertForMaskedLM, BertForMaskedLM, "texts", CapabilityError, "masked tokens have one each"),
        (MinilmMethod(layer=9), BertModel, BertModel, "plain", ModelError, "layer 9 of a teacher with 2"),
        (MinilmMethod(relation_heads=5), BertModel, BertModel, "plain", ModelError, "give one of 1, 2, 4, 8, 16"),
        (EmbeddingMethod(), BertForMaskedLM, BertForMaskedLM, "plain", ModelError, "one vector for each text"),
    ],
)  # fmt: skip
def test_what_does_not_fit_says_so(
    method: Method, student: Any, teacher: Any, task: str, error: type[Exception], says: str
) -> None:
    b, mine, theirs = batch(task), make(student, 1), make(teacher, 2)
    with pytest.raises(error, match=says):
        seen(mine, theirs, fit(method, mine, theirs, b), b)


def test_vocabularies_and_classes_and_tokens_that_differ_say_so() -> None:
    b, student = batch(), make(seed=1)
    torch.manual_seed(0)
    other = BertForMaskedLM(BertConfig(**{**SIZES, "vocab_size": 44}))
    with pytest.raises(CapabilityError, match="scores 40 tokens, the teacher 44"):
        fit(TripleMethod(), student, other, b)
    shorter = replace(b, teacher_inputs={k: v[:, :5] for k, v in b.inputs.items()})
    for method in (TripleMethod(), TinybertMethod(prediction=0), MinilmMethod(1), MinilmMethod(2)):
        with pytest.raises(CapabilityError, match="reads 9 tokens of a text, the teacher 5"):
            seen(student, make(seed=2), fit(method, student, make(seed=2), shorter), shorter)
    kind, texts = BertForSequenceClassification, batch("texts")
    three, two = make(kind, 1, num_labels=3, layers=2), make(kind, 2, num_labels=2)
    for method in (PatientMethod(), TinybertMethod(stage1_fraction=0)):
        with pytest.raises(CapabilityError, match="score the same classes"):
            seen(three, two, fit(method, three, two, texts), texts)
    images = Batch(torch.randn(2, 1, 8, 8), torch.zeros(2, dtype=torch.long))
    with pytest.raises(CapabilityError, match="tokens of texts"):
        fit(MinilmMethod(), student, student, images)
    with pytest.raises(ModelError, match="no layers are found in the student, Flat"):
        find_layers("student", Flat(), b)


class Flat(nn.Linear):
    """Reads tokens and has no layers."""

    def __init__(self) -> None:
        super().__init__(1, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input_ids.unsqueeze(-1).float())


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        ("triple", {"mlm": -1}, "0 or more"),
        ("triple", {"mlm": 0, "kd": 0, "cosine": 0}, "are all 0"),
        ("triple", {"positions": "some"}, "counted, masked"),
        ("triple", {"temperature": 0}, "above 0"),
        ("tinybert", {"layers": "skip"}, "uniform, last"),
        ("tinybert", {"layers": [0, 2]}, "counted from 1"),
        ("tinybert", {"prediction": 0, "stage1_fraction": 0.5}, "leave it out"),
        ("minilm", {"version": 1, "queries": 1.0}, "version 1 has no such term"),
        ("minilm", {"version": 3}, "allowed: 1, 2"),
        ("patient", {"alpha": 2.0}, r"\[0, 1\]"),
        ("embedding", {"mse": 0, "similarity": 0}, "are all 0"),
    ],
)
def test_options_that_cannot_be_say_so(kind: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        METHODS[kind](**options)


RECIPE: dict[str, Any] = {
    "name": "texts", "data": {"source": "digits"}, "teacher": {"model": "convnet", "train": {}}, "student": "convnet",
}  # fmt: skip


@pytest.mark.parametrize("kind", ["triple", "tinybert", "minilm", "patient", "embedding"])
def test_a_recipe_makes_each_method_with_the_same_defaults(kind: str) -> None:
    section = build_recipe({**RECIPE, "method": {"kind": kind}}).method
    assert isinstance(section, METHOD_KINDS[kind])
    made, plain = METHODS[kind](**section.model_dump(exclude={"kind"})), METHODS[kind]()
    assert made.formula() == plain.formula()
    assert made.weights == plain.weights


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ({"kind": "tinybert", "prediction": 0, "stage1_fraction": 0.5}, "one of its two stages"),
        ({"kind": "tinybert", "layers": "every"}, "uniform"),
        ({"kind": "minilm", "version": 1, "keys": 1}, "version 1 has no term 'keys'"),
        ({"kind": "patient", "alpha": 2}, "give at most 1, or 'hard' too"),
        ({"kind": "triple", "cosin": 1}, "cosine"),
    ],
)
def test_a_recipe_says_at_once_what_is_wrong(method: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build_recipe({**RECIPE, "method": method})
    listed = build_recipe({**RECIPE, "method": {"kind": "tinybert", "layers": [None, 4]}}).method
    assert METHODS["tinybert"](**listed.model_dump(exclude={"kind"})).hidden.layers == [None, 4]
