"""Each image model reads its inputs as its own files say: timm, Hugging Face, torchvision and our own cards."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tutelage.cli.doctor_checks import examine
from tutelage.config import Recipe, build_recipe
from tutelage.data import view_seeds
from tutelage.data.image_files import open_image
from tutelage.data.preprocessing import Preprocessing
from tutelage.errors import CacheError, CapabilityError, CheckpointError
from tutelage.experiment.export_student import export_student
from tutelage.experiment.fill_cache import fill_cache
from tutelage.experiment.prepare import build_teacher
from tutelage.experiment.recipe_source import build_model, data_key, load_data, model_spec, recipe_spec
from tutelage.experiment.run import run_recipe
from tutelage.experiment.teacher_setup import build_live_teacher
from tutelage.export.image_files import known_preprocessing
from tutelage.export.inference import predict
from tutelage.models import ModelSpec, build, load_model, read_image_files, save_model
from tutelage.progress import Terminal
from tutelage.taps import Needs

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
pytest.importorskip("torchvision")
Image = pytest.importorskip("PIL.Image")

QUIET = Terminal(speaks=False)


def noise(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def six_files(folder: Path) -> list[Path]:
    """Image files of different sizes and modes."""
    folder.mkdir(parents=True, exist_ok=True)
    turned = Image.Exif()
    turned[0x0112] = 6
    pictures = {
        "rgb.png": Image.fromarray(noise(75, 61, 3)),
        "grey.png": Image.fromarray(noise(48, 90, seed=1)),
        "alpha.png": Image.fromarray(noise(50, 50, 4, seed=2), "RGBA"),
        "palette.png": Image.fromarray(noise(64, 81, 3, seed=3)).quantize(64),
        "turned.jpg": Image.fromarray(noise(40, 71, 3, seed=4)),
        "tiny.png": Image.fromarray(noise(3, 5, 3, seed=5)),
    }
    for name, picture in pictures.items():
        picture.save(folder / name, **({"exif": turned} if name == "turned.jpg" else {}))
    return [folder / name for name in pictures]


def image_folder(root: Path) -> Path:
    """The six files in each of two classes, twice."""
    for label in ("a", "b"):
        for half in ("1", "2"):
            six_files(root / label / half)
    return root


PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "squashed": ("ViTImageProcessor", {"size": {"height": 32, "width": 32}, "image_mean": [0.1, 0.2, 0.3],
                                       "image_std": [0.4, 0.5, 0.6]}),
    "cropped": ("CLIPImageProcessor", {"size": {"shortest_edge": 37}, "crop_size": {"height": 32, "width": 32}}),
    "share": ("ConvNextImageProcessor", {"size": {"shortest_edge": 32}, "crop_pct": 0.9, "resample": 2}),
    "blue first": ("MobileViTImageProcessor", {"size": {"shortest_edge": 36},
                                               "crop_size": {"height": 32, "width": 32}}),
    "twice scaled": ("EfficientNetImageProcessor", {"size": {"height": 32, "width": 32}, "rescale_offset": True,
                                                    "rescale_factor": 1 / 127.5}),
    "pillow": ("ViTImageProcessorPil", {"size": {"height": 32, "width": 32}, "resample": 3}),
}  # fmt: skip


def vit(folder: Path) -> nn.Module:
    """A tiny ViT of transformers with random weights, saved without an image processor."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8,
        id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1},
    )  # fmt: skip
    model: nn.Module = transformers.ViTForImageClassification(config)
    model.save_pretrained(folder)  # type: ignore[operator]
    return model.eval()


def saved_vit(folder: Path, which: str) -> tuple[str, dict[str, Any], Callable[[Any], Any]]:
    vit(folder)
    name, options = PROCESSORS[which]
    processor = getattr(transformers, name)(**options)
    processor.save_pretrained(folder)
    loaded = transformers.AutoImageProcessor.from_pretrained(folder)
    return f"hf:{folder}", {}, lambda picture: loaded(images=[picture], return_tensors="pt")["pixel_values"][0]


TIMM: dict[str, dict[str, Any]] = {
    "cropped": {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "crop_pct": 0.9, "interpolation": "bilinear"},
    "squashed": {"crop_mode": "squash", "crop_pct": 0.95, "interpolation": "bicubic"},
    "padded": {"crop_mode": "border", "crop_pct": 1.0, "interpolation": "bicubic"},
}


