"""Students that teach each other: whose gradient is whose, what is kept, and what resumes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tutelage
from support.worlds import Shuffled, images, state
from tutelage import api
from tutelage.cli.doctor_checks import examine
from tutelage.config import build_recipe, load_recipe
from tutelage.data import Batch, load_images
from tutelage.errors import CapabilityError, ConfigError, Interrupted
from tutelage.methods import DistillationModule, MutualMethod
from tutelage.models import load_model
from tutelage.progress import Terminal

SILENT = Terminal(speaks=False)
RECIPE: dict[str, Any] = {
    "name": "mutual",
    "data": {"source": "digits", "labels": 100},
    "student": {"model": "mlp", "options": {"hidden": [8]}},
    "train": {"steps": 12, "batch_size": 32, "optimizer": {"lr": 0.01}},
}


def recipe(method: Any, **changes: Any) -> Any:
    return build_recipe({**json.loads(json.dumps(RECIPE)), "method": method, **changes})


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))


def batch(size: int = 7) -> Batch:
    torch.manual_seed(9)
    labels = torch.randint(4, (size,))
    labels[::3] = -100
    return Batch(torch.randn(size, 6), labels)


def trio(**options: Any) -> DistillationModule:
    method = MutualMethod(peers=2, **options)
    method.add_peers([network(1), network(2)])
    student = network(0)
    method.build(student, None, batch(2))
    return DistillationModule(student, method).train()


def students(module: DistillationModule) -> list[nn.Module]:
    return [module.student, *module.method.members]  # type: ignore[misc]


@pytest.mark.parametrize("target", ["each", "mean"])
@pytest.mark.parametrize("t", [1.0, 3.0])
def test_each_student_has_the_loss_of_the_papers(target: str, t: float) -> None:
    module, b = trio(target=target, temperature=t), batch()
    terms = module(b, None)
    p = [torch.softmax(model(b.inputs) / t, -1) for model in students(module)]
    logs = [torch.log_softmax(model(b.inputs), -1) for model in students(module)]
    for i, name in enumerate(("", "(peer-1)", "(peer-2)")):
        has = b.labels >= 0
        ce = -logs[i][has].gather(1, b.labels[has].unsqueeze(1)).sum()
        torch.testing.assert_close(terms[f"ce{name}"].sum, ce)
        others = [p[j] for j in range(3) if j != i]
        others = [(others[0] + others[1]) / 2] if target == "mean" else others
        kl = sum((q * (q.log() - p[i].log())).sum() for q in others) / len(others)
        torch.testing.assert_close(terms[f"mutual{name}"].sum, t * t * kl)
        assert int(terms[f"mutual{name}"].count) == 7
        assert int(terms[f"ce{name}"].count) == int(has.sum())
    counts = module.method.counts(b)
    assert {k: int(v) for k, v in counts.items()} == {k: int(v.count) for k, v in terms.items()}
    assert set(terms) == set(module.method.weights)


@pytest.mark.parametrize("options", [{}, {"target": "mean"}, {"refresh": 5}])
def test_a_students_gradient_is_that_of_its_own_loss(options: dict[str, Any]) -> None:
    module, b = trio(**options), batch()
    terms = module(b, None)
    whole = torch.stack([term.sum for term in terms.values()]).sum()
    for model, name in zip(students(module), ("", "(peer-1)", "(peer-2)"), strict=True):
        weights = list(model.parameters())
        mine = terms[f"ce{name}"].sum + terms[f"mutual{name}"].sum
        own = torch.autograd.grad(mine, weights, retain_graph=True)
        got = torch.autograd.grad(whole, weights, retain_graph=True)
        assert all(torch.equal(a, g) for a, g in zip(own, got, strict=True))
        others = [p for other in students(module) if other is not model for p in other.parameters()]
        assert all(g is None for g in torch.autograd.grad(mine, others, retain_graph=True, allow_unused=True))
    whole.backward()
    assert all(p.grad is None for p in module.method.stale.parameters())  # type: ignore[union-attr]


def test_stale_copies_are_renewed_when_due_and_never_in_between() -> None:
    module = trio(refresh=3)
    method: Any = module.method
    start = copy.deepcopy(method.stale)
    method.before_training(module.student, 4, 10)
    for step in (5, 6, 7):
        with torch.no_grad():
            for p in [*module.student.parameters(), *method.members.parameters()]:
                p.add_(0.1)
        method.after_step()
        renewed = all(torch.equal(a, b) for a, b in zip(start.parameters(), method.stale.parameters(), strict=True))
        assert renewed == (step < 6)
        live = [p for model in students(module) for p in model.parameters()]
        same = all(torch.equal(a, b) for a, b in zip(live, method.stale.parameters(), strict=True))
        assert same == (step == 6)
    assert not any(p.requires_grad for p in method.stale.parameters())
    assert not [k for k, _ in module.named_parameters() if "_student" in k], "the student must not be held twice"


def test_stale_peers_speak_in_evaluation_mode_and_stay_in_it() -> None:
    method = MutualMethod(peers=1, refresh=2)
    torch.manual_seed(0)
    student, peer = (nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 4)) for _ in range(2))
    method.add_peers([peer])
    method.build(student, None, batch(2))
    module, b = DistillationModule(student, method).train(), batch()
    before = {k: v.clone() for k, v in method.stale.state_dict().items()}
    with torch.no_grad():
        peer_logits = method._logits_for_peers([], b)
        for model, z in zip(method.stale, peer_logits, strict=True):
            torch.testing.assert_close(model.eval()(b.inputs), z)
    module(b, None)
    assert all(torch.equal(v, before[k]) for k, v in method.stale.state_dict().items())


def test_burning_in_learns_from_labels_alone() -> None:
    module, b = trio(burn_in=0.5), batch()
    method: Any = module.method
    for step, burning in ((0, True), (4, True), (5, False), (9, False)):
        method.before_training(module.student, step, 10)
        with torch.no_grad():
            terms = module(b, None)
        assert all((float(terms[k].sum) == 0) == burning for k in terms if k.startswith("mutual"))
        assert all(float(terms[k].sum) > 0 for k in terms if k.startswith("ce"))


# Runs ------------------------------------------------------------------------------------------------------


def test_peers_of_any_architecture_are_saved_measured_and_shown(tmp_path: Path) -> None:
    method = {"kind": "mutual", "peers": [None, {"model": "convnet", "options": {"widths": [4], "depth": 1}}]}
    teacher = {"model": "mlp", "options": {"hidden": [32]}, "train": {"steps": 60}}
    found = api.run(recipe(method, teacher=teacher, seeds=[0, 1]), out=tmp_path / "run", terminal=SILENT)
    assert load_recipe(found.path / "config.yaml") == recipe(method, teacher=teacher, seeds=[0, 1])
    assert found.summary["projectors"] == 0
    others = found.summary["students"]["distilled"]["others"]
    assert set(others) == {"peer-1", "peer-2"}
    test = load_images("digits", labels=100).test
    b = test.fetch(torch.arange(len(test)))
    for name, row in others.items():
        for seed in (0, 1):
            model = load_model(found.path / "models" / f"distilled-seed{seed}-{name}")
            assert row["parameters"] == sum(p.numel() for p in model.parameters())
            with torch.no_grad():
                right = (model(b.inputs).argmax(1) == b.labels).float().mean()
            assert row["best"]["accuracy"]["values"][seed] == pytest.approx(float(right))
        assert 0 < row["best"]["agreement"]["mean"] <= 1
    exported = load_model(found.path / "student")
    assert type(exported).__name__ == "MLP"
    page = (found.path / "report.html").read_text(encoding="utf-8")
    assert "</span>peer-1</span>" in page
    assert "</span>peer-2</span>" in page


def test_the_student_starts_as_alone_and_its_peers_do_not(tmp_path: Path) -> None:
    """With labels for all and peers that weigh nothing, the run's student is the baseline student, bit by bit."""
    asked = recipe({"kind": "mutual", "peers": 2, "weight": 0.0}, data="digits", seeds=[3])
    out = api.run(asked, out=tmp_path / "run", terminal=SILENT).path
    alone, student, one, two = (
        load_file(str(out / "models" / f"{name}" / "model.safetensors"))
        for name in ("baseline-seed3", "distilled-seed3", "distilled-seed3-peer-1", "distilled-seed3-peer-2")
    )
    assert all(torch.equal(alone[k], student[k]) for k in alone)
    for a, b in ((student, one), (student, two), (one, two)):
        assert not any(torch.equal(a[k], b[k]) for k in a)


