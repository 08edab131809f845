"""The laws that every loss obeys, over one table of all of them."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.loss_cases import CASES, UTILITIES, Batch, Case
from tutelage import losses

every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
per_example = pytest.mark.parametrize("case", [c for c in CASES if not c.relation], ids=lambda c: c.id)
relations = pytest.mark.parametrize("case", [c for c in CASES if c.relation], ids=lambda c: c.id)
divergences = pytest.mark.parametrize("case", [c for c in CASES if c.divergence], ids=lambda c: c.id)
with_teacher = pytest.mark.parametrize("case", [c for c in CASES if c.teacher], ids=lambda c: c.id)
halves = [torch.float32, torch.bfloat16, torch.float16]
law = settings(derandomize=True, deadline=None, max_examples=6)


def gradient(case: Case, batch: Batch, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Value and gradient by the student."""
    student = batch.student.detach().clone().requires_grad_()
    value = case(Batch(student, batch.teacher, batch.extra), **options)
    assert value.requires_grad, "the loss is not connected to the student"
    value.sum().backward()
    return value.detach(), student.grad


def test_every_exported_objective_is_in_the_table():
    assert {case.function for case in CASES} == set(losses.__all__) - UTILITIES
    assert len({case.id + str(case.shape) for case in CASES}) == len(CASES)


@pytest.mark.parametrize("name", sorted(set(losses.__all__) - UTILITIES))
def test_every_objective_has_the_one_signature(name):
    parameters = inspect.signature(getattr(losses, name)).parameters
    assert next(iter(parameters)) in ("student", "student_hidden")
    assert list(parameters)[-2:] == ["mask", "reduction"]
    for option in ("mask", "reduction"):
        assert parameters[option].kind is inspect.Parameter.KEYWORD_ONLY
    assert parameters["mask"].default is None
    assert parameters["reduction"].default == "mean"
    assert "Reference:" in inspect.getdoc(getattr(losses, name)) or name == "cross_entropy"


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_student_gets_a_gradient(case, dtype):
    value, grad = gradient(case, case.batch(5, dtype=dtype))
    assert value.dtype == grad.dtype == dtype
    assert grad.isfinite().all()
    assert grad.abs().max() > 1e-6


@divergences
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_divergence_is_zero_with_zero_gradient_at_equality(case, dtype, tolerance):
    if case.function == "pkt" and case.options:
        tolerance = 1e-7  # the authors add that much inside the logarithms
    batch = case.batch(5, dtype=dtype)
    value, grad = gradient(case, Batch(batch.teacher.clone(), batch.teacher, batch.extra))
    assert abs(value) < tolerance
    assert grad.abs().max() < tolerance


@divergences
def test_divergence_is_positive_elsewhere(case):
    for seed in range(3):
        assert case(case.batch(5, seed)) > 1e-6


@with_teacher
def test_no_gradient_reaches_the_teacher(case):
    batch = case.batch(5)
    student, teacher = batch.student.requires_grad_(), batch.teacher.requires_grad_()
    case(Batch(student, teacher, batch.extra)).backward()
    assert student.grad is not None
    # CRD's teacher argument is the output of a head that is learned with the student
    assert (teacher.grad is not None) == case.teacher_learns


def spoil(x: torch.Tensor, keep: torch.Tensor, garbage: float) -> torch.Tensor:
    x = x.clone()
    if x.is_floating_point():
        x[~keep] = garbage
    return x


@every
@law
@given(
    keep=st.lists(st.booleans(), min_size=4, max_size=6), garbage=st.sampled_from([float("nan"), float("inf"), -1e30])
)
def test_mask_equals_deletion_whatever_masked_rows_hold(case, keep, garbage):
    keep = torch.tensor([True, True, *keep])
    batch = case.batch(len(keep))
    spoilt, mask = batch.map(lambda x: spoil(x, keep, garbage)), case.mask(keep)
    for reduction in ("mean", "sum"):
        value, grad = gradient(case, spoilt, mask=mask, reduction=reduction)
        expected, expected_grad = gradient(case, batch[keep], reduction=reduction)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(grad[keep], expected_grad)
        assert (grad[~keep] == 0).all()
    if not case.relation:
        value = case(spoilt, mask=mask, reduction="none")
        torch.testing.assert_close(value[keep], case(batch[keep], reduction="none"))
        assert (value[~keep] == 0).all()


