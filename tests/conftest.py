"""Shared by all tests: no hub, one thread, one fixed seed."""

from __future__ import annotations

import gc
import multiprocessing.context
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from support import python
from support.language_worlds import cutter, folder

__all__ = ["cutter", "folder"]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of the package start as forks of a server that has imported torch, not as fresh interpreters."""
    monkeypatch.setitem(multiprocessing.context._concrete_contexts, "spawn", python.context())


@pytest.fixture(autouse=True, scope="module")
def _imports_are_not_searched_for_garbage() -> None:
    """Accelerate collects garbage after each training, which took longer than the trainings of most tests."""
    gc.collect()
    gc.freeze()
