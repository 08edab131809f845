"""Teachers with another tokenizer: spans of the same text, shared entries, the losses, and a run from a recipe."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import tutelage
from support import language_worlds as worlds
from support.language_methods import TURNS, gradients, model, passed, total
from tutelage import losses
from tutelage.config import build_recipe
from tutelage.data import IGNORE, Batch, load_texts
from tutelage.data.alignment import TokenEnds, align_predicted, align_spans, find_shared_tokens, token_bytes
from tutelage.errors import CapabilityError, DataError
from tutelage.losses import CrossVocabularyTargets, LinearHead, linear_sums
from tutelage.methods import METHODS, prepare_method
from tutelage.teachers import LiveTeacher

ODD = "Ann 😀 naïve  café\n\nhas 12 plums, and it's done. "
DIVERGENCES: list[dict[str, Any]] = [
    {"divergence": "kl", "temperature": 2.0}, {"divergence": "reverse_kl"}, {"divergence": "js", "beta": 0.3},
    {"divergence": "skew_kl", "alpha": 0.2, "reverse": True}, {"divergence": "tvd"},
]  # fmt: skip


def wordy(bos: bool = False) -> Any:
    """A tokenizer of words and bytes like SentencePiece, with another end and, where asked for, a beginning."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>"]
    pieces = [f"<0x{b:02X}>" for b in range(256)] + ["▁", *"abcdefghijklmnopqrstuvwxyz0123456789.,:"]
    words = [("▁", "h"), ("▁h", "a"), ("▁ha", "s"), ("▁", "p"), ("▁p", "l"), ("▁pl", "u"), ("l", "u"), ("m", "s")]
    vocabulary = {token: i for i, token in enumerate([*special, *pieces, *(a + b for a, b in words)])}
    made = Tokenizer(models.BPE(vocabulary, words, byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "▁")  # type: ignore[assignment]
    made.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    if bos:
        made.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="</s>",
                                   chat_template=worlds.TEMPLATES["mistral"])  # fmt: skip


def spans(mine: Any, theirs: Any, text: Any) -> tuple[Any, Any]:
    ends = [TokenEnds(t)(text)[2][None] for t in (mine, theirs)]
    return tuple(x[0] for x in align_spans(*ends))  # type: ignore[return-value]


def batch_of(tmp_path: Path, mine: Any, theirs: Any, rows: list[str] | None = None) -> Batch:
    path = tmp_path / "texts.jsonl"
    rows = rows or worlds.texts(12)
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in rows), encoding="utf-8")
    data = load_texts("table", tokenizer=mine, teacher_tokenizer=theirs, path=str(path), task="causal", align=True)
    return data.train.fetch(torch.arange(min(6, len(data.train))))


# Spans -------------------------------------------------------------------------------------------------


def test_equal_tokenizers_make_every_token_a_span_even_parts_of_a_character() -> None:
    cutter = worlds.tokenizer()
    mine, theirs = spans(cutter, cutter, ODD)
    assert mine.tolist() == theirs.tolist() == list(range(len(mine)))


@pytest.mark.parametrize("text", [ODD, TURNS], ids=["text", "conversation"])
@pytest.mark.parametrize("bos", [False, True])
def test_spans_of_two_tokenizers_stand_for_the_same_bytes(text: Any, bos: bool) -> None:
    tokenizers = worlds.tokenizer("chatml"), wordy(bos)
    found = spans(*tokenizers, text)
    said: list[dict[int, bytes]] = []
    for tokenizer, numbers in zip(tokenizers, found, strict=True):
        known, ids = token_bytes(tokenizer), TokenEnds(tokenizer)(text)[0]
        parts: dict[int, bytes] = {}
        for i, number in zip(ids, numbers, strict=True):
            if number >= 0:
                parts[int(number)] = parts.get(int(number), b"") + (known[i] or b"<end>")
        said.append(parts)
    assert said[0] == said[1]
    whole = b"".join(said[0].values())
    assert whole == (ODD.encode() + b"<end>" if isinstance(text, str) else b"Hello!<end>It is 3.<end>")
    assert len(said[0]) > 10