def saved_timm(folder: Path, which: str) -> tuple[str, dict[str, Any], Callable[[Any], Any]]:
    folder.mkdir()
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=2)
    torch.save(model.state_dict(), folder / "weights.pt")
    overlay = {"file": str(folder / "weights.pt"), "num_classes": 2, "input_size": (3, 32, 32), **TIMM[which]}
    options = {"pretrained": True, "pretrained_cfg_overlay": overlay}
    model = timm.create_model("resnet10t", num_classes=2, **options)
    own = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    return "timm:resnet10t", options, own


def timm_folder(folder: Path, which: str) -> tuple[str, dict[str, Any], Callable[[Any], Any]]:
    """A folder as timm saves it for a model hub."""
    from safetensors.torch import save_file

    folder.mkdir()
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=2)
    save_file(model.state_dict(), folder / "model.safetensors")
    config = {"num_classes": 2, "input_size": [3, 32, 32], "fixed_input_size": False, **TIMM["cropped"]}
    card = {"architecture": "resnet10t", "num_classes": 2, "pretrained_cfg": config}
    (folder / "config.json").write_text(json.dumps(card))
    own = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=config), is_training=False)
    return (f"timm:local-dir:{folder}", {"pretrained": True}, own) if which == "timm" else (f"hf:{folder}", {}, own)


def saved_torchvision(folder: Path, which: str) -> tuple[str, dict[str, Any], Callable[[Any], Any]]:
    from torchvision import models

    weights = models.get_model_weights("squeezenet1_1").DEFAULT
    file = folder / "hub" / "checkpoints" / Path(weights.url).name
    file.parent.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(models.squeezenet1_1().state_dict(), file)
    torch.hub.set_dir(folder / "hub")
    return "torchvision:squeezenet1_1", {"weights": which}, weights.transforms()


def recipe_of(place: Path, teacher: dict[str, Any], student: dict[str, Any] | None = None, **more: Any) -> Recipe:
    """A recipe on the six files, four times."""
    raw = {
        "name": "x", "data": {"source": "imagefolder", "path": str(image_folder(place / "images"))} | more,
        "teacher": teacher, "student": student or {"model": "convnet", "options": {"widths": [4]}},
        "method": {"kind": "logit"}, "train": {"epochs": 1, "batch_size": 8},
    }  # fmt: skip
    return build_recipe(raw)


LIBRARIES = {
    **{f"hf, {which}": (saved_vit, which) for which in PROCESSORS},
    **{f"timm, {which}": (saved_timm, which) for which in TIMM},
    "timm, folder": (timm_folder, "timm"),
    "hf, timm's folder": (timm_folder, "hf"),
    "torchvision": (saved_torchvision, "DEFAULT"),
}


@pytest.mark.parametrize("which", LIBRARIES)
def test_logits_on_six_files_equal_those_of_the_librarys_own_pipeline(which: str, tmp_path: Path) -> None:
    make, argument = LIBRARIES[which]
    before = torch.hub.get_dir()
    try:
        model, options, own = make(tmp_path / "model", argument)
        recipe = recipe_of(tmp_path, {"model": model, "options": options, "trained": True})
        data: Any = load_data(recipe, QUIET)
        spec = replace(model_spec(recipe.required_teacher, data, 0), classes=1000 if which == "torchvision" else 2)
        assert spec.size == (224 if which == "torchvision" else 32)
        teacher = build_model(recipe.required_teacher, data, 0, "teacher", spec).eval()
    finally:
        torch.hub.set_dir(before)
    batch = data.train.fetch(torch.arange(len(data.train)))
    assert batch.teacher_inputs is None  # a student without files reads what its teacher reads
    files = six_files(tmp_path / "six")
    read = data.teacher(0)
    ours = torch.stack([read.normalise(read.pixels(open_image(file))[None])[0] for file in files])
    theirs = torch.stack([own(open_image(file).convert("RGB")) for file in files])
    with torch.no_grad():
        a, b = (getattr(out, "logits", out) for out in (teacher(ours), teacher(theirs)))
    assert float((a - b).abs().max()) <= 1e-4
    assert float(b.std()) > 1e-4


