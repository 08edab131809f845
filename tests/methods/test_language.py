"""Causal language models: which tokens count, packing, the heads of families, methods, and a run from a recipe."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import tutelage
from support import language_worlds as worlds
from support.language_methods import TURNS, causal, gradients, model, recipe, total
from tutelage import losses
from tutelage.config import build_recipe, load_recipe
from tutelage.data import IGNORE, load_texts
from tutelage.data.chat import encode_learned
from tutelage.data.tokens import tokenize
from tutelage.engine.loop import enable_gradient_checkpointing
from tutelage.errors import CacheError, CapabilityError, DataError
from tutelage.evaluation import evaluate
from tutelage.methods import METHODS, prepare_method
from tutelage.methods.token import check_packed_rows_are_separate
from tutelage.models.pretrained import _strip_gguf as whole_of
from tutelage.taps import Needs, observe
from tutelage.teachers import LiveTeacher
from tutelage.teachers.signal import Signal, Sparse

MARKED = {
    "chatml": "<|im_start|>user\nHi  there<|im_end|>\n<|im_start|>assistant\n{Hello!<|im_end|>}\n"
    "<|im_start|>user\n1 and 2?<|im_end|>\n<|im_start|>assistant\n{It is 3.<|im_end|>}\n",
    "llama": "<|begin|><|head|>user<|/head|>\n\nHi  there<|eot|><|head|>assistant<|/head|>\n\n{Hello!<|eot|>}"
    "<|head|>user<|/head|>\n\n1 and 2?<|eot|><|head|>assistant<|/head|>\n\n{It is 3.<|eot|>}",
    "mistral": "<s>[INST] Hi  there [/INST]{ Hello!</s>}[INST] 1 and 2? [/INST]{ It is 3.</s>}",
    "gemma": "<bos><turn>user\nHi  there<end>\n<turn>model\n{Hello!<end>}\n"
    "<turn>user\n1 and 2?<end>\n<turn>model\n{It is 3.<end>}\n",
}
"""What is learned of these turns, between braces, marked by hand."""

__all__ = ["recipe"]


@pytest.mark.parametrize("family", sorted(MARKED))
def test_the_answers_are_those_that_a_person_marks(family: str) -> None:
    cutter = worlds.tokenizer(family)
    ids, learned = encode_learned(TURNS, cutter)
    assert cutter.decode(ids) == MARKED[family].replace("{", "").replace("}", "")
    shown, inside = "", False
    for token, counts in zip(ids, learned, strict=True):
        shown += ("{" if counts and not inside else "}" if inside and not counts else "") + cutter.decode([token])
        inside = counts
    assert shown + "}" * inside == MARKED[family]


def test_a_template_that_marks_its_answers_itself_is_believed() -> None:
    cutter = worlds.tokenizer(None)
    cutter.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    ids, learned = encode_learned(TURNS, cutter)
    answers = [token for token, counts in zip(ids, learned, strict=True) if counts]
    assert cutter.decode(answers) == "Hello!It is 3."


def test_a_template_that_rewrites_what_was_said_before_is_refused() -> None:
    cutter = worlds.tokenizer(None)
    cutter.chat_template = "{{ messages|length }}: {% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(DataError, match=r"(?s)renders the first messages of a conversation differently.*generation"):
        encode_learned(TURNS, cutter)
    ids, learned = encode_learned(TURNS, cutter, "all")
    assert all(learned)
    assert cutter.decode(ids) == "4: Hi  thereHello!1 and 2?It is 3."


def test_a_text_is_learned_whole_and_to_its_end(cutter: Any) -> None:
    ids, learned = encode_learned("Ann has 3", cutter)
    assert cutter.decode(ids) == "Ann has 3<|im_end|>"
    assert all(learned)


def test_padding_is_known_by_its_place_though_it_is_the_end_of_sequence_token(cutter: Any) -> None:
    assert cutter.pad_token_id == cutter.eos_token_id
    _, batch = causal(cutter, ["Ann has 3 plums.", "Ben"])
    assert isinstance(batch.inputs, dict)
    lengths = batch.inputs["attention_mask"].sum(1)
    for row, length in enumerate(lengths):
        ids = batch.inputs["input_ids"][row]
        assert batch.labels[row, : length - 1].tolist() == ids[1:length].tolist()
        assert batch.labels[row, length - 2] == cutter.eos_token_id  # the end is learned
        assert bool((batch.labels[row, length - 1 :] == IGNORE).all())  # and nothing from it or the padding


def test_a_prompt_longer_than_a_row_leaves_nothing_to_learn_and_harms_nothing(cutter: Any, folder: Path) -> None:
    rows = [[{"role": "user", "content": "x" * 200}, {"role": "assistant", "content": "Yes."}], TURNS]
    _, batch = causal(cutter, rows, max_length=96)
    assert not bool(batch.mask[0].any())  # type: ignore[index]
    _, alone = causal(cutter, [TURNS], max_length=96)
    student = model(folder, 2)
    assert torch.allclose(*(total(student, METHODS["sequence"](), b, None) for b in (batch, alone)), rtol=1e-5)


def test_two_columns_are_a_prompt_and_its_answer(cutter: Any) -> None:
    tokens = tokenize([["1 and 2?"], ["It is 3."]], cutter, max_length=64, learn="answers")
    ids, _ = encode_learned(TURNS[2:], cutter)
    assert tokens.ids.tolist() == ids


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([{"role": "user", "text": "x"}], "give each message a role"),
        ([{"role": "user", "content": "x"}], "has no answer"),
    ],
)
def test_what_is_no_conversation_is_refused(cutter: Any, value: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        tokenize([[value]], cutter, max_length=64, learn="answers")


def test_conversations_need_a_chat_template() -> None:
    with pytest.raises(DataError, match="no chat template"):
        encode_learned(TURNS, worlds.tokenizer(None))


def test_the_gradient_is_the_same_for_any_packing_padding_and_splitting(cutter: Any, folder: Path) -> None:
    rows = [*worlds.texts(5), *(r["messages"] for r in worlds.conversations(4))]
    teacher, student = model(folder), model(folder, 2)
    _, apart = causal(cutter, rows, max_length=128)
    _, packed = causal(cutter, rows, max_length=128, pack=True)
    assert isinstance(packed.inputs, dict)
    assert len(packed) < len(apart)
    assert "attention_mask" not in packed.inputs
    method = prepare_method(METHODS["token"](hidden=0.5, layers="last"), student, teacher, packed.rows(0, 2), seed=0)
    assert int(method.counts(packed)["soft"]) == int(method.counts(apart)["soft"])
    expected = gradients(student, teacher, method, [apart])
    wider = replace(
        apart, labels=F.pad(apart.labels, (0, 7), value=IGNORE), mask=F.pad(apart.mask, (0, 7)),  # type: ignore[arg-type]
        inputs={k: F.pad(v, (0, 7)) for k, v in apart.inputs.items()},  # type: ignore[union-attr]
    )  # fmt: skip
    for batches in ([packed], packed.split(2), apart.split(3), [wider], [packed.rows(0, 1), packed.rows(1, 9)]):
        found = gradients(student, teacher, method, batches)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=2e-6, rtol=1e-3, msg=name)


def test_packing_keeps_every_text_whole_and_wastes_little(cutter: Any) -> None:
    rows = worlds.texts(60)
    tokens = tokenize([rows], cutter, max_length=100, pack=True, learn="answers")
    assert tokens.segments is not None
    assert int(tokens.lengths.max()) <= 100
    assert int(tokens.lengths.sum()) / (100 * len(tokens)) > 0.85
    found = []
    for row in range(len(tokens)):
        ids, numbers = tokens.row(tokens.ids, row), tokens.row(tokens.segments, row)
        found += [cutter.decode(ids[numbers == i][:-1]) for i in range(int(numbers.max()) + 1)]
    assert sorted(found) == sorted(rows)


def test_a_text_longer_than_a_row_is_cut_into_pieces_where_rows_are_packed(cutter: Any) -> None:
    (text,) = [" ".join(worlds.texts(20))]
    tokens = tokenize([[text]], cutter, max_length=50, pack=True, learn="answers")
    assert cutter.decode([t for row in range(len(tokens)) for t in tokens.row(tokens.ids, row)][:-1]) == text
    assert len(tokenize([[text]], cutter, max_length=50, learn="answers").ids) == 50


def test_a_model_in_which_packed_texts_see_each_other_is_refused(cutter: Any, folder: Path) -> None:
    _, packed = causal(cutter, worlds.texts(6), max_length=128, pack=True)
    blind = model(folder)
    check_packed_rows_are_separate("student", blind, packed)
    plain = blind.model.forward
    blind.model.forward = lambda *a, position_ids=None, **k: plain(*a, **k)  # as a model without positions
    with pytest.raises(CapabilityError, match="the texts of a packed row attend to each other"):
        check_packed_rows_are_separate("student", blind, packed)


@pytest.mark.parametrize("kind", ["Gemma2", "Cohere", "Granite", "Llama", "GPT2", "Qwen3", "Mistral"])
def test_scores_from_the_head_are_the_models_own_in_every_family(kind: str, cutter: Any) -> None:
    import transformers

    sizes = {
        "vocab_size": len(cutter), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 64, "head_dim": 8, "pad_token_id": None,
    }  # fmt: skip
    if kind == "GPT2":
        sizes = {
            "vocab_size": len(cutter), "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": None,
            "eos_token_id": None,
        }  # fmt: skip
    more = {"Granite": {"logits_scaling": 7.0}, "Gemma2": {"final_logit_softcapping": 0.05}}.get(kind, {})
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes, **more)
    name = {"GPT2": "GPT2LMHeadModel"}.get(kind, f"{kind}ForCausalLM")
    made = getattr(transformers, name)(config).eval()
    ids = torch.randint(0, len(cutter), (2, 12))
    with torch.no_grad():
        logits = made(input_ids=ids).logits
        head = observe(made, {"input_ids": ids}, Needs(logits=False, head=True)).head
    assert head is not None
    flat = head._replace(inputs=head.inputs.flatten(0, 1))
    torch.testing.assert_close(flat.scores(slice(None)), logits.flatten(0, 1), atol=1e-6, rtol=1e-5)


def recurrent_gemma(cutter: Any, seed: int) -> Any:
    """A model whose config calls the cap of its logits by a name of its own; the cap changes its logits."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.RecurrentGemmaConfig(
        vocab_size=len(cutter), hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=1,
        intermediate_size=48, lru_width=32, logits_soft_cap=0.05, attention_window_size=16, pad_token_id=None,
    )  # fmt: skip
    return transformers.RecurrentGemmaForCausalLM(config).eval()


