"""Shared by all tests: no hub, one thread, one fixed seed."""

from __future__ import annotations

import gc
import multiprocessing.context
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from support import python

frozen_modules = 0
"""The number of imported modules when their objects were last frozen."""

# Nothing here imports torch before a test runs: the process that only hands out tests needs none.


@pytest.fixture(autouse=True, scope="session")
def _no_seeds_for_absent_devices() -> Iterator[None]:
    """Torch stores each seed for devices that it has not initialised, with the call stack, which is slow."""
    import torch

    with pytest.MonkeyPatch.context() as patch:
        for device in (torch.cuda, torch.xpu, torch.mtia):
            if not device.is_available():
                patch.setattr(device, "manual_seed_all", lambda seed: None)
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="module")
def cutter() -> Any:
    """A tokenizer with the template of ChatML."""
    from support import language_worlds

    return language_worlds.tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, cutter: Any) -> Path:
    """Of a small causal language model and that tokenizer."""
    from support import language_worlds

    return language_worlds.llama(tmp_path_factory.mktemp("models") / "teacher", cutter=cutter)


@pytest.fixture
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of the package start as forks of a server that has imported torch, not as fresh interpreters."""
    monkeypatch.setitem(multiprocessing.context._concrete_contexts, "spawn", python.context())


@pytest.fixture(autouse=True)
def _imports_are_not_searched_for_garbage() -> None:
    """Accelerate collects garbage after each training, which took longer than the trainings of most tests."""
    global frozen_modules
    if len(sys.modules) > frozen_modules + 20:
        gc.collect()
        gc.freeze()
        frozen_modules = len(sys.modules)
