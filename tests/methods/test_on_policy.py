"""Language models taught on what they write themselves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tutelage
from support import language_worlds as worlds
from support.language_methods import TURNS, causal, model, passed, ready, recipe, total
from support.worlds import Shuffled, state
from tutelage import losses
from tutelage.config import build_recipe
from tutelage.data import IGNORE, Batch
from tutelage.errors import CapabilityError, ConfigError, Interrupted
from tutelage.methods import METHODS, OnPolicyMethod, check_capabilities
from tutelage.methods.on_policy import _prompts as prompts_of
from tutelage.methods.on_policy import mean_after
from tutelage.students.sampling import sample_completions
from tutelage.teachers import LiveTeacher, MemoryTeacher

__all__ = ["recipe"]


def test_the_students_answers_stand_behind_the_prompts_and_they_alone_count(cutter: Any, folder: Path) -> None:
    rows = [TURNS, TURNS[:2], *(r["messages"] for r in worlds.conversations(1))]
    _, batch = causal(cutter, rows, max_length=256)
    student, teacher = model(folder, 2).train(), model(folder)
    written = ready(student, teacher, batch).prepare_batch(student, batch)
    assert student.training
    assert isinstance(written.inputs, dict)
    for row, text in enumerate(rows):
        prompt = cutter.apply_chat_template(text[:-1], add_generation_prompt=True)["input_ids"]
        length = int(written.inputs["attention_mask"][row].sum())
        ids = written.inputs["input_ids"][row, :length].tolist()
        assert ids[: len(prompt)] == prompt
        assert 1 <= length - len(prompt) <= 6
        counted = written.mask[row].nonzero().flatten().tolist()  # type: ignore[index]
        assert counted == list(range(len(prompt) - 1, length - 1))
    assert bool((written.labels == IGNORE).all())


def test_greedy_answers_are_what_the_student_finds_likeliest_and_stop_at_their_end(cutter: Any, folder: Path) -> None:
    _, batch = causal(cutter, [TURNS, TURNS[:2]], max_length=256)
    student = model(folder, 2)
    method = ready(student, model(folder), batch, sampling_temperature=0.0, max_new_tokens=12)

    def answers() -> list[list[int]]:
        written = method.prepare_batch(student, batch)
        assert isinstance(written.inputs, dict)
        with torch.no_grad():
            best = student(**written.inputs).logits.argmax(-1)
        places = [mask.nonzero().flatten() for mask in written.counted()]
        found = [written.inputs["input_ids"][row, at + 1].tolist() for row, at in enumerate(places)]
        assert found == [best[row, at].tolist() for row, at in enumerate(places)]
        return found

    whole = answers()
    assert [len(answer) for answer in whole] == [12, 12]
    student.generation_config.eos_token_id = [whole[0][2], whole[1][4]]
    for short, answer in zip(answers(), whole, strict=True):
        ends = [i for i, token in enumerate(answer) if token in student.generation_config.eos_token_id]
        assert short == answer[: ends[0] + 1]


def test_a_text_without_a_prompt_is_gone_on_with_and_a_long_prompt_is_cut_at_its_front(
    cutter: Any, folder: Path
) -> None:
    (text,) = worlds.texts(1)
    _, batch = causal(cutter, [text, [{"role": "user", "content": "y" * 90}, TURNS[1]]], max_length=256)
    student = model(folder, 2)
    written = ready(student, model(folder), batch, max_prompt_tokens=20).prepare_batch(student, batch)
    assert isinstance(written.inputs, dict)
    assert isinstance(batch.inputs, dict)
    begins = [int(m.nonzero()[0]) + 1 for m in written.mask]  # type: ignore[union-attr]
    length = int(batch.inputs["attention_mask"][0].sum())
    assert begins == [length // 4, 20]
    assert torch.equal(written.inputs["input_ids"][0, : begins[0]], batch.inputs["input_ids"][0, : begins[0]])
    assert cutter.decode(written.inputs["input_ids"][1, :20]).endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_lambda_is_the_share_of_batches_that_the_student_writes(share: float, cutter: Any, folder: Path) -> None:
    _, batch = causal(cutter, [TURNS[:2]])
    student = model(folder, 2)
    method = ready(student, model(folder), batch, lmbda=share, max_new_tokens=1)
    torch.manual_seed(0)
    own = sum(method.prepare_batch(student, batch) is not batch for _ in range(100))
    assert abs(own / 100 - share) < 0.12
    assert (share > 0) or own == 0


def test_the_loss_of_what_it_wrote_is_the_divergence_from_the_teacher_there(cutter: Any, folder: Path) -> None:
    _, batch = causal(cutter, [TURNS, TURNS[:2]], max_length=256)
    student, teacher = model(folder, 2), model(folder)
    method = ready(student, teacher, batch, divergence="js", beta=0.1, alpha=0.8)
    written = method.prepare_batch(student, batch)
    found = total(student, method, written, LiveTeacher(teacher).signal(written, method.needs))
    mine, theirs = (m(**written.inputs).logits[written.mask] for m in (student, teacher))
    torch.testing.assert_close(found, 0.8 * losses.js(mine, theirs.detach(), beta=0.1), rtol=1e-5, atol=1e-6)
    assert int(method.counts(written)["ce"]) == 0


def test_answers_are_kept_used_again_and_the_oldest_go(cutter: Any, folder: Path) -> None:
    batches = [causal(cutter, [r["messages"]], max_length=256)[1] for r in worlds.conversations(6)]
    student = model(folder, 2)
    method = ready(student, model(folder), batches[0], replay_buffer=3, replay_share=0.0)
    torch.manual_seed(0)
    made = [method.prepare_batch(student, batch) for batch in batches]
    assert int(method.replay_count) == 6
    method.options.replay_share = 1.0
    again = {tuple(method.prepare_batch(student, batches[0]).inputs["input_ids"][0].tolist()) for _ in range(40)}  # type: ignore[index, call-overload]
    assert again == {tuple(b.inputs["input_ids"][0].tolist()) for b in made[3:]}  # type: ignore[index, call-overload]
    drawn = method.prepare_batch(student, batches[0])
    match = next(b for b in made if torch.equal(b.inputs["input_ids"], drawn.inputs["input_ids"]))  # type: ignore[index, call-overload]
    assert torch.equal(match.mask, drawn.mask)  # type: ignore[arg-type]
    assert {"replay_tokens", "replay_lengths", "replay_count"} <= set(method.state_dict())


def test_the_long_part_is_the_policy_gradient_of_what_follows(cutter: Any, folder: Path) -> None:
    _, batch = causal(cutter, [TURNS, TURNS[:2]], max_length=256)
    student, teacher = model(folder, 2), model(folder)
    method = ready(student, teacher, batch, divergence="reverse_kl", long=0.5)
    written = method.prepare_batch(student, batch)
    terms = passed(student, method, written, LiveTeacher(teacher).signal(written, method.needs))
    terms["long"].sum.backward()
    found = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    expected = torch.zeros(())
    for row in range(2):
        places = written.mask[row].nonzero().flatten()  # type: ignore[index]
        tokens = written.inputs["input_ids"][row, places + 1]  # type: ignore[index, call-overload]
        log_q, log_p = (
            m(**written.inputs).logits[row, places].log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
            for m in (student, teacher)
        )
        reward = (log_p - log_q).detach()
        for t in range(len(places) - 1):
            expected = expected - reward[t + 1 :].mean() * log_q[t]
    expected.backward()
    torch.testing.assert_close(terms["long"].sum, expected.detach(), rtol=1e-4, atol=1e-5)
    for name, value in found.items():
        torch.testing.assert_close(value, student.get_parameter(name).grad, rtol=1e-3, atol=1e-5, msg=name)


def of_tokens(student: Any, teacher: Any, written: Batch, row: int) -> tuple[torch.Tensor, ...]:
    """All log probabilities of both at the places of an answer, and its tokens."""
    places = written.mask[row].nonzero().flatten()  # type: ignore[index]
    tokens = written.inputs["input_ids"][row, places + 1]  # type: ignore[index, call-overload]
    q, p = (m(**written.inputs).logits[row, places].log_softmax(-1) for m in (student, teacher))
    return q, p.detach(), tokens


def test_answers_drawn_from_both_are_weighted_as_if_from_the_student(cutter: Any, folder: Path) -> None:
    _, batch = causal(cutter, [TURNS, TURNS[:2]], max_length=256)
    student, teacher = sharp(model(folder, 2)), sharp(model(folder))
    method = ready(student, teacher, batch, divergence="reverse_kl", mix=0.4, long=0.5)
    written = method.prepare_batch(student, batch)
    terms = passed(student, method, written, LiveTeacher(teacher).signal(written, method.needs))
    (terms["soft"].sum + terms["long"].sum).backward()
    found = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    single, long, spread = torch.zeros(()), torch.zeros(()), []
    for row in range(2):
        q, p, tokens = of_tokens(student, teacher, written, row)
        mine, theirs = (x.gather(-1, tokens[:, None])[:, 0] for x in (q, p))
        w = (mine.exp() / (0.4 * theirs.exp() + 0.6 * mine.exp())).detach()
        single = single + (w * (q.exp() * (q - p)).sum(-1)).sum()
        reward = (theirs - mine).detach()
        for t in range(len(tokens) - 1):
            long = long - w[t] * reward[t + 1 :].mean() * mine[t]
        spread += w.tolist()
    assert max(spread) - min(spread) > 0.3
    torch.testing.assert_close(terms["soft"].sum, single.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms["long"].sum, long.detach(), rtol=1e-4, atol=1e-4)
    (single + long).backward()
    for name, value in found.items():
        torch.testing.assert_close(value, student.get_parameter(name).grad, rtol=2e-3, atol=1e-4, msg=name)


def sharp(of: Any) -> Any:
    """With distributions far from flat, and another model's far from it."""
    with torch.no_grad():
        for parameter in of.parameters():
            parameter.mul_(6)
    return of.eval()


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_tokens_are_drawn_from_the_mixture(share: float, cutter: Any, folder: Path) -> None:
    _, batch = causal(cutter, [TURNS[:2], TURNS], max_length=256)
    student, teacher = sharp(model(folder, 2)), sharp(model(folder))
    method = ready(student, teacher, batch, mix=share, max_new_tokens=2)
    prompts = list(prompts_of(batch, 512))
    begins = [len(p) for p in prompts]
    many = Batch(
        {k: v.repeat_interleave(1500, 0) for k, v in batch.inputs.items()},  # type: ignore[union-attr]
        batch.labels.repeat_interleave(1500, 0), mask=batch.mask.repeat_interleave(1500, 0),  # type: ignore[union-attr]
    )  # fmt: skip
    written = method.prepare_batch(student, many)
    ids = written.inputs["input_ids"]  # type: ignore[index, call-overload]
    for i in range(2):
        first = ids[i * 1500 : (i + 1) * 1500, begins[i]]
        seen = torch.bincount(first, minlength=len(cutter)) / 1500
        right = prompt_mixture(student, teacher, prompts[i], share)
        assert float((seen - right).abs().sum()) < 0.2, i
        best = int(right.argmax())  # and the token after the likeliest one, by the cache of both
        after = ids[i * 1500 : (i + 1) * 1500, begins[i] + 1][first == best] if best != cutter.eos_token_id else None
        if after is not None and len(after) > 300:
            seen = torch.bincount(after, minlength=len(cutter)) / len(after)
            right = prompt_mixture(student, teacher, torch.cat([prompts[i], torch.tensor([best])]), share)
            assert float((seen - right).abs().sum()) < 0.4, i


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 0.1}, {"typical_p": 0.3}, {"min_p": 0.3},
        {"epsilon_cutoff": 0.05}, {"bad_words_ids": None}, {"suppress_tokens": None}, {"top_h": 0.3},
    ],
    ids=lambda settings: next(iter(settings)),
)  # fmt: skip
def test_settings_for_generation_do_not_change_the_distribution(
    settings: dict[str, Any], cutter: Any, folder: Path
) -> None:
    _, batch = causal(cutter, [TURNS], max_length=256)
    student = sharp(model(folder, 2))
    (prompt,) = prompts_of(batch, 512)
    with torch.no_grad():
        right = student(input_ids=prompt[None]).logits[0, -1].softmax(-1)
    best = int(right.argmax())
    words = {"bad_words_ids": [[best]], "suppress_tokens": [best]}
    student.generation_config.update(**{name: words.get(name, value) for name, value in settings.items()})
    before = student.generation_config
    torch.manual_seed(0)
    completions = sample_completions(student, [prompt] * 3000, max_new_tokens=1)
    drawn = torch.bincount(torch.stack([one.ids[-1] for one in completions]), minlength=len(cutter)) / 3000
    assert float((drawn - right).abs().sum()) / 2 < 0.05
    assert student.generation_config is before


