"""Own loaders, students and teachers train as in a loop by hand, or are refused before training."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime", reason="needs the extra export")
pytest.importorskip("datasets", reason="needs the extra text")

from support.matrix import PAGE, RESULTS, Cells, run_all, run_cell, table
from support.matrix_loaders import LOADERS
from support.matrix_students import STUDENTS
from support.matrix_teachers import TEACHERS

L, S, T = list(LOADERS), list(STUDENTS), list(TEACHERS)
DIAGONAL = [(L[i], S[i], T[i % len(T)]) for i in range(len(L))]


def right(cells: Cells) -> tuple[int, int, list[str]]:
    """How many cells train as by hand, of how many, and which are neither right nor refused."""
    every = [(f"{a} | {b} | {c}", t) for a, x in cells.items() for b, y in x.items() for c, t in y.items()]
    return sum(not t for _, t in every), len(every), [f"{name}: {t}" for name, t in every if t.startswith("!")]


@pytest.mark.parametrize(("loader", "student", "teacher"), DIAGONAL)
def test_a_cell_of_the_matrix(loader: str, student: str, teacher: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcome = run_cell(loader, student, teacher, tmp_path / "run")
    assert not outcome.startswith("!"), outcome
    assert outcome == json.loads(RESULTS.read_text(encoding="utf-8"))[loader][student][teacher]


def test_the_page_has_the_table_of_the_results() -> None:
    cells = json.loads(RESULTS.read_text(encoding="utf-8"))
    count, total, wrong = right(cells)
    assert wrong == []
    assert total == len(L) * len(S) * len(T) == 4_800
    assert count >= 0.9 * total
    assert table(cells) in PAGE.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_whole_matrix() -> None:
    assert run_all() == json.loads(RESULTS.read_text(encoding="utf-8"))
