"""Two models of one tokenizer whose output layers have different numbers of rows: the others are nobody's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import tutelage
from support import language_worlds as worlds
from support.language_methods import causal, passed, ready, recipe, total
from tutelage import losses
from tutelage.cli.doctor_checks import examine
from tutelage.config import build_recipe
from tutelage.data import IGNORE, Batch
from tutelage.evaluation import evaluate, evaluate_teacher
from tutelage.experiment.export_student import export_student
from tutelage.export import open_export, predict
from tutelage.methods import METHODS, prepare_method
from tutelage.students.sampling import sample_completions
from tutelage.taps import Needs, count_tokens, observe
from tutelage.teachers import EnsembleTeacher, LiveTeacher

__all__ = ["recipe"]

WIDTHS = [(8, 40), (40, 8), (0, 24), (24, 0)]
"""Rows of padding of student and teacher."""


def padded(cutter: Any, rows: int, hidden: int = 16, seed: int = 0) -> Any:
    """A model with ``rows`` of padding, whose random weights give the padding as much probability as tokens."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(cutter) + rows, hidden_size=hidden, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=2 * hidden, max_position_embeddings=256, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=cutter.eos_token_id, pad_token_id=None,
    )  # fmt: skip
    found: Any = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        found.lm_head.weight.normal_()
    found.tokenizer = cutter
    return found


@pytest.mark.parametrize(("own", "theirs"), WIDTHS)
@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "js"])
def test_the_loss_is_over_tokens_and_padding_gets_no_gradient(
    own: int, theirs: int, divergence: str, cutter: Any
) -> None:
    student, teacher = padded(cutter, own), padded(cutter, theirs, 32, seed=1)
    _, batch = causal(cutter, worlds.texts(4))
    size = len(cutter)
    method = prepare_method(METHODS["token"](alpha=0.7, temperature=2.0, divergence=divergence), student, teacher,
                            batch, seed=0)  # fmt: skip
    live = LiveTeacher(teacher)
    head = live.signal(batch, method.needs)
    dense = live.signal(batch, Needs())
    assert dense.dense().shape[-1] == size
    for signal in (head, dense):
        student.zero_grad()
        value = total(student, method, batch, signal)
        value.backward()
        assert not bool(student.lm_head.weight.grad[size:].any())
        gradient = student.lm_head.weight.grad[:size].clone()
        student.zero_grad()
        mine = student(**batch.inputs).logits[..., :size]
        with torch.no_grad():
            other = teacher(**batch.inputs).logits[..., :size]
        soft = {"kl": losses.kd, "reverse_kl": losses.reverse_kl, "js": losses.js}[divergence]
        right = 0.7 * soft(mine, other, temperature=2.0, mask=batch.mask)
        right = right + 0.3 * losses.cross_entropy(mine, batch.labels, mask=batch.mask)
        right.backward()
        torch.testing.assert_close(value, right, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient, student.lm_head.weight.grad[:size], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("own", "theirs"), WIDTHS)
def test_figures_are_over_tokens(own: int, theirs: int, cutter: Any) -> None:
    student, teacher = padded(cutter, own), LiveTeacher(padded(cutter, theirs, 32, seed=1))
    _, batch = causal(cutter, worlds.texts(4))
    device = torch.device("cpu")
    outputs = [teacher.signal(batch, Needs()).dense()]
    found = evaluate(student, [batch], device, outputs)
    with torch.no_grad():
        mine, other = (m(**batch.inputs).logits[..., : len(cutter)] for m in (student, teacher.model))
    assert found["loss"] == pytest.approx(float(losses.cross_entropy(mine, batch.labels)), rel=1e-5)
    where = batch.labels != IGNORE
    assert found["kl"] == pytest.approx(float(losses.kd(mine[where], other[where], temperature=1.0)), rel=1e-4)
    assert evaluate_teacher(teacher, [batch], device)["loss"] == pytest.approx(
        float(losses.cross_entropy(other, batch.labels)), rel=1e-5
    )
    both = EnsembleTeacher([teacher, LiveTeacher(padded(cutter, own, seed=2))])
    assert both.signal(batch, Needs()).dense().shape[-1] == len(cutter)
    assert both.model(**batch.inputs).shape[-1] == len(cutter)


@pytest.mark.parametrize("mix", [0.0, 0.4])
@pytest.mark.parametrize(("own", "theirs"), [(40, 8), (8, 40)])
def test_samples_are_tokens_with_the_probabilities_of_tokens(own: int, theirs: int, mix: float, cutter: Any) -> None:
    student, teacher = padded(cutter, own), padded(cutter, theirs, 32, seed=1)
    prompt = torch.arange(5, 12)
    torch.manual_seed(0)
    mixture = (teacher, mix) if mix else None
    draws = sample_completions(student, [prompt] * 20_000, max_new_tokens=1, mixture=mixture)
    found = torch.bincount(torch.stack([one.ids[-1] for one in draws]), minlength=len(cutter) + own)
    size = len(cutter)
    assert int(found[size:].sum()) == 0
    with torch.no_grad():
        p, q = (m.eval()(prompt[None]).logits[0, -1, :size].softmax(-1) for m in (student, teacher))
    right = (1 - mix) * p + mix * q
    assert float((found[:size] / found.sum() - right).abs().sum()) / 2 < 0.05
    greedy = sample_completions(student, [prompt], max_new_tokens=8, temperature=0)
    assert int(greedy[0].ids.max()) < size


