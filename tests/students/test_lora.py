"""Students of which low-rank adapters learn, on whole and on 4-bit weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tutelage
from support import language_worlds as worlds
from support.expert_models import FAMILIES, family
from support.language_methods import causal, model, recipe, total
from tutelage import losses
from tutelage.config import build_recipe
from tutelage.errors import ConfigError
from tutelage.evaluation import evaluate
from tutelage.methods import METHODS, prepare_method
from tutelage.models import load_model
from tutelage.students import add_lora, describe_adapters, has_adapters, merge_lora
from tutelage.students.lora import NF4Linear
from tutelage.taps import Needs
from tutelage.teachers import LiveTeacher

__all__ = ["recipe"]


IDS = torch.arange(40).view(2, 20)


def test_adapters_start_as_the_model_learn_alone_and_merge_into_a_plain_one(folder: Path) -> None:
    plain, student = model(folder), add_lora(model(folder), rank=4)
    assert type(student) is type(plain)
    assert torch.equal(student(IDS).logits, plain(IDS).logits)
    learn = {n for n, p in student.named_parameters() if p.requires_grad}
    assert learn
    assert all("lora_" in n for n in learn)
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # B is zero at first, and A gets no gradient
        student(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    taught = student(IDS).logits.detach()
    assert not torch.allclose(taught, plain(IDS).logits)
    assert has_adapters(student)
    found = merge_lora(student)
    assert not has_adapters(found)
    assert found.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(found(IDS).logits, taught, atol=1e-5, rtol=1e-4)  # type: ignore[operator]
    assert all(p.requires_grad for p in found.parameters())


def test_the_same_seed_gives_the_same_adapters(folder: Path) -> None:
    first, again, other = (add_lora(model(folder), seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(v, again[k]) for k, v in first.items())
    assert any(not torch.equal(v, other[k]) for k, v in first.items())


def test_targets_are_ends_of_paths_and_others_are_refused(folder: Path) -> None:
    student = add_lora(model(folder), targets=["q_proj", "model.layers.1.mlp.up_proj"])
    learn = {n.partition(".lora_")[0] for n, p in student.named_parameters() if p.requires_grad}
    assert learn == {f"model.layers.{i}.self_attn.q_proj" for i in range(4)} | {"model.layers.1.mlp.up_proj"}
    with pytest.raises(ConfigError, match=r"(?s)called 'query'.*q_proj"):
        add_lora(model(folder), targets=["query"])
    with pytest.raises(ConfigError, match="called 'head'"):
        add_lora(model(folder), targets=["head"])
    with pytest.raises(ConfigError, match="adapter of the output head, 'lm_head'"):
        add_lora(model(folder), targets=["lm_head"], dropout=0.1)


@pytest.mark.parametrize("bits", [None, 4])
def test_the_head_learns_by_its_adapter_without_the_scores(bits: Any, cutter: Any, tmp_path: Path) -> None:
    folder = worlds.llama(tmp_path / "wide", hidden=64, cutter=cutter)
    _, batch = causal(cutter, worlds.texts(4))
    teacher, student = model(folder, 2), add_lora(model(folder), rank=4, bits=bits, targets=["v_proj", "lm_head"])
    embedded = student.get_input_embeddings().weight.clone()  # type: ignore[operator]
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    method = prepare_method(METHODS["token"](alpha=0.8, temperature=2.0), student, teacher, batch, seed=0)
    assert method.student_needs == Needs(logits=False, head=True)
    said = LiveTeacher(teacher).signal(batch, method.needs)
    gradients = []
    for chunked in (True, False):
        student.zero_grad()
        if chunked:
            loss = total(student, method, batch, said)
        else:
            dense, theirs = student(**batch.inputs).logits, teacher(**batch.inputs).logits
            loss = 0.8 * losses.kd(dense, theirs, temperature=2.0, mask=batch.mask)
            loss = loss + 0.2 * losses.cross_entropy(dense, batch.labels, mask=batch.mask)
        loss.backward()
        gradients.append({n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None})
    assert any("lm_head.lora_A" in name for name in gradients[0])
    assert gradients[0].keys() == gradients[1].keys()
    assert all("lora_" in name for name in gradients[0])
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-3, atol=1e-6, msg=name)
    found = evaluate(student, [batch], torch.device("cpu"))
    with torch.no_grad():
        right = losses.cross_entropy(student(**batch.inputs).logits, batch.labels)
    assert found["loss"] == pytest.approx(float(right), rel=1e-4)
    before = student(IDS).logits.detach()
    plain = merge_lora(student)
    torch.testing.assert_close(plain(IDS).logits, before, atol=1e-4, rtol=1e-3)  # type: ignore[operator]
    assert torch.equal(plain.get_input_embeddings().weight, embedded)  # type: ignore[operator]


def test_a_recipe_with_an_adapter_of_a_tied_head_exports_it_untied(recipe: dict[str, Any], tmp_path: Path) -> None:
    import transformers

    recipe["student"] = {"model": recipe["teacher"]["model"], "lora": {"rank": 4, "targets": ["q_proj", "lm_head"]}}
    tutelage.run(build_recipe(recipe), out=tmp_path / "run")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student")
    assert not torch.equal(plain.lm_head.weight, plain.get_input_embeddings().weight)
    assert torch.equal(
        plain.get_input_embeddings().weight,
        model(Path(recipe["teacher"]["model"].removeprefix("hf:"))).get_input_embeddings().weight,
    )
    torch.testing.assert_close(load_model(tmp_path / "run" / "student")(IDS).logits, plain.eval()(IDS).logits)


def test_four_bits_are_near_the_weights_and_merge_into_what_was_trained(tmp_path: Path) -> None:
    folder = worlds.llama(tmp_path / "wide", hidden=64)
    plain, student = model(folder), add_lora(model(folder), rank=4, bits=4)
    parts = [m for m in student.modules() if isinstance(m, NF4Linear)]
    assert len(parts) == 4 * 7
    kept = sum(m.packed.numel() + 4 * m.absmax.numel() for m in parts)
    whole = sum(4 * m.in_features * m.out_features for m in parts)
    assert kept < 0.15 * whole
    assert not any("packed" in k or "base_layer" in k for k in student.state_dict())
    near = student(IDS).logits - plain(IDS).logits
    assert 0 < float(near.detach().norm() / plain(IDS).logits.detach().norm()) < 0.3
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        student(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    taught = student(IDS).logits.detach()
    torch.testing.assert_close(merge_lora(student)(IDS).logits, taught, atol=1e-4, rtol=1e-3)  # type: ignore[operator]


@pytest.mark.parametrize("bits", [None, 4])
def test_a_recipe_with_adapters_exports_a_plain_model_and_resumes(
    bits: int | None, recipe: dict[str, Any], tmp_path: Path
) -> None:
    import transformers

    recipe["student"] = {"model": recipe["teacher"]["model"], "lora": {"rank": 4, "bits": bits}}
    recipe["train"]["checkpoint_every"] = 2
    found = tutelage.run(build_recipe(recipe), out=tmp_path / "run")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student")
    start = model(Path(recipe["teacher"]["model"].removeprefix("hf:")))
    assert found.summary["parameters"]["student"] == sum(p.numel() for p in start.parameters())
    moved = {k for k, v in plain.state_dict().items() if not torch.equal(v, start.state_dict()[k])}
    assert moved
    assert not any("embed" in k or "norm" in k for k in moved)
    again = load_model(tmp_path / "run" / "student")
    torch.testing.assert_close(again(IDS).logits, plain.eval()(IDS).logits)


@pytest.mark.parametrize(("name", "options"), FAMILIES, ids=[name for name, _ in FAMILIES])
def test_adapters_are_on_linear_layers_alone_and_merge_where_experts_are_one_tensor(
    name: str, options: dict[str, Any]
) -> None:
    plain, student = family(name, **options), add_lora(family(name, **options), rank=4)
    assert torch.equal(student(IDS).logits, plain(IDS).logits)
    linear = {path for path, m in plain.named_modules() if isinstance(m, torch.nn.Linear) and path != "lm_head"}
    assert {n.partition(".lora_")[0] for n, p in student.named_parameters() if p.requires_grad} == linear
    with torch.no_grad():
        for n, p in student.named_parameters():
            if "lora_B" in n:
                p.normal_(std=0.1)
    learned = student(IDS).logits.detach()
    assert ("gate_up_proj hold all experts" in describe_adapters(student)) == (name != "Llama")
    merged = merge_lora(student)
    assert merged.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(merged(IDS).logits, learned, atol=1e-4, rtol=1e-3)  # type: ignore[operator]
    if name != "Llama":
        experts = [n for n, _ in plain.named_parameters() if "experts" in n and "shared" not in n]
        assert all(torch.equal(merged.get_parameter(n), plain.get_parameter(n)) for n in experts)
        with pytest.raises(ConfigError, match=r"(?s)called 'experts'.*gate_up_proj hold all experts in one tensor"):
            add_lora(family(name, **options), targets=["experts"])


def test_a_model_without_a_linear_layer_to_adapt_is_refused_in_a_sentence() -> None:
    import transformers

    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, bos_token_id=0, eos_token_id=0)
    with pytest.raises(ConfigError, match="GPT2LMHeadModel has no linear layer except its output head"):
        add_lora(transformers.GPT2LMHeadModel(config))


def test_the_output_layer_of_an_attention_that_reads_its_weight_gets_no_adapter() -> None:
    student = add_lora(torch.nn.TransformerEncoderLayer(16, 2, 32), rank=2)
    adapted = {n.partition(".lora_")[0] for n, p in student.named_parameters() if p.requires_grad}
    assert adapted == {"linear1", "linear2"}