def card_of(folder: Path, **entries: Any) -> Path:
    """A folder of a trained ``mlp`` whose card says how it reads images."""
    own = Preprocessing(**{"size": 16, "channels": 3, **entries})
    spec = {"model": "mlp", "options": {}, "classes": 2, "channels": own.channels, "size": own.size}
    card = {"spec": spec, "classes": ["a", "b"], "preprocessing": own.to_dict()}
    torch.manual_seed(0)
    save_model(build(ModelSpec(**spec)), folder, card)
    return folder


def test_teacher_and_student_each_read_one_augmented_picture_in_their_own_way(tmp_path: Path) -> None:
    model, options, own = saved_vit(tmp_path / "model", "squashed")
    card = card_of(tmp_path / "s", size=24, resize=27, interpolation="bicubic")
    student = {"model": "mlp", "checkpoint": str(card)}
    teacher = {"model": model, "options": options, "trained": True}
    recipe = recipe_of(tmp_path, teacher, student, augment=["flip"])
    data: Any = load_data(recipe, QUIET)
    plain = data.train.fetch(torch.arange(8))
    assert plain.inputs.shape[-1] == 24
    assert plain.teacher_inputs.shape[-1] == 32
    rows = torch.arange(len(data.train))
    seeds = view_seeds(0, 0, data.train.ids)
    probe = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2).repeat(len(rows), 1, 1, 1)
    flipped = data.train.augments[0](probe, seeds)[:, 0, 0, 0].bool().tolist()
    view, read, seen = data.train.fetch(rows, seeds), data.train.preprocessing, set()
    for i in rows.tolist():
        picture = data.train.open(i).convert("RGB")
        if max(picture.size) <= 32:  # larger pictures are resized once before they are augmented
            seen.add(flipped[i])
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped[i] else picture
            torch.testing.assert_close(view.inputs[i], read.normalise(read.pixels(picture)[None])[0])
            torch.testing.assert_close(view.teacher_inputs[i], own(picture), atol=1e-4, rtol=0)
    assert seen == {True, False}
    torch.testing.assert_close(data.train.fetch(rows, seeds).teacher_inputs, view.teacher_inputs, atol=0, rtol=0)


def test_models_that_differ_in_normalisation_only_share_the_augmented_pixels(tmp_path: Path) -> None:
    entries: dict[str, Any] = {"fit": "squash", "size": 32}
    teacher = {"model": "mlp", "checkpoint": str(card_of(tmp_path / "t", mean=(0.1,) * 3, order="BGR", **entries))}
    student = {"model": "mlp", "checkpoint": str(card_of(tmp_path / "s", mean=(0.5,) * 3, **entries))}
    for augment in (
        ["flip"],
        [{"color-jitter": {"hue": 0.3}}, "erase", {"shift": 3}],
        ["resized-crop", {"mixup": 1}],
    ):
        data: Any = load_data(recipe_of(tmp_path, teacher, student, augment=augment), QUIET)
        assert len(data.train.geometries) == 1
        seeds = view_seeds(0, 0, data.train.ids[:8])
        batch = data.train.fetch(torch.arange(8), seeds)
        own, theirs = data.train.preprocessing, data.teacher(0)
        pixels = own.denormalise(batch.inputs)
        torch.testing.assert_close(theirs.denormalise(batch.teacher_inputs), pixels, atol=1e-5, rtol=0)


def test_all_augmentations_show_both_models_the_same_view(tmp_path: Path) -> None:
    """Of a picture of one colour gradient, what both see is compared at the lower resolution."""
    teacher = {"model": "mlp", "checkpoint": str(card_of(tmp_path / "t", size=64))}
    student = {"model": "mlp", "checkpoint": str(card_of(tmp_path / "s", size=32))}
    recipe = recipe_of(tmp_path, teacher, student)
    ramp = np.linspace(0, 255, 80).astype(np.uint8)
    smooth = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], ramp[::-1, None]), -1)
    for file in (tmp_path / "images").rglob("*.*"):
        Image.fromarray(smooth).save(file)
    for augment in (
        ["resized-crop", "flip"], [{"shift": 9}], ["rand-augment"], [{"erase": 1.0}], [{"rotate": 40}],
        ["flip", {"cutmix": 1.0}], ["resized-crop", {"cutmix": 1.0}], [{"color-jitter": {"brightness": 0.8}}],
    ):  # fmt: skip
        data: Any = load_data(recipe.model_copy(update={"data": replace_key(recipe.data, augment)}), QUIET)
        batch = data.train.fetch(torch.arange(8), view_seeds(0, 0, data.train.ids[:8]))
        mine = data.train.preprocessing.denormalise(batch.inputs)
        theirs = torch.nn.functional.avg_pool2d(data.teacher(0).denormalise(batch.teacher_inputs), 2)
        assert float((mine - theirs).abs().mean()) < 0.03, augment


