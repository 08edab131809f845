"""Methods of text encoders: terms are the papers', and padding and special tokens never count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
)

from support.text_method_cases import CASES, LENGTHS, Pooled, batch, fit, make, models, seen
from tutelage import losses
from tutelage.data import Batch
from tutelage.losses import chunked
from tutelage.losses.heads import HeadProjection
from tutelage.methods import (
    DistillationModule,
    EmbeddingMethod,
    LogitMethod,
    Method,
    MinilmMethod,
    PatientMethod,
    TinybertMethod,
    TripleMethod,
    prepare_student,
)
from tutelage.taps import observe
from tutelage.teachers import LiveTeacher


def hf(model: nn.Module, b: Batch) -> Any:
    """All that transformers itself says, with attention computed plainly."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(**b.inputs, output_hidden_states=True, output_attentions=True)
    model.set_attn_implementation(before)
    return found


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


@pytest.mark.parametrize("method", [TinybertMethod(prediction=0, scores="probabilities"), MinilmMethod(version=1)])
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
    for factory in (lambda: TinybertMethod(prediction=0), lambda: MinilmMethod(version=1)):
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
    method = fit(TinybertMethod(layers=[1, None], prediction=0, hidden=0, embedding=0), student, teacher, b)
    evaluated = seen(student, teacher, method, b)["attention"]
    torch.testing.assert_close(seen(student.train(), teacher, method, b)["attention"], evaluated)


def in_chunks(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """Let so many tokens go together."""
    monkeypatch.setattr(chunked, "CHUNK", {"cpu": 0})
    monkeypatch.setattr(chunked, "MIN_TOKENS", tokens)


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
    seen(student, teacher, method, b)  # the first pass compares the head with the logits
    sizes: list[int] = []
    for model in (student, teacher):
        model.cls.predictions.decoder.register_forward_hook(lambda m, a, out: sizes.append(out.shape[-1]))
    seen(student, teacher, method, b)
    assert sizes == [16, 16]  # what goes in comes out


@pytest.mark.parametrize(
    ("method", "never"),
    [
        (lambda: TripleMethod(kd=0), ["SoftTargets"]),
        (lambda: TripleMethod(mlm=0), ["HardTargets"]),
        (lambda: TripleMethod(cosine=0), ["cosine"]),
        (lambda: TinybertMethod(attention=0, prediction=0), ["attention_mse", "soft_cross_entropy"]),
        (lambda: TinybertMethod(embedding=0, hidden=0, prediction=0), ["hint"]),
        (lambda: MinilmMethod(version=1, attention=0), ["attention_kl"]),
        (lambda: MinilmMethod(version=1, values=0), ["value_relation"]),
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