def prompt_mixture(student: Any, teacher: Any, ids: torch.Tensor, share: float) -> torch.Tensor:
    with torch.no_grad():
        q, p = (m(input_ids=ids[None]).logits[0, -1].softmax(-1) for m in (student, teacher))
    return share * p + (1 - share) * q


def test_lambda_grows_where_the_loss_of_an_evaluation_does(cutter: Any, folder: Path) -> None:
    _, batch = causal(cutter, [TURNS[:2]])
    method = ready(model(folder, 2), model(folder), batch, lmbda=0.0, adaptive=0.4, slack=0.1)
    seen = []
    for loss in (3.0, 2.0, 3.05, 3.1, 3.15, 3.3, 9.0, 10.0):
        method.after_validation({"loss": loss})
        seen.append(round(float(method.current_lambda), 3))
    assert seen == [0.0, 0.0, 0.0, 0.4, 0.4, 0.8, 1.0, 1.0]
    fixed = ready(model(folder, 2), model(folder), batch, lmbda=0.3)
    fixed.after_validation({"loss": 1.0})
    fixed.after_validation({"loss": 9.0})
    assert float(fixed.current_lambda) == pytest.approx(0.3)


def test_what_adapts_to_an_evaluation_needs_one(cutter: Any, folder: Path, tmp_path: Path) -> None:
    batches = [causal(cutter, [r["messages"] for r in worlds.conversations(3)])[1]]
    with pytest.raises(CapabilityError, match="adapts to the validation loss"):
        tutelage.distill(
            model(folder), lambda: model(folder, 2), batches, eval_data=batches, baseline=False, epochs=1,
            method=OnPolicyMethod(lmbda=0.0, adaptive=0.1), out=tmp_path / "run", verbose=False,
        )  # fmt: skip


