"""Broken recipes and inputs: one message with the remedy, exit code 2, no traceback, nothing overwritten."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tutelage
from support import bad_input_files as broken
from tutelage import errors
from tutelage.cli import main
from tutelage.config import AUGMENTS, MODELS, SOURCES
from tutelage.data.views import CROPS, MIX_AUGMENTS, TENSOR_AUGMENTS, TORCHVISION_AUGMENTS
from tutelage.errors import (
    CapabilityError,
    CheckpointError,
    ConfigError,
    DataError,
    MissingDependencyError,
    ModelError,
    NumericsError,
    RunDirectoryError,
    TutelageError,
)
from tutelage.models import ZOO

Setup = Callable[[Path, pytest.MonkeyPatch], Any]


@dataclass
class Case:
    """A broken input of ``tutelage run``.

    ``change`` replaces parts of the small recipe, or is the whole text of another; ``says`` is what the
    message must hold: what was given, where, and the remedy.
    """

    name: str
    says: list[str]
    change: dict[str, str] | str | bytes = field(default_factory=dict)
    setup: Setup | None = None
    args: list[str] = field(default_factory=list)
    command: str = "run"
    recipe: str = "recipe.yaml"


@pytest.fixture(scope="session")
def teacher() -> nn.Module:
    return broken.taught()


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, teacher: nn.Module) -> Path:
    """A folder with the small recipe and its finished run in ``out``."""
    folder = tmp_path_factory.mktemp("finished")
    before = Path.cwd()
    os.chdir(folder)
    try:
        broken.save_teacher(teacher, folder / "teacher")
        (folder / "recipe.yaml").write_text(broken.RECIPE)
        assert call(["run", "recipe.yaml", "--out", "out"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def place(tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the small recipe and the teacher that it names."""
    shutil.copytree(finished / "teacher", tmp_path / "teacher")
    (tmp_path / "recipe.yaml").write_text(broken.RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(args: list[str]) -> int:
    """The command's exit code."""
    try:
        main(args)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def check_message(err: str, says: list[str]) -> None:
    assert "Traceback" not in err
    assert "Warning" not in err
    start = err.find("tutelage: ")
    assert start >= 0, err
    message = err[start:]
    assert "\n  -> " in message, f"no remedy in:\n{message}"
    missing = [part for part in says if part not in message]
    assert not missing, f"{missing} not in:\n{message}"
    assert len(message) < 1500, message


# Recipes ----------------------------------------------------------------------------------------------

TEXT = [
    Case("unclosed-brace", ["recipe.yaml:", "not YAML", "check indentation"],
         {"options: {hidden: [4]}": "options: {"}),
    Case("tab", ["recipe.yaml:4", "not YAML", "'\\t'"], {"  limit": "\tlimit"}),
    Case("colon-in-value", ["recipe.yaml:3", "not YAML", "quotes"], {"source: digits": "source: di: gits"}),
    Case("key-twice", ["recipe.yaml:14", "'data' is given twice, first on line 2", "keep one"],
         broken.RECIPE + "data: digits\n"),
    Case("key-twice-inside", ["recipe.yaml:12", "'steps'", "line 11", "keep one"],
         {"steps: 2": "steps: 2\n  steps: 3"}),
    Case("empty", ["recipe.yaml", "empty", "digits.yaml"], " "),
    Case("only-comments", ["recipe.yaml", "empty"], "# nothing yet\n"),
    Case("list", ["recipe.yaml", "a list", "mapping"], "- data: digits\n- method: logit\n"),
    Case("sentence", ["recipe.yaml", "a str", "mapping"], "distil my model, please\n"),
    Case("binary", ["recipe.yaml", "not UTF-8", "YAML file"], b"\x89PNG\r\n\x1a\n\xff\xfe\x00"),
    Case("nul", ["recipe.yaml", "not YAML", "#x0000"], b"name: a\x00b\n"),
    Case("code-in-yaml", ["recipe.yaml:1", "not YAML", "python/object"],
         '!!python/object/apply:os.system ["touch owned"]\n'),
    Case("empty-tag", ["recipe.yaml", "not YAML", "without tags"], {"steps: 2": "steps: !!int ''"}),
    Case("impossible-tag", ["recipe.yaml", "not YAML", "without tags"], {"steps: 2": "steps: !!int many"}),
    Case("number-too-long", ["recipe.yaml", "not YAML", "shorter"], {"steps: 2": "steps: " + "7" * 5000}),
    Case("too-deep", ["recipe.yaml", "too deeply"], {"steps: 2": "steps: " + "[" * 3000 + "]" * 3000}),
    Case("alias-of-itself", ["recipe.yaml:11", "contains the alias itself", "write the values out"],
         {"steps: 2": "steps: &a [*a]"}),
    Case("recipe-is-a-folder", ["teacher", "cannot be read", "YAML file"], recipe="teacher"),
    Case("recipe-missing", ["recipes.yaml", "no such recipe", "did you mean recipe.yaml"], recipe="recipes.yaml"),
    Case("non-string-key", ["recipe.yaml", "train", "string"], {"steps: 2": "3: 2"}),
]  # fmt: skip

KEYS = [
    Case("key-at-top", ["recipe.yaml:14", "unknown key 'sede'", "did you mean 'seeds'", "allowed here: name, data"],
         broken.RECIPE + "sede: 1\n"),
    Case("key-in-data", ["recipe.yaml:4", "'data.limits'", "did you mean 'limit'", "given 200"], {"limit": "limits"}),
    Case("key-in-teacher", ["recipe.yaml:5", "'teacher.chekpoint'", "did you mean 'checkpoint'"],
         {"checkpoint": "chekpoint"}),
    Case("key-in-train", ["recipe.yaml:11", "'train.step'", "did you mean 'steps'", "allowed here"],
         {"steps": "step"}),
    Case("key-in-method", ["recipe.yaml:9", "'method.temprature'", "did you mean 'temperature'", "alpha"],
         {"temperature": "temprature"}),
    Case("key-in-optimizer", ["recipe.yaml:13", "no option 'momentun'", "did you mean 'momentum'", "nesterov"],
         {"lr: 0.1": "lr: 0.1, momentun: 0.9"}),
    Case("key-in-schedule", ["recipe.yaml:12", "'cosine' has no option 'finale'", "did you mean 'final'"],
         {"steps: 2": "steps: 2\n  schedule: {kind: cosine, finale: 0}"}),
    Case("teachers-own-training", ["recipe.yaml:5", "'teacher.train.epoch'", "did you mean 'epochs'"],
         {"checkpoint: teacher": "train: {epoch: 3}"}),
    Case("no-student", ["recipe.yaml", "'student' is missing", "add it"],
         {"student:\n  model: mlp\n  options: {hidden: [4]}\n": ""}),
    Case("no-source", ["recipe.yaml:2", "'data.source' is missing"], {"  source: digits\n": ""}),
    Case("two-faults", ["recipe.yaml:4", "data.limit", "recipe.yaml:11", "train.steps"],
         {"limit: 200": "limit: all", "steps: 2": "steps: few"}),
]  # fmt: skip

MANY = "teacher: {members: [{model: mlp, checkpoint: teacher}, {model: mlp, checkpoint: teacher}]MORE}"


def many(more: str) -> dict[str, str]:
    """The small recipe with two teachers, and ``more`` about them."""
    return {"teacher: {model: mlp, checkpoint: teacher}": MANY.replace("MORE", more)}


SEVERAL = [
    Case("no-teacher-model", ["recipe.yaml:5", "neither 'model' nor 'members'", "give one"],
         {"model: mlp, checkpoint": "checkpoint"}),
    Case("model-and-members", ["recipe.yaml:5", "both 'model' and 'members'", "give one"], many(", model: mlp")),
    Case("one-member", ["recipe.yaml:5", "teacher.members", "at least 2"],
         {"model: mlp, checkpoint: teacher": "members: [{model: mlp, checkpoint: teacher}]"}),
    Case("key-in-member", ["recipe.yaml:5", "'teacher.members.1.chekpoint'", "did you mean 'checkpoint'", "options"],
         {"teacher: {model: mlp, checkpoint: teacher}":
          "teacher: {members: [mlp, {model: mlp, chekpoint: teacher}]}"}),
    Case("member-model", ["recipe.yaml:5", "teacher.members.0.model", "'mpl'", "did you mean 'mlp'"],
         {"teacher: {model: mlp, checkpoint: teacher}": "teacher: {members: [mpl, mlp]}"}),
    Case("checkpoint-of-many", ["recipe.yaml:5", "'checkpoint' is of a single teacher", "each of 'members'"],
         many(", checkpoint: teacher")),
    Case("combine", ["recipe.yaml:5", "teacher.combine", "'probabilites'", "did you mean 'probabilities'", "logits"],
         many(", combine: probabilites")),
    Case("ahead-of-a-cache", ["recipe.yaml:5", "read from disk is not asked ahead", "remove 'overlap'"],
         {"checkpoint: teacher": "checkpoint: teacher, cache: true, inference: {overlap: true}"}),
    Case("sharded-and-cached", ["recipe.yaml:5", "all processes ask a sharded teacher at once", "remove 'cache'"],
         {"checkpoint: teacher": "checkpoint: teacher, cache: true, inference: {sharded: true}"}),
    Case("sharded-and-ahead", ["recipe.yaml:5", "on all processes at once", "remove 'overlap'"],
         {"checkpoint: teacher": "checkpoint: teacher, inference: {overlap: true, sharded: true}"}),
    Case("sharded-int8", ["recipe.yaml:5", "on all processes at once", "remove 'dtype'"],
         {"checkpoint: teacher": "checkpoint: teacher, inference: {dtype: int8, sharded: true}"}),
    Case("combine-of-one", ["recipe.yaml:5", "'combine' is for an ensemble", "remove it"],
         {"checkpoint: teacher": "checkpoint: teacher, combine: logits"}),
    Case("weights-too-few", ["recipe.yaml:5", "1 weights for 2 members", "one for each"], many(", weights: [1]")),
    Case("weights-negative", ["recipe.yaml:5", "teacher.weights", "greater than or equal to 0"],
         many(", weights: [1, -1]")),
    Case("weights-zero", ["recipe.yaml:5", "all weights are 0"], many(", weights: [0, 0]")),
    Case("weights-word", ["recipe.yaml:5", "teacher.weights", "'learnt'", "learned"], many(", weights: learnt")),
    Case("average-at-of-logits", ["recipe.yaml:5", "remove 'average_temperature'"],
         many(", combine: logits, average_temperature: 4")),
    Case("route-without-column", ["recipe.yaml:5", "no 'data.route'", "name it"], many(", route: {a: 0, b: 1}")),
    Case("column-without-route", ["recipe.yaml:2", "no 'teacher.route'", "remove it"],
         {"source: digits": "source: imagefolder\n  path: x\n  route: folder"}),
    Case("column-of-no-column", ["recipe.yaml:4", "'digits' has no column 'folder'", "imagefolder"],
         {"source: digits": "source: digits\n  route: folder"}),
    Case("route-and-mixes", ["recipe.yaml:2", "mixup mixes images of different routes", "data.route"],
         {**many(", route: {a: 0, b: 1}"),
          "source: digits": "source: imagefolder\n  path: x\n  route: folder\n  augment: [{mixup: 0.2}]"}),
    Case("route-to-nobody", ["recipe.yaml:5", "route 'b' names [2]", "0 to 1"], many(", route: {a: 0, b: 2}")),
    Case("route-leaves-one-out", ["recipe.yaml:5", "no route leads to member 1"], many(", route: {a: 0, b: 0}")),
    Case("route-and-learned", ["recipe.yaml:5", "weights are learned", "remove 'route'"],
         many(", weights: learned, route: {a: 0, b: 1}")),
    Case("features-of-many", ["recipe.yaml:9", "which member's features", "0.stages.1"],
         {**many(""), "kind: logit": "kind: feature"}),
    Case("simkd-of-many", ["recipe.yaml:9", "simkd", "there are several"],
         {**many(""), "{kind: logit, temperature: 2, alpha: 0.5}": "simkd"}),
    Case("feature-of-no-member", ["Ensemble has no module 'body.1'", "nearest: 1.body.1, 0.body.1"],
         {**many(""), "kind: logit": "kind: feature, pairs: [{student: body.1, teacher: body.1}]"}),
    Case("member-of-other-width", ["teacher/model.safetensors", "MLP", "very model"],
         {"teacher: {model: mlp, checkpoint: teacher}":
          "teacher: {members: [mlp, {model: mlp, options: {hidden: [3]}, checkpoint: teacher}]}"}),
    Case("dtype", ["recipe.yaml:5", "teacher.inference.dtype", "'bf15'", "did you mean 'bf16'", "int8"],
         {"checkpoint: teacher": "checkpoint: teacher, inference: {dtype: bf15}"}),
    Case("speed-key", ["recipe.yaml:5", "'teacher.inference.batchsize'", "did you mean 'batch_size'"],
         {"checkpoint: teacher": "checkpoint: teacher, inference: {batchsize: 8}"}),
    Case("overlap-twice", ["recipe.yaml:5", "overlaps anyway", "remove 'overlap'"],
         {"checkpoint: teacher": "checkpoint: teacher, inference: {overlap: true, process: true}"}),
    Case("overlap-of-member", ["recipe.yaml:5", "'teacher.members.0.inference.overlap'", "allowed here: dtype"],
         {"teacher: {model: mlp, checkpoint: teacher}":
          "teacher: {members: [{model: mlp, inference: {overlap: true}}, mlp]}"}),
    Case("no-such-device", ["there is no device 'cuda:77'", "give cpu, cuda"],
         {"checkpoint: teacher": "checkpoint: teacher, inference: {device: 'cuda:77'}"}),
    Case("train-bn-in-parts", ["train_bn", "leave batch_size out"],
         {"model: mlp, checkpoint: teacher":
          "model: convnet, mode: train_bn, train: {steps: 1}, inference: {batch_size: 8}"}),
]  # fmt: skip

VALUES = [
    Case("text-for-number", ["recipe.yaml:13", "train.optimizer.lr", "'0.1'", "valid number"],
         {"lr: 0.1": "lr: '0.1'"}),
    Case("bool-for-int", ["recipe.yaml:11", "train.steps", "given True", "valid integer"],
         {"steps: 2": "steps: true"}),
    Case("float-for-int", ["recipe.yaml:11", "train.steps", "2.5", "integer"], {"steps: 2": "steps: 2.5"}),
    Case("negative", ["recipe.yaml:11", "train.steps", "-2", "greater than or equal to 1"],
         {"steps: 2": "steps: -2"}),
    Case("zero-batch", ["recipe.yaml:12", "train.batch_size", "given 0"], {"batch_size: 50": "batch_size: 0"}),
    Case("alpha-above-1", ["recipe.yaml:9", "alpha: 1.5 leaves -0.5 for the labels", "give at most 1"],
         {"alpha: 0.5": "alpha: 1.5"}),
    Case("temperature-0", ["recipe.yaml:9", "method.temperature", "greater than 0"],
         {"temperature: 2": "temperature: 0"}),
    Case("infinite-lr", ["recipe.yaml:13", "train.optimizer.lr", "inf", "finite"], {"lr: 0.1": "lr: .inf"}),
    Case("nan-mean", ["recipe.yaml:4", "data.mean.0", "nan"], {"limit: 200": "mean: [.nan]\n  std: [1]"}),
    Case("mean-of-0-to-255", ["recipe.yaml:4", "data.mean.0", "123.7", "less than or equal to 1"],
         {"limit: 200": "mean: [123.7]\n  std: [0.5]"}),
    Case("mean-alone", ["recipe.yaml:2", "'mean' and 'std' go together", "both or neither"],
         {"limit: 200": "mean: [0.5]"}),
    Case("std-0", ["recipe.yaml:5", "std [0.0]", "above 0"], {"limit: 200": "mean: [0.5]\n  std: [0.0]"}),
    Case("epochs-and-steps", ["recipe.yaml:11", "both 'epochs' (3) and 'steps' (2)", "give one"],
         {"steps: 2": "steps: 2\n  epochs: 3"}),
    Case("method", ["recipe.yaml:9", "unknown method 'logits'", "did you mean 'logit'", "byot, cross-tokenizer"],
         {"kind: logit": "kind: logits"}),
    Case("method-is-a-list", ["recipe.yaml:9", "unknown method ['logit']", "allowed: byot, cross-tokenizer"],
         {"kind: logit": "kind: [logit]"}),
    Case("optimizer", ["recipe.yaml:13", "unknown optimizer 'sgdm'", "did you mean 'sgd'", "adamw"],
         {"kind: sgd": "kind: sgdm"}),
    Case("schedule", ["recipe.yaml:12", "unknown schedule 'cosin'", "did you mean 'cosine'"],
         {"steps: 2": "steps: 2\n  schedule: cosin"}),
    Case("augmentation",
         ["recipe.yaml:4", "unknown augmentation 'flipp'", "did you mean 'flip'", "allowed: flip, shift"],
         {"limit: 200": "augment: [flipp]"}),
    Case("two-augmentations-in-one", ["recipe.yaml:4", "is not an augmentation", "{shift: 2}"],
         {"limit: 200": "augment: [{flip: 0.5, shift: 2}]"}),
    Case("source", ["recipe.yaml:3", "unknown source 'digit'", "did you mean 'digits'", "imagefolder"],
         {"source: digits": "source: digit"}),
    Case("source-without-name", ["recipe.yaml:3", "unknown source 'hf:'", "hf:DATASET_ID"],
         {"source: digits": "source: 'hf:'"}),
    Case("model", ["recipe.yaml:7", "student.model", "unknown model 'mpl'", "did you mean 'mlp'", "timm:NAME"],
         {"  model: mlp": "  model: mpl"}),
    Case("unlabeled", ["recipe.yaml:4", "data.unlabeled", "'keeep'", "did you mean 'keep'", "allowed"],
         {"limit: 200": "unlabeled: keeep"}),
    Case("precision", ["recipe.yaml:11", "train.precision", "'fp32'", "'bf16'"], {"steps: 2": "precision: fp32"}),
    Case("tracker", ["recipe.yaml:11", "train.trackers.0", "'wandbb'", "did you mean 'wandb'"],
         {"steps: 2": "trackers: [wandbb]"}),
    Case("section-is-empty", ["recipe.yaml:10", "train: given nothing", "keys: epochs, steps"],
         {"  steps: 2\n  batch_size: 50\n  optimizer: {kind: sgd, lr: 0.1}\n": ""}),
    Case("section-is-a-number", ["recipe.yaml:10", "train: given 5", "keys: epochs, steps"],
         {"train:\n  steps: 2\n  batch_size: 50\n  optimizer: {kind: sgd, lr: 0.1}\n": "train: 5\n"}),
    Case("options-is-a-list", ["recipe.yaml:8", "student.options", "[4]"], {"{hidden: [4]}": "[4]"}),
    Case("seed-twice", ["recipe.yaml:14", "[1, 1] holds a seed twice"], broken.RECIPE + "seeds: [1, 1]\n"),
    Case("seed-and-seeds", ["recipe.yaml:15", "both 'seed' and 'seeds'"], broken.RECIPE + "seeds: [1]\nseed: 1\n"),
    Case("seed-negative", ["recipe.yaml:14", "seeds.0", "-1"], broken.RECIPE + "seed: -1\n"),
    Case("no-seeds", ["recipe.yaml:14", "seeds", "at least 1"], broken.RECIPE + "seeds: []\n"),
    Case("name", ["recipe.yaml:1", "name", "'../up'"], {"name: small": "name: ../up"}),
    Case("weights-and-training", ["recipe.yaml:5", "both 'checkpoint' and 'train'", "remove one"],
         {"checkpoint: teacher": "checkpoint: teacher, train: {steps: 3}"}),
    Case("options-of-digits", ["recipe.yaml:4", "takes no options", "remove them"],
         {"limit: 200": "options: {train: true}"}),
    Case("columns-of-digits", ["recipe.yaml:4", "has no columns", "remove 'label_column'"],
         {"limit: 200": "label_column: label"}),
    Case("imagefolder-without-path", ["recipe.yaml:2", "needs 'path'", "sub-folder"],
         {"source: digits": "source: imagefolder"}),
]  # fmt: skip

OVERRIDES = [
    Case("override-without-value", ["override 'train.steps'", "key=value", "method.temperature=8"],
         args=["train.steps"]),
    Case("override-without-key", ["override '=3'", "key=value"], args=["=3"]),
    Case("override-with-a-hole", ["override 'train..steps=3'", "key=value"], args=["train..steps=3"]),
    Case("override-not-yaml", ["override 'name=[a'", "not YAML", "quote it"], args=["name=[a"]),
    Case("override-into-a-value", ["override 'train.steps.x=1'", "'train.steps' is not a section"],
         args=["train.steps.x=1"]),
    Case("override-unknown", ["override 'train.lr=1'", "unknown key 'train.lr'", "allowed here"],
         args=["train.lr=1"]),
    Case("override-wrong-type", ["override 'method.alpha=high'", "method.alpha", "'high'", "number"],
         args=["method.alpha=high"]),
    Case("override-unknown-source", ["override 'data=digts'", "did you mean 'digits'"], args=["data=digts"]),
    Case("override-twice", ["override 'train.batch_size=0'", "train.batch_size"],
         args=["train.batch_size=50", "train.batch_size=0"]),
]  # fmt: skip


# Models and weights -----------------------------------------------------------------------------------


def weights(make: Callable[[Path], None], name: str) -> Setup:
    return lambda place, _: make(place / name)


def card(**changes: Any) -> Setup:
    return lambda place, _: broken.edit_card(place / "teacher" / "model.json", **changes)


def own(name: str) -> dict[str, str]:
    return {"  model: mlp\n  options: {hidden: [4]}": f"  model: bad_input_files:{name}"}


def offline(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


MODEL = [
    Case("timm-name", ["student.model", "timm has no model 'resnet81'", "nearest: ", "resnet18"],
         {"  model: mlp\n  options: {hidden: [4]}": "  model: timm:resnet81"},
         setup=lambda *_: pytest.importorskip("timm")),
    Case("torchvision-name", ["student.model", "no classifier 'resnet81'", "nearest: ", "resnet18"],
         {"  model: mlp\n  options: {hidden: [4]}": "  model: torchvision:resnet81"},
         setup=lambda *_: pytest.importorskip("torchvision")),
    Case("torchvision-channels", ["takes 3 channels, the images have 1", "timm:resnet18"],
         {"  model: mlp\n  options: {hidden: [4]}": "  model: torchvision:resnet18"},
         setup=lambda *_: pytest.importorskip("torchvision")),
    Case("hf-id", ["student.model", "cannot build 'hf:nobody/nothing'", "HF_HUB_OFFLINE"],
         {"  model: mlp\n  options: {hidden: [4]}": "  model: hf:nobody/nothing"}, setup=offline),
    Case("no-such-module", ["student.model", "no module 'mymodels'", "PYTHONPATH"],
         {"  model: mlp\n  options: {hidden: [4]}": "  model: mymodels.small:make"}),
    Case("no-such-callable", ["bad_input_files has no 'no_modul'", "nearest: no_module"], own("no_modul")),
    Case("callable-gives-no-module", ["bad_input_files:no_module returned a int", "torch.nn.Module"],
         own("no_module")),
    Case("not-callable", ["student.model", "bad_input_files:not_callable", "check its name"], own("not_callable")),
    Case("callable-scores-other-classes", ["the student scores 5 classes, the data has 10", "number of classes"],
         own("five_whatever")),
    Case("callable-for-other-images", ["the student, a Sequential, does not take the data", "(2, 1, 8, 8)", "size"],
         own("for_bigger_images")),
    Case("callable-gives-no-logits", ["returned a str without logits", "return a tensor"], own("no_tensor")),
    Case("unknown-option", ["student.model", "'hiden'", "options of mlp: hidden"], {"hidden": "hiden"}),
    Case("impossible-option", ["student.model", "cannot build 'mlp'", "options of mlp: hidden"], {"[4]": "wide"}),
    Case("optimizer-value", ["train.optimizer", "sgd", "-3", "torch.optim"], {"lr: 0.1": "lr: 0.1, momentum: -3"}),
    Case("optimizer-type", ["train.optimizer", "sgd", "heavy", "torch.optim"],
         {"lr: 0.1": "lr: 0.1, momentum: heavy"}),
    Case("schedule-without-milestones", ["train.schedule", "'milestones'", "for example"],
         {"steps: 2": "steps: 2\n  schedule: multistep"}),
    Case("schedule-value", ["train.schedule", "step", "'gamma': 'low'", "docs/recipes.md"],
         {"steps: 2": "steps: 2\n  schedule: {kind: step, every: 1, gamma: low}"}),
    Case("schedule-infinite", ["train.schedule", "step", "inf", "docs/recipes.md"],
         {"steps: 2": "steps: 2\n  schedule: {kind: step, every: .inf}"}),
    Case("train-bn-without-bn", ["'train_bn'", "MLP has no batch norm", "mode: eval"],
         {"checkpoint: teacher": "checkpoint: teacher, mode: train_bn"}),
]  # fmt: skip

CHECKPOINT = [
    Case("weights-missing", ["teachr", "no such file", "did you mean teacher"],
         {"checkpoint: teacher": "checkpoint: teachr"}),
    Case("weights-folder-empty", ["nothing/model.safetensors", "no such file", "check the path"],
         {"checkpoint: teacher": "checkpoint: nothing"}, setup=lambda place, _: (place / "nothing").mkdir()),
    Case("weights-truncated", ["w.safetensors", "not a whole safetensors file", "download it again"],
         {"checkpoint: teacher": "checkpoint: w.safetensors"}, setup=weights(broken.truncated, "w.safetensors")),
    Case("weights-empty", ["w.safetensors", "not a whole safetensors file", "again"],
         {"checkpoint: teacher": "checkpoint: w.safetensors"}, setup=weights(Path.touch, "w.safetensors")),
    Case("torch-file-truncated", ["w.pt", "cannot be read as weights", "again"],
         {"checkpoint: teacher": "checkpoint: w.pt"}, setup=weights(broken.truncated_torch, "w.pt")),
    Case("weights-are-a-text", ["notes.pt", "copy or download it again"],
         {"checkpoint: teacher": "checkpoint: notes.pt"},
         setup=weights(lambda p: p.write_text("remember the milk\n" * 9), "notes.pt")),
    Case("pickle-with-code", ["w.pt", "would run code", "state_dict()"],
         {"checkpoint: teacher": "checkpoint: w.pt"}, setup=weights(broken.pickled_with_code, "w.pt")),
    Case("plain-pickle-with-code", ["w.bin", "pickle that torch.save did not write", "safetensors"],
         {"checkpoint: teacher": "checkpoint: w.bin"}, setup=weights(broken.plain_pickle_with_code, "w.bin")),
    Case("not-weights", ["w.pt", "is a dict, not a mapping of names to tensors", "state_dict()"],
         {"checkpoint: teacher": "checkpoint: w.pt"}, setup=weights(broken.optimizer_state, "w.pt")),
    Case("other-architecture", ["w.safetensors", "another model than MLP", "stages.0.0.weight", "same options"],
         {"checkpoint: teacher": "checkpoint: w.safetensors"},
         setup=weights(broken.other_architecture, "w.safetensors")),
    Case("other-number-of-classes",
         ["w.safetensors", "head.weight is (5, 64) in the file and (10, 64) in MLP", "classes"],
         {"checkpoint: teacher": "checkpoint: w.safetensors"}, setup=weights(broken.five_classes, "w.safetensors")),
    Case("nan-weights", ["w.safetensors", "head.bias holds NaN", "another checkpoint"],
         {"checkpoint: teacher": "checkpoint: w.safetensors"}, setup=weights(broken.nan_weights, "w.safetensors")),
    Case("students-weights",
         ["teacher/model.safetensors", "body.1.weight is (64, 64) in the file and (4, 64) in MLP", "same options"],
         {"options: {hidden: [4]}": "options: {hidden: [4]}\n  checkpoint: teacher"}),
    Case("classes-in-other-order", ["label map", "class 0 is '9' to the teacher and '0' in the data", "data.classes"],
         setup=card(classes=broken.DIGITS[::-1])),
    Case("other-classes", ["label map", "class 3 is 'cat' to the teacher", "a teacher for these classes"],
         setup=card(classes=[*broken.DIGITS[:3], "cat", *broken.DIGITS[4:]])),
    Case("card-damaged", ["teacher/model.json", "cannot be read", "export the model again"],
         setup=lambda place, _: (place / "teacher" / "model.json").write_text("{")),
    Case("card-is-a-list", ["teacher/model.json", "a list, not a mapping", "export the model again"],
         setup=lambda place, _: (place / "teacher" / "model.json").write_text("[]")),
    Case("teacher-worse-than-chance", ["the teacher's accuracy", "chance is 10.0%", "label order"],
         {"source: digits": f"source: digits\n  classes: {broken.DIGITS[::-1]}"}, setup=card(classes=None)),
]  # fmt: skip


# Data -------------------------------------------------------------------------------------------------

UNTAUGHT = "checkpoint: teacher", "train: {steps: 1}"


def folder(*splits: tuple[str, dict[str, int]], then: Callable[[Path], Any] = lambda place: None) -> Setup:
    def make(place: Path, _: pytest.MonkeyPatch) -> None:
        pytest.importorskip("PIL")
        (place / "pics").mkdir()
        for split, classes in splits:
            broken.images(place / "pics", classes, split)
        then(place / "pics")

    return make


def pictures(**more: Any) -> dict[str, str]:
    lines = "".join(f"\n  {key}: {value}" for key, value in {"path": "pics", "size": 8, **more}.items())
    return {"source: digits\n  limit: 200": f"source: imagefolder{lines}", UNTAUGHT[0]: UNTAUGHT[1]}


DATA = [
    Case("folder-missing", ["pics", "no such folder", "data.path"], pictures()),
    Case("folder-is-a-file", ["pics", "not a folder", "data.path"], pictures(),
         setup=lambda place, _: (place / "pics").write_text("")),
    Case("folder-empty", ["pics", "has no sub-folders", "each class"], pictures(), setup=folder()),
    Case("class-without-images", ["pics/train/dog", "has no images", ".png", "remove the folder"], pictures(),
         setup=folder(("train", {"cat": 9, "dog": 0}))),
    Case("image-broken", ["pics/train/cat/3.png", "cannot be decoded", "remove the file"], pictures(),
         setup=folder(("train", {"cat": 20, "dog": 20}), then=lambda p: (p / "train/cat/3.png").write_bytes(b"GIF"))),
    Case("image-truncated", ["pics/train/dog/2.png", "cannot be decoded", "replace it"], pictures(),
         setup=folder(("train", {"cat": 20, "dog": 20}),
                      then=lambda p: (p / "train/dog/2.png").write_bytes((p / "train/dog/2.png").read_bytes()[:44]))),
    Case("validation-has-other-classes",
         ["pics/val", "['cow']", "classes of the training images: cat, dog"], pictures(),
         setup=folder(("train", {"cat": 20, "dog": 20}), ("val", {"cat": 2, "cow": 2}))),
    Case("validation-empty", ["validation split", "has no images", "check its path"], pictures(),
         setup=folder(("train", {"cat": 20, "dog": 20}), ("val", {"cat": 0, "dog": 0}))),
    Case("classes-unknown", ["pics/train", "['cat', 'cow']", "['cat', 'dog']", "name every folder once"],
         pictures(classes="[cat, cow]"), setup=folder(("train", {"cat": 20, "dog": 20}))),
    Case("fewer-images-than-classes", ["data.test", "4 classes", "smallest has 1", "add some"], pictures(),
         setup=folder(("train", {"a": 1, "b": 1, "c": 1, "d": 1}))),
    Case("mean-for-grey-images", ["1 and 1 values, the images 3 channels", "one value for each channel"],
         pictures(mean="[0.5]", std="[0.5]"), setup=folder(("train", {"cat": 20, "dog": 20}))),
    Case("mean-for-colours", ["3 and 3 values, the images 1 channels", "one value for each channel"],
         {"limit: 200": "mean: [0.5, 0.5, 0.5]\n  std: [0.5, 0.5, 0.5]"}),
    Case("more-labels-than-images", ["data.labels", "500 images are asked for, there are 200", "at most 200"],
         {"limit: 200": "limit: 200\n  labels: 500"}),
    Case("fewer-labels-than-classes", ["data.labels", "cannot take 3 of 200", "10 classes"],
         {"limit: 200": "limit: 200\n  labels: 3"}),
    Case("limit-above-all", ["data.limit", "5000 images are asked for", "leave it out"],
         {"limit: 200": "limit: 5000"}),
    Case("classes-of-digits", ["data.classes names 2 classes", "0, 1, 2", "every class of the source once"],
         {"limit: 200": "classes: [odd, even]"}),
    Case("augment-option", ["data.augment", "flip", "'probability'", "its options: p"],
         {"limit: 200": "augment: [{flip: {probability: 1}}]"}),
    Case("augment-value", ["data.augment", "shift", "pixels='far'", "its options: pixels"],
         {"limit: 200": "augment: [{shift: far}]"}),
    Case("augment-probability", ["data.augment", "p=3", "[0, 1]"], {"limit: 200": "augment: [{flip: 3}]"}),
    Case("augment-option-of-torchvision", ["rand-augment", "'many'", "torchvision.transforms.v2.RandAugment"],
         {"limit: 200": "augment: [{rand-augment: {num_ops: many}}]"},
         setup=lambda *_: pytest.importorskip("torchvision")),
    Case("augment-fails-on-images", ["data.augment cannot be applied", "options"],
         {"limit: 200": "augment: [{rand-augment: {num_ops: 9, magnitude: 99}}]"},
         setup=lambda *_: pytest.importorskip("torchvision")),
    Case("crop-without-files", ["resized-crop", "no files", "{shift: pixels}"],
         {"limit: 200": "augment: [resized-crop]"}),
    Case("torchvision-data-set", ["no data set 'FashonMNIST'", "nearest: FashionMNIST"],
         {"source: digits": "source: torchvision:FashonMNIST"}, setup=lambda *_: pytest.importorskip("torchvision")),
    Case("torchvision-options", ["torchvision:FakeData", "'sise'", "data.options"],
         {"source: digits": "source: torchvision:FakeData\n  options: {sise: 3}"},
         setup=lambda *_: pytest.importorskip("torchvision")),
    Case("idx-truncated", ["train-images-idx3-ubyte.gz", "not a whole gzipped IDX file", "fetch it again"],
         {"source: digits": "source: fashion-mnist\n  path: idx"},
         setup=lambda place, _: ((place / "idx").mkdir(),
         (place / "idx/train-images-idx3-ubyte.gz").write_bytes(b"no"))),
]  # fmt: skip


# Where it goes ----------------------------------------------------------------------------------------


def refuse(name: str, code: int) -> Setup:
    """An operating system that refuses to make the folder ``out``."""

    def make(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real = getattr(os, name)

        def refused(path: Any, *args: Any, **kwargs: Any) -> Any:
            if Path(path).name == "out":
                raise OSError(code, os.strerror(code), str(path))
            return real(path, *args, **kwargs)

        monkeypatch.setattr(os, name, refused)

    return make


def uninstalled(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tutelage.engine.launch

    monkeypatch.setattr(tutelage.engine.launch, "get_available_trackers", list)


OUT = [
    Case("out-is-a-file", ["out", "is a file", "another --out"],
         setup=lambda place, _: (place / "out").write_text("mine")),
    Case("out-below-a-file", ["recipe.yaml/out", "a part of the path is a file", "another --out"],
         args=["--out", "recipe.yaml/out"]),
    Case("out-is-not-empty", ["out", "is not empty", "new folder"],
         setup=lambda place, _: ((place / "out").mkdir(), (place / "out" / "thesis.tex").write_text("precious"))),
    Case("out-in-proc", ["/proc/out", "cannot be written", "another --out"], args=["--out", "/proc/out"]),
    Case("out-name-too-long", ["too long", "another --out"], args=["--out", "x" * 300]),
    Case("out-not-permitted", ["out", "permission denied", "permissions"], setup=refuse("mkdir", errno.EACCES)),
    Case("out-read-only", ["out", "read-only", "another --out"], setup=refuse("mkdir", errno.EROFS)),
    Case("out-disk-full", ["out", "the disk is full", "free some space"], setup=refuse("mkdir", errno.ENOSPC)),
    Case("resume-of-nothing", ["out", "no run to resume", "leave --resume out"], args=["--resume"]),
    Case("resume-of-something-else", ["out", "no run to resume"], args=["--resume"],
         setup=lambda place, _: ((place / "out").mkdir(), (place / "out" / "thesis.tex").write_text("precious"))),
    Case("fp16-on-cpu", ["train.precision fp16", "needs a GPU", "bf16"], {"steps: 2": "steps: 2\n  precision: fp16"},
         setup=lambda *_: pytest.skip("has a GPU") if torch.cuda.is_available() else None),
    Case("tracker-not-installed", ["train.trackers: aim is not installed", "pip install aim"],
         {"steps: 2": "steps: 2\n  trackers: [aim]"}, setup=uninstalled),
    Case("doctor-recipe", ["recipe.yaml:11", "'train.step'"], {"steps": "step"}, command="doctor"),
    Case("doctor-weights", ["w.safetensors", "no such file"], {"checkpoint: teacher": "checkpoint: w.safetensors"},
         command="doctor"),
]  # fmt: skip

CASES = [*TEXT, *KEYS, *SEVERAL, *VALUES, *OVERRIDES, *MODEL, *CHECKPOINT, *DATA, *OUT]


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in CASES])
def test_one_message_and_nothing_touched(
    case: Case, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(case, place, monkeypatch)
    before = broken.snapshot(place)
    args = [case.command, case.recipe, *case.args]
    code = call(args if "--out" in args or case.command != "run" else [*args, "--out", "out"])
    captured = capsys.readouterr()
    check_message(captured.err, case.says)
    assert code == 2
    assert captured.out == ""
    monkeypatch.undo()
    assert broken.snapshot(place) == before, "something was written, overwritten or removed"


def prepare(case: Case, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if isinstance(case.change, dict):
        text = broken.RECIPE
        for old, new in case.change.items():
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        (place / "recipe.yaml").write_text(text)
    else:
        text_or_bytes = case.change
        (place / "recipe.yaml").write_bytes(
            text_or_bytes if isinstance(text_or_bytes, bytes) else text_or_bytes.encode()
        )
    if case.setup is not None:
        case.setup(place, monkeypatch)


def test_there_are_many_cases_with_different_names() -> None:
    assert len({c.name for c in CASES}) == len(CASES) >= 50


def test_doctor_finds_what_would_fail(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = broken.snapshot(place)
    for name, says in (
        ("five_whatever", "the student scores 5 classes"),
        ("for_bigger_images", "does not take the data"),
    ):
        model = f"student={{model: 'bad_input_files:{name}'}}"
        assert call(["doctor", "recipe.yaml", model]) == 2
        captured = capsys.readouterr()
        assert says in captured.out
        assert "->" in captured.out
        assert "Traceback" not in captured.err
    assert call(["doctor", "recipe.yaml", "train.optimizer.momentum=-3"]) == 2
    assert "see torch.optim" in capsys.readouterr().out
    assert broken.snapshot(place) == before


def test_the_names_that_a_recipe_may_hold_are_those_that_exist() -> None:
    assert sorted(AUGMENTS) == sorted([*TENSOR_AUGMENTS, *MIX_AUGMENTS, *TORCHVISION_AUGMENTS, *CROPS])
    assert sorted(ZOO) == sorted(m for m in MODELS if ":" not in m)
    assert [s for s in SOURCES if ":" not in s] == ["digits", "fashion-mnist", "imagefolder"]


def test_a_corrected_recipe_may_use_the_same_folder(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "recipe.yaml").write_text(broken.RECIPE.replace("checkpoint: teacher", "checkpoint: teachr"))
    assert call(["run", "recipe.yaml", "--out", "out"]) == 2
    assert call(["run", "recipe.yaml", "--out", "out", "teacher.checkpoint=teacher"]) == 0
    assert (place / "out" / "student" / "model.safetensors").exists()


# A run that is there already ---------------------------------------------------------------------------


@pytest.fixture
def ran(finished: Path, place: Path) -> Path:
    """The current folder, with a finished run in ``out``."""
    shutil.copytree(finished / "out", place / "out")
    return place


def unfinish(place: Path) -> Path:
    """Make the run in ``out`` one that stopped before its last training ended; its checkpoint."""
    for gone in ("models/distilled-seed0", "student"):
        shutil.rmtree(place / "out" / gone)
    (place / "out" / "summary.json").unlink()
    return place / "out" / "checkpoints" / "distilled-seed0" / "step-000000002"


def cut(path: Path, keep: int = 40) -> None:
    path.write_bytes(path.read_bytes()[:keep])


RESUME = ["--out", "out", "--resume"]


@pytest.mark.parametrize(
    ("args", "breakage", "says"),
    [
        pytest.param(["--out", "out"], None, ["out", "holds a run already", "--resume", "another --out"], id="taken"),
        pytest.param([*RESUME, "train.steps=3"], None,
                     ["out", "other settings: train.steps (then 2, now 3)", "same recipe and overrides"], id="steps"),
        pytest.param([*RESUME, "method.temperature=3", "train.clip=1"], None,
                     ["method.temperature (then 2.0, now 3.0)", "train.clip (then not set, now 1.0)"], id="two-keys"),
        pytest.param(RESUME, lambda place: cut(place / "out/config.yaml"), ["out/config.yaml", "cannot be read"],
                     id="config-cut"),
        pytest.param(RESUME, lambda place: (place / "out/config.yaml").write_bytes(b"\xff\x00"),
                     ["out/config.yaml", "cannot be read", "another --out"], id="config-binary"),
        pytest.param(RESUME, lambda place: (place / "out/config.yaml").write_text("- a"),
                     ["out/config.yaml", "no settings", "another --out"], id="config-is-a-list"),
        pytest.param(RESUME, lambda place: cut(place / "out/summary.json"),
                     ["out/summary.json", "is damaged", "delete this file"], id="summary-cut"),
        pytest.param(RESUME, lambda place: cut(unfinish(place) / "tensors.safetensors"),
                     ["step-000000002", "is damaged", "delete this folder"], id="checkpoint-cut"),
        pytest.param(RESUME, lambda place: cut(unfinish(place) / "state.json"),
                     ["step-000000002", "is damaged", "delete this folder"], id="state-cut"),
        pytest.param(RESUME, lambda place: (unfinish(place) / "state.json").write_text("[]"),
                     ["step-000000002", "is damaged", "delete this folder"], id="state-is-a-list"),
        pytest.param(RESUME, lambda place: (unfinish(place) / "tensors.safetensors").unlink(),
                     ["step-000000002", "is damaged", "delete this folder"], id="checkpoint-gone"),
        pytest.param(RESUME, lambda place: (unfinish(place), cut(place / "out/models/baseline-seed0/result.json")),
                     ["baseline-seed0/result.json", "is damaged", "--resume then trains"], id="result-cut"),
    ],
)  # fmt: skip
def test_a_run_that_is_there_is_not_touched(
    ran: Path,
    args: list[str],
    breakage: Callable[[Path], Any] | None,
    says: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    if breakage is not None:
        breakage(ran)
    before = broken.snapshot(ran)
    assert call(["run", "recipe.yaml", *args]) == 2
    check_message(capsys.readouterr().err, says)
    assert broken.snapshot(ran) == before


def test_two_writers(ran: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unfinish(ran)
    before = broken.snapshot(ran)
    with open(ran / "out" / "run.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert call(["run", "recipe.yaml", *RESUME]) == 2
    check_message(capsys.readouterr().err, ["out", "another process is writing", "wait for it"])
    assert broken.snapshot(ran) == before


def no_space(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_space_for_tensors(*args: Any, **kwargs: Any) -> Any:
    from safetensors import SafetensorError

    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("target", "failure"),
    [
        ("tutelage.engine.checkpoint.save_file", no_space_for_tensors),
        ("tutelage.engine.checkpoint.save_file", no_space),
        ("tutelage.models.files.save_shared", no_space_for_tensors),
        ("tutelage.files.os.fsync", no_space),
        ("tutelage.files.os.replace", no_space),
        ("tutelage.files.tempfile.mkdtemp", no_space),
    ],
)
def test_full_disk(
    ran: Path, target: str, failure: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unfinish(ran)
    shutil.rmtree(ran / "out" / "checkpoints" / "distilled-seed0")
    before = broken.snapshot(ran)
    with monkeypatch.context() as m:
        m.setattr(target, failure)
        assert call(["run", "recipe.yaml", *RESUME]) == 2
    check_message(capsys.readouterr().err, ["out", "the disk is full", "free some space, then go on with --resume"])
    after = broken.snapshot(ran)
    assert not (ran / "out" / "student").exists()
    assert not (ran / "out" / "models" / "distilled-seed0").exists()
    assert {k: v for k, v in after.items() if k in before and "metrics" not in k} == {
        k: v for k, v in before.items() if "metrics" not in k
    }
    assert call(["run", "recipe.yaml", *RESUME]) == 0, "once there is space, it goes on"
    assert (ran / "out" / "student" / "model.safetensors").exists()
    assert not list((ran / "out").rglob(".*")), "no draft is left behind"


def test_a_small_full_disk(ran: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disk = ran / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    try:
        code = call(["run", "recipe.yaml", "--out", "disk/out", "student.options={hidden: [64]}"])
        check_message(capsys.readouterr().err, ["disk/out", "the disk is full", "--resume"])
        assert code == 2
        assert not (disk / "out" / "student").exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    ("breakage", "args", "says"),
    [
        (lambda place: None, ["nowhere"], ["nowhere", "no such run directory", "check the path"]),
        (lambda place: None, ["teacher"], ["teacher", "is not a run directory", "tutelage run"]),
        (lambda place: (place / "out/summary.json").unlink(), ["out"], ["out", "not finished", "--resume"]),
        (lambda place: (place / "out/summary.json").rename(place / "out/lab.json"), ["out"], ["a lab", "lab.html"]),
        (lambda place: cut(place / "out/summary.json"), ["out"], ["summary.json", "is not JSON", "--resume"]),
        (lambda place: (place / "out/metrics.jsonl").write_text("{}\n{}\n"), ["out"],
         ["metrics.jsonl, line 1", "remove the line"]),
        (lambda place: None, ["out", "--out", "recipe.yaml/page.html"],
         ["recipe.yaml/page.html", "cannot be written", "another --out"]),
        (lambda place: None, ["out", "--out", "teacher"], ["teacher"]),
    ],
    ids=["missing", "no-run", "unfinished", "lab", "summary-cut", "metrics", "out-below-a-file", "out-is-a-folder"],
)  # fmt: skip
def test_report(
    ran: Path,
    breakage: Callable[[Path], Any],
    args: list[str],
    says: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    breakage(ran)
    before = broken.snapshot(ran)
    assert call(["report", *args]) == 2
    check_message(capsys.readouterr().err, says)
    assert broken.snapshot(ran) == before


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["rn", "recipe.yaml"], "rn"),
        (["run"], "RECIPE"),
        (["run", "recipe.yaml", "--steps", "3"], "--steps"),
        (["run", "recipe.yaml", "--out"], "--out"),
        (["report"], "RUN"),
    ],
)
def test_the_command_line_itself(place: Path, args: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = broken.snapshot(place)
    assert call(args) == 2
    err = capsys.readouterr().err
    assert says in err
    assert "Traceback" not in err
    assert broken.snapshot(place) == before


# In a process of its own -------------------------------------------------------------------------------


def python(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("change", "overrides", "says"),
    [
        (("steps: 2", "step: 2"), [], ["recipe.yaml:11", "'train.step'", "did you mean 'steps'"]),
        (("checkpoint: teacher", "checkpoint: w.pt"), [], ["w.pt", "would run code"]),
        (("source: digits\n  limit: 200", "source: imagefolder\n  path: pics"), [], ["pics", "no such folder"]),
    ],
    ids=["typo", "code-in-weights", "no-images"],
)
def test_as_a_command(place: Path, change: tuple[str, str], overrides: list[str], says: list[str]) -> None:
    (place / "recipe.yaml").write_text(broken.RECIPE.replace(*change))
    broken.pickled_with_code(place / "w.pt")
    before = broken.snapshot(place)
    done = python("-m", "tutelage", "run", "recipe.yaml", "--out", "out", *overrides)
    check_message(done.stderr, says)
    assert (done.returncode, done.stdout) == (2, "")
    assert broken.snapshot(place) == before


@pytest.mark.parametrize(
    "args", [["--help"], ["--version"], ["run", "recipe.yaml", "train.step=2"], ["run", "recipe.yaml", "data=digts"]]
)
def test_an_answer_needs_no_torch(place: Path, args: list[str]) -> None:
    code = f"""
import sys
from tutelage.cli import main
try:
    main({args!r})
except SystemExit as stop:
    code = stop.code or 0
heavy = [m for m in ("torch", "numpy", "accelerate", "sklearn", "plotly", "transformers") if m in sys.modules]
print("code", code, "heavy", heavy)
"""
    expected = 0 if args[0].startswith("--") else 2
    assert python("-c", code).stdout.splitlines()[-1] == f"code {expected} heavy []"


# From Python -------------------------------------------------------------------------------------------


def samples(n: int = 40, classes: int = 10) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 64, generator=generator)
    y = torch.arange(n) % classes
    x[torch.arange(n), y] += 8
    return list(zip(x.split(10), y.split(10), strict=True))


class Known(nn.Module):
    """A perfect teacher of :func:`samples`."""

    def __init__(self, classes: int = 10, sign: float = 1.0) -> None:
        super().__init__()
        self.head = nn.Linear(64, classes, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(sign * torch.eye(classes, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(x)
        return out


def small(classes: int = 10) -> nn.Module:
    return nn.Sequential(nn.Linear(64, 4), nn.Linear(4, classes))


def poisoned(row: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    data = samples()
    data[row // 10][0][row % 10, 5] = float("nan")
    return data


SHARED = Known()


class Doubled(nn.Module):
    """A student that holds its teacher's head."""

    def __init__(self) -> None:
        super().__init__()
        self.head = SHARED.head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(x)
        return out


def shuffled() -> Any:
    data = torch.utils.data.TensorDataset(torch.randn(40, 64), torch.arange(40) % 10)
    return torch.utils.data.DataLoader(data, batch_size=10, shuffle=True)


@pytest.mark.parametrize(
    ("change", "error", "stdlib", "says"),
    [
        pytest.param({"train_loader": poisoned(13)}, DataError, ValueError,
                     ["NaN or infinity in 1 of 10", "[3]", "remove or repair"], id="nan-in-training"),
        pytest.param({"eval_data": poisoned(0)}, DataError, ValueError, ["NaN", "[0]", "remove"],
                     id="nan-in-evaluation"),
        pytest.param({"train_loader": [(torch.ones(4, 64),)]}, DataError, ValueError,
                     ["tuple of 1", "pair of tensors", "to_batch="], id="batch-of-one"),
        pytest.param({"train_loader": [{"pixels": torch.ones(4, 64)}]}, DataError, ValueError,
                     ["no key 'labels', only pixels", "to_batch="], id="mapping-without-labels"),
        pytest.param({"train_loader": [{"x": torch.ones(2, 64), "labels": [0, 1]}]}, DataError, ValueError,
                     ["labels are a list", "torch.tensor"], id="labels-are-a-list"),
        pytest.param({"train_loader": [(torch.ones(4, 64), torch.arange(3))]}, DataError, ValueError,
                     ["4 inputs but 3 labels", "one for each"], id="one-label-missing"),
        pytest.param({"train_loader": [(torch.ones(4, 64), torch.ones(4, 10))]}, DataError, ValueError,
                     ["torch.float32, not class indices", "argmax"], id="labels-are-one-hot-floats"),
        pytest.param({"eval_data": [(torch.ones(4, 64), torch.ones(4, 10, dtype=torch.int64))]}, CapabilityError,
                     ValueError, ["(2, 10)", "class indices"], id="labels-are-one-hot-integers"),
        pytest.param({"train_loader": [(torch.ones(2, 64), torch.tensor([3, 12]))]}, DataError, ValueError,
                     ["labels from 3 to 12", "classes 0 to 9", "class indices"], id="label-beyond-classes"),
        pytest.param({"train_loader": [(torch.ones(2, 64), torch.tensor([-1, 2]))]}, DataError, ValueError,
                     ["labels from -1 to 2", "-100 where there is none"], id="label-negative"),
        pytest.param({"train_loader": (b for b in samples())}, DataError, ValueError,
                     ["a generator, has no length", "__len__"], id="loader-without-length"),
        pytest.param({"train_loader": []}, DataError, ValueError, ["yields no batches", "drop_last"],
                     id="no-training"),
        pytest.param({"eval_data": []}, DataError, ValueError, ["yields no batches", "drop_last"],
                     id="no-evaluation"),
        pytest.param({"eval_data": (b for b in samples())}, DataError, ValueError,
                     ["eval_data", "generator", "DataLoader"], id="evaluation-once-only"),
        pytest.param({"eval_data": shuffled()}, DataError, ValueError,
                     ["eval_data", "another order", "shuffle=False"], id="evaluation-shuffled"),
        pytest.param({"teacher": Known(sign=-1.0)}, CapabilityError, ValueError,
                     ["accuracy on the evaluation data is 0.0%, chance is 10.0%", "label order"],
                     id="worse-than-chance"),
        pytest.param({"teacher": SHARED, "student": SHARED}, CapabilityError, ValueError,
                     ["the same module", "copy.deepcopy"], id="same-module"),
        pytest.param({"teacher": SHARED, "student": Doubled}, CapabilityError, ValueError,
                     ["share 1 parameters, head.weight", "copy.deepcopy"], id="shared-weights"),
        pytest.param({"student": small(12)}, CapabilityError, ValueError,
                     ["(2, 12)", "(2, 10)", "same classes"], id="student-scores-more"),
        pytest.param({"student": small(5)}, CapabilityError, ValueError,
                     ["label 9", "the student scores classes 0 to 4", "number of classes"],
                     id="student-scores-fewer"),
        pytest.param({"teacher": Known(5)}, CapabilityError, ValueError,
                     ["label 9", "the teacher scores classes 0 to 4"], id="teacher-scores-fewer"),
        pytest.param({"classes": ["a", "b"]}, CapabilityError, ValueError,
                     ["scores 10 classes, the data has 2"], id="class-names"),
        pytest.param({"student": nn.Sequential(nn.Linear(7, 10))}, CapabilityError, ValueError,
                     ["the student, a Sequential, does not take the data, inputs (2, 64)", "fit the model"],
                     id="width"),
        pytest.param({"student": lambda: None}, ModelError, ValueError, ["returned a NoneType", "nn.Module"],
                     id="no-student"),
        pytest.param({"teacher": "bert-base"}, ModelError, ValueError, ["teacher", "a str", "nn.Module"],
                     id="name-as-teacher"),
        pytest.param({"student": "bert-base"}, ModelError, ValueError, ["student", "a str", "nn.Module"],
                     id="name-as-student"),
        pytest.param({"method": "logit"}, ConfigError, ValueError, ["method='logit'", "LogitMethod"],
                     id="name-as-method"),
        pytest.param({"epochs": "three"}, ConfigError, ValueError, ["epochs='three'", "keys of train"], id="epochs"),
        pytest.param({"epochs": 0}, ConfigError, ValueError, ["epochs=0", "greater"], id="no-epochs"),
        pytest.param({"lr": "fast"}, ConfigError, ValueError, ["lr='fast'", "number"], id="lr"),
        pytest.param({"optimizer": "adamm"}, ConfigError, ValueError, ["unknown optimizer 'adamm'", "'adam'"],
                     id="optimizer"),
        pytest.param({"schedule": "cosin"}, ConfigError, ValueError, ["unknown schedule 'cosin'", "'cosine'"],
                     id="schedule"),
        pytest.param({"train": {"clipp": 1.0}}, ConfigError, ValueError, ["clipp", "clip"], id="train-key"),
        pytest.param({"seeds": ()}, ConfigError, ValueError, ["seeds=()", "(0, 1, 2)"], id="no-seeds"),
        pytest.param({"seeds": 3}, ConfigError, ValueError, ["seeds=3", "(0, 1, 2)"], id="one-seed"),
        pytest.param({"teacher_mode": "train"}, CapabilityError, ValueError, ["'train'", "train_bn"],
                     id="teacher-mode"),
        pytest.param({"out": "taken/file"}, RunDirectoryError, OSError, ["taken/file", "is a file"], id="out"),
    ],
)  # fmt: skip
def test_from_python(
    change: dict[str, Any],
    error: type[TutelageError],
    stdlib: type[Exception],
    says: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    arguments: dict[str, Any] = {
        "teacher": Known(), "student": small(), "train_loader": samples(), "eval_data": samples(),
        "epochs": 1, "out": "out", "verbose": False, **change,
    }  # fmt: skip
    teacher, student, loader = (arguments.pop(k) for k in ("teacher", "student", "train_loader"))
    with pytest.raises(error) as caught:
        tutelage.distill(teacher, student, loader, **arguments)
    assert isinstance(caught.value, TutelageError)
    assert isinstance(caught.value, stdlib)
    message = str(caught.value)
    missing = [part for part in says if part not in message]
    assert not missing, f"{missing} not in:\n{message}"
    assert caught.value.remedy
    assert caught.value.remedy in message
    assert not list(tmp_path.rglob("student"))
    assert (tmp_path / "taken" / "file").read_text() == "mine"


def test_a_teacher_whose_weights_are_nan() -> None:
    teacher = Known()
    with torch.no_grad():
        teacher.head.weight[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="the teacher's logits are NaN") as caught:
        tutelage.distill(teacher, small(), samples(), eval_data=samples(), epochs=1, verbose=False)
    assert isinstance(caught.value, ArithmeticError)
    assert "check its weights" in str(caught.value)


def test_a_learning_rate_that_blows_up(tmp_path: Path) -> None:
    with pytest.raises(NumericsError, match="no longer finite") as caught:
        tutelage.distill(
            Known(), small(), samples(), eval_data=samples(), epochs=20, optimizer="sgd", lr=1e6, schedule="constant",
            out=tmp_path / "out", verbose=False,
        )  # fmt: skip
    assert "lower train.optimizer.lr" in str(caught.value)
    assert not (tmp_path / "out" / "student").exists()


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError) as caught:
        tutelage.models.build(tutelage.models.ModelSpec("timm:resnet18", classes=2))
    assert isinstance(caught.value, ImportError)
    assert "pip install 'tutelage[vision]'" in str(caught.value)


def test_an_exported_student_that_is_not_whole(ran: Path) -> None:
    student = ran / "out" / "student"
    cut(student / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a whole safetensors file") as caught:
        tutelage.models.load_model(student)
    assert isinstance(caught.value, ValueError)
    broken.edit_card(student / "model.json", spec={"mode": "mlp"})
    with pytest.raises(CheckpointError, match="mode"):
        tutelage.models.load_model(student)
    (student / "model.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no model\.json"):
        tutelage.models.load_model(student)


def test_the_message_of_each_error() -> None:
    for kind in (ConfigError, DataError, ModelError, CheckpointError, CapabilityError, NumericsError,
                 RunDirectoryError, MissingDependencyError):  # fmt: skip
        error = kind("what", where="where", remedy="remedy")
        assert str(error) == "where: what\n  -> remedy"
        assert json.dumps([error.what, error.where, error.remedy]) == '["what", "where", "remedy"]'


def _kinds(cls: type) -> list[type]:
    return [cls, *(k for sub in cls.__subclasses__() for k in _kinds(sub))]


@pytest.mark.parametrize("kind", _kinds(errors.TutelageError), ids=lambda k: k.__name__)
def test_an_error_survives_the_way_between_processes(kind: type) -> None:
    import pickle

    error = pickle.loads(pickle.dumps(kind("what", where="where", remedy="remedy")))
    assert type(error) is kind
    assert str(error) == "where: what\n  -> remedy"


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("command", ["run", "doctor"])
def test_a_broken_image_is_named_whichever_process_met_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, workers: int, command: str
) -> None:
    import numpy as np
    from PIL import Image

    from tutelage import cli

    draw = np.random.default_rng(0)
    for name in "ab":
        (tmp_path / "x" / name).mkdir(parents=True)
        for i in range(20):
            pixels = draw.integers(0, 255, (16, 16, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "x" / name / f"{i}.png")
    for file in (tmp_path / "x").rglob("*.png"):  # all of one class: some are met by every part of a run
        if file.parent.name == "a":
            file.write_bytes(file.read_bytes()[:60])
    monkeypatch.setattr("tutelage.data.images.IN_MEMORY_BYTES", 0)  # decoded when asked for, as large sets are
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"data: {{source: imagefolder, path: {tmp_path / 'x'}, size: 16, workers: {workers}}}\n"
        "teacher: {model: mlp, options: {hidden: [4]}}\nstudent: {model: mlp, options: {hidden: [2]}}\n"
        "method: logit\ntrain: {steps: 2, batch_size: 8}\n"
    )
    where = ["--out", str(tmp_path / "out")] if command == "run" else []
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, str(recipe), *where])
    said = "".join(capfd.readouterr())
    assert stopped.value.code == 2, said
    assert "Traceback" not in said
    assert str(tmp_path / "x" / "a") in said.replace("\n", "")
    assert "remove the file or replace it" in said
