"""Chunked token losses are the dense ones, whatever head, teacher, mask and chunk, in little memory."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from support.launching import launch
from support.token_world import DIVERGENCES, SIZE, TOKENS, WIDTH, World, close, every, gradients, same
from tutelage import losses
from tutelage.losses import (
    HardTargets,
    LinearHead,
    LoRA,
    SampledTargets,
    SoftTargets,
    TopKTargets,
    kernels,
    linear_divergence,
    linear_sums,
)
from tutelage.losses.heads import GradientSums, HeadProjection


@settings(derandomize=True, deadline=None, max_examples=300)
@given(
    name=st.sampled_from(list(DIVERGENCES)),
    precision=st.sampled_from([(torch.float64, 1e-9), (torch.float32, 1e-5)]),
    temperature=st.sampled_from([0.7, 1.0, 2.0, 6.0]),
    head=st.fixed_dictionaries(
        {
            "bias": st.booleans(),
            "lora": st.booleans(),
            "scale": st.sampled_from([1.0, 0.3]),
            "softcap": st.sampled_from([None, 2.5]),
        }
    ),
    keep=st.one_of(st.none(), st.lists(st.booleans(), min_size=TOKENS, max_size=TOKENS)),
    chunk=st.sampled_from([None, 1, 2, 5, 100]),
    ce=st.sampled_from([0.0, 0.6]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    whole=st.booleans(),
    seed=st.integers(0, 99),
)
def test_value_and_every_gradient_are_those_of_all_scores_at_once(
    name, precision, temperature, head, keep, chunk, ce, reduction, whole, seed
):
    world = World(precision[0], seed, **head)
    mask = None if keep is None else torch.tensor(keep)
    options = {"temperature": temperature, "mask": mask, "reduction": reduction, "ce": ce}
    teacher = {"teacher": world.teacher()} if whole else {}
    by = world.draw(TOKENS).to(precision[0]) if reduction == "none" else torch.tensor(-0.4, dtype=precision[0])
    found = world.chunked(name, chunk=chunk, **options, **teacher)
    same(found, world.dense(name, **options), world.learned, precision[1], by)


@every
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_every_combination_is_that_of_all_scores_at_once_in_float64(name, dtype, tolerance):
    masks = [None, torch.arange(TOKENS) % 5 > 0]
    for softcap, other in ((None, {}), (2.5, {"bias": True, "lora": True, "scale": 0.3})):
        world, exact = (World(kind, softcap=softcap, **other) for kind in (dtype, torch.float64))
        with torch.no_grad():  # the same numbers, rounded as they are
            numbers = [(*w.learned, w.said, w.other) for w in (exact, world)]
            for to, of in zip(*numbers, strict=True):
                to.copy_(of)
        for temperature, chunk, mask, ce in itertools.product((0.7, 2.0, 6.0), (None, 1, 5), masks, (0.0, 0.6)):
            options = {"temperature": temperature, "mask": mask, "ce": ce}
            found, right = world.chunked(name, chunk=chunk, **options), exact.dense(name, **options)
            same(found, right, world.learned, tolerance, others=exact.learned)


@every
def test_gradients_are_those_of_the_value(name):
    world = World(tokens=4, size=6, bias=True, lora=True, scale=0.8, softcap=2.0)
    mask = torch.tensor([True, False, True, True])

    def loss(hidden, weight, bias, a, b):
        world.hidden, world.head = hidden, LinearHead(weight, bias, 0.8, 2.0, LoRA(a, b, 0.7))
        return world.chunked(name, ce=0.5, temperature=2.0, chunk=2, mask=mask)

    assert torch.autograd.gradcheck(loss, world.learned, atol=1e-7)


def test_what_the_issue_of_t_squared_says():
    """T^2 KL, averaged over tokens that count, and not over the vocabulary."""
    world, mask = World(), torch.arange(TOKENS) % 3 > 0
    value = linear_divergence(
        world.hidden, world.weight, (world.said, world.other), divergence="kl", temperature=2.0, mask=mask
    )
    log_q, p = (world.scores() / 2).log_softmax(-1), (world.teacher() / 2).softmax(-1)
    torch.testing.assert_close(value, 4 * F.kl_div(log_q[mask], p[mask], reduction="batchmean"))


@every
def test_a_student_that_is_its_teacher_is_taught_nothing(name):
    world = World()
    value = world.chunked(name, teacher=(world.hidden, world.weight), temperature=3.0, chunk=5)
    assert value.abs() < 1e-12
    assert all(g.abs().max() < 1e-12 for g in gradients(value, world.learned))


def test_labels_stand_at_the_positions_of_their_hidden_states():
    """A second shift, after that of the data, would teach the token after the next."""
    world = World()
    both = world.chunked(ce=1.0) - world.chunked()
    torch.testing.assert_close(both, F.cross_entropy(world.scores(), world.labels))


def test_a_token_without_a_label_is_still_taught_by_the_teacher_and_one_masked_is_not():
    world = World()
    none = torch.full_like(world.labels, -100)
    world.labels = none
    torch.testing.assert_close(world.chunked(ce=1.0), world.chunked())
    masked = world.chunked(ce=1.0, mask=none != -100)
    assert masked == 0


def test_of_part_of_a_teacher_value_and_gradients_are_those_of_the_sparse_objectives():
    world, mask = World(bias=True, softcap=3.0), torch.arange(TOKENS) % 4 > 0
    options = {"temperature": 2.0, "mask": mask}
    log_p = (world.teacher() / 2).log_softmax(-1)
    for k in (1, 4, SIZE):
        best = log_p.topk(k)
        found = world.chunked(teacher=TopKTargets(best.indices, best.values), chunk=5, **options)
        same(found, losses.topk_kd(world.scores(), best.indices, best.values, **options), world.learned)
    found = world.chunked(teacher=TopKTargets(best.indices, best.values), **options)
    same(found, world.dense(**options), world.learned)  # of all k, it is the whole
    index = torch.randint(SIZE, (TOKENS, 6), generator=world.generator)  # with repetitions
    weights = world.draw(TOKENS, 6).abs()
    found = world.chunked(teacher=SampledTargets(index, weights), chunk=5, **options)
    same(found, losses.sampled_kd(world.scores(), index, weights, **options), world.learned)


def test_a_top_1_keeps_its_tail():
    """Renormalised it would be identically zero."""
    world = World()
    best = world.teacher().log_softmax(-1).topk(1)
    value = world.chunked(teacher=TopKTargets(best.indices, best.values))
    assert value > 0.01
    assert all(g.abs().max() > 1e-3 for g in gradients(value, world.learned))


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "kl"])
def test_of_part_of_a_teacher_no_divergence_is_given_that_is_least_where_the_student_leaves_it(name):
    world = World()
    best = world.teacher().log_softmax(-1).topk(3)
    with pytest.raises(ValueError, match="leaves the support"):
        world.chunked(name, teacher=TopKTargets(best.indices, best.values))


def test_no_gradient_reaches_the_teacher():
    world = World()
    world.said.requires_grad_()
    world.other.requires_grad_()
    world.chunked().backward()
    assert world.said.grad is None
    assert world.other.grad is None


@every
@pytest.mark.parametrize("form", ["pair", "logits"])
def test_rows_behind_the_vocabulary_have_neither_probability_nor_gradient(name, form):
    """A logit of 0 would be the likeliest, where all others are below."""
    world = World(bias=True)
    dense = world.dense(name, ce=0.5)
    expected = gradients(dense, world.learned)
    padded = LinearHead(
        F.pad(world.weight.detach(), (0, 0, 0, 3), value=torch.nan).requires_grad_(),
        F.pad(world.bias.detach(), (0, 3), value=50.0).requires_grad_(),
    )
    teacher = F.pad(world.other, (0, 0, 0, 7), value=torch.inf)
    said = (world.said, teacher) if form == "pair" else F.pad(world.teacher(), (0, 7), value=90.0)
    world.head = padded
    value = world.chunked(name, ce=0.5, teacher=said, vocabulary=SIZE, chunk=5)
    close(value, dense)
    by_hidden, by_weight, by_bias = gradients(value, [world.hidden, padded.weight, padded.bias])
    for x, y in zip((by_hidden, by_weight[:SIZE], by_bias[:SIZE]), expected, strict=True):
        close(x, y)
    assert (by_weight[SIZE:] == 0).all()
    assert (by_bias[SIZE:] == 0).all()
    with pytest.raises(ValueError, match=f"scores {SIZE + 3} tokens, the teacher {SIZE + 7}"):
        world.chunked(name, teacher=said)


def test_gradients_of_a_tied_weight_add_up():
    table = nn.Embedding(SIZE, WIDTH, dtype=torch.float64)
    ids, said = torch.randint(SIZE, (3, 4)), torch.randn(3, 4, SIZE, dtype=torch.float64)

    def both(chunked):
        hidden = table(ids).tanh()
        value = linear_divergence(hidden, table.weight, said, chunk=5) if chunked else losses.kd(
            hidden @ table.weight.mT, said, temperature=1.0
        )  # fmt: skip
        table.weight.grad = None
        value.backward()
        return table.weight.grad

    torch.testing.assert_close(both(True), both(False))


def test_a_frozen_base_costs_no_gradient_of_its_size(monkeypatch):
    world = World(lora=True)
    world.weight.requires_grad_(False)
    made = []
    start = GradientSums.__init__

    def watched(self, *args):
        start(self, *args)
        made.extend(x.shape for x in self.sums if x is not None)

    monkeypatch.setattr(GradientSums, "__init__", watched)
    of = [x for x in world.learned if x.requires_grad]
    same(world.chunked(chunk=5), world.dense(), of)
    assert sorted(made) == sorted(x.shape for x in of)
    assert (SIZE, WIDTH) not in made


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_what_is_frozen_gets_no_gradient_and_all_else_its_own(frozen):
    world = World(bias=True)
    getattr(world, frozen).requires_grad_(False)
    same(world.chunked(chunk=5), world.dense(), [x for x in world.learned if x.requires_grad])


def test_a_teachers_head_may_be_capped_and_the_students_not():
    world = World()
    said = (world.said, LinearHead(world.other, scale=0.5, softcap=1.5))
    expected = losses.kd(world.scores(), 1.5 * torch.tanh(world.teacher() * 0.5 / 1.5), temperature=1.0)
    same(world.chunked(teacher=said, chunk=5), expected, world.learned)


def test_with_ligers_kernel_values_and_gradients_are_the_same():
    """In Triton's interpreter, which no GPU is needed for."""
    pytest.importorskip("liger_kernel")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "support.liger_job"]  # triton reads the variable when it is imported
    done = subprocess.run(command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "agrees" in done.stdout


def test_without_liger_or_a_gpu_no_kernel_is_taken(monkeypatch):
    assert kernels.kernel_for("kl", torch.zeros(2, 3)) is None
    monkeypatch.setattr(kernels, "DEVICES", {"cpu"})
    monkeypatch.setitem(kernels.KERNELS, "kl", kernels.liger_kl.__wrapped__)
    monkeypatch.setitem(sys.modules, "liger_kernel.functional", None)
    assert kernels.kernel_for("kl", torch.zeros(2, 3)) is None
    world = World(torch.float32)
    same(world.chunked(), world.dense(), world.learned, 1e-5)


def test_a_sharded_head_gets_the_mean_gradient_of_the_processes_on_its_own_shards():
    assert launch(2, "-m", "support.sharded_head_job").count("agrees") == 2


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    order=st.permutations(range(TOKENS)),
    padding=st.lists(st.integers(0, 2), min_size=TOKENS, max_size=TOKENS),
    garbage=st.sampled_from([float("nan"), float("inf"), -1e30]),
    cut=st.integers(1, TOKENS - 1),
    chunk=st.sampled_from([1, 3, None]),
)
def test_any_packing_padding_and_split_of_the_same_tokens_gives_the_same_gradient(
    order, padding, garbage, cut, chunk
):
    world = World(bias=True)
    expected = gradients(world.dense("js", ce=0.5), world.learned)
    places: list[int] = []
    for token, pads in zip(order, padding, strict=True):
        places += [token] + [-1] * pads
    place = torch.tensor(places)
    real = place >= 0
    counts = TOKENS, int((world.labels != -100).sum())

    def scattered(x, fill):
        padded = x.new_full((len(place), *x.shape[1:]), fill)
        return padded.index_put((real.nonzero().flatten(),), x[place[real]])

    hidden, said = scattered(world.hidden, garbage), scattered(world.said, garbage)
    labels = scattered(world.labels, 0)  # a pad token that is also a real one, such as eos
    total = 0.0
    for some in (slice(0, cut), slice(cut, None)):  # two micro-batches, of different counts
        soft, hard = linear_sums(
            hidden[some].unsqueeze(0),
            world.head,
            [
                SoftTargets((said[some].unsqueeze(0), world.other), "js", mask=real[some].unsqueeze(0)),
                HardTargets(labels[some].unsqueeze(0), real[some].unsqueeze(0)),
            ],
            weights=[1 / counts[0], 0.5 / counts[1]],
            chunk=chunk,
        )
        total = total + soft / counts[0] + 0.5 * hard / counts[1]
    for x, y in zip(gradients(total, world.learned), expected, strict=True):
        torch.testing.assert_close(x, y)


def test_tokens_that_do_not_count_are_not_projected(monkeypatch):
    world, mask, rows = World(), torch.arange(TOKENS) % 4 == 1, []
    made = HeadProjection.project

    def watched(self, which):
        rows.append(len(made(self, which)))
        return made(self, which)

    monkeypatch.setattr(HeadProjection, "project", watched)
    world.chunked(mask=mask, chunk=2)
    assert sum(rows) == 2 * int(mask.sum())
    assert max(rows) == 2


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("tokens", [0, TOKENS])
def test_nothing_to_learn_from_is_a_zero_connected_to_all_that_learns(tokens, reduction):
    world = World(tokens=tokens, bias=True, lora=True)
    value = world.chunked(ce=1.0, mask=torch.zeros(tokens, dtype=torch.bool), reduction=reduction)
    assert (value == 0).all()
    for gradient, x in zip(gradients(value.sum(), world.learned), world.learned, strict=True):
        assert gradient.shape == x.shape
        assert (gradient == 0).all()