def distil(out: Path, die_at: int | None = None, **options: Any) -> tutelage.DistillResult:
    world = images()
    method = MutualMethod(peers=[None, lambda: world.make(4)], refresh=3, burn_in=0.3, target="mean")
    return tutelage.distill(
        None, lambda: world.make(8), Shuffled(world.train, die_at), eval_data=world.held, validation=world.held,
        method=method, epochs=4, lr=5e-3, baseline=False, out=out, verbose=False,
        train={"accumulate": 2, "log_every": 1, "clip": 1.0, "ema": 0.9, "checkpoint_every": 2}, **options,
    )  # fmt: skip


@pytest.mark.parametrize("batches", [4, 13])
def test_peers_and_their_stale_copies_resume_to_the_same_bits(batches: int, tmp_path: Path) -> None:
    distil(tmp_path / "whole")
    with pytest.raises(Interrupted):
        distil(tmp_path / "cut", die_at=batches)
    distil(tmp_path / "cut", resume=True)
    first, second = state(tmp_path / "whole"), state(tmp_path / "cut")
    assert any(k.startswith("method.stale.2.") for k in first)
    assert all(torch.equal(v, second[k]) for k, v in first.items())
    assert (tmp_path / "whole" / "metrics.jsonl").read_text() == (tmp_path / "cut" / "metrics.jsonl").read_text()
    for peer in ("peer-1", "peer-2"):
        a, b = (
            load_file(str(tmp_path / run / "models" / f"distilled-seed0-{peer}" / "model.safetensors"))
            for run in ("whole", "cut")
        )
        assert all(torch.equal(v, b[k]) for k, v in a.items())


