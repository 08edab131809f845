"""What a run does after training is tried before it: saving, loading and generating."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tutelage
from support.expert_models import FAMILIES, QWEN_NEXT, family
from support.language_methods import recipe
from tutelage.cli.doctor_checks import examine
from tutelage.config import build_recipe
from tutelage.errors import CapabilityError
from tutelage.experiment import save_check
from tutelage.models import load_model

__all__ = ["recipe"]


def test_half_of_a_qwen3_next_saves_loads_and_is_refused_for_what_it_cannot_do(
    recipe: dict[str, Any], tmp_path: Path, cutter: Any
) -> None:
    folder = tmp_path / "next"
    family("Qwen3Next", **QWEN_NEXT, eos_token_id=cutter.eos_token_id).save_pretrained(folder)
    cutter.save_pretrained(folder)
    recipe |= {"teacher": {"model": f"hf:{folder}"}, "baseline": False}
    recipe["data"]["pack"] = False
    recipe["method"] = {"kind": "token"}
    recipe["train"]["steps"] = 1
    with pytest.raises(CapabilityError, match=r"(?s)cannot generate the samples.*samples\.generations=0"):
        tutelage.run(build_recipe(recipe), out=tmp_path / "run")
    assert not (tmp_path / "run" / "models").exists()
    assert any("cannot generate" in finding.text for finding in examine(build_recipe(recipe)))
    recipe["samples"] = {"generations": 0}
    tutelage.run(build_recipe(recipe), out=tmp_path / "run2")
    loaded: Any = load_model(tmp_path / "run2" / "student")
    assert loaded.config.layer_types == ["linear_attention"] * 2
    recipe["samples"] = {"generations": 2}
    recipe["student"] = {"model": "teacher", "map": [0, 3]}
    tutelage.run(build_recipe(recipe), out=tmp_path / "run3")
    assert json.loads((tmp_path / "run3" / "samples" / "written.json").read_text())["texts"]


class Overlapping(nn.Module):
    """Two weights that share a part of one tensor, which no safetensors file can hold."""

    def __init__(self) -> None:
        super().__init__()
        flat = torch.randn(96)
        self.a, self.b = nn.Parameter(flat[:64].view(16, 4)), nn.Parameter(flat[32:].view(16, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.a + x @ self.b


def test_a_student_that_cannot_be_saved_is_refused_before_training(tmp_path: Path) -> None:
    batches = [(torch.randn(8, 16), torch.arange(8) % 4) for _ in range(2)]
    with pytest.raises(CapabilityError, match="the student, a Overlapping, cannot be loaded after it is saved"):
        tutelage.distill(
            nn.Linear(16, 4),
            Overlapping,
            batches,
            eval_data=batches,
            out=tmp_path / "run",
            train={"steps": 2},
            baseline=False,
        )
    assert not (tmp_path / "run" / "models").exists()
    assert not list((tmp_path / "run").glob(".tutelage-tmp*"))


@pytest.mark.parametrize(("name", "options"), FAMILIES, ids=[name for name, _ in FAMILIES])
def test_of_a_large_model_a_layer_of_each_kind_is_saved_and_loaded(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = family(name, **options)
    small: Any = save_check._few_layers(model)
    assert small is not None
    assert small.config.vocab_size == 32
    card = {"task": "causal"}
    save_check._check_model(model, card, tmp_path)
    monkeypatch.setattr(save_check, "LARGE", 0)
    saved: list[nn.Module] = []
    monkeypatch.setattr(save_check, "_save_and_load", lambda m, *_: saved.append(m))
    save_check._check_model(model, card, tmp_path)
    monkeypatch.undo()
    save_check._save_and_load(saved[0], card, tmp_path)
    assert saved[0].config.vocab_size == 32  # type: ignore[union-attr]
    assert not list(tmp_path.iterdir())


def test_a_config_that_builds_another_model_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = family("Llama")
    model.config.intermediate_size = 48
    for large in (0, 10**9):
        monkeypatch.setattr(save_check, "LARGE", large)
        with pytest.raises(Exception, match=r"mlp|shape"):
            save_check._check_model(model, {"task": "causal"}, tmp_path)


def test_the_weights_that_families_save_by_other_names_are_read_by_their_own(tmp_path: Path) -> None:
    model, other = family("Qwen3Moe", num_experts=4), family("Qwen3Moe", num_experts=4)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    tutelage.models.save_model(model, tmp_path, {})
    tutelage.models.load_weights(other, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    with pytest.raises(tutelage.errors.CheckpointError, match="belongs to another model"):
        tutelage.models.load_weights(family("Llama"), tmp_path)
