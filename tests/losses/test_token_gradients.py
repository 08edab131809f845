"""Chunked token losses: one pass for all gradients, precision, memory, and clear errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from support import python
from support.token_world import DIVERGENCES, OTHER, SIZE, TOKENS, WIDTH, World, close, every, gradients, same
from tutelage import losses
from tutelage.losses import (
    HardTargets,
    LinearHead,
    LoRA,
    SampledTargets,
    SoftTargets,
    TopKTargets,
    linear_divergence,
    linear_sums,
)


def counted(monkeypatch) -> list[bool]:
    """An entry for each pass over the tokens: whether gradients were made in it."""
    from tutelage.losses import chunked

    passes, go = [], chunked._run

    def watched(problem, tensors, weights, wanted):
        passes.append(wanted is not None)
        return go(problem, tensors, weights, wanted)

    monkeypatch.setattr(chunked, "_run", watched)
    return passes


def test_without_a_gradient_to_make_none_is_made(monkeypatch):
    passes = counted(monkeypatch)
    world = World(bias=True)
    expected = world.chunked(ce=0.5)
    assert passes == [True]
    with torch.no_grad():
        assert world.chunked(ce=0.5) == expected
    for x in world.learned:
        x.requires_grad_(False)
    value = world.chunked(ce=0.5)
    assert value == expected
    assert not value.requires_grad
    assert passes == [True, False, False]


def test_any_scale_of_the_loss_scales_the_gradient_and_projects_nothing_again(monkeypatch):
    world = World()
    expected = gradients(world.dense(), world.learned)
    passes = counted(monkeypatch)
    for scale in (1.0, -3.0, 0.0):
        for x, y in zip(gradients(scale * world.chunked(), world.learned), expected, strict=True):
            torch.testing.assert_close(x, scale * y)
    assert passes == [True] * 3


def test_a_second_backward_pass_finds_the_gradients_as_they_were():
    world = World()
    value = 3.0 * world.chunked(chunk=5)
    first = torch.autograd.grad(value, world.learned, retain_graph=True)
    kept = [x.clone() for x in first]
    second = torch.autograd.grad(value, world.learned)
    for a, b, c in zip(first, second, kept, strict=True):
        assert torch.equal(a, c), "a later backward pass changed what an earlier one gave"
        assert torch.equal(b, c)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value, world.learned)


def test_gradients_accumulate_in_parameters():
    world = World()
    for _ in range(2):
        (0.5 * world.chunked()).backward()
    for x, y in zip(world.learned, gradients(world.dense(), world.learned), strict=True):
        torch.testing.assert_close(x.grad, y)


def test_a_gradient_of_the_gradient_is_refused():
    world = World()
    (by_hidden,) = torch.autograd.grad(world.chunked().square(), [world.hidden], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        by_hidden.sum().backward()


@pytest.mark.parametrize("factor", [1.0, 7.0])
def test_terms_weighted_as_promised_take_one_gradient_and_one_pass(monkeypatch, factor):
    world, found = World(bias=True), []
    passes = counted(monkeypatch)
    for promise in ([2.0, 0.3], [torch.tensor(w, dtype=torch.float64) for w in (2.0, 0.3)]):
        soft, hard = sums(world, promise)
        found.append(gradients(factor * (2.0 * soft + 0.3 * hard), world.learned))
    assert passes == [True, True]
    for one in found:
        for x, y in zip(one, wanted(world, 2.0 * factor, 0.3 * factor), strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("promise", [None, [1.0, 1.0], [2.0, 0.31]])
@pytest.mark.parametrize("weights", [(2.0, 0.3), (2.0, 0.0), (0.0, -1.0)])
def test_terms_weighted_otherwise_get_the_right_gradient_all_the_same(monkeypatch, promise, weights):
    world = World(bias=True)
    passes = counted(monkeypatch)
    terms = sums(world, promise)
    loss = sum(w * term for w, term in zip(weights, terms, strict=True) if w)
    for x, y in zip(gradients(loss, world.learned), wanted(world, *weights), strict=True):
        torch.testing.assert_close(x, y)
    assert passes == [promise is not None, True]


def sums(world: World, promise: Any) -> tuple[Tensor, ...]:
    mask = torch.arange(TOKENS) % 5 > 0
    terms = [SoftTargets((world.said, world.other), temperature=2.0, mask=mask), HardTargets(world.labels)]
    return linear_sums(world.hidden, world.head, terms, weights=promise, chunk=3)


def wanted(world: World, soft: float, hard: float) -> tuple[Tensor, ...]:
    mask = torch.arange(TOKENS) % 5 > 0
    scores = world.scores()
    value = soft * losses.kd(scores, world.teacher(), temperature=2.0, mask=mask, reduction="sum")
    value = value + hard * losses.cross_entropy(scores, world.labels, reduction="sum")
    return gradients(value, world.learned)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_where_scores_are_200(name, dtype):
    world = World(dtype, size=OTHER + 1)
    ends = torch.eye(OTHER + 1, OTHER)
    world.hidden = (200 * torch.eye(TOKENS, WIDTH)).to(dtype).requires_grad_()
    world.head = LinearHead(ends[:, :WIDTH].sub(0.5).mul(2).to(dtype).requires_grad_())
    said = (-200 * torch.eye(TOKENS, OTHER)).to(dtype), ends.sub(0.5).mul(2).to(dtype)
    value = world.chunked(name, teacher=said, chunk=5)
    assert value.dtype == torch.float32
    assert value.isfinite()
    for gradient in gradients(value, [world.hidden, world.head.weight]):
        assert gradient.dtype == dtype
        assert gradient.isfinite().all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_sums_over_tokens_are_not_rounded_to_half_precision(dtype, tolerance):
    """bf16 holds 8 bits: a sum of 2,000 equal numbers in it stops growing at 256 of them."""
    world = World(dtype, tokens=1)
    world.hidden = world.hidden.detach().expand(2000, -1).clone().requires_grad_()
    said = world.teacher().expand(2000, -1)
    value = world.chunked(teacher=said, reduction="sum", chunk=1)
    (found,) = gradients(value / 2000, [world.weight])
    exact = [x.detach().double().requires_grad_() for x in (world.hidden, world.weight)]
    dense = losses.kd(exact[0] @ exact[1].mT, said.double(), temperature=1.0)
    torch.testing.assert_close(value.double() / 2000, dense, rtol=tolerance, atol=0)
    (right,) = gradients(dense, [exact[1]])
    assert (found.double() - right).norm() < tolerance * right.norm()


def test_slopes_that_float16_has_no_room_for_reach_a_scaled_loss():
    """A loss scale comes after the gradients are made: what had vanished by then stays away."""
    world = World(torch.float16, tokens=4, size=3000)
    world.hidden, world.said = (4 * world.hidden.detach()).requires_grad_(), 4 * world.said
    (found,) = gradients(world.chunked(chunk=2) * 2.0**14, [world.weight])
    exact = [x.detach().float().requires_grad_() for x in (world.hidden, world.weight)]
    dense = losses.kd(exact[0] @ exact[1].mT, world.teacher().float(), temperature=1.0)
    (right,) = gradients(dense * 2.0**14, [exact[1]])
    assert (right.abs() < 2.0**14 * 2.0**-24).float().mean() > 0.3, "all of them have room: nothing is tested"
    assert not ((found == 0) & (right.abs() > 2.0**-22)).any()
    assert (found.float() - right).norm() < 1e-2 * right.norm()


def test_under_autocast_projections_are_of_its_precision_and_all_else_float32():
    world = World(torch.float32, bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        found, dense = world.chunked(ce=0.5, chunk=5, temperature=2.0), world.dense(ce=0.5, temperature=2.0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, dense, rtol=1e-6, atol=1e-6)
    for x, y in zip(gradients(found, world.learned), gradients(dense, world.learned), strict=True):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2 * float(y.abs().max()))
    # gradients that wait for the backward pass, outside of autocast, are those of its precision too
    with torch.autocast("cpu", torch.bfloat16):
        each = world.chunked(chunk=5, temperature=2.0, reduction="none").mean()
        at_once = world.chunked(chunk=5, temperature=2.0)
    same(each, at_once, world.learned, 1e-6)


SCRIPT = """
import pathlib, re, resource, sys, torch
from tutelage import losses

