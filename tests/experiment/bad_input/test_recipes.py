"""Broken recipes: one message with the remedy, exit code 2, no traceback, nothing overwritten."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import bad_input_files as broken
from support.bad_input import Case, call, check_refused
from tutelage.config import AUGMENTS, MODELS, SOURCES
from tutelage.data.views import CROPS, MIX_AUGMENTS, TENSOR_AUGMENTS, TORCHVISION_AUGMENTS
from tutelage.models import ZOO

TEXT = [
    Case("unclosed-brace", ["recipe.yaml:", "not YAML", "close the bracket"],
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
    Case("non-string-key", ["recipe.yaml:10", "train.3", "a key must be text", "in quotes"], {"steps: 2": "3: 2"}),
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
    Case("checkpoint-of-many", ["recipe.yaml:5", "'checkpoint' is for a single teacher", "each of 'members'"],
         many(", checkpoint: teacher")),
    Case("combine", ["recipe.yaml:5", "teacher.combine", "'probabilites'", "did you mean 'probabilities'", "logits"],
         many(", combine: probabilites")),
    Case("ahead-of-a-cache", ["recipe.yaml:5", "read from disk, without prefetching", "remove 'overlap'"],
         {"checkpoint: teacher": "checkpoint: teacher, cache: true, inference: {overlap: true}"}),
    Case("sharded-and-cached", ["recipe.yaml:5", "a sharded teacher runs on all processes", "takes no 'cache'"],
         {"checkpoint: teacher": "checkpoint: teacher, cache: true, inference: {sharded: true}"}),
    Case("sharded-and-ahead", ["recipe.yaml:5", "on all processes", "takes no 'overlap'"],
         {"checkpoint: teacher": "checkpoint: teacher, inference: {overlap: true, sharded: true}"}),
    Case("sharded-int8", ["recipe.yaml:5", "on all processes", "takes no 'dtype'"],
         {"checkpoint: teacher": "checkpoint: teacher, inference: {dtype: int8, sharded: true}"}),
    Case("combine-of-one", ["recipe.yaml:5", "'combine' is for an ensemble", "remove it"],
         {"checkpoint: teacher": "checkpoint: teacher, combine: logits"}),
    Case("weights-too-few", ["recipe.yaml:5", "1 weights for 2 members", "one for each"], many(", weights: [1]")),
    Case("weights-negative", ["recipe.yaml:5", "teacher.weights.1 is -1", "at least 0"],
         many(", weights: [1, -1]")),
    Case("weights-zero", ["recipe.yaml:5", "all weights are 0"], many(", weights: [0, 0]")),
    Case("weights-word", ["recipe.yaml:5", "teacher.weights", "'learnt'", "learned"], many(", weights: learnt")),
    Case("average-at-of-logits", ["recipe.yaml:5", "remove 'average_temperature'"],
         many(", combine: logits, average_temperature: 4")),
    Case("route-without-column", ["recipe.yaml:5", "needs 'data.route'", "name its column"],
         many(", route: {a: 0, b: 1}")),
    Case("column-without-route", ["recipe.yaml:5", "data.route needs 'teacher.route'", "remove it"],
         {"source: digits": "source: imagefolder\n  path: x\n  route: folder"}),
    Case("column-of-no-column", ["recipe.yaml:4", "'digits' has no column 'folder'", "imagefolder"],
         {"source: digits": "source: digits\n  route: folder"}),
    Case("route-and-mixes", ["recipe.yaml:6", "data.augment", "mixup mixes images of different routes", "data.route"],
         {**many(", route: {a: 0, b: 1}"),
          "source: digits": "source: imagefolder\n  path: x\n  route: folder\n  augment: [{mixup: 0.2}]"}),
    Case("route-to-nobody", ["recipe.yaml:5", "route 'b' names [2]", "0 to 1"], many(", route: {a: 0, b: 2}")),
    Case("route-leaves-one-out", ["recipe.yaml:5", "member 1 has no route"], many(", route: {a: 0, b: 0}")),
    Case("route-and-learned", ["recipe.yaml:5", "learned weights need members", "remove 'route'"],
         many(", weights: learned, route: {a: 0, b: 1}")),
    Case("features-of-many", ["recipe.yaml:9", "ambiguous with several teachers", "0.stages.1"],
         {**many(""), "kind: logit": "kind: feature"}),
    Case("simkd-of-many", ["recipe.yaml:9", "simkd", "there are several"],
         {**many(""), "{kind: logit, temperature: 2, alpha: 0.5}": "simkd"}),
    Case("feature-of-no-member",
         ["recipe.yaml:9: method.pairs.0.teacher: Ensemble has no module 'body.1'", "nearest: 1.body.1, 0.body.1",
          "`tutelage taps"],
         {**many(""), "kind: logit": "kind: feature, pairs: [{student: body.1, teacher: body.1}]"}),
    Case("member-of-other-width", ["teacher/model.safetensors", "MLP", "checkpoint of this model"],
         {"teacher: {model: mlp, checkpoint: teacher}":
          "teacher: {members: [mlp, {model: mlp, options: {hidden: [3]}, checkpoint: teacher}]}"}),
    Case("dtype", ["recipe.yaml:5", "teacher.inference.dtype", "'bf15'", "did you mean 'bf16'", "int8"],
         {"checkpoint: teacher": "checkpoint: teacher, inference: {dtype: bf15}"}),
    Case("speed-key", ["recipe.yaml:5", "'teacher.inference.batchsize'", "did you mean 'batch_size'"],
         {"checkpoint: teacher": "checkpoint: teacher, inference: {batchsize: 8}"}),
    Case("overlap-twice", ["recipe.yaml:5", "'process' includes 'overlap'", "remove 'overlap'"],
         {"checkpoint: teacher": "checkpoint: teacher, inference: {overlap: true, process: true}"}),
    Case("overlap-of-member", ["recipe.yaml:5", "'teacher.members.0.inference.overlap'", "allowed here: dtype"],
         {"teacher: {model: mlp, checkpoint: teacher}":
          "teacher: {members: [{model: mlp, inference: {overlap: true}}, mlp]}"}),
    Case("no-such-device", ["there is no device 'cuda:77'", "such as cpu, cuda"],
         {"checkpoint: teacher": "checkpoint: teacher, inference: {device: 'cuda:77'}"}),
    Case("train-bn-in-parts", ["train_bn", "remove batch_size"],
         {"model: mlp, checkpoint: teacher":
          "model: convnet, mode: train_bn, train: {steps: 1}, inference: {batch_size: 8}"}),
]  # fmt: skip


VALUES = [
    Case("text-for-number", ["recipe.yaml:13", "train.optimizer.lr", "'0.1'", "it must be a number"],
         {"lr: 0.1": "lr: '0.1'"}),
    Case("bool-for-int", ["recipe.yaml:11", "train.steps", "is True", "a whole number"],
         {"steps: 2": "steps: true"}),
    Case("float-for-int", ["recipe.yaml:11", "train.steps", "2.5", "a whole number"], {"steps: 2": "steps: 2.5"}),
    Case("negative", ["recipe.yaml:11", "train.steps", "-2", "at least 1"],
         {"steps: 2": "steps: -2"}),
    Case("zero-batch", ["recipe.yaml:12", "train.batch_size is 0"], {"batch_size: 50": "batch_size: 0"}),
    Case("alpha-above-1", ["recipe.yaml:9", "alpha: 1.5 leaves -0.5 for the labels", "give at most 1"],
         {"alpha: 0.5": "alpha: 1.5"}),
    Case("temperature-0", ["recipe.yaml:9", "method.temperature is 0", "a number above 0"],
         {"temperature: 2": "temperature: 0"}),
    Case("infinite-lr", ["recipe.yaml:13", "train.optimizer.lr", "inf", "finite"], {"lr: 0.1": "lr: .inf"}),
    Case("nan-mean", ["recipe.yaml:4", "data.mean.0", "nan"], {"limit: 200": "mean: [.nan]\n  std: [1]"}),
    Case("mean-of-0-to-255", ["recipe.yaml:4", "data.mean.0", "123.7", "at most 1"],
         {"limit: 200": "mean: [123.7]\n  std: [0.5]"}),
    Case("mean-alone", ["recipe.yaml:4", "'mean' and 'std' go together", "both or neither"],
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
    Case("unlabeled",
         ["recipe.yaml:4", "data.unlabeled is 'keeep' (did you mean 'keep'?)", "allowed: keep or drop"],
         {"limit: 200": "unlabeled: keeep"}),
    Case("precision", ["recipe.yaml:11", "train.precision", "'fp32'", "auto, no, bf16 or fp16"],
         {"steps: 2": "precision: fp32"}),
    Case("tracker", ["recipe.yaml:11", "train.trackers.0", "'wandbb'", "did you mean 'wandb'"],
         {"steps: 2": "trackers: [wandbb]"}),
    Case("section-is-empty", ["recipe.yaml:10", "train is empty", "keys: epochs, steps"],
         {"  steps: 2\n  batch_size: 50\n  optimizer: {kind: sgd, lr: 0.1}\n": ""}),
    Case("section-is-a-number", ["recipe.yaml:10", "train is 5", "keys: epochs, steps"],
         {"train:\n  steps: 2\n  batch_size: 50\n  optimizer: {kind: sgd, lr: 0.1}\n": "train: 5\n"}),
    Case("options-is-a-list", ["recipe.yaml:8", "student.options", "[4]"], {"{hidden: [4]}": "[4]"}),
    Case("seed-twice", ["recipe.yaml:14", "[1, 1] has a seed twice"], broken.RECIPE + "seeds: [1, 1]\n"),
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
    Case("imagefolder-without-path", ["recipe.yaml:3", "needs 'path'", "sub-folder"],
         {"source: digits": "source: imagefolder"}),
]  # fmt: skip


OVERRIDES = [
    Case("override-without-value", ["override 'train.steps'", "key=value", "method.temperature=8"],
         args=["train.steps"]),
    Case("override-without-key", ["override '=3'", "key=value"], args=["=3"]),
    Case("override-with-a-hole", ["override 'train..steps=3'", "key=value"], args=["train..steps=3"]),
    Case("override-not-yaml", ["override 'name=[a'", "not YAML", "close the bracket"], args=["name=[a"]),
    Case("override-into-a-value", ["override 'train.steps.x=1'", "'train.steps' is not a section"],
         args=["train.steps.x=1"]),
    Case("override-unknown", ["override 'train.lr=1'", "unknown key 'train.lr'", "allowed here"],
         args=["train.lr=1"]),
    Case("override-wrong-type", ["override 'method.alpha=high'", "method.alpha", "'high'", "number"],
         args=["method.alpha=high"]),
    Case("override-unknown-source", ["override 'data=digts'", "did you mean 'digits'"], args=["data=digts"]),
    Case("override-with-dashes", ["--train.steps=3 is no option", "no dashes: train.steps=3"],
         args=["--train.steps=3"]),
    Case("maps-of-vectors",
         ["recipe.yaml:9: method.pairs.0: nst compares feature maps", "student 'body' gives [2, 4]",
          "teacher 'body' [2, 64]", "hint or a relation"],
         {"kind: logit": "kind: feature, loss: nst, pairs: [{student: body, teacher: body}]"}),
    Case("no-maps",
         ["recipe.yaml:9: method.loss: the student has no feature maps", "pkt", "kind: logit"],
         {"kind: logit": "kind: feature, loss: nst"}),
    Case("override-twice", ["override 'train.batch_size=0'", "train.batch_size"],
         args=["train.batch_size=50", "train.batch_size=0"]),
]  # fmt: skip


RECIPES = [*TEXT, *KEYS, *SEVERAL, *VALUES, *OVERRIDES]


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in RECIPES])
def test_a_broken_recipe_gets_one_message_and_nothing_is_touched(
    case: Case, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check_refused(case, place, monkeypatch, capsys)


def test_there_are_many_recipes_with_different_names() -> None:
    assert len({c.name for c in RECIPES}) == len(RECIPES) >= 40


def test_doctor_finds_what_would_fail(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = broken.snapshot(place)
    for name, says in (
        ("five_whatever", "the student scores 5 classes"),
        ("for_bigger_images", "does not take the data"),
    ):
        model = f"student={{model: 'support.bad_input_files:{name}'}}"
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
