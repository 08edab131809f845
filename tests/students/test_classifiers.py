"""A classifier that is reused gives the model's own logits, or the model is refused by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tutelage.config import build_recipe
from tutelage.data import Batch
from tutelage.errors import ModelError
from tutelage.experiment.run import run_recipe
from tutelage.methods import SimkdMethod, prepare_method, prepare_student
from tutelage.methods.step import get_signal
from tutelage.models import ModelSpec, load_model, save_model
from tutelage.progress import Terminal
from tutelage.students import ReusedHead, find_classifier
from tutelage.taps import Needs, observe
from tutelage.teachers import LiveTeacher

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

CLASSES = 5
SMALL_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
SMALL_STAGES = {"depths": (1, 1, 1, 1), "embed_dims": (8, 8, 16, 16)}
SMALL_HF = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
            "image_size": 32, "patch_size": 8, "num_labels": CLASSES}  # fmt: skip


def levit() -> Any:
    config = transformers.LevitConfig(
        image_size=64, hidden_sizes=[16, 16, 16], num_attention_heads=[2, 2, 2], depths=[1, 1, 1], key_dim=[8, 8, 8],
        num_labels=CLASSES,
    )  # fmt: skip
    return transformers.LevitForImageClassificationWithTeacher(config)


TWO_HEADED: dict[str, tuple[Callable[[], Any], int]] = {
    "timm's DeiT": (
        lambda: timm.create_model("deit_tiny_distilled_patch16_224", num_classes=CLASSES, **SMALL_VIT), 32),
    "timm's LeViT": (lambda: timm.create_model("levit_128s", num_classes=CLASSES, img_size=64), 64),
    "timm's EfficientFormer": (
        lambda: timm.create_model("efficientformer_l1", num_classes=CLASSES, num_vit=1, **SMALL_STAGES), 224),
    "timm's RepViT": (
        lambda: timm.create_model("repvit_m1", num_classes=CLASSES, embed_dim=(8, 8, 8, 16), depth=(1, 1, 1, 1),
                                  distillation=True), 32),
    "timm's CrossViT": (
        lambda: timm.create_model("crossvit_tiny_240", num_classes=CLASSES), 240),
    "DeiT": (lambda: transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**SMALL_HF)), 32),
    "LeViT": (levit, 64),
}  # fmt: skip


def made(which: str) -> tuple[nn.Module, Batch]:
    """A model whose heads and norms are those of a trained one: none is zero, no two are equal."""
    torch.manual_seed(0)
    build, size = TWO_HEADED[which]
    model: nn.Module = build()
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        if x.is_floating_point() and ("head" in name or "classifier" in name):
            x.data += 0.1 * torch.rand_like(x)
    return model.eval(), Batch(torch.randn(3, 3, size, size), torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("which", TWO_HEADED)
def test_several_heads_are_one_classifier_with_the_models_own_logits(which: str) -> None:
    model, batch = made(which)
    classifier = find_classifier(model, batch)
    assert len(classifier.paths) == 2
    seen = observe(model, batch.inputs, Needs(hidden=classifier.taps))
    features = torch.cat([seen.hidden[tap] for tap in classifier.taps], -1)
    torch.testing.assert_close(features @ classifier.weight.T + classifier.bias, seen.logits)


@pytest.mark.parametrize("which", TWO_HEADED)
def test_simkd_reuses_the_whole_classifier_of_a_teacher_with_two_heads(which: str) -> None:
    teacher, batch = made(which)
    torch.manual_seed(1)
    body = nn.Sequential(
        nn.Conv2d(3, 8, 5, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES)
    )
    method = SimkdMethod()
    student: Any = prepare_student(method, body, teacher, batch, 0)
    method = prepare_method(method, student, teacher, batch, 0, None)  # type: ignore[assignment]
    signal = get_signal(LiveTeacher(teacher), method, batch)
    assert signal is not None
    features = torch.cat([signal.hidden[tap] for tap in method.taps], -1)
    logits = observe(teacher, batch.inputs, Needs()).logits
    torch.testing.assert_close(student.head(features.mean((2, 3)) if student.maps else features), logits)
    terms = method(observe(student, batch.inputs, method.student_needs), batch, signal)
    assert float(terms["simkd"].sum.detach()) > 0


@pytest.mark.parametrize("which", ["timm's DeiT", "timm's LeViT", "timm's RepViT", "DeiT"])
def test_simkd_trains_and_saves_a_student_with_two_heads(which: str, tmp_path: Path) -> None:
    body, batch = made(which)
    teacher, method = nn.Sequential(nn.Flatten(), nn.Linear(batch.inputs[0].numel(), CLASSES)), SimkdMethod()  # type: ignore[index]
    student = prepare_student(method, body, teacher, batch, 0)
    assert isinstance(student, ReusedHead)
    loss = student.train()(batch.inputs).square().sum()
    loss.backward()  # type: ignore[no-untyped-call]
    trained = [name for name, p in student.named_parameters() if p.grad is not None and bool(p.grad.any())]
    assert any(name.startswith("model.") for name in trained)
    assert len(student.card["heads"]) == 2
    if which == "timm's RepViT":  # our own folder
        options = {"embed_dim": [8, 8, 8, 16], "depth": [1, 1, 1, 1], "distillation": True}
        spec = ModelSpec("timm:repvit_m1", options, CLASSES, 3, 32)
        save_model(student, tmp_path / "m", {"spec": spec.to_dict(), "reused_head": student.card})
        torch.testing.assert_close(load_model(tmp_path / "m")(batch.inputs), student.eval()(batch.inputs))


def test_a_run_with_simkd_and_a_baseline_of_a_student_with_two_heads(tmp_path: Path) -> None:
    vit = {"model": "timm:deit_tiny_distilled_patch16_224", "options": {**SMALL_VIT, "depth": 2}}
    raw = {
        "name": "x", "data": {"source": "digits", "size": 32, "limit": 160}, "method": {"kind": "simkd"},
        "teacher": {**vit, "train": {"steps": 60, "optimizer": {"lr": 0.003}}},
        "student": {**vit, "options": SMALL_VIT}, "train": {"steps": 4, "batch_size": 40},
    }  # fmt: skip
    run = run_recipe(build_recipe(raw), out=tmp_path / "run", terminal=Terminal(speaks=False))
    assert run.summary["students"].keys() == {"baseline", "distilled"}
    teacher, student = load_model(run.path / "models" / "teacher"), load_model(run.path / "student")
    assert isinstance(student, ReusedHead)
    both = torch.cat([teacher.head.weight, teacher.head_dist.weight], 1) / 2  # type: ignore[arg-type, union-attr, list-item]
    torch.testing.assert_close(student.head.weight, both)


@pytest.mark.parametrize("name", ["volo_d1_224", "resnetv2_50", "dla34"])
def test_a_classifier_that_is_not_linear_is_refused_by_name(name: str) -> None:
    options = {"img_size": 64} if name.startswith("volo") else {}
    model = timm.create_model(name, num_classes=CLASSES, **options).eval()
    batch = Batch(torch.randn(2, 3, 64, 64), torch.tensor([0, 1]))
    with pytest.raises(ModelError, match=type(model).__name__):
        prepare_student(SimkdMethod(), nn.Sequential(nn.Flatten(), nn.Linear(12288, CLASSES)), model, batch, 0)