# Errors ----------------------------------------------------------------------------------------------------


def test_peers_that_start_alike_are_refused(tmp_path: Path) -> None:
    world = images()
    options: dict[str, Any] = {"eval_data": world.held, "epochs": 1, "out": tmp_path / "run", "verbose": False}
    with pytest.raises(ConfigError, match="peer 1 starts with the same weights as the student"):
        tutelage.distill(None, world.make(4), world.train, method=MutualMethod(), **options)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="is not a function that returns a module"):
        tutelage.distill(
            None, world.make(4), world.train, method=MutualMethod(peers=[{"model": "mlp"}]), **options
        )  # fmt: skip
    five = MutualMethod(peers=[lambda: tutelage.models.small.ConvNet(classes=5, channels=1, widths=(4,))])
    with pytest.raises(CapabilityError, match="peer-1 does not score the student's 4 classes"):
        tutelage.distill(None, world.make(4), world.train, method=five, **options)


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ({"peers": 0}, "method.peers: 0 peers"),
        ({"peers": []}, "neither a number nor a list"),
        ({"peers": ["mpl"]}, "did you mean 'mlp'"),
        (
            {"peers": [{"model": "mlp", "option": {}}]},
            r"unknown key 'method.peers.0.option' \(did you mean 'options'",
        ),
        ({"burn_in": 1.0}, "method.burn_in"),
        ({"refresh": 0}, "method.refresh"),
        ({"target": "all"}, "method.target"),
        ({"alpha": 0.5}, "unknown key 'method.alpha'"),
    ],
)
def test_a_recipes_mistakes_are_named(method: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        recipe({"kind": "mutual", **method})


@pytest.mark.parametrize(
    "options",
    [{"peers": 0}, {"temperature": 0.0}, {"weight": -1.0}, {"target": "all"}, {"refresh": 0}, {"burn_in": 1.0}],
    ids=str,
)
def test_a_methods_mistakes_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"MutualOptions: {next(iter(options))}(:| is) "):
        MutualMethod(**options)


def test_doctor_looks_at_peers() -> None:
    found = examine(recipe({"kind": "mutual", "peers": ["convnet"], "burn_in": 0.5}), SILENT)
    assert not [f for f in found if f.level == "bad"]
    assert "mutual(peer-1)" in next(f.text for f in found if f.topic == "one batch")