def peak(what):
    return int(re.search(what + r":\\s*(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) / 1024

torch.set_num_threads(1)
way, tokens, width, size = sys.argv[1], int(sys.argv[2]), 64, 16_384
def run(n, d, v):
    hidden, head = torch.randn(n, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
    said, other = torch.randn(n, d), torch.randn(v, d)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = peak("VmRSS")
    if way == "dense":
        value = losses.kd(hidden @ head.mT, said @ other.mT, temperature=2.0)
    else:
        value = losses.linear_divergence(hidden, head, (said, other), temperature=2.0, chunk=128)
    (0.5 * value).backward()
    return peak("VmHWM") - before
run(8, 4, 16)
print(run(tokens, width, size))
"""


def test_memory_grows_by_the_hidden_size_and_not_by_the_vocabulary():
    if not Path("/proc/self/status").exists():
        pytest.skip("the largest resident size is read from /proc")
    found = {}
    for way, tokens in (("dense", 2048), ("chunked", 2048), ("chunked", 8192)):
        done = python.run(["-c", SCRIPT, way, str(tokens)])
        assert done.returncode == 0, done.stderr
        found[way, tokens] = float(done.stdout)
    assert found["dense", 2048] > 700, "seven tensors of scores went unnoticed: the measurement does not measure"
    # two chunks of scores are 16 MB, the head's gradient 4
    assert found["chunked", 2048] < 60
    # and 6,144 tokens more are 1.5 MB of gradients: 400 MB of scores each
    assert found["chunked", 8192] - found["chunked", 2048] < 15


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"divergence": "wasserstein"}, "'kl', 'reverse_kl', 'js', 'skew_kl', 'tvd'"),
        ({"beta": 0.5}, "beta is an option of js, not of kl"),
        ({"divergence": "js", "alpha": 0.5}, "alpha is an option of skew_kl, not of js"),
        ({"divergence": "js", "beta": 1.5}, r"must lie in \[0, 1\]"),
        ({"divergence": "skew_kl", "alpha": 1.0}, "nothing is learned"),
        ({"ce_weight": 0.5}, "no labels"),
        ({"ce_weight": -0.5, "labels": torch.zeros(TOKENS, dtype=torch.long)}, "0 or more"),
        ({"ce_weight": 0.5, "labels": torch.zeros(3, dtype=torch.long)}, r"one token for each of \(12,\) positions"),
        ({"vocabulary": SIZE + 1}, f"at most {SIZE}"),
        ({"vocabulary": 0}, "above 0"),
        ({"chunk": 0}, "1 token or more"),
        ({"student_hidden": torch.zeros(TOKENS, 3)}, r"\[\.\.\., D\] and \[V, D\]"),
        ({"student_head": torch.zeros(WIDTH)}, "a row for each token"),
        ({"teacher": (torch.zeros(TOKENS, OTHER), torch.zeros(SIZE + 1, OTHER))}, "pass vocabulary="),
        ({"teacher": (torch.zeros(TOKENS, 3), torch.zeros(SIZE, OTHER))}, "the teacher's hidden states"),
        ({"teacher": torch.zeros(1, SIZE)}, r"must be \(12, \.\.\.\)"),
        ({"teacher": TopKTargets(torch.zeros(TOKENS, 2).long(), torch.zeros(TOKENS, 3))}, "a few classes for each"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_is_allowed(change, message):
    world = World()
    given = {"student_hidden": world.hidden, "student_head": world.weight, "teacher": (world.said, world.other)}
    with pytest.raises(ValueError, match=message):
        linear_divergence(**{**given, **change})


def test_heads_that_cannot_be_are_refused():
    weight = torch.zeros(SIZE, WIDTH)
    with pytest.raises(ValueError, match="above 0"):
        LinearHead(weight, softcap=0.0)
    with pytest.raises(ValueError, match=r"as in torch\.nn\.Linear"):
        LinearHead(weight, torch.zeros(WIDTH))
    with pytest.raises(ValueError, match="LoRA of a"):
        LinearHead(weight, lora=LoRA(torch.zeros(WIDTH, 2), torch.zeros(SIZE, 2)))
    with pytest.raises(ValueError, match="2 weights for 1 terms"):
        linear_sums(torch.zeros(3, WIDTH), weight, [HardTargets(torch.zeros(3).long())], weights=[1.0, 2.0])


@pytest.mark.parametrize("name", list(DIVERGENCES))
def test_a_token_of_soft_labels_may_weigh_anything(name: str) -> None:
    world = World(torch.float64, 3)
    weights, mask = world.draw(TOKENS), world.draw(TOKENS) > -0.5
    divergence, f, more = DIVERGENCES[name]
    term = SoftTargets((world.said, world.other), divergence, 2.0, mask=mask, token_weights=weights, **more)
    found = linear_sums(world.hidden, world.head, [term], weights=[1.0], chunk=2)[0]
    each = f(world.scores(), world.teacher(), temperature=2.0, mask=mask, reduction="none", **more)
    same(found, (each * weights).sum(), world.learned)
    with pytest.raises(ValueError, match="token_weights"):
        linear_sums(world.hidden, world.head, [replace(term, token_weights=weights[1:])])


@pytest.mark.parametrize(("precision", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("chunk", [2, None])
def test_draws_and_labels_share_one_softmax_and_stay_two_losses(
    precision: torch.dtype, tolerance: float, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(precision, 5, bias=True, softcap=2.5)
    index = torch.randint(SIZE, (TOKENS, 4), generator=world.generator)
    weights = world.draw(TOKENS, 4).abs().to(precision)  # whose sum is not 1
    mask = world.draw(TOKENS) > -0.8
    terms = [SoftTargets(SampledTargets(index, weights), mask=mask), HardTargets(world.labels)]
    softmaxes, made = [], Tensor.log_softmax
    monkeypatch.setattr(Tensor, "log_softmax", lambda self, *a: softmaxes.append(len(self)) or made(self, *a))
    soft, hard = linear_sums(world.hidden, world.head, terms, weights=[0.7, 0.3], chunk=chunk)
    assert sum(softmaxes) == int((mask | (world.labels != -100)).sum())
    monkeypatch.undo()
    scores = world.scores()
    right = losses.sampled_kd(scores, index, weights, temperature=1.0, mask=mask, reduction="sum")
    labelled = losses.cross_entropy(scores, world.labels, reduction="sum")
    close(soft, right, tolerance)
    close(hard, labelled, tolerance)
    same(0.7 * soft + 0.3 * hard, 0.7 * right + 0.3 * labelled, world.learned, tolerance)