def test_the_share_of_kept_answers_rises_with_the_training(cutter: Any, folder: Path) -> None:
    _, batch = causal(cutter, [TURNS[:2]])
    student = model(folder, 2)
    method = ready(student, model(folder), batch, replay_buffer=4, replay_share="rising", max_new_tokens=1)
    method.prepare_batch(student, batch)
    shares = []
    for step in (0, 50, 100):
        method.before_training(student, step, 100)
        before = int(method.replay_count)
        for _ in range(60):
            method.prepare_batch(student, batch)
        shares.append(1 - (int(method.replay_count) - before) / 60)
    assert shares[0] == 0
    assert abs(shares[1] - 0.5) < 0.2
    assert shares[2] == 1
    method.before_training(student, 0, 2)
    method.after_step()
    assert method._progress == 0.5


def test_what_follows_counts_up_to_the_end_of_an_answer() -> None:
    x, mask = torch.tensor([[9.0, 1.0, 2.0, 4.0, 7.0]]), torch.tensor([[False, True, True, True, False]])
    assert mean_after(x, mask)[0, 1:4].tolist() == [3.0, 4.0, 0.0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lmbda": 1.5}, "lmbda(.|\n)*at most 1"),
        ({"max_new_tokens": 0}, "max_new_tokens(.|\n)*at least 1"),
        ({"long": 1.0}, "needs divergence: reverse_kl"),
        ({"divergence": "reverse_kl", "long": 1.0, "replay_buffer": 5}, "replay_buffer: 0"),
        ({"mix": 0.2, "replay_buffer": 5}, "'mix' needs"),
        ({"mix": 1.0}, "below 1"),
        ({"adaptive": -0.1}, "adaptive(.|\n)*at least 0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        METHODS["on-policy"](**options)


def test_who_knows_the_data_alone_cannot_judge_what_is_written(cutter: Any, folder: Path) -> None:
    _, batch = causal(cutter, [TURNS], max_length=256)
    teacher, student = model(folder), model(folder, 2)
    method = ready(student, teacher, batch)
    check_capabilities(method, LiveTeacher(teacher))
    known = MemoryTeacher(LiveTeacher(teacher), [replace(batch, ids=torch.arange(1))])
    with pytest.raises(CapabilityError, match="MemoryTeacher has outputs for the training data only"):
        check_capabilities(method, known)


def test_packed_rows_and_models_that_cannot_write_are_refused(cutter: Any, folder: Path) -> None:
    _, packed = causal(cutter, worlds.texts(6), max_length=128, pack=True)
    with pytest.raises(CapabilityError, match="not packed"):
        ready(model(folder, 2), model(folder), packed)
    _, batch = causal(cutter, [TURNS], max_length=256)
    mute = model(folder, 2)
    mute.generate = None
    with pytest.raises(CapabilityError, match="cannot generate"):
        ready(mute, model(folder), batch)


@pytest.mark.parametrize("key", ["cache", "inference"])
def test_a_recipe_that_asks_the_teacher_ahead_is_refused(key: str, recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["data"].pop("pack")
    recipe["method"] = {"kind": "on-policy"}
    recipe["teacher"][key] = {"cache": True, "inference": {"overlap": True}}[key]
    with pytest.raises(CapabilityError, match=rf"teacher\.{key}.*cannot be computed ahead"):
        tutelage.run(build_recipe(recipe), out=tmp_path / "run")


def distil(cutter: Any, folder: Path, out: Path, die_at: int | None = None, **options: Any) -> tutelage.DistillResult:
    batches = [causal(cutter, [r["messages"] for r in worlds.conversations(3, seed)])[1] for seed in range(4)]
    return tutelage.distill(
        model(folder), lambda: model(folder, 2), Shuffled(batches, die_at), eval_data=batches[:1],
        validation=batches[1:2], method=OnPolicyMethod(lmbda=0.7, max_new_tokens=4, replay_buffer=6),
        epochs=3, lr=1e-3, baseline=False,
        train={"log_every": 1, "checkpoint_every": 2}, out=out, verbose=False, **options,
    )  # fmt: skip


@pytest.mark.parametrize("batches", [4, 7])
def test_what_was_written_and_kept_is_the_same_after_a_stop(
    batches: int, cutter: Any, folder: Path, tmp_path: Path
) -> None:
    distil(cutter, folder, tmp_path / "whole")
    with pytest.raises(Interrupted):
        distil(cutter, folder, tmp_path / "cut", die_at=batches)
    distil(cutter, folder, tmp_path / "cut", resume=True)
    first, second = state(tmp_path / "whole"), state(tmp_path / "cut")
    assert int(first["method.replay_count"]) > 6
    assert all(torch.equal(v, second[k]) for k, v in first.items())


def test_a_recipe_of_what_the_student_writes_runs_and_exports_a_plain_model(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    import transformers

    recipe["data"].pop("pack")
    recipe["method"] = {"kind": "on-policy", "lmbda": 0.7, "max_new_tokens": 5}
    found = tutelage.run(build_recipe(recipe), out=tmp_path / "run")
    assert "kl" in found.summary["students"]["distilled"]["last"]
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student")
