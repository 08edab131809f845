"""DeepSpeed's ZeRO gives the steps and the checkpoints of one process. It compiles a part of itself at first."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from support.launching import HERE, assert_same, language_world, launch, same_students, steps

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="pip install deepspeed"),
]


def zero(stage: int) -> dict[str, str]:
    """What `accelerate launch` would set, on CPUs."""
    return {
        "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage), "DS_ACCELERATOR": "cpu",
        "PATIENCE": "1200",
    }  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return steps(tmp_path_factory.mktemp("one"), 1, 1, count=5)


@pytest.mark.parametrize(("stage", "accumulate"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_a_training_under_zero_makes_the_steps_of_one_process(
    stage: int, accumulate: int, whole: dict[str, Tensor], tmp_path: Path
) -> None:
    found = steps(tmp_path, 2, accumulate, f"zero{stage}", **zero(stage))
    assert_same({k: v for k, v in whole.items() if k.split("/")[0] in "123"}, found, 1e-5)
    exported = load_file(str(tmp_path / "student.safetensors"))
    assert exported.keys() == {"0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"}


def test_weights_stay_whole_numbers_of_32_bits_where_sums_run_in_bf16(
    whole: dict[str, Tensor], tmp_path: Path
) -> None:
    one = steps(tmp_path / "one", 1, 1, ACCELERATE_MIXED_PRECISION="bf16")
    two = steps(tmp_path / "two", 2, 1, "zero2", ACCELERATE_MIXED_PRECISION="bf16", **zero(2))
    assert_same(one, two, 2e-2)
    assert all(x.dtype == torch.float32 for x in two.values())
    assert any(bool((x != x.bfloat16().float()).any()) for x in two.values())
    assert any(bool((x - whole[k]).abs().max() > 1e-5) for k, x in two.items()), "nothing was in bf16"


@pytest.mark.parametrize("first", ["zero1", "zero2", "plain"])
def test_its_checkpoint_goes_on_without_it_and_the_other_way_round(
    first: str, whole: dict[str, Tensor], tmp_path: Path
) -> None:
    stages = {"zero1": zero(1), "zero2": zero(2), "plain": dict[str, str]()}
    second = "zero2" if first == "plain" else "plain"
    steps(tmp_path, 1 if first == "plain" else 2, 1, first, count=2, **stages[first])
    resumed = steps(tmp_path, 1 if second == "plain" else 2, 1, second, count=5, **stages[second])
    assert {k.split("/")[0] for k in resumed} == {"3", "4", "5"}
    assert_same({k: v for k, v in whole.items() if k.split("/")[0] in "345"}, resumed, 1e-5)


def test_a_recipe_of_a_language_model_runs_under_it(tmp_path: Path) -> None:
    language_world(tmp_path)
    recipe = tmp_path / "small.yaml"
    recipe.write_text(
        "data: {source: table, path: chats.jsonl, task: causal, text: messages, max_length: 64, pack: true}\n"
        "teacher: {model: 'hf:teacher'}\nstudent: {model: teacher, layers: 2}\nmethod: token\n"
        "train: {steps: 6, batch_size: 8, accumulate: 2, clip: 1.0, optimizer: {kind: adamw, lr: 1e-3}}\n"
    )
    words = ("run", str(recipe), "--out")
    launch(1, "-m", "tutelage", *words, str(tmp_path / "one"), cwd=tmp_path)
    script = tmp_path / "zero.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(HERE)!r})\nfrom support import distributed_job\n"
        "distributed_job.deepspeed_on_cpus()\nimport runpy\nrunpy.run_module('tutelage', run_name='__main__')\n"
    )
    launch(2, str(script), *words, str(tmp_path / "two"), cwd=tmp_path, **zero(2))
    same_students(tmp_path / "one", tmp_path / "two", rtol=1e-3, atol=1e-4)


def test_what_it_does_not_go_with_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="ZeRO stage 3 is not supported with DeepSpeed"):
        steps(tmp_path, 2, 1, "zero3", **zero(3))
