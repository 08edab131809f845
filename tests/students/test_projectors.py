"""Projectors: the right shape from one dry run that leaves no trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tutelage.data import Batch
from tutelage.errors import ConfigError, ModelError
from tutelage.models.small import ConvNet, ResNet
from tutelage.students import PROJECTORS, build_projector, feature_shapes, find_stages


def example(channels: int = 1, side: int = 8) -> Batch:
    return Batch(torch.randn(2, channels, side, side), torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize("kind", [k for k in PROJECTORS if k != "identity"])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ((4, 6, 8, 8), (4, 10, 8, 8)),
        ((4, 6, 8, 8), (4, 10, 3, 5)),  # pooled
        ((4, 6, 4, 4), (4, 10, 9, 9)),  # interpolated
        ((4, 6, 8, 8), (4, 10)),  # a map's mean
        ((4, 6), (4, 10)),
        ((4, 6), (4, 6)),
    ],
)
def test_a_projector_leads_to_the_teachers_shape(
    student: tuple[int, ...], teacher: tuple[int, ...], kind: str, norm: bool
) -> None:
    projector = build_projector(student, teacher, kind=kind, norm=norm)
    x = torch.randn(student, requires_grad=True)
    out = projector(x, torch.randn(teacher))
    assert out.shape == teacher
    out.square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() > 0
    assert all(p.grad is not None for p in projector.parameters())


def test_the_size_is_that_of_the_feature_at_hand_and_not_of_the_dry_run() -> None:
    projector = build_projector((2, 6, 8, 8), (2, 10, 4, 4))
    assert projector(torch.randn(2, 6, 12, 12), torch.randn(2, 10, 6, 6)).shape == (2, 10, 6, 6)
    tokens = build_projector((2, 5, 6), (2, 5, 10))
    assert tokens(torch.randn(3, 7, 6), torch.randn(3, 7, 10)).shape == (3, 7, 10)
    assert tokens(torch.randn(3, 16, 6), torch.randn(3, 9, 10)).shape == (3, 9, 10)


def test_equal_channels_need_no_parameters_and_others_are_counted() -> None:
    assert not list(build_projector((2, 6, 8, 8), (2, 6, 4, 4)).parameters())
    assert "70 parameters" in repr(build_projector((2, 6, 8, 8), (2, 10, 8, 8)))


@pytest.mark.parametrize(
    ("student", "teacher", "options", "error", "says"),
    [
        ((2, 6), (2, 10), {"kind": "identity"}, ModelError, "6 to 10 channels"),
        ((2, 6), (2, 10), {"kind": "linar"}, ConfigError, "allowed: auto"),
        ((2, 5, 6), (2, 5, 10), {"norm": True}, ConfigError, "maps and vectors"),
        ((2, 6), (2, 10, 4, 4), {}, ModelError, "from a vector to a map"),
        ((2, 5, 6), (2, 10), {}, ModelError, "from tokens to a vector"),
        ((2,), (2, 10), {}, ModelError, "no projector"),
    ],
)
def test_shapes_without_a_way_are_errors(student, teacher, options, error, says) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=says):
        build_projector(student, teacher, **options)


def test_a_dry_run_moves_no_statistic_and_leaves_every_mode() -> None:
    model = ConvNet(classes=3, channels=1, widths=(4, 8), depth=1).train()
    model.stages[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    assert feature_shapes(model, example(), ["stages.0", "stages.1", "stages.0"]) == {
        "stages.0": (2, 4, 8, 8),
        "stages.1": (2, 8, 4, 4),
    }
    find_stages(model, example())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(ModelError, match=r"stages\.1"):
        feature_shapes(model, example(), ["stage.1"])
    assert [m.training for m in model.modules()] == modes


def test_stages_are_the_outermost_modules_of_one_resolution() -> None:
    assert find_stages(ConvNet(classes=3, channels=1, widths=(4, 8, 8)), example()) == {
        (8, 8): "stages.0", (4, 4): "stages.1", (2, 2): "stages.2",
    }  # fmt: skip
    assert find_stages(ResNet(classes=3, channels=1, blocks=2), example()) == {
        (8, 8): "stages.0", (4, 4): "stages.1", (2, 2): "stages.2",
    }  # fmt: skip
    assert find_stages(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), example()) == {}
    timm = pytest.importorskip("timm")
    assert list(find_stages(timm.create_model("resnet10t", num_classes=2), example(3, 64)).values())[-4:] == [
        "layer1", "layer2", "layer3", "layer4",
    ]  # fmt: skip


def test_heads_of_an_attention_are_no_map() -> None:
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=8, depth=2, num_classes=3)
    images = Batch(torch.randn(2, 3, 64, 64), torch.zeros(2, dtype=torch.long))
    assert all("attn" not in path for path in find_stages(model, images).values())
    resnet = timm.create_model("resnet18", num_classes=3)
    assert find_stages(resnet, images) == {
        (16, 16): "layer1", (8, 8): "layer2", (4, 4): "layer3", (2, 2): "layer4",
    }  # fmt: skip
