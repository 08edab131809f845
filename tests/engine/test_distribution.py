"""The same gradient for any split of the batch and any number of processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from support.launching import assert_same, language_world, launch, same_students, steps, torchrun


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return steps(tmp_path_factory.mktemp("one"), 1, 1)


def test_accumulation_gives_the_gradient_of_the_whole_batch(alone: dict[str, Tensor], tmp_path: Path) -> None:
    assert_same(alone, steps(tmp_path, 1, 4), 1e-6)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_two_processes_give_the_gradient_of_one(alone: dict[str, Tensor], tmp_path: Path, accumulate: int) -> None:
    assert_same(alone, steps(tmp_path, 2, accumulate), 1e-6)
    one = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in one if "terms" in line] == [1, 2, 3]


def test_projectors_of_the_feature_method_agree_too(tmp_path: Path) -> None:
    one = steps(tmp_path / "one", 1, 1, "feature")
    assert any(".losses.1.projector.body" in name for name in one)
    assert_same(one, steps(tmp_path / "two", 2, 2, "feature"), 1e-5)
    assert not any("losses" in name for name in load_file(str(tmp_path / "two" / "student.safetensors")))


def test_a_language_model_learns_the_same_however_its_texts_are_packed_and_split(tmp_path: Path) -> None:
    one = steps(tmp_path / "one", 1, 1, "token")
    assert any(".projectors.1.body" in name for name in one)
    for kind, processes, accumulate in (
        ("token", 1, 4), ("token-packed", 2, 2), ("fsdp-token", 2, 3), ("token-sharded-teacher", 2, 2),
    ):  # fmt: skip
        assert_same(one, steps(tmp_path / kind, processes, accumulate, kind), 2e-5)


def test_a_sharded_student_writes_what_a_whole_one_does(tmp_path: Path) -> None:
    one = steps(tmp_path / "one", 1, 1, "on-policy", count=2)
    for kind in ("fsdp-on-policy", "fsdp-served-on-policy"):  # or a server that has its weights
        two = steps(tmp_path / kind, 2, 2, kind, count=2)
        assert one.keys() == two.keys()
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=2e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_the_memory_of_a_contrast_moves_by_what_all_processes_saw(tmp_path: Path) -> None:
    from support.distributed_job import BATCH

    steps(tmp_path, 2, 2, "crd", count=1)
    assert [(tmp_path / f"moved-{rank}").read_text() for rank in (0, 1)] == [str(BATCH)] * 2


def test_peers_and_their_stale_copies_agree_too(tmp_path: Path) -> None:
    one = steps(tmp_path / "one", 1, 1, "mutual")
    assert {"3/method.members.0.0.weight", "3/method.stale.1.0.weight"} <= one.keys()
    for kind in ("mutual", "fsdp-mutual"):
        two = steps(tmp_path / kind, 2, 2, kind)
        assert two.keys() == one.keys()
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_mean_of_means_would_differ(alone: dict[str, Tensor]) -> None:
    """The guard of the guard: averaging micro-batch means moves the weights by far more than the tolerance."""
    from support.distributed_job import BATCH, Rows
    from tutelage.data import RankSlice
    from tutelage.data.loader import PlannedBatches

    last = list(PlannedBatches(Rows(), BATCH, seed=3).epoch(0, RankSlice(accumulate=4)))[-1]
    counts = [int(b.labelled().sum()) for b in last]
    assert len(set(counts)) > 1, "the last batch must be uneven for the test above to mean anything"


@pytest.mark.parametrize(("accumulate", "kind"), [(1, "fsdp"), (2, "fsdp-root")])
def test_sharded_student_with_projectors_agrees(
    alone: dict[str, Tensor], tmp_path: Path, accumulate: int, kind: str
) -> None:
    assert_same(alone, steps(tmp_path, 2, accumulate, kind), 1e-5)
    exported = load_file(str(tmp_path / "student.safetensors"))
    assert exported.keys() == {"0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"}


def test_a_sharded_checkpoint_goes_on_unsharded_and_the_other_way_round(tmp_path: Path) -> None:
    whole = steps(tmp_path / "whole", 1, 1, count=5)
    for first, second in ((("fsdp", 2), ("plain", 1)), (("plain", 1), ("fsdp", 2))):
        out = tmp_path / f"{first[0]}-{second[0]}"
        steps(out, first[1], 1, first[0], count=2)
        resumed = steps(out, second[1], 1, second[0], count=5)
        assert {k.split("/")[0] for k in resumed} == {"3", "4", "5"}
        assert_same({k: v for k, v in whole.items() if k.split("/")[0] in "345"}, resumed, 1e-5)


def test_averages_go_on_with_another_number_of_processes(tmp_path: Path) -> None:
    launch(1, "-m", "support.distributed_job", str(tmp_path / "whole"), "1", "ema", "5")
    launch(2, "-m", "support.distributed_job", str(tmp_path / "cut"), "1", "ema", "2")
    launch(1, "-m", "support.distributed_job", str(tmp_path / "cut"), "1", "ema", "5")
    whole, cut = (load_file(str(tmp_path / run / "student.safetensors")) for run in ("whole", "cut"))
    for name in whole:
        torch.testing.assert_close(whole[name], cut[name], rtol=1e-5, atol=1e-6)


def test_torchrun_runs_a_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text(
        "data: digits\n"
        "teacher: {model: mlp, options: {hidden: [64]}}\nstudent: {model: mlp, options: {hidden: [8]}}\n"
        "method: logit\ntrain: {steps: 20, batch_size: 64}\n"
    )
    command = ("-m", "tutelage", "run", str(recipe), "--out")
    launch(1, *command, str(tmp_path / "1"), cwd=tmp_path)
    torchrun(2, *command, str(tmp_path / "2"), cwd=tmp_path)
    same_students(tmp_path / "1", tmp_path / "2", rtol=1e-3, atol=1e-4)
    assert (tmp_path / "2" / "report.html").exists()
    found = [json.loads((tmp_path / p / "summary.json").read_text())["processes"] for p in "12"]
    assert found == [1, 2]


def test_a_recipe_shards_its_teacher(tmp_path: Path) -> None:
    """Students are cut from it, compared with it and taught by it as by a whole one."""
    language_world(tmp_path)
    recipe = tmp_path / "small.yaml"
    recipe.write_text(
        "data: {source: table, path: chats.jsonl, task: causal, text: messages, max_length: 64}\n"
        "teacher: {model: 'hf:teacher', inference: {sharded: true}}\nstudent: {model: teacher, layers: 2}\n"
        "method: {kind: token, hidden: 0.1}\nbaseline: false\n"
        "train: {steps: 6, batch_size: 8, optimizer: {kind: sgd, lr: 0.1}}\n"
    )
    for processes in (1, 2):
        launch(processes, "-m", "tutelage", "run", str(recipe), "--out", str(tmp_path / str(processes)), cwd=tmp_path)
    same_students(tmp_path / "1", tmp_path / "2", rtol=1e-4, atol=1e-5)
    first, second = (json.loads((tmp_path / p / "summary.json").read_text()) for p in "12")
    assert second["teacher"]["loss"] == pytest.approx(first["teacher"]["loss"], rel=1e-5)
    kl = [s["students"]["distilled"]["last"]["kl"]["mean"] for s in (first, second)]
    assert kl[0] == pytest.approx(kl[1], rel=1e-3)
    assert set(second["latency"]) == {"student"}
    assert "teacher" in json.loads((tmp_path / "2" / "samples" / "written.json").read_text())["models"]
    assert (tmp_path / "2" / "report.html").exists()