def test_a_head_with_a_cap_of_unknown_name_takes_the_path_of_dense_logits(cutter: Any) -> None:
    _, batch = causal(cutter, worlds.texts(4))
    batch = replace(batch, inputs={k: x for k, x in batch.inputs.items() if k != "position_ids"})
    student, teacher = recurrent_gemma(cutter, 0), recurrent_gemma(cutter, 1)
    head = observe(student, batch.inputs, Needs(logits=False, head=True)).head
    assert head is not None
    assert head.is_dense
    logits = student(**batch.inputs, use_cache=False).logits
    assert torch.equal(head.inputs, logits)
    method = prepare_method(METHODS["token"](alpha=0.7, temperature=2.0), student, teacher, batch, seed=0)
    signal = LiveTeacher(teacher).signal(batch, method.needs)
    found = total(student, method, batch, signal)
    theirs = teacher(**batch.inputs, use_cache=False).logits.detach()
    ce = F.cross_entropy(logits[batch.mask], batch.labels[batch.mask])
    expected = 0.7 * losses.kd(logits[batch.mask], theirs[batch.mask], temperature=2.0) + 0.3 * ce
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    weights = [p for p in student.parameters() if p.requires_grad]
    ours = torch.autograd.grad(found, weights, allow_unused=True)
    for got, want in zip(ours, torch.autograd.grad(expected, weights, allow_unused=True), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    scored = evaluate(student, [batch], torch.device("cpu"))
    assert scored["loss"] == pytest.approx(float(ce.detach()), rel=1e-5)


def test_a_run_says_that_it_takes_dense_logits_and_a_cache_of_head_inputs_is_refused(
    recipe: dict[str, Any], cutter: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recurrent_gemma(cutter, 1).save_pretrained(tmp_path / "capped")
    cutter.save_pretrained(tmp_path / "capped")
    recipe["teacher"] = {"model": f"hf:{tmp_path / 'capped'}"}
    recipe["student"] = {"model": f"hf:{worlds.llama(tmp_path / 'small', layers=2, cutter=cutter)}"}
    recipe |= {"method": {"kind": "token"}, "baseline": False}
    recipe["data"] |= {"pack": False}
    recipe["train"] |= {"steps": 2, "batch_size": 8}
    kept = {**recipe, "teacher": {**recipe["teacher"], "cache": {"keep": "hidden"}}}
    with pytest.raises(CapabilityError, match="logits of the teacher, a RecurrentGemmaForCausalLM, are not"):
        tutelage.run(build_recipe(kept), out=tmp_path / "kept")
    tutelage.run(build_recipe(recipe), out=tmp_path / "run")
    assert "note: the teacher's logits are not just its output layer" in " ".join(capsys.readouterr().err.split())


def test_a_number_for_each_token_that_is_added_to_the_scores_takes_the_path_of_dense_logits() -> None:
    import transformers

    bart = transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32,
        )
    ).eval()  # fmt: skip
    ids = torch.arange(4, 16).view(2, 6)
    inputs = {"input_ids": ids, "decoder_input_ids": ids}
    head = observe(bart, inputs, Needs(logits=False, head=True)).head
    assert head is not None
    assert head.is_dense
    torch.testing.assert_close(head.inputs, bart(**inputs).logits)


