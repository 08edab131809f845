"""A network that teaches itself: what its exits learn from, what they are, and that nothing of them is exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tutelage
from support.worlds import Shuffled, images, texts, tokens
from tutelage import api
from tutelage.cli.doctor_checks import examine
from tutelage.config import build_recipe, load_recipe
from tutelage.data import Batch, load_images
from tutelage.engine.checkpoint import load_checkpoint, newest
from tutelage.errors import ConfigError, Interrupted, ModelError
from tutelage.methods import ByotMethod, DistillationModule, prepare_method
from tutelage.models import load_model
from tutelage.models.small import MLP, ConvNet, ResNet
from tutelage.progress import Terminal

SILENT = Terminal(speaks=False)


def batch(size: int = 5) -> Batch:
    torch.manual_seed(3)
    return Batch(torch.randn(size, 1, 16, 16), torch.tensor([0, 3, -100, 1, 2])[:size])


def network() -> nn.Module:
    torch.manual_seed(0)
    return ConvNet(classes=4, channels=1, widths=(3, 5, 8), depth=1)


def fit(student: nn.Module, **options: Any) -> DistillationModule:
    example = batch(2)
    return DistillationModule(student, prepare_method(ByotMethod(**options), student, None, example, 0)).train()


def test_terms_are_those_of_the_paper() -> None:
    """Worked again from the exits' own outputs, with labels where there are any and the network's word everywhere."""
    module, b = fit(network(), alpha=0.4, temperature=2.0, hint=0.5), batch()
    method: Any = module.method
    module.eval()
    terms = module(b, None)
    assert method.taps == ["stages.0", "stages.1"]
    stages, head = module.student.stages, module.student.head
    x, features = b.inputs, []
    for stage in stages:  # type: ignore[union-attr]
        x = stage(x)
        features.append(x)
    deepest = features[-1].mean((2, 3))
    has = b.labels >= 0
    word = torch.softmax(head(deepest) / 2, -1)  # type: ignore[operator]
    loss = nn.functional.cross_entropy(head(deepest)[has], b.labels[has])  # type: ignore[operator]
    for feature, leave in zip(features, method.exits, strict=False):
        mine, z = leave(feature)
        ce = nn.functional.cross_entropy(z[has], b.labels[has])
        kl = (word * (word.log() - torch.log_softmax(z / 2, -1))).sum(-1).mean()
        square = (mine - deepest).square().sum(-1).mean()
        loss = loss + 0.6 * ce + 0.4 * kl + 0.5 * square
    ours = sum(method.weights[name] * term.sum / term.count for name, term in terms.items())
    torch.testing.assert_close(ours, loss)
    assert {k: int(v) for k, v in method.counts(b).items()} == {k: int(v.count) for k, v in terms.items()}
    assert set(terms) == set(method.weights)


def test_exits_move_the_stages_before_them_and_never_their_own_teacher() -> None:
    module, b = fit(network()), batch()
    terms = module(b, None)
    names = ("stages.0", "stages.1", "stages.2", "head")
    parts = {name: list(module.student.get_submodule(name).parameters()) for name in names}
    reach = {"ce": set(parts)}
    for kind in ("ce", "kd", "hint"):
        reach[f"{kind}(stages.0)"], reach[f"{kind}(stages.1)"] = {"stages.0"}, {"stages.0", "stages.1"}
    for name, expected in reach.items():
        got = {
            part
            for part, weights in parts.items()
            if any(
                g is not None and bool(g.any())
                for g in torch.autograd.grad(terms[name].sum, weights, retain_graph=True, allow_unused=True)
            )
        }
        assert got == expected, name
    torch.stack([term.sum for term in terms.values()]).sum().backward()
    assert all(p.grad is not None for p in module.parameters()), "DDP waits for every one"


@pytest.mark.parametrize(
    ("student", "options", "taps"),
    [
        (ResNet(classes=4, channels=1), {}, ["stages.0", "stages.1"]),
        (ConvNet(classes=4, channels=1, widths=(3, 5, 8)), {"exits": ["stages.0.2", "stages.1"]}, None),
        (MLP(classes=4, channels=1, size=16, hidden=(9, 7)), {"exits": ["body.2"], "factor": 2}, None),
    ],
    ids=["resnet", "named", "vectors"],
)
def test_exits_of_other_networks(student: nn.Module, options: Any, taps: list[str] | None) -> None:
    module, b = fit(student, **options), batch()
    method: Any = module.method
    assert method.taps == (taps or options["exits"])
    terms = module(b, None)
    assert all(torch.isfinite(term.sum) for term in terms.values())
    for model in method.auxiliary_models(student).values():
        assert model.eval()(b.inputs).shape == (5, 4)


# Runs ------------------------------------------------------------------------------------------------------

RECIPE: dict[str, Any] = {
    "name": "byot",
    "data": {"source": "digits", "labels": 100},
    "student": {"model": "convnet", "options": {"widths": [4, 8], "depth": 1}},
    "train": {"steps": 12, "batch_size": 32, "optimizer": {"lr": 0.01}, "evaluate_every": 4},
    "seeds": [0, 1],
}


def test_the_plain_network_is_exported_and_its_exits_are_measured(tmp_path: Path) -> None:
    asked = build_recipe({**json.loads(json.dumps(RECIPE)), "method": "byot"})
    found = api.run(asked, out=tmp_path / "run", terminal=SILENT)
    assert load_recipe(found.path / "config.yaml") == asked
    plain = load_model(found.path / "student")
    assert type(plain) is ConvNet
    assert found.summary["parameters"]["student"] == sum(p.numel() for p in plain.parameters())
    assert found.summary["projectors"] > 0
    assert not (found.path / "models" / "distilled-seed0-exit-1").exists()
    row = found.summary["students"]["distilled"]["others"]["exit-1"]
    state = load_checkpoint(newest(found.path / "checkpoints" / "distilled-seed1"))["model"]  # type: ignore[arg-type]
    data = load_images("digits", labels=100).test
    b = data.fetch(torch.arange(len(data)))
    student = ConvNet(classes=10, channels=1, widths=(4, 8), depth=1)
    method = prepare_method(ByotMethod(), student, None, b.rows(0, 2), 0)
    student.load_state_dict({k.removeprefix("student."): v for k, v in state.items() if k.startswith("student.")})
    method.load_state_dict({k.removeprefix("method."): v for k, v in state.items() if k.startswith("method.")})
    early = method.auxiliary_models(student)["exit-1"].eval()
    with torch.no_grad():
        right = (early(b.inputs).argmax(1) == b.labels).float().mean()
    assert row["last"]["accuracy"]["values"][1] == pytest.approx(float(right))
    needed = sum(p.numel() for p in [*student.stages[0].parameters(), *method.exits[0].parameters()])  # type: ignore[union-attr, index]
    assert row["parameters"] == needed


def test_exits_resume_to_the_same_bits(tmp_path: Path) -> None:
    world = images()

    def distil(out: Path, die_at: int | None = None, **options: Any) -> dict[str, torch.Tensor]:
        tutelage.distill(
            None, world.make(4), Shuffled(world.train, die_at), eval_data=world.held, method=ByotMethod(), epochs=3,
            lr=5e-3, baseline=False, out=out, verbose=False, train={"clip": 1.0, "checkpoint_every": 3}, **options,
        )  # fmt: skip
        found = newest(out / "checkpoints" / "distilled-seed0")
        assert found is not None
        model: dict[str, torch.Tensor] = load_checkpoint(found)["model"]
        return model

    torch.manual_seed(5)
    student = world.make(4)
    world.make = lambda width: student
    whole = distil(tmp_path / "whole")
    with pytest.raises(Interrupted):
        distil(tmp_path / "cut", die_at=7)
    resumed = distil(tmp_path / "cut", resume=True)
    assert any(k.startswith("method.exits.0.head") for k in whole)
    assert all(torch.equal(v, resumed[k]) for k, v in whole.items())


# Errors ----------------------------------------------------------------------------------------------------


def test_students_without_exits_are_named() -> None:
    with pytest.raises(ModelError, match="feature maps of one resolution only"):
        fit(MLP(classes=4, channels=1, size=16))
    with pytest.raises(ModelError, match=r"stages\.7"):
        fit(network(), exits=["stages.7"])
    for world, tap, says in (
        (texts(), "bert.encoder.layer.0", "an exit is at a map"), (tokens(), "model.layers.0", "not one vector"),
    ):  # fmt: skip
        b = world.to_batch(world.held[0]).rows(0, 2)
        with pytest.raises(ModelError, match=says):
            prepare_method(ByotMethod(exits=[tap]), world.make(8), None, b, 0)


@pytest.mark.parametrize(
    "options", [{"exits": []}, {"alpha": 1.5}, {"temperature": 0.0}, {"hint": -1.0}, {"factor": 0}], ids=str
)
def test_values_out_of_range_are_refused(options: dict[str, Any]) -> None:
    name = next(iter(options))
    with pytest.raises(ConfigError, match=f"ByotOptions: {name}(:| is) "):
        ByotMethod(**options)
    with pytest.raises(ConfigError, match=f"method.{name}"):
        build_recipe({**json.loads(json.dumps(RECIPE)), "method": {"kind": "byot", **options}})


def test_doctor_finds_the_exits() -> None:
    found = {f.topic: f for f in examine(build_recipe({**json.loads(json.dumps(RECIPE)), "method": "byot"}), SILENT)}
    assert "at stages.0: 0.7 * ce + 0.0333 * kd(T=3) + 0.24 * hint" in found["method"].text
    assert "hint(stages.0)" in found["one batch"].text