def replace_key(section: Any, augment: list[Any]) -> Any:
    return section.model_copy(update={"augment": augment})


def test_the_recipe_wins_and_doctor_shows_both(tmp_path: Path) -> None:
    model, options, _ = saved_vit(tmp_path / "model", "cropped")
    teacher = {"model": model, "options": options, "trained": True}
    recipe = recipe_of(tmp_path, teacher, mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    data: Any = load_data(recipe, QUIET)
    assert data.teacher(0).mean == (0.1, 0.2, 0.3)
    assert data.teacher(0).resize == 37
    found = {finding.topic: finding for finding in examine(recipe, QUIET) if finding.topic == "images"}["images"]
    assert found.level == "note"
    assert "preprocessor_config.json" in found.text
    assert "mean [0.1, 0.2, 0.3] ([0.481455, 0.457827, 0.408211])" in found.text
    plain = next(f for f in examine(recipe_of(tmp_path, teacher), QUIET) if f.topic == "images")
    assert plain.level == "ok"
    smaller: Any = load_data(recipe_of(tmp_path, {"model": "timm:resnet10t"}, size=20, crop=0.9), QUIET)
    assert (smaller.teacher(0).size, smaller.teacher(0).resize) == (20, 22)


def test_an_image_processor_that_does_something_else_is_refused_by_name(tmp_path: Path) -> None:
    vit(tmp_path / "model")
    transformers.PerceiverImageProcessor().save_pretrained(tmp_path / "model")
    with pytest.raises(CapabilityError, match="PerceiverImageProcessor") as caught:
        load_data(recipe_of(tmp_path, {"model": f"hf:{tmp_path / 'model'}", "trained": True}), QUIET)
    assert caught.value.where == "teacher.model"


def test_a_grey_data_set_is_read_in_colour_by_a_teacher_in_colour(tmp_path: Path) -> None:
    model, _, own = saved_vit(tmp_path / "model", "cropped")
    vit_labels = {"id2label": {i: str(i) for i in range(10)}, "label2id": {str(i): i for i in range(10)}}
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | vit_labels))
    raw = {
        "name": "x", "data": {"source": "digits", "augment": [{"shift": 1}]}, "method": {"kind": "logit"},
        "teacher": {"model": model, "train": {"epochs": 1}}, "student": {"model": "mlp"},
        "train": {"epochs": 1, "batch_size": 8},
    }  # fmt: skip
    data: Any = load_data(build_recipe(raw), QUIET)
    batch = data.test.fetch(torch.arange(4))
    assert batch.inputs.shape == (4, 1, 8, 8)
    assert batch.teacher_inputs.shape == (4, 3, 32, 32)
    torch.testing.assert_close(batch.teacher_inputs[0], own(data.test.open(0).convert("RGB")), atol=1e-5, rtol=0)
    trained = data.training_of(0).fetch(torch.arange(4), torch.arange(4))
    assert trained.inputs.shape == (4, 3, 32, 32)
    assert trained.teacher_inputs is None
    assert data.spec["channels"] == 1


def test_members_of_an_ensemble_each_read_their_own_way(tmp_path: Path) -> None:
    folders = [card_of(tmp_path / name, size=size, mean=(mean,) * 3) for name, size, mean in
               (("t0", 32, 0.1), ("t1", 24, 0.4))]  # fmt: skip
    members = [{"model": "mlp", "checkpoint": str(folder)} for folder in folders]
    recipe = recipe_of(tmp_path, {"members": members})
    data: Any = load_data(recipe, QUIET)
    spec = recipe_spec(recipe, data)
    model = build_teacher(spec)
    assert model is not None
    live = build_live_teacher(spec, model, torch.device("cpu"))
    batch = data.test.fetch(torch.arange(3))
    alone = []
    for number, one in enumerate(model.children()):
        read = data.teacher(number)
        alone.append(
            one.eval()(torch.stack([read.normalise(read.pixels(data.test.open(i))[None])[0] for i in range(3)]))
        )
    expected = torch.stack([x.softmax(-1) for x in alone]).mean(0).log()
    torch.testing.assert_close(live.signal(batch, Needs()).dense().log_softmax(-1), expected)
    torch.testing.assert_close(model(**batch.for_teacher().inputs).log_softmax(-1), expected)