def test_one_bos_more_moves_no_span(tmp_path: Path) -> None:
    cutter = worlds.tokenizer()
    (mine, plain), (same, with_bos) = (spans(cutter, wordy(bos), ODD) for bos in (False, True))
    assert mine.tolist() == same.tolist()
    assert with_bos.tolist() == [-1, *plain.tolist()]
    batches = [batch_of(tmp_path, cutter, wordy(bos)) for bos in (False, True)]
    counts = [int(METHODS["cross-tokenizer"]().counts(b)["soft"]) for b in batches]
    assert counts[0] == counts[1] > 50  # the student, without one, is asked for no first token in either


def test_normalisation_and_dropped_spaces_leave_words_aligned() -> None:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[UNK]", "[SEP]", "ann", "naive", "cafe", "has", "12", "plum", "##s", ",", "and", "it", "'", "done", "."]
    made = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))  # type: ignore[call-arg]
    made.normalizer = normalizers.BertNormalizer()  # type: ignore[assignment]
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    made.decoder = decoders.WordPiece()  # type: ignore[assignment]
    bert = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", sep_token="[SEP]", pad_token="[SEP]")
    cutter = worlds.tokenizer()
    mine, theirs = spans(cutter, bert, ODD)
    ids = TokenEnds(cutter)(ODD)[0]
    parts = [cutter.decode([ids[i] for i in np.flatnonzero(mine == n)]) for n in range(mine.max() + 1)]
    assert parts[:5] == ["Ann", " 😀", " naïve", "  café", "\n\nhas"]
    own, other = find_shared_tokens(cutter, bert)
    pairs = {(cutter.decode(int(a)), bert.convert_ids_to_tokens(int(b))) for a, b in zip(own, other, strict=True)}
    assert {(" has", "has"), ("s", "##s"), (",", ",")} <= pairs
    assert len(theirs) == int((theirs >= 0).sum())


def test_spans_are_lost_whole_where_a_part_is_not_predicted(tmp_path: Path) -> None:
    batch = batch_of(tmp_path, worlds.tokenizer(), wordy(), [f"has plums {i}" for i in range(20)])
    assert batch.spans is not None
    assert batch.teacher_labels is not None
    for side, labels in (("student", batch.labels), ("teacher", batch.teacher_labels)):
        inside = batch.spans[side] >= 0
        assert bool((labels[inside] != IGNORE).all())
    assert set(batch.spans["student"].unique().tolist()) == set(batch.spans["teacher"].unique().tolist())


def test_what_cannot_be_aligned_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in worlds.texts(20)), encoding="utf-8")
    given: dict[str, Any] = {"tokenizer": worlds.tokenizer(), "teacher_tokenizer": wordy(), "path": str(path),
                             "task": "causal"}  # fmt: skip
    with pytest.raises(DataError, match="kind: cross-tokenizer"):
        load_texts("table", **given)
    with pytest.raises(DataError, match="packed"):
        load_texts("table", align=True, pack=True, **given)


# Losses ------------------------------------------------------------------------------------------------


def sides(rows: int = 7, mine: int = 23, theirs: int = 31) -> tuple[torch.Tensor, ...]:
    made = (torch.randn(rows, 5), torch.randn(mine, 5), torch.randn(rows, 4), torch.randn(theirs, 4))
    return tuple(x.double().requires_grad_(i < 2) for i, x in enumerate(made))