@every
def test_a_mask_of_numbers_counts_rows_and_does_not_weigh_them(case):
    keep = torch.tensor([True, True, False, True, True])
    batch = case.batch(5)
    weighty = case.mask(keep) * 3
    torch.testing.assert_close(case(batch, mask=weighty), case(batch, mask=case.mask(keep)))
    with pytest.raises(ValueError, match="a mask is booleans"):
        case(batch, mask=case.mask(keep) * 3.0)


@every
def test_a_full_mask_changes_nothing(case):
    batch = case.batch(5)
    full = case.mask(torch.ones(5, dtype=torch.bool))
    for reduction in ("mean", "sum"):
        torch.testing.assert_close(case(batch, mask=full, reduction=reduction), case(batch, reduction=reduction))


@every
@pytest.mark.parametrize("k", [2, 3])
def test_a_repeated_batch_has_the_same_mean_or_the_one_its_relation_states(case, k):
    batch = case.batch(5)
    value = case(batch.map(lambda x: x.repeat(k, *[1] * (x.ndim - 1))))
    if case.repeated is not None:
        torch.testing.assert_close(value, case.repeated(k) * case(batch))
    else:
        assert not torch.isclose(value, case(batch)), "the docstring says that this one changes"


@every
@law
@given(order=st.permutations(range(5)), seed=st.integers(0, 9))
def test_order_of_examples_does_not_matter(case, order, seed):
    batch, order = case.batch(5, seed), torch.tensor(order)
    torch.testing.assert_close(case(batch[order]), case(batch))
    if not case.relation:
        torch.testing.assert_close(case(batch[order], reduction="none"), case(batch, reduction="none")[order])


@every
def test_gradient_is_that_of_the_value(case):
    batch = case.batch(4, seed=1)
    student = batch.student.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: case(Batch(x, batch.teacher, batch.extra)), (student,))


@every
@pytest.mark.parametrize("dtype", halves, ids=str)
@pytest.mark.parametrize("pattern", ["random", "opposite", "constant", "zero", "tiny"])
def test_finite_at_logits_of_200(case, dtype, pattern):
    batch = case.batch(5, dtype=dtype)
    student, teacher = batch.student, batch.teacher
    if pattern == "random":
        student, teacher = student.sign() * 200, None if teacher is None else teacher.sign() * 200
    elif pattern == "opposite":
        student = student.sign() * 200
        if teacher is not None:
            teacher = -student if teacher.shape == student.shape else teacher.sign() * -200
    elif pattern == "constant":
        student, teacher = torch.full_like(student, 200), None if teacher is None else teacher.sign() * 200
    elif pattern == "zero":
        student, teacher = torch.zeros_like(student), None if teacher is None else torch.zeros_like(teacher)
    else:
        # fp16 has no room for the gradient of a normalised vector that is smaller
        student = student * (1e-3 if dtype == torch.float16 else 1e-7)
    value, grad = gradient(case, Batch(student, teacher, batch.extra))
    assert value.dtype == torch.float32
    assert grad.dtype == dtype
    assert value.isfinite()
    assert grad.isfinite().all()


@every
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_an_empty_batch_gives_a_connected_zero(case, reduction):
    value, grad = gradient(case, case.batch(0), reduction=reduction)
    assert value == 0
    assert grad.shape == (0, *case.shape)


