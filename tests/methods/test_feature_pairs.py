"""Automatic pairs are of one kind: maps of one resolution, or as many tokens; the axis of the channels is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from support.language_methods import passed
from tutelage import losses
from tutelage.cli.doctor_checks import examine
from tutelage.config import build_recipe
from tutelage.data import Batch
from tutelage.errors import ModelError
from tutelage.methods import FeatureMethod, prepare_method, prepare_student
from tutelage.methods.simkd import SimkdMethod
from tutelage.students import find_channels_last, find_stages
from tutelage.teachers import LiveTeacher

timm = pytest.importorskip("timm")


def batch(size: int = 64) -> Batch:
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    return Batch(images, torch.arange(4) % 2, ids=torch.arange(4))


def create(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=2, **options).eval()


def resnet() -> Any:
    return create("resnet10t")


def vit(width: int = 24, name: str = "vit_tiny_patch16_224") -> Any:
    return create(name, img_size=64, depth=2, embed_dim=width, num_heads=2)


def swin() -> Any:
    return create("swin_tiny_patch4_window7_224", img_size=64, window_size=4, depths=(1, 1, 1, 1), embed_dim=24,
                  num_heads=(2, 2, 2, 2))  # fmt: skip


def torchvision_swin() -> Any:
    vision = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    return vision.swin_transformer.SwinTransformer([4, 4], 24, [1] * 4, [3] * 4, [4, 4], num_classes=2).eval()


@pytest.mark.parametrize("loss", ["hint", "similarity", "vid", "overhaul"])
def test_a_patch_embedding_is_no_feature_map_of_a_cnn(loss: str) -> None:
    method = FeatureMethod(loss=loss)
    with pytest.raises(
        ModelError, match=r"(?s)student gives 17 tokens, the teacher gives feature maps.*name modules"
    ):
        prepare_method(method, vit(), resnet(), batch(), seed=0)
    with pytest.raises(ModelError, match="student gives feature maps, the teacher gives 17 tokens"):
        prepare_method(method, resnet(), vit(), batch(), seed=0)


def test_vision_transformers_are_paired_by_their_last_blocks() -> None:
    method = prepare_method(FeatureMethod(loss="hint"), vit(24), vit(48), batch(), seed=0)
    assert method.describe_pairs() == [
        "hint: student blocks (17 tokens, 24 wide), teacher blocks (17 tokens, 48 wide)"
    ]
    with pytest.raises(ModelError, match="student gives 18 tokens, the teacher gives 17 tokens"):
        prepare_method(method, vit(24, "deit_tiny_distilled_patch16_224"), vit(), batch(), seed=0)


@pytest.mark.parametrize("model", [swin, torchvision_swin])
def test_maps_with_the_channels_last_are_paired_by_resolution(model: Any) -> None:
    teacher, student = model(), resnet()
    stages = find_stages(teacher, batch(), any_layout=True)
    assert list(stages) == [(16, 16), (8, 8), (4, 4), (2, 2)]
    first = [*find_stages(teacher, batch()).values()]
    assert not any(find_channels_last(teacher, batch(), first).values())
    assert all(find_channels_last(teacher, batch(), [*stages.values()]).values())
    method = prepare_method(FeatureMethod(loss="hint"), student, teacher, batch(), seed=0)
    pairs = method.describe_pairs()
    assert len(pairs) == 4
    assert "map of 8x8, 128 channels" in pairs[1]
    assert "map of 8x8, 48 channels" in pairs[1]
    terms = passed(student, method, batch(), LiveTeacher(teacher).signal(batch(), method.needs))
    assert all(bool(torch.isfinite(term.sum)) for term in terms.values())
    reverse = prepare_method(FeatureMethod(loss="similarity"), teacher, student, batch(), seed=0)
    observed = LiveTeacher(teacher).signal(batch(), reverse.student_needs).hidden
    other = LiveTeacher(student).signal(batch(), reverse.needs).hidden
    (mine,), (theirs,) = observed.values(), other.values()
    value = next(t for n, t in passed(teacher, reverse, batch(), LiveTeacher(student).signal(batch(), reverse.needs)
                                      ).items() if n.startswith("similarity"))  # fmt: skip
    right = losses.similarity(mine.permute(0, 3, 1, 2), theirs, reduction="sum")
    torch.testing.assert_close(value.sum, right)


@pytest.mark.parametrize("loss", ["crd", "factor_transfer", "vid", "review", "attention_transfer"])
def test_learned_losses_read_the_channels_of_both_layouts(loss: str) -> None:
    student, teacher, example = torchvision_swin(), resnet(), batch()
    pairs = [{"student": "features.5", "teacher": "layer3"}]
    options = {"negatives": 2} if loss == "crd" else {}
    for mine, theirs, swapped in ((student, teacher, False), (teacher, student, True)):
        given = [{"student": p["teacher"], "teacher": p["student"]} for p in pairs] if swapped else pairs
        method = FeatureMethod(loss=loss, pairs=given, options=options)
        method = prepare_method(method, mine, theirs, example, seed=0, ids=torch.arange(4))
        (built,) = method.hidden.losses  # type: ignore[attr-defined]
        shapes = built.pairs[0].student_shape, built.pairs[0].teacher_shape  # type: ignore[union-attr, index]
        assert [shape[1] for shape in shapes] == ([256, 96] if swapped else [96, 256])
        if loss == "crd":
            assert built.student_head.in_features == (256 if swapped else 96)  # type: ignore[union-attr]
        terms = passed(mine, method, example, LiveTeacher(theirs).signal(example, method.needs))
        assert all(bool(torch.isfinite(term.sum)) for term in terms.values())
        for phase in method.phases():
            passed(mine, phase.method, example, LiveTeacher(theirs).signal(example, phase.method.needs))


class Square(nn.Module):
    """A map of as many channels as rows and columns, channels first or last; of images of one size if set."""

    def __init__(self, last: bool, size: int | None = None) -> None:
        super().__init__()
        self.last, self.size = last, size
        self.conv, self.map, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Identity(), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.size is not None and x.shape[-1] != self.size:
            raise AssertionError("another size")
        x = self.conv(x)
        x = self.map(x.movedim(1, -1) if self.last else x)
        out: torch.Tensor = self.head(x.mean((1, 2) if self.last else (2, 3)))
        return out


@pytest.mark.parametrize("last", [False, True])
def test_the_axis_of_the_channels_is_read_or_asked_for(last: bool) -> None:
    example = batch(8)
    assert find_channels_last(Square(last), example, ["map", "head"]) == {"map": last, "head": False}
    fixed = Square(last, 8)
    with pytest.raises(ModelError, match=r"(?s)cannot tell the channel axis of 'map'.*student_channels"):
        find_channels_last(fixed, example, ["map"])
    pair = {"student": "map", "teacher": "map", "student_channels": "last" if last else "first"}
    method = prepare_method(FeatureMethod(pairs=[pair], loss="hint"), fixed, Square(not last), example, seed=0)
    (built,) = method.hidden.losses  # type: ignore[attr-defined]
    assert built.pairs[0].channels_last == (last, not last)  # type: ignore[union-attr, index]


def test_simkd_takes_no_patch_embedding_for_the_last_feature() -> None:
    method = SimkdMethod()
    reused: Any = prepare_student(method, vit(), resnet(), batch(), 0)
    assert reused.tap == "head:input"
    grown: Any = prepare_student(SimkdMethod(), swin(), resnet(), batch(), 0)
    assert grown.tap.endswith(":input")


def test_doctor_says_the_pairs() -> None:
    recipe = {
        "name": "pairs",
        "data": {"source": "digits", "limit": 100},
        "teacher": {"model": "resnet", "train": {"steps": 1}},
        "student": {"model": "convnet"},
        "method": {"kind": "feature"},
        "train": {"steps": 1},
    }
    found = [finding.text for finding in examine(build_recipe(recipe)) if finding.topic == "pair"]
    assert found
    assert all(text.startswith("hint: student stages.") and "map of" in text for text in found)
