"""A teacher never learns, never forgets, and is never asked about what it has not seen."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from support.worlds import unsettled
from tutelage.data import Batch, SequentialBatches, load_images
from tutelage.errors import CapabilityError
from tutelage.methods import DistillationModule, LogitMethod, check_capabilities
from tutelage.taps import Needs
from tutelage.teachers import LiveTeacher, MemoryTeacher
from tutelage.teachers.model_copies import find_blocks


def batch(n: int = 6) -> Batch:
    return Batch(torch.randn(n, 1, 8, 8), torch.zeros(n).long(), ids=torch.arange(n))


def test_a_later_train_call_changes_neither_signal_nor_buffers() -> None:
    teacher = LiveTeacher(unsettled())
    given, before = batch(), {k: v.clone() for k, v in teacher.model.state_dict().items()}
    first = teacher.signal(given, Needs()).dense()
    teacher.model.train()
    assert torch.equal(first, teacher.signal(given, Needs()).dense())
    teacher.model.stages[0].train()  # a part of it, as somebody's own callback might
    assert torch.equal(first, teacher.signal(given, Needs()).dense())
    assert all(torch.equal(v, before[k]) for k, v in teacher.model.state_dict().items())


def test_train_bn_uses_the_batch_and_moves_nothing() -> None:
    teacher = LiveTeacher(unsettled(), mode="train_bn")
    before = {k: v.clone() for k, v in teacher.model.state_dict().items()}
    a, b = batch(), batch()
    mixed = Batch(torch.cat([a.inputs, 5 * b.inputs]), torch.zeros(12).long())
    alone, among = teacher.signal(a, Needs()).dense(), teacher.signal(mixed, Needs()).dense()[:6]
    assert not torch.allclose(alone, among)
    assert torch.equal(alone, teacher.signal(a, Needs()).dense()), "dropout must stay off"
    assert all(torch.equal(v, before[k]) for k, v in teacher.model.state_dict().items())
    with pytest.raises(CapabilityError, match="no batch norm"):
        LiveTeacher(nn.Linear(2, 2), mode="train_bn")


def test_no_gradient_and_out_of_the_student_s_reach() -> None:
    teacher, student = LiveTeacher(unsettled()), unsettled()
    module = DistillationModule(student, LogitMethod())
    terms = module(batch(), teacher.signal(batch(), Needs()))
    sum(t.sum for t in terms.values()).backward()
    assert all(p.grad is None for p in teacher.model.parameters())
    mine = {id(p) for p in module.parameters()}
    assert not mine & {id(p) for p in teacher.model.parameters()}
    assert len(module.state_dict()) == len(student.state_dict())


def test_memory_gives_the_live_logits_by_sample_whatever_the_order() -> None:
    data = load_images("digits", limit=100)
    live = LiveTeacher(unsettled())
    memory = MemoryTeacher(live, SequentialBatches(data.train, 32))
    rows = torch.randperm(100)[:40]
    shuffled = data.train.fetch(rows)
    torch.testing.assert_close(memory.signal(shuffled, Needs()).dense(), live.signal(shuffled, Needs()).dense())


def test_memory_refuses_other_samples_other_views_and_other_needs() -> None:
    data = load_images("digits", limit=50, augment=["flip"])
    memory = MemoryTeacher(LiveTeacher(unsettled()), SequentialBatches(data.train))
    with pytest.raises(CapabilityError, match="no teacher outputs in memory"):
        memory.signal(data.test.fetch(torch.arange(4)), Needs())
    with pytest.raises(CapabilityError, match="another view"):
        memory.signal(data.train.fetch(torch.arange(4), torch.arange(4)), Needs())
    with pytest.raises(CapabilityError, match="no sample ids"):
        memory.signal(Batch(torch.zeros(1, 1, 8, 8), torch.zeros(1).long()), Needs())
    method = LogitMethod()
    method.needs = Needs(hidden=("stages.0",))
    with pytest.raises(CapabilityError, match="needs hidden"):
        check_capabilities(method, memory)


def test_memory_refuses_an_id_that_stands_for_two_samples() -> None:
    twice = batch()
    with pytest.raises(CapabilityError, match="same id"):
        MemoryTeacher(LiveTeacher(unsettled()), [twice, twice])


def test_hidden_states_are_remembered_row_by_row() -> None:
    data = load_images("digits", limit=50)
    live, needs = LiveTeacher(unsettled()), Needs(hidden=("stages.0", "head:input"))
    memory = MemoryTeacher(live, SequentialBatches(data.train, batch_size=7), needs=needs)
    rows = torch.tensor([31, 4, 18])
    batch = data.train.fetch(rows)
    said, expected = memory.signal(batch, needs), live.signal(batch, needs)
    torch.testing.assert_close(said.dense(), expected.dense())
    for tap in needs.hidden:
        torch.testing.assert_close(said.hidden[tap], expected.hidden[tap])
    assert memory.signal(batch, Needs(logits=False, hidden=("stages.0",))).logits is None
    with pytest.raises(CapabilityError, match=r"stages\.1 of the teacher is not in memory"):
        memory.signal(batch, Needs(hidden=("stages.1",)))


def test_the_blocks_of_a_teacher_share_nothing_and_hold_no_head() -> None:
    pytest.importorskip("transformers")
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32
    )
    bert = BertForMaskedLM(config)  # says that its embeddings are not to be split, which are tied to the head
    assert find_blocks(bert) == list(bert.bert.encoder.layer)
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    assert find_blocks(plain) == [plain[0], plain[2]]
    with pytest.raises(CapabilityError, match="no list of layers"):
        find_blocks(nn.Linear(4, 3))
    with pytest.raises(CapabilityError, match="batch_size is set"):
        LiveTeacher(plain, sharded=True, batch_size=2)