@pytest.mark.parametrize(("own", "theirs"), [(40, 8), (8, 40)])
def test_on_policy_and_across_tokenizers(own: int, theirs: int, cutter: Any) -> None:
    student, teacher = padded(cutter, own), padded(cutter, theirs, 32, seed=1)
    _, batch = causal(cutter, worlds.texts(4))
    method = ready(student, teacher, batch, mix=0.3, long=0.5, divergence="reverse_kl", temperature=1.0)
    sampled = method.prepare_batch(student, batch)
    assert int(sampled.inputs["input_ids"].max()) < len(cutter)  # type: ignore[call-overload]
    terms = passed(student, method, sampled, LiveTeacher(teacher).signal(sampled, method.needs))
    assert all(bool(torch.isfinite(term.sum)) for term in terms.values())
    across = prepare_method(METHODS["cross-tokenizer"](alpha=1.0), student, teacher, batch, seed=0)
    plain = prepare_method(METHODS["token"](alpha=1.0), student, teacher, batch, seed=0)
    signal = LiveTeacher(teacher).signal(batch, plain.needs)
    same = [total(student, each, batch, signal) for each in (across, plain)]
    torch.testing.assert_close(same[0], same[1])
    sorted_ = prepare_method(METHODS["cross-tokenizer"](alpha=1.0, compare="uld"), student, teacher, batch, seed=0)
    mine, other = (m(**batch.inputs).logits[..., : len(cutter)] for m in (student, teacher))
    torch.testing.assert_close(
        total(student, sorted_, batch, signal), losses.uld(mine, other, mask=batch.mask), rtol=1e-4, atol=1e-6
    )


def test_a_masked_language_model_and_the_triple_loss() -> None:
    import transformers

    cutter = worlds.tokenizer()
    cutter.mask_token = "<s>"

    def bert(rows: int, hidden: int) -> Any:
        torch.manual_seed(hidden)
        config = transformers.BertConfig(
            vocab_size=len(cutter) + rows, hidden_size=hidden, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=16, max_position_embeddings=32,
        )  # fmt: skip
        found: Any = transformers.BertForMaskedLM(config).eval()
        found.tokenizer = cutter
        return found

    student, teacher = bert(8, 16), bert(24, 32)
    ids = torch.arange(24).view(2, 12)
    batch = Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids.clone())
    method = prepare_method(METHODS["triple"](cosine=0.0, mlm=0.0, kd=1.0, temperature=2.0), student, teacher, batch,
                            seed=0)  # fmt: skip
    value = total(student.eval(), method, batch, LiveTeacher(teacher).signal(batch, method.needs))
    mine, other = (observe(m, batch.inputs, Needs()).logits for m in (student, teacher))
    assert mine is not None
    assert other is not None
    assert mine.shape[-1] == len(cutter)
    torch.testing.assert_close(value, F.kl_div(
        (mine / 2).log_softmax(-1), (other / 2).log_softmax(-1), reduction="sum", log_target=True
    ) * 4 / 24, rtol=1e-4, atol=1e-5)  # fmt: skip


@pytest.mark.parametrize("wider", ["student", "teacher"])
@pytest.mark.parametrize("change", [
    {}, {"kind": "on-policy", "max_new_tokens": 4, "mix": 0.2}, {"kind": "cross-tokenizer"},
    {"cache": {"keep": "dense"}}, {"cache": {"keep": "topk", "k": 8}}, {"cache": {"keep": "hidden"}},
], ids=["live", "on-policy", "cross-tokenizer", "dense", "topk", "hidden"])  # fmt: skip
def test_recipes_run_whichever_is_wider(
    change: dict[str, Any], wider: str, recipe: dict[str, Any], tmp_path: Path, cutter: Any
) -> None:
    for who in ("student", "teacher"):
        worlds.llama(tmp_path / who, cutter=cutter, vocabulary=len(cutter) + (40 if who == wider else 8))
        recipe[who] = {"model": f"hf:{tmp_path / who}"}
    recipe["data"]["pack"] = False
    recipe["train"]["steps"] = 2
    method = {k: v for k, v in change.items() if k != "cache"}
    recipe["method"] = {"kind": "token", "temperature": 1.0, **method}
    recipe["teacher"] |= {k: v for k, v in change.items() if k == "cache"}
    recipe["samples"] = {"generations": 2, "max_new_tokens": 4}
    recipe["baseline"] = False
    bad = [finding.text for finding in examine(build_recipe(recipe)) if finding.level == "bad"]
    assert bad == []
    found = tutelage.run(build_recipe(recipe), out=tmp_path / "run")
    assert found.summary["teacher"]["perplexity"] > 1
    assert 0 <= found.summary["students"]["distilled"]["best"]["agreement"]["mean"] <= 1


def test_an_export_scores_tokens_alone(recipe: dict[str, Any], tmp_path: Path, cutter: Any) -> None:
    recipe["train"]["steps"] = 1
    recipe["baseline"] = False
    tutelage.run(build_recipe(recipe), out=tmp_path / "run")
    for to in ("onnx", "hf"):
        export = export_student(tmp_path / "run", to)
        assert export.manifest["check"]
        assert next(iter(predict(export.path, ["Ann has"], tokens=3)))["text"] is not None

    opened = open_export(tmp_path / "run" / "export" / "onnx")
    ids = torch.arange(12).view(2, 6)
    assert opened.run({"input_ids": ids, "attention_mask": torch.ones_like(ids)}).shape[-1] == len(cutter)


def test_a_tokenizer_that_grows_is_read_again(cutter: Any) -> None:
    import copy

    model = padded(cutter, 8)
    model.tokenizer = copy.deepcopy(cutter)
    assert count_tokens(model) == len(cutter)
    model.tokenizer.add_tokens(["<new>"])
    assert count_tokens(model) == len(cutter) + 1
    del model.tokenizer
    assert count_tokens(model) is None
