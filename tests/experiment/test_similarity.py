"""The similarity of classes is E[p_i p_j], however the examples are batched."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from tutelage.data import Batch
from tutelage.engine import RunDirectory
from tutelage.evaluation import evaluate
from tutelage.experiment.measure import MOST_CLASSES, TEMPERATURES, Similarities, class_similarity

EXACT = {"rtol": 0, "atol": 1e-12}


def logits(seed, n, classes, scale=3.0):
    return scale * torch.randn(n, classes, generator=torch.Generator().manual_seed(seed))


def test_by_hand():
    # two examples: p = (0.8, 0.1, 0.1) and (0.2, 0.6, 0.2)
    p = torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.6, 0.2]], dtype=torch.float64)
    by_hand = [[0.34, 0.10, 0.06], [0.10, 0.185, 0.065], [0.06, 0.065, 0.025]]
    assert_close(class_similarity(p.log(), 1), torch.tensor(by_hand, dtype=torch.float64), **EXACT)
    assert_close(class_similarity(4 * p.log(), 4), torch.tensor(by_hand, dtype=torch.float64), **EXACT)


@given(st.integers(0, 999), st.integers(1, 20), st.integers(2, 8), st.sampled_from([0.5, 1, 4, 20]))
def test_it_is_symmetric_sums_to_one_and_its_rows_are_the_mean_probabilities(seed, n, classes, temperature):
    z = logits(seed, n, classes)
    sim = class_similarity(z, temperature)
    assert_close(sim, sim.T, **EXACT)
    assert_close(sim.sum(), torch.ones((), dtype=torch.float64), **EXACT)
    assert_close(sim.sum(1), torch.softmax(z.double() / temperature, 1).mean(0), **EXACT)


def test_no_constant_that_is_added_to_all_logits_of_an_example_changes_it():
    z = logits(0, 9, 5).double()
    assert_close(class_similarity(z, 2), class_similarity(z + torch.arange(9.0)[:, None], 2), **EXACT)


def test_with_the_temperature_every_pair_becomes_alike():
    level = torch.full((6, 6), 1 / 36, dtype=torch.float64)
    assert_close(class_similarity(logits(1, 50, 6), 1e12), level, **EXACT)


def test_one_hot_answers_leave_the_diagonal():
    answers = torch.tensor([0, 0, 1, 2])
    sim = class_similarity(1e4 * nn.functional.one_hot(answers, 4), 1)
    assert_close(sim, torch.diag(torch.tensor([0.5, 0.25, 0.25, 0.0], dtype=torch.float64)), **EXACT)


@given(st.lists(st.integers(0, 7), min_size=1, max_size=6), st.integers(0, 99))
def test_batches_make_no_difference(sizes, seed):
    z = logits(seed, sum(sizes), 5)
    parts = Similarities()
    for part in z.split(sizes):
        parts.add(part)
    means = parts.means()
    assert list(means) == (list(TEMPERATURES) if sum(sizes) else [])
    for temperature, mean in means.items():
        assert_close(mean, class_similarity(z, temperature), **EXACT)


def test_positions_that_do_not_count_are_not_seen():
    z, labels = logits(2, 8, 3), torch.arange(8) % 3
    batch = Batch(z, labels, mask=torch.arange(8) < 5)
    seen = Similarities()
    evaluate(nn.Identity(), [batch], torch.device("cpu"), watch=seen.add)
    assert seen.n == 5
    assert_close(seen.means()[4], class_similarity(z[:5], 4), **EXACT)


def test_the_file_holds_the_upper_triangle(tmp_path):
    seen = Similarities()
    seen.add(z := logits(3, 30, 4))
    seen.write(RunDirectory(tmp_path), "teacher")
    kept = json.loads((tmp_path / "similarity" / "teacher.json").read_text())
    assert (kept["classes"], kept["n"], list(kept["sim"])) == (4, 30, [str(t) for t in TEMPERATURES])
    sim = class_similarity(z, 8).tolist()
    assert kept["sim"]["8"] == pytest.approx([sim[i][j] for i in range(4) for j in range(i, 4)], rel=1e-5)


def test_a_vocabulary_is_not_kept_and_the_file_says_how_large_it_was(tmp_path):
    seen = Similarities()
    seen.add(torch.zeros(2, MOST_CLASSES + 1))
    seen.write(RunDirectory(tmp_path), "teacher")
    kept = json.loads((tmp_path / "similarity" / "teacher.json").read_text())
    assert kept == {"classes": MOST_CLASSES + 1, "n": 2, "sim": {}}
    assert seen.sums == {}


def test_only_the_writing_process_writes(tmp_path):
    seen = Similarities()
    seen.add(logits(3, 3, 4))
    seen.write(RunDirectory(tmp_path, writes=False), "teacher")
    assert list(tmp_path.iterdir()) == []