@every
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_fully_masked_batch_gives_a_connected_zero(case, reduction):
    none = torch.zeros(4, dtype=torch.bool)
    batch = case.batch(4).map(lambda x: spoil(x, none, float("nan")))
    value, grad = gradient(case, batch, mask=case.mask(none), reduction=reduction)
    assert value == 0
    assert (grad == 0).all()


@every
def test_a_batch_of_one_is_finite(case):
    value, grad = gradient(case, case.batch(1))
    assert value.isfinite()
    assert grad.isfinite().all()


@pytest.mark.parametrize("case", [c for c in CASES if not c.projects], ids=lambda case: case.id)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(case, dtype):
    batch = case.batch(5, dtype=dtype)
    value, grad = gradient(case, batch)
    student = batch.student.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = case(Batch(student, batch.teacher, batch.extra))
    cast.backward()
    assert torch.equal(value, cast)
    assert torch.equal(grad, student.grad)


@per_example
def test_reductions_agree(case):
    batch = case.batch(5)
    each = case(batch, reduction="none")
    assert each.shape == ((5, case.tokens) if case.tokens else (5,))
    if case.function == "distillation":
        each = each.sum(0)
        torch.testing.assert_close(each, case(batch, reduction="sum"))
        return
    torch.testing.assert_close(each.sum(), case(batch, reduction="sum"))
    torch.testing.assert_close(each.mean(), case(batch, reduction="mean"))


@per_example
def test_the_sums_of_two_halves_are_the_sum_of_the_whole(case):
    batch = case.batch(6)
    halves = case(batch[:2], reduction="sum") + case(batch[2:], reduction="sum")
    torch.testing.assert_close(halves, case(batch, reduction="sum"))


@relations
def test_a_relation_has_no_value_per_row_and_says_so(case):
    with pytest.raises(ValueError, match="relations between the rows"):
        case(case.batch(5), reduction="none")


@relations
def test_a_relations_sum_divides_to_its_mean(case):
    batch, keep = case.batch(5), torch.tensor([True, True, False, True, True])
    torch.testing.assert_close(case(batch, reduction="sum") / 5, case(batch))
    torch.testing.assert_close(case(batch, mask=keep, reduction="sum") / 4, case(batch, mask=keep))


@every
def test_an_unknown_reduction_is_refused(case):
    with pytest.raises(ValueError, match="reduction='average'"):
        case(case.batch(3), reduction="average")


@with_teacher
def test_a_teacher_of_another_batch_is_refused_and_not_broadcast(case):
    batch = case.batch(5)
    for other in (batch.teacher[:1], batch.teacher[:4]):
        with pytest.raises(ValueError, match=r"\(5, "):
            case(Batch(batch.student, other, batch.extra))


@every
@pytest.mark.parametrize("shape", [(4,), (1,), (5, 1), ()])
def test_a_mask_of_another_shape_is_refused_and_not_broadcast(case, shape):
    with pytest.raises(ValueError, match="mask"):
        case(case.batch(5), mask=torch.ones(shape, dtype=torch.bool))


temperate = pytest.mark.parametrize(
    "case",
    [c for c in CASES if "temperature" in inspect.signature(getattr(losses, c.function)).parameters],
    ids=lambda c: c.id,
)


@temperate
@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_above_zero_is_refused(case, temperature):
    with pytest.raises(ValueError, match="temperature"):
        case(case.batch(3), temperature=temperature)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 3, 4)])
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.shape == (6,) and c.teacher == (6,) and c.function != "crd"], ids=lambda c: c.id
)
def test_rows_may_be_tokens_of_any_leading_shape(case, leading):
    size = 24
    batch = case.batch(size)
    count = torch.Size(leading).numel()
    flat = batch[:count]
    shaped = flat.map(lambda x: x.reshape((*leading, *x.shape[1:])))
    torch.testing.assert_close(case(shaped), case(flat))
    mask = torch.rand(count) > 0.3
    torch.testing.assert_close(case(shaped, mask=mask.reshape(leading)), case(flat, mask=mask))