@pytest.mark.parametrize("rest", ["bucket", "uld"])
@pytest.mark.parametrize("options", DIVERGENCES, ids=lambda o: o["divergence"])
def test_shared_entries_are_compared_as_the_dense_objectives_compare_coarse_logits(
    options: dict[str, Any], rest: Any
) -> None:
    hidden, weight, inputs, head = sides()
    own, other = torch.randperm(23)[:15].sort().values, torch.randperm(31)[:15]
    mask = torch.tensor([True, False, True, True, True, False, True])
    term = CrossVocabularyTargets((inputs, head), (own, other), rest, mask=mask, **options)
    found = linear_sums(hidden, LinearHead(weight), [term], weights=[1.0], chunk=3)[0]
    grads = torch.autograd.grad(found, (hidden, weight))
    t = options.get("temperature", 1.0)
    s, p = (hidden @ weight.T)[mask] / t, (inputs @ head.T)[mask] / t
    name = {"kl": "kd"}.get(options["divergence"], options["divergence"])
    more = {k: v for k, v in options.items() if k not in ("divergence", "temperature")}
    dense = getattr(losses, name)(
        losses.coarse(s, own), losses.coarse(p, other), reduction="sum", temperature=1.0, **more
    )
    if rest == "uld":
        out = [x.softmax(-1).index_fill(-1, kept, 0.0).sort(-1, descending=True).values
               for x, kept in ((s, own), (p, other))]  # fmt: skip
        dense = dense + (F.pad(out[0], (0, 8)) - out[1]).abs().sum()
    dense = dense * t**2
    torch.testing.assert_close(found, dense)
    for a, b in zip(grads, torch.autograd.grad(dense, (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("sizes", [(23, 31), (31, 23)])
def test_chunked_sorted_distances_are_the_dense_ones(sizes: tuple[int, int]) -> None:
    hidden, weight, inputs, head = sides(7, *sizes)
    found = linear_sums(
        hidden, weight, [CrossVocabularyTargets((inputs, head), temperature=2.0)], weights=[1.0], chunk=2
    )[0]
    grads = torch.autograd.grad(found, (hidden, weight))
    dense = losses.uld(hidden @ weight.T, inputs @ head.T, temperature=2.0, reduction="sum")
    torch.testing.assert_close(found, dense)
    for a, b in zip(grads, torch.autograd.grad(dense, (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("whole", ["student", "teacher"])
@pytest.mark.parametrize("divergence", ["kl", "reverse_kl"])
def test_a_vocabulary_inside_the_other_leaves_the_loss_finite(whole: str, divergence: str) -> None:
    hidden, weight, inputs, head = sides(5, *((12, 20) if whole == "student" else (20, 12)))
    ids = torch.arange(12)
    found = linear_sums(
        hidden, weight, [CrossVocabularyTargets((inputs, head), (ids, ids), divergence=divergence)], weights=[1.0]
    )[0]
    grads = torch.autograd.grad(found, (hidden, weight))
    assert all(bool(g.isfinite().all()) for g in (found, *grads))
    assert found.item() < 500


@pytest.mark.parametrize("options", DIVERGENCES, ids=lambda o: o["divergence"])
def test_with_equal_tokenizers_it_is_the_token_method_in_value_and_gradient(
    options: dict[str, Any], tmp_path: Path
) -> None:
    cutter = worlds.tokenizer()
    folder = worlds.llama(tmp_path / "m", cutter=cutter)
    teacher, student = model(folder), model(folder, 2)
    given = {{"alpha": "skew"}.get(k, k): v for k, v in options.items()}
    plain = batch_of(tmp_path, cutter, None, [*worlds.texts(8), ODD, ODD[3:], ODD[5:]])
    assert plain.spans is None
    inputs = plain.inputs
    measured = [
        TokenEnds(cutter)(cutter.decode(row[m.bool()][:-1]))[2]
        for row, m in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]  # type: ignore[index, call-overload]
    ends = np.full(plain.labels.shape, -1)
    for row, mine in zip(ends, measured, strict=True):
        row[: len(mine)] = mine
    cross = replace(plain, teacher_inputs=inputs, teacher_labels=plain.labels,
                    spans=align_predicted(ends, ends, plain.labels, plain.labels))  # fmt: skip
    found = []
    for kind, batch in (("token", plain), ("cross-tokenizer", cross)):
        more = {"tokenizers": (cutter, cutter)} if kind != "token" else {}
        method = prepare_method(METHODS[kind](alpha=0.7, **given, **more), student, teacher, batch, seed=0)
        student.zero_grad()
        value = total(student, method, batch, LiveTeacher(teacher).signal(batch, method.needs))
        value.backward()
        counts = {k: int(v) for k, v in method.counts(batch).items()}
        found.append((value.detach(), counts, {n: p.grad.clone() for n, p in student.named_parameters()}))
    assert found[0][1] == found[1][1]
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-7)
    for name, gradient in found[0][2].items():
        torch.testing.assert_close(found[1][2][name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_chains_are_compared_by_the_products_of_their_probabilities(tmp_path: Path) -> None:
    mine, theirs = worlds.tokenizer(), wordy()
    student = model(worlds.llama(tmp_path / "s", cutter=mine), 2)
    teacher = model(worlds.llama(tmp_path / "t", cutter=theirs))
    batch = batch_of(tmp_path, mine, theirs)
    method = METHODS["cross-tokenizer"](alpha=1.0, hard=0.0, tokenizers=(mine, theirs))
    method = prepare_method(method, student, teacher, batch, seed=0)
    found = passed(student, method, batch, LiveTeacher(teacher).signal(batch, method.needs))["soft"]
    own, other = find_shared_tokens(mine, theirs)
    there = dict(zip(own.tolist(), other.tolist(), strict=True))
    with torch.no_grad():
        q = student(**batch.inputs).logits.log_softmax(-1)
        p = teacher(**batch.teacher_inputs).logits.log_softmax(-1)
    expected, count, chains = 0.0, 0, 0
    assert batch.spans is not None
    assert batch.teacher_labels is not None
    for row in range(len(batch)):
        a, b = batch.spans["student"][row], batch.spans["teacher"][row]
        for number in sorted(set(a.tolist()) - {-1}):
            i, j = (a == number).nonzero().flatten(), (b == number).nonzero().flatten()
            x, y = batch.labels[row, i], batch.teacher_labels[row, j]
            count += 1
            if len(i) == len(j) == 1 and there.get(int(x)) == int(y):
                expected += float(
                    losses.kd(losses.coarse(q[row, i], own), losses.coarse(p[row, j], other), temperature=1.0)
                )
                continue
            chains += 1
            lq, lp = float(q[row, i, x].sum()), float(p[row, j, y].sum())
            both = [torch.tensor([[v, np.log1p(-np.exp(v))]]) for v in (lq, lp)]
            expected += float(losses.kd(*both, temperature=1.0))
    assert int(found.count) == count
    assert 0 < chains < count
    assert found.sum.item() == pytest.approx(expected, rel=1e-4)


def test_the_gradient_is_the_same_for_any_splitting(tmp_path: Path) -> None:
    mine, theirs = worlds.tokenizer(), wordy()
    student = model(worlds.llama(tmp_path / "s", cutter=mine), 2)
    teacher = model(worlds.llama(tmp_path / "t", cutter=theirs))
    batch = batch_of(tmp_path, mine, theirs)
    method = prepare_method(METHODS["cross-tokenizer"](tokenizers=(mine, theirs)), student, teacher, batch, seed=0)
    expected = gradients(student, teacher, method, [batch])
    for parts in (batch.split(3), [batch.rows(0, 1), batch.rows(1, 9), batch.rows(3, 3)]):
        found = gradients(student, teacher, method, parts)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=2e-6, rtol=1e-3, msg=name)


def test_the_token_method_refuses_tokens_of_another_tokenizer(tmp_path: Path) -> None:
    mine, theirs = worlds.tokenizer(), wordy()
    student = model(worlds.llama(tmp_path / "s", cutter=mine), 2)
    teacher = model(worlds.llama(tmp_path / "t", cutter=theirs))
    batch = batch_of(tmp_path, mine, theirs)
    method = prepare_method(METHODS["token"](), student, teacher, batch, seed=0)
    with pytest.raises(CapabilityError, match="kind: cross-tokenizer"):
        total(student, method, batch, LiveTeacher(teacher).signal(batch, method.needs))


# From a recipe -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [{"compare": "spans", "rest": "uld"}, {"compare": "uld"}], ids=["spans", "uld"])
def test_a_student_with_another_tokenizer_is_taught_by_a_recipe(
    method: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    monkeypatch.chdir(tmp_path)
    teacher = worlds.llama(tmp_path / "teacher", cutter=wordy(bos=True))
    student = worlds.llama(tmp_path / "student", cutter=worlds.tokenizer(), layers=2)
    rows = worlds.conversations(80)
    Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = {
        "name": "cross",
        "data": {"source": "table", "path": "chats.jsonl", "task": "causal", "text": "messages", "max_length": 96},
        "teacher": {"model": f"hf:{teacher}"},
        "student": {"model": f"hf:{student}"},
        "method": {"kind": "cross-tokenizer", **method},
        "train": {"steps": 8, "batch_size": 4, "log_every": 1, "optimizer": {"kind": "adamw", "lr": 1e-2}},
    }
    found = tutelage.run(build_recipe(recipe), out=tmp_path / "run")
    assert set(found.summary["students"]) == {"baseline", "distilled"}
    assert "kl" not in found.summary["students"]["distilled"]["last"]  # of other tokens there is none
    assert found.summary["teacher"]["n"] > 0
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = [x["loss"] for x in lines if x.get("training") == "distilled-seed0" and "loss" in x and "lr" in x]
    assert len(logged) >= 6
    assert logged[-1] < logged[0]
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "student")
    assert len(saved) == len(worlds.tokenizer())