@pytest.mark.parametrize("change", ["bias", "scale", "trained bias"])
def test_a_bias_or_scale_behind_the_head_is_seen(change: str, cutter: Any, folder: Path) -> None:
    class Shifted(type(model(folder))):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * self.factor + self.shift
            return output

    shifted = model(folder)
    shifted.__class__ = Shifted
    shifted.factor = 1.01 if change == "scale" else 1.0
    shifted.shift = 1e-3 if change == "bias" else 0.0
    if change == "trained bias":
        shifted.shift = torch.nn.Parameter(torch.zeros(shifted.config.vocab_size))
    ids = torch.arange(12).view(2, 6)
    for one, dense in ((shifted, True), (model(folder), False)):
        head = observe(one, {"input_ids": ids}, Needs(logits=False, head=True)).head
        assert head is not None
        assert head.is_dense == dense


def test_evaluation_token_by_token_equals_that_of_all_scores(cutter: Any, folder: Path) -> None:
    _, batch = causal(cutter, [r["messages"] for r in worlds.conversations(6)])
    student = model(folder)
    found = evaluate(student, [batch], torch.device("cpu"))
    with torch.no_grad():
        logits = student(**batch.inputs).logits[batch.mask]
    labels = batch.labels[batch.mask]
    assert found["n"] == len(labels)
    assert found["loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)
    assert found["accuracy"] == pytest.approx(float((logits.argmax(-1) == labels).float().mean()))


@pytest.mark.parametrize(
    ("options", "dense"),
    [
        ({"divergence": "kl", "temperature": 2.0}, lambda s, t: losses.kd(s, t, temperature=2.0)),
        ({"divergence": "reverse_kl"}, losses.reverse_kl),
        ({"divergence": "js", "beta": 0.3}, lambda s, t: losses.js(s, t, beta=0.3)),
        ({"divergence": "skew_kl", "skew": 0.2, "reverse": True},
         lambda s, t: losses.skew_kl(s, t, alpha=0.2, reverse=True)),
        ({"divergence": "tvd"}, losses.tvd),
    ],
)  # fmt: skip
def test_the_soft_term_is_the_dense_objective_over_tokens_that_count(
    options: dict[str, Any], dense: Any, cutter: Any, folder: Path
) -> None:
    _, batch = causal(cutter, [r["messages"] for r in worlds.conversations(5)])
    teacher, student = model(folder), model(folder, 2)
    method = prepare_method(METHODS["token"](alpha=0.7, **options), student, teacher, batch, seed=0)
    signal = LiveTeacher(teacher).signal(batch, method.needs)
    found = total(student, method, batch, signal)
    mine, theirs = student(**batch.inputs).logits, teacher(**batch.inputs).logits.detach()
    ce = F.cross_entropy(mine[batch.mask], batch.labels[batch.mask])
    expected = 0.7 * dense(mine[batch.mask], theirs[batch.mask]) + 0.3 * ce
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_teacher_may_give_logits_or_a_part_of_its_distribution(cutter: Any, folder: Path) -> None:
    _, batch = causal(cutter, worlds.texts(4))
    teacher, student = model(folder), model(folder, 2)
    method = prepare_method(METHODS["token"](alpha=1.0), student, teacher, batch, seed=0)
    with torch.no_grad():
        logits = teacher(**batch.inputs).logits
    exact = total(student, method, batch, LiveTeacher(teacher).signal(batch, method.needs))
    torch.testing.assert_close(total(student, method, batch, Signal(logits)), exact)
    every = logits.log_softmax(-1)
    whole = torch.arange(logits.shape[-1]).expand_as(every)
    parts = Signal(sparse=Sparse("topk", whole, every, logits.shape[-1], 1.0))
    torch.testing.assert_close(total(student, method, batch, parts), exact)
    with pytest.raises(CapabilityError, match="for T = 2, the loss has T = 1"):
        total(student, method, batch, Signal(sparse=Sparse("topk", whole, every, logits.shape[-1], 2.0)))


def test_vocabularies_that_differ_are_refused_before_step_0(cutter: Any, folder: Path, tmp_path: Path) -> None:
    _, batch = causal(cutter, worlds.texts(4))
    other = model(worlds.llama(tmp_path / "other", cutter=worlds.tokenizer(merges=30)))
    method = prepare_method(METHODS["token"](), other, model(folder), batch, seed=0)
    ids = batch.inputs["input_ids"].clamp(max=290)  # type: ignore[index, call-overload]
    batch = replace(batch, inputs={**batch.inputs, "input_ids": ids})  # type: ignore[dict-item]
    with pytest.raises(CapabilityError, match="vocabular"):
        total(other, method, batch, LiveTeacher(model(folder)).signal(batch, method.needs))


def test_a_language_model_is_halved_by_a_recipe_and_loads_anywhere(recipe: dict[str, Any], tmp_path: Path) -> None:
    import transformers

    found = tutelage.run(build_recipe(recipe), out=tmp_path / "run")
    students = found.summary["students"]
    assert set(students) == {"baseline", "distilled"}
    assert students["distilled"]["last"]["perplexity"]["mean"] > 1
    assert "kl" in students["distilled"]["last"]
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student")
    assert len(plain.model.layers) == 2
    cutter = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "student")
    prompt = cutter.apply_chat_template(TURNS[:1], add_generation_prompt=True, return_tensors="pt")
    assert plain.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1] > prompt["input_ids"].shape[1]


