"""Broken models, weights, data and output folders: one message with the remedy, nothing overwritten."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import tutelage
from support import bad_input_files as broken
from support.bad_input import Case, Setup, check_refused, cut, folder, weights
from tutelage.errors import (
    CheckpointError,
)


def card(**changes: Any) -> Setup:
    return lambda place, _: broken.edit_card(place / "teacher" / "model.json", **changes)


def own(name: str) -> dict[str, str]:
    return {"  model: mlp\n  options: {hidden: [4]}": f"  model: support.bad_input_files:{name}"}


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
    Case("no-such-callable", ["support.bad_input_files has no 'no_modul'", "nearest: no_module"], own("no_modul")),
    Case("callable-gives-no-module", ["support.bad_input_files:no_module returned a int", "torch.nn.Module"],
         own("no_module")),
    Case("not-callable", ["student.model", "support.bad_input_files:not_callable", "check its name"],
         own("not_callable")),
    Case("callable-scores-other-classes", ["the student scores 5 classes, the data has 10", "number of classes"],
         own("five_whatever")),
    Case("callable-for-other-images", ["the student, a Sequential, does not take the data", "(2, 1, 8, 8)", "size"],
         own("for_bigger_images")),
    Case("callable-gives-no-logits", ["returned a str without logits", "return a tensor"], own("no_tensor")),
    Case("unknown-option",
         ["recipe.yaml:8: student.options.hiden", "did you mean 'hidden'", "options of mlp: hidden"],
         {"hidden": "hiden"}),
    Case("impossible-option", ["recipe.yaml:7: student.model", "cannot build 'mlp'", "options of mlp: hidden"],
         {"[4]": "wide"}),
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
    Case("weights-missing", ["recipe.yaml:5: teacher.checkpoint: teachr: no such file", "did you mean teacher"],
         {"checkpoint: teacher": "checkpoint: teachr"}),
    Case("weights-folder-empty", ["nothing/model.safetensors", "no such file", "check the path"],
         {"checkpoint: teacher": "checkpoint: nothing"}, setup=lambda place, _: (place / "nothing").mkdir()),
    Case("weights-truncated", ["w.safetensors", "not a complete safetensors file", "download it again"],
         {"checkpoint: teacher": "checkpoint: w.safetensors"}, setup=weights(broken.truncated, "w.safetensors")),
    Case("weights-empty", ["w.safetensors", "not a complete safetensors file", "again"],
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
         ["w.safetensors", "head.weight has shape (5, 64) in the file and (10, 64) in MLP", "classes"],
         {"checkpoint: teacher": "checkpoint: w.safetensors"}, setup=weights(broken.five_classes, "w.safetensors")),
    Case("nan-weights", ["w.safetensors", "head.bias contains NaN", "another checkpoint"],
         {"checkpoint: teacher": "checkpoint: w.safetensors"}, setup=weights(broken.nan_weights, "w.safetensors")),
    Case("students-weights",
         ["teacher/model.safetensors", "body.1.weight has shape (64, 64) in the file and (4, 64) in MLP",
          "same options"],
         {"options: {hidden: [4]}": "options: {hidden: [4]}\n  checkpoint: teacher"}),
    Case("classes-in-other-order", ["label map", "class 0 is '9' in the teacher and '0' in the data", "data.classes"],
         setup=card(classes=broken.DIGITS[::-1])),
    Case("other-classes", ["label map", "class 3 is 'cat' in the teacher", "a teacher for these classes"],
         setup=card(classes=[*broken.DIGITS[:3], "cat", *broken.DIGITS[4:]])),
    Case("card-damaged", ["teacher/model.json", "cannot be read", "export the model again"],
         setup=lambda place, _: (place / "teacher" / "model.json").write_text("{")),
    Case("card-is-a-list", ["teacher/model.json", "a list, not a mapping", "export the model again"],
         setup=lambda place, _: (place / "teacher" / "model.json").write_text("[]")),
    Case("teacher-worse-than-chance", ["the teacher's accuracy", "chance is 10.0%", "label order"],
         {"source: digits": f"source: digits\n  classes: {broken.DIGITS[::-1]}"}, setup=card(classes=None)),
]  # fmt: skip


UNTAUGHT = "checkpoint: teacher", "train: {steps: 1}"


def pictures(**more: Any) -> dict[str, str]:
    lines = "".join(f"\n  {key}: {value}" for key, value in {"path": "pics", "size": 8, **more}.items())
    return {"source: digits\n  limit: 200": f"source: imagefolder{lines}", UNTAUGHT[0]: UNTAUGHT[1]}


DATA = [
    Case("folder-missing", ["recipe.yaml:4: data.path: pics: no such folder", "data.path"], pictures()),
    Case("folder-is-a-file", ["pics", "not a folder", "data.path"], pictures(),
         setup=lambda place, _: (place / "pics").write_text("")),
    Case("folder-empty", ["pics", "has no folders of classes", "each class"], pictures(), setup=folder()),
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
    Case("validation-empty", ["validation split", "has no images", "remove the split"], pictures(),
         setup=folder(("train", {"cat": 20, "dog": 20}), ("val", {"cat": 0, "dog": 0}))),
    Case("classes-unknown", ["pics/train", "['cat', 'cow']", "['cat', 'dog']", "name every folder once"],
         pictures(classes="[cat, cow]"), setup=folder(("train", {"cat": 20, "dog": 20}))),
    Case("fewer-images-than-classes", ["data.test", "4 classes", "smallest has 1", "add some"], pictures(),
         setup=folder(("train", {"a": 1, "b": 1, "c": 1, "d": 1}))),
    Case("mean-for-grey-images", ["1 and 1 values, the images 3 channels", "one value for each channel"],
         pictures(mean="[0.5]", std="[0.5]"), setup=folder(("train", {"cat": 20, "dog": 20}))),
    Case("mean-for-colours", ["3 and 3 values, the images 1 channels", "one value for each channel"],
         {"limit: 200": "mean: [0.5, 0.5, 0.5]\n  std: [0.5, 0.5, 0.5]"}),
    Case("more-labels-than-images", ["data.labels", "500 images are requested, there are 200", "at most 200"],
         {"limit: 200": "limit: 200\n  labels: 500"}),
    Case("fewer-labels-than-classes", ["data.labels", "cannot choose 3 of 200 images so that both", "10 classes"],
         {"limit: 200": "limit: 200\n  labels: 3"}),
    Case("limit-above-all", ["data.limit", "5000 images are requested", "leave it out"],
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
    Case("crop-without-files", ["resized-crop", "no files", "{shift: PIXELS}"],
         {"limit: 200": "augment: [resized-crop]"}),
    Case("torchvision-data-set", ["no data set 'FashonMNIST'", "nearest: FashionMNIST"],
         {"source: digits": "source: torchvision:FashonMNIST"}, setup=lambda *_: pytest.importorskip("torchvision")),
    Case("torchvision-options", ["torchvision:FakeData", "'sise'", "data.options"],
         {"source: digits": "source: torchvision:FakeData\n  options: {sise: 3}"},
         setup=lambda *_: pytest.importorskip("torchvision")),
    Case("idx-truncated", ["train-images-idx3-ubyte.gz",
         "is damaged, or is not a gzipped IDX file", "download it again"],
         {"source: digits": "source: fashion-mnist\n  path: idx"},
         setup=lambda place, _: ((place / "idx").mkdir(),
         (place / "idx/train-images-idx3-ubyte.gz").write_bytes(b"no"))),
]  # fmt: skip


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
    Case("fp16-on-cpu", ["train.precision: fp16 needs a GPU", "bf16"], {"steps: 2": "steps: 2\n  precision: fp16"},
         setup=lambda *_: pytest.skip("has a GPU") if torch.cuda.is_available() else None),
    Case("tracker-not-installed", ["train.trackers: aim is not installed", "pip install aim"],
         {"steps: 2": "steps: 2\n  trackers: [aim]"}, setup=uninstalled),
    Case("doctor-recipe", ["recipe.yaml:11", "'train.step'"], {"steps": "step"}, command="doctor"),
    Case("doctor-weights", ["recipe.yaml:5: teacher.checkpoint: w.safetensors: no such file"],
         {"checkpoint: teacher": "checkpoint: w.safetensors"},
         command="doctor"),
]  # fmt: skip


FILES = [*MODEL, *CHECKPOINT, *DATA, *OUT]


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in FILES])
def test_a_broken_file_gets_one_message_and_nothing_is_touched(
    case: Case, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check_refused(case, place, monkeypatch, capsys)


def test_there_are_many_files_with_different_names() -> None:
    assert len({c.name for c in FILES}) == len(FILES) >= 40


def test_an_exported_student_that_is_not_whole(ran: Path) -> None:
    student = ran / "out" / "student"
    cut(student / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a complete safetensors file") as caught:
        tutelage.models.load_model(student)
    assert isinstance(caught.value, ValueError)
    broken.edit_card(student / "model.json", spec={"mode": "mlp"})
    with pytest.raises(CheckpointError, match="mode"):
        tutelage.models.load_model(student)
    (student / "model.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no model\.json"):
        tutelage.models.load_model(student)


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