def test_a_run_exports_a_student_that_reads_as_its_card_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, options, own = saved_vit(tmp_path / "model", "cropped")
    teacher = {"model": model, "options": options, "trained": True, "cache": True}
    recipe = recipe_of(tmp_path, teacher, {"model": "mlp"}, augment=["flip"], views=1)
    run = run_recipe(recipe, out=tmp_path / "run", terminal=QUIET).path
    student = load_model(run / "student")
    files = six_files(tmp_path / "six")
    for place in (run, export_student(run, "onnx", terminal=QUIET).path):
        for file, found in zip(files, predict(place, files), strict=True):
            with torch.no_grad():
                expected = student(own(open_image(file).convert("RGB"))[None]).softmax(-1)[0]
            labels = {one["label"]: one["probability"] for one in found["labels"]}
            torch.testing.assert_close(torch.tensor([labels["a"], labels["b"]]), expected, atol=1e-5, rtol=0)
    text = (run / "export" / "onnx" / "README.md").read_text()
    assert "resize the shorter side to 37 (bicubic), cut out the centre of 32x32" in text


def test_rows_of_a_cache_belong_to_the_teachers_preprocessing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, options, _ = saved_vit(tmp_path / "model", "cropped")
    recipe = recipe_of(tmp_path, {"model": model, "options": options, "trained": True, "cache": "kept"})
    fill_cache(recipe, terminal=QUIET)
    assert fill_cache(recipe, terminal=QUIET).computed == 0
    transformers.CLIPImageProcessor(**PROCESSORS["cropped"][1], resample=2).save_pretrained(tmp_path / "model")
    assert data_key(recipe) != data_key(recipe_of(tmp_path, {"model": "timm:resnet10t"}))
    with pytest.raises(CacheError, match="preprocessing"):
        fill_cache(recipe, terminal=QUIET)


def test_a_folder_whose_files_say_nothing_about_images_predicts_nothing(tmp_path: Path) -> None:
    vit(tmp_path / "model")
    files = six_files(tmp_path / "six")
    with pytest.raises(CheckpointError, match=r"no file says how its images are prepared"):
        predict(tmp_path / "model", files)
    transformers.ViTImageProcessor(**PROCESSORS["squashed"][1]).save_pretrained(tmp_path / "model")
    assert len(predict(tmp_path / "model", files)) == 6
    assert read_image_files(f"hf:{tmp_path / 'model'}", {}, None) is not None
    found = known_preprocessing(f"hf:{tmp_path / 'model'}", {})
    assert found is not None
    assert found.preprocessing.fit == "squash"


@pytest.mark.parametrize("which", ["squashed", "cropped", "blue first", None])
def test_an_exported_student_of_transformers_comes_with_its_image_processor(
    which: str | None, tmp_path: Path
) -> None:
    if which is None:
        vit(tmp_path / "model")
    else:
        saved_vit(tmp_path / "model", which)
    one = {"model": f"hf:{tmp_path / 'model'}"}
    recipe = recipe_of(tmp_path, {**one, "trained": True}, one, **({} if which else {"size": 32, "crop": 0.9}))
    made = export_student(run_recipe(recipe, out=tmp_path / "run", terminal=QUIET).path, "hf", terminal=QUIET)
    said = made.manifest.get("how", {}).get("image_processor", "")
    assert ("none" in said, "differ" in said) == (which == "blue first", which is None)
    if which in ("squashed", "cropped"):
        processor = transformers.AutoImageProcessor.from_pretrained(made.path)
        model = transformers.AutoModelForImageClassification.from_pretrained(made.path).eval()
        files = six_files(tmp_path / "six")
        for file, found in zip(files, predict(tmp_path / "run", files), strict=True):
            with torch.no_grad():
                pixels = processor(images=[open_image(file).convert("RGB")], return_tensors="pt")["pixel_values"]
                expected = model(pixels).logits.softmax(-1)[0].tolist()
            labels = {one["label"]: one["probability"] for one in found["labels"]}
            assert [labels["a"], labels["b"]] == pytest.approx(expected, abs=1e-5)
