"""Feature distillation: pairs, projectors that are trained and never exported, and misfits found before step 0."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tutelage
from support.worlds import Shuffled, images, teacher_for, texts
from tutelage import api, config, losses
from tutelage.config import build_recipe, dump_recipe
from tutelage.data import Batch
from tutelage.engine.checkpoint import load_checkpoint, newest
from tutelage.errors import CapabilityError, ConfigError, Interrupted, ModelError
from tutelage.methods import FEATURE_LOSSES, LOGIT_LOSSES, FeatureMethod, Method, prepare_method
from tutelage.methods.feature import feature_loss
from tutelage.methods.features import FeatureLoss
from tutelage.methods.logit import logit_loss
from tutelage.models.small import ConvNet
from tutelage.progress import Terminal
from tutelage.students import PROJECTORS
from tutelage.taps import observe
from tutelage.teachers import LiveTeacher

RECIPE: dict[str, Any] = {
    "name": "feature",
    "data": {"source": "digits", "labels": 100},
    "teacher": {"model": "convnet", "options": {"widths": [8, 16], "depth": 1}, "train": {"steps": 150}},
    "student": {"model": "convnet", "options": {"widths": [4, 8], "depth": 1}},
    "method": {"kind": "feature", "pairs": "auto", "weight": 100},
    "train": {"steps": 12, "batch_size": 32, "optimizer": {"lr": 0.02}},
}


def net(*widths: int) -> ConvNet:
    return ConvNet(classes=4, channels=1, widths=widths, depth=1)


def batch(n: int = 6) -> Batch:
    return Batch(torch.randn(n, 1, 8, 8), torch.randint(4, (n,)))


def accepted(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters)


@pytest.mark.parametrize("name", LOGIT_LOSSES)
def test_every_logit_loss_has_a_function_that_takes_its_options(name: str) -> None:
    entry, parameters = LOGIT_LOSSES[name], accepted(logit_loss(name))
    assert set(entry.options.model_fields) <= parameters
    assert ("temperature" in parameters) == (entry.temperature is not None)
    assert ("labels" in parameters) == entry.needs_labels


@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_every_feature_loss_has_a_class_and_a_function_that_takes_its_options(name: str) -> None:
    entry = FEATURE_LOSSES[name]
    assert issubclass(feature_loss(name), FeatureLoss)
    assert set(entry.options.model_fields) - entry.options.method_only <= accepted(getattr(losses, name))


def test_every_kind_of_projector_in_recipes_can_be_built() -> None:
    assert set(config.PROJECTORS) == set(PROJECTORS)


PLAIN = [name for name, entry in FEATURE_LOSSES.items() if entry.module == "PairwiseLoss"]
PAIRS = [{"student": f"stages.{i}", "teacher": f"stages.{i}"} for i in range(2)]


@pytest.mark.parametrize("name", PLAIN)
def test_a_term_is_its_objective_on_the_rows_that_count(name: str) -> None:
    torch.manual_seed(1)
    student, teacher, b = net(4, 8).eval(), net(6, 12).eval(), batch()
    mask = torch.tensor([True, True, False, True, True, False])
    b = Batch(b.inputs, b.labels, mask=mask)
    method = prepare_method(FeatureMethod(pairs=PAIRS, loss=name, weight=3.0), student, teacher, b, seed=0)
    projects = name == "hint"
    terms = method(observe(student, b.inputs, method.student_needs), b, LiveTeacher(teacher).signal(b, method.needs))
    assert set(terms) == set(method.counts(b)) == set(method.weights)
    for i, stage in enumerate(("stages.0", "stages.1")):
        term = terms[f"{name}({stage})"]
        assert int(term.count) == int(method.counts(b)[f"{name}({stage})"]) == 4
        s, t = (m.stages[: i + 1](b.inputs[mask]) for m in (student, teacher))
        if projects:
            s = method.hidden.losses[i].projector(s, t)
        torch.testing.assert_close(term.sum / term.count, getattr(losses, name)(s, t), rtol=1e-4, atol=1e-6)
    assert bool(list(method.parameters())) == projects


def test_padding_is_no_token() -> None:
    world = texts()
    student, teacher = world.make(8).eval(), world.make(16).eval()
    b = world.to_batch(world.held[1])
    pairs = [{"student": "bert.embeddings", "teacher": "bert.embeddings", "loss": o} for o in ("hint", "pkt")]
    method = prepare_method(FeatureMethod(pairs=pairs), student, teacher, b, seed=0)
    hint, pkt = "hint(bert.embeddings)", "pkt(bert.embeddings)"
    assert int(method.counts(b)[hint]) == int(b.inputs["attention_mask"].sum())
    assert int(method.counts(b)[pkt]) == len(b)
    seen = observe(student, b.inputs, method.student_needs)
    signal = LiveTeacher(teacher).signal(b, method.needs)
    before = method(seen, b, signal)
    seen.hidden["bert.embeddings"][b.inputs["attention_mask"] == 0] = float("nan")
    after = method(seen, b, signal)
    for name in (hint, pkt):
        torch.testing.assert_close(before[name].sum, after[name].sum)


def test_the_formula_names_every_term_and_the_seed_every_projector() -> None:
    pair = {"student": "stages.1", "teacher": "stages.1"}

    def made(seed: int) -> Method:
        return prepare_method(FeatureMethod(pairs=[pair, pair], weight=100), net(4, 8), net(6, 12), batch(), seed)

    one, again, other = made(1), made(1), made(2)
    assert one.formula() == "0.9 * kd(T=4) + 0.1 * ce + 100 * hint(stages.1) + 100 * hint(stages.1)#2"
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"pairs": [{"student": "stage.1", "teacher": "stages.1"}]}, ModelError, r"pairs\.0\.student.*nearest"),
        ({"pairs": [{"student": "stages.1", "teacher": "x"}]}, ModelError, r"pairs\.0\.teacher"),
        ({"pairs": [{"student": "head", "teacher": "stages.1"}]}, ModelError, "from a vector to a map"),
        ({"pairs": [{"student": "head", "teacher": "head", "loss": "nst"}]}, ModelError, "feature maps"),
        ({"pairs": [{"student": "head", "teacher": "head", "loss": "attention_kl"}]}, ModelError, "attention"),
        ({"loss": "hnt"}, ConfigError, "did you mean 'hint'"),
        ({"loss": "nst", "options": {"kernel": "cubic"}}, ConfigError, "linear"),
        ({"loss": "hint", "options": {"kernel": "linear"}}, ConfigError, "no option 'kernel'"),
        ({"loss": "pkt", "projector": "mlp"}, ConfigError, "takes no projector"),
        ({"loss": "crd"}, CapabilityError, "needs sample ids"),
        ({"loss": "crd", "options": {"negatives": 0}}, ConfigError, "at least 1"),
        ({"loss": "factor_transfer", "options": {"share": 1.5}}, ConfigError, "below 1"),
        ({"loss": "review", "options": {"levels": [0.5]}}, ConfigError, "whole number"),
        ({"loss": "vid", "options": {"variant": "mine"}}, ConfigError, "it must be paper or authors"),
        ({"stage1_fraction": 1.0}, ConfigError, "below 1"),
        ({"pairs": []}, ConfigError, "is no list of pairs"),
    ],
)  # fmt: skip
def test_misfits_are_named_before_anything_is_trained(
    options: dict[str, Any], error: type[Exception], says: str, tmp_path: Path
) -> None:
    import re

    world = images()
    with pytest.raises(error) as caught:
        tutelage.distill(
            net(6, 12), net(4, 8), world.train, eval_data=world.held, method=FeatureMethod(**options),
            out=tmp_path / "run", verbose=False,
        )  # fmt: skip
    assert re.search(says, str(caught.value), re.DOTALL), str(caught.value)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ({"loss": "hnt"}, "did you mean 'hint'"),
        ({"pairs": "all"}, "allowed: auto, or"),
        ({"wieght": 3}, "did you mean 'weight'"),
        ({"pairs": [{"student": "a"}]}, "'method.pairs.0.teacher' is missing"),
        ({"pairs": [{"student": "a", "teacher": "b", "wait": 1}]}, "did you mean 'weight'"),
        ({"options": {"variant": "x"}}, "hint has no option 'variant'"),
        ({"projector": "cnv"}, "allowed: auto, conv1x1"),
    ],
)
def test_a_wrong_recipe_is_answered_by_the_schema(method: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_recipe({**RECIPE, "method": {"kind": "feature", **method}})
    assert says in str(caught.value)
    assert "feature." not in str(caught.value)


def test_a_recipe_runs_and_what_it_exports_has_no_trace(tmp_path: Path) -> None:
    recipe = build_recipe({k: dict(v) if isinstance(v, dict) else v for k, v in RECIPE.items()})
    import yaml

    assert build_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe
    found = api.run(recipe, out=tmp_path / "run", terminal=Terminal(speaks=False))
    assert found.summary["formula"] == "0.9 * kd(T=4) + 0.1 * ce + 100 * hint(stages.0) + 100 * hint(stages.1)"
    assert found.summary["projectors"] == 4 * 8 + 8 + 8 * 16 + 16
    exported = load_file(str(found.path / "student" / "model.safetensors"))
    assert exported.keys() == ConvNet(classes=10, channels=1, widths=(4, 8), depth=1).state_dict().keys()
    folder = newest(found.path / "checkpoints" / "distilled-seed0")
    assert folder is not None
    saved = load_checkpoint(folder)
    assert "method.hidden.losses.1.projector.body.weight" in saved["model"]
    assert any("losses.1.projector.body.weight" in name for name in saved["optimizer"]["state"])


def distil(out: Path, die_at: int | None = None, **options: Any) -> tutelage.DistillResult:
    world = images()
    torch.manual_seed(7)
    return tutelage.distill(
        teacher_for(world), world.make(8), Shuffled(world.train, die_at), eval_data=world.held,
        method=FeatureMethod(weight=10.0, norm=True), epochs=4, lr=5e-3, baseline=False, out=out, verbose=False,
        train={"accumulate": 2, "log_every": 1, "clip": 1.0, "ema": 0.9, "checkpoint_every": 3}, **options,
    )  # fmt: skip


def test_projectors_resume_to_the_same_bits(tmp_path: Path) -> None:
    whole = distil(tmp_path / "whole")
    with pytest.raises(Interrupted):
        distil(tmp_path / "cut", die_at=len(images().train) * 2 + 1)
    resumed = distil(tmp_path / "cut", resume=True)
    assert type(resumed.student) is type(whole.student)
    for (name, a), b in zip(whole.student.state_dict().items(), resumed.student.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for run in ("whole", "cut"):
        folder = newest(tmp_path / run / "checkpoints" / "distilled-seed0")
        assert folder is not None
        saved = load_checkpoint(folder)["model"]
        if run == "whole":
            first = saved
    assert all(torch.equal(v, saved[k]) for k, v in first.items())
    assert (tmp_path / "whole" / "metrics.jsonl").read_text() == (tmp_path / "cut" / "metrics.jsonl").read_text()