def test_texts_of_a_column_load_with_ids_and_no_labels(tmp_path: Path, cutter: Any) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in worlds.texts(30)), encoding="utf-8")
    data = load_texts("table", tokenizer=cutter, path=str(path), task="causal")
    assert len(data.train) + len(data.validation) + len(data.test) == 30
    batch = data.train.fetch(torch.arange(3))
    assert batch.labels.shape == batch.inputs["input_ids"].shape  # type: ignore[index, call-overload]
    assert data.settings["learn"] == "answers"


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["smollm2-half", "smollm2-half-cached", "smollm2-half-on-policy", "llama-8b-to-1b"])
def test_shipped_recipes_of_language_models_run_in_small(
    name: str, recipe: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    small = worlds.llama(tmp_path / "small", layers=2, hidden=16, cutter=worlds.tokenizer(), vocabulary=1024)
    text = "messages"
    halved = name in ("smollm2-half", "smollm2-half-cached")
    if halved:
        text = "text"
        rows = [{"text": t} for t in worlds.texts(80)]
        Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    changes = [
        "data.source=table", "data.options={}", "data.path=chats.jsonl", "data.max_length=64", f"data.text={text}",
        "data.test=0.1", "data.validation=0.1", f"teacher.model={recipe['teacher']['model']}", "train.epochs=null",
        "train.steps=2", "train.batch_size=8", "train.precision=no", "train.evaluate_every=2",
    ]  # fmt: skip
    if halved:
        changes.append("student.layers=2")
    else:
        changes.append(f"student.model=hf:{small}")
    if name == "llama-8b-to-1b":
        changes += ["train.accumulate=2"]
    if name == "smollm2-half-on-policy":
        changes.append("method.max_new_tokens=4")
    found = tutelage.run(load_recipe(ROOT / "recipes" / f"{name}.yaml", changes), out=tmp_path / "run")
    assert found.summary["students"]["distilled"]["last"]["perplexity"]["mean"] > 1


def test_layers_computed_again_give_the_same_gradients(cutter: Any, folder: Path) -> None:
    _, batch = causal(cutter, [r["messages"] for r in worlds.conversations(3)])
    teacher, student = model(folder), model(folder, 2).train()
    method = prepare_method(METHODS["token"](hidden=0.5, layers="last"), student, teacher, batch, seed=0)
    expected = gradients(student, teacher, method, [batch])
    calls = 0

    def counted(*_: Any) -> None:
        nonlocal calls
        calls += 1

    student.model.layers[0].input_layernorm.register_forward_hook(counted)
    enable_gradient_checkpointing(student)
    found = gradients(student, teacher, method, [batch])
    assert calls == 2, "forward, and again backward"
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)
    with pytest.raises(CapabilityError, match="gradient_checkpointing"):
        enable_gradient_checkpointing(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("keep", ["hidden", "dense", "topk", "sampled", "stochastic_rounding"])
def test_a_student_is_taught_from_what_was_kept_of_its_teacher(
    keep: str, recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe["baseline"] = False
    recipe["method"] = {"kind": "token", "alpha": 1.0}
    live = tutelage.run(build_recipe(recipe), out=tmp_path / "live").summary["students"]["distilled"]["last"]
    recipe["teacher"]["cache"] = {
        "keep": keep, "path": str(tmp_path / "cache"), "k": 900, "draws": 20_000, "dtype": "fp32"
    }  # fmt: skip
    found = tutelage.run(build_recipe(recipe), out=tmp_path / "run").summary["students"]["distilled"]["last"]
    noise = {"topk": 1e-4, "sampled": 1.5e-3, "stochastic_rounding": 5e-4}.get(keep, 1e-6)
    assert found["kl"]["mean"] == pytest.approx(live["kl"]["mean"], abs=noise)


def test_a_cache_of_another_tokenizer_or_template_is_refused(recipe: dict[str, Any], tmp_path: Path) -> None:
    import transformers

    recipe["baseline"] = False
    recipe["method"] = {"kind": "token"}
    recipe["teacher"]["cache"] = {"keep": "topk", "path": str(tmp_path / "cache")}
    tutelage.run(build_recipe(recipe), out=tmp_path / "first")
    folder = Path(recipe["teacher"]["model"].removeprefix("hf:"))
    cutter = transformers.AutoTokenizer.from_pretrained(folder)
    for change in ("template", "tokenizer"):
        if change == "template":
            cutter.chat_template = cutter.chat_template.replace("<|im_start|>", "<|begin|>")
        else:
            cutter = worlds.tokenizer(merges=50)
        cutter.save_pretrained(folder)
        with pytest.raises(CacheError, match="token"):
            tutelage.run(build_recipe(recipe), out=tmp_path / change)


def test_a_model_read_from_a_gguf_file_is_saved_as_one_that_never_was(folder: Path, tmp_path: Path) -> None:
    read = model(folder)
    read.config.quantization_config = {"quant_method": "gguf", "gguf_file": "teacher.gguf"}
    whole: Any = whole_of(read)
    whole.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    again = model(tmp_path / "saved")
    again.save_pretrained(tmp_path / "again")
    ids = torch.arange(20)[None]
    assert torch.equal(again(ids).logits, read.eval()(ids).logits)
