"""A teacher's weights all come from a file, or are trained first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from support.text_worlds import encoder, sentences, table
from tutelage import api
from tutelage.cli.doctor_checks import examine
from tutelage.config import Recipe, build_recipe
from tutelage.errors import CapabilityError
from tutelage.progress import Terminal

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def texts(classes: int, **teacher: Any) -> Recipe:
    rows = [{**row, "label": f"c{i % classes}"} for i, row in enumerate(sentences(120))]
    table(Path("d.jsonl"), rows)
    raw = {
        "name": "t",
        "data": {"source": "table", "path": "d.jsonl", "max_length": 32, "label": "label"},
        "teacher": {"model": "hf:teacher", **teacher},
        "student": {"model": "teacher", "layers": 1},
        "method": "logit",
        "train": {"epochs": 1, "batch_size": 32},
    }
    return build_recipe(raw)


def of_three_labels() -> None:
    encoder(Path("teacher"), "BertForSequenceClassification", num_labels=3)


def mentions_random(recipe: Recipe) -> bool:
    return any("would be random" in one.text for one in examine(recipe, Terminal(speaks=False)))


def refused(recipe: Recipe, match: str) -> None:
    with pytest.raises(CapabilityError, match=match):
        api.run(recipe, out="out", terminal=Terminal(speaks=False))
    assert mentions_random(recipe)


@pytest.mark.parametrize("classes", [2, 4, 5])
def test_a_classifier_of_other_classes_is_refused(classes: int) -> None:
    of_three_labels()
    refused(texts(classes), rf"contain no classifier.weight, classifier.bias for {classes} classes")


def test_an_encoder_without_a_classifier_is_refused() -> None:
    encoder(Path("teacher"))
    refused(texts(3), "contain no classifier.weight, classifier.bias.* for 3 classes")


def test_a_classifier_of_these_classes_runs_and_a_new_one_is_trained_first() -> None:
    of_three_labels()
    summary = api.run(texts(4, train={"epochs": 1}), out="trained", terminal=Terminal(speaks=False)).summary
    assert summary["teacher"]["n"] > 0
    assert not mentions_random(texts(3))


def test_a_network_of_timm_with_other_classes_is_refused() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=7, in_chans=1)
    torch.save(model.state_dict(), "weights.pth")
    card = {"file": "weights.pth", "num_classes": 7, "input_size": (1, 64, 64)}
    options = {"pretrained": True, "pretrained_cfg_overlay": card}
    raw = {
        "name": "t", "data": {"source": "digits"}, "teacher": {"model": "timm:resnet10t", "options": options},
        "student": {"model": "convnet"}, "method": "logit", "train": {"epochs": 1},
    }  # fmt: skip
    refused(build_recipe(raw), r"contain no fc.weight, fc.bias for 10 classes")
