"""Every method by name: what it compares, what it learns beside the student, what of it is kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tutelage
from support.worlds import Shuffled, images, teacher_for, texts
from tutelage import api, losses
from tutelage.config import build_recipe
from tutelage.data import Batch
from tutelage.data.batch import Task
from tutelage.engine.checkpoint import load_checkpoint, newest
from tutelage.errors import CapabilityError, ConfigError, Interrupted
from tutelage.methods import (
    FEATURE_LOSSES,
    LOGIT_LOSSES,
    DistillationModule,
    FeatureMethod,
    LogitMethod,
    Method,
    SimkdMethod,
    SupervisedMethod,
    TeacherFreeMethod,
    prepare_method,
    prepare_student,
)
from tutelage.models import load_model
from tutelage.models.small import ConvNet, ResNet
from tutelage.progress import Terminal
from tutelage.students import ReusedHead, find_last_norm
from tutelage.taps import Needs, observe
from tutelage.teachers import LiveTeacher

OF_IMAGES = [n for n in FEATURE_LOSSES if n not in ("attention_kl", "attention_mse", "value_relation")]


def pair(resnet: bool = False) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(3)
    if resnet:
        return ResNet(classes=4, channels=1, widths=(4, 6)), ResNet(classes=4, channels=1, widths=(6, 10), blocks=2)
    return ConvNet(classes=4, channels=1, widths=(4, 8), depth=1), ConvNet(classes=4, channels=1, widths=(6, 12))


def batch(n: int = 12, **extra: Any) -> Batch:
    torch.manual_seed(4)
    return Batch(torch.randn(n, 1, 8, 8), torch.randint(4, (n,)), ids=torch.arange(n) * 3 + 5, **extra)


def fit(method: Method, student: nn.Module, teacher: nn.Module, b: Batch) -> Method:
    return prepare_method(method, student, teacher, b.rows(0, 2), 0, b.ids)


# Logits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, o in LOGIT_LOSSES.items() if "classes" in o.tasks])
def test_a_soft_term_is_its_objective_on_the_rows_that_count(name: str) -> None:
    student, teacher = (m.eval() for m in pair())
    b = batch(mask=torch.arange(12) != 4)
    b.labels[2] = -100
    options = {"alpha": 2.0, "beta": 3.0} if name == "dkd" else {}
    method = LogitMethod(soft=name, alpha=0.7, soft_options=options)
    terms = method(observe(student, b.inputs, Needs()), b, LiveTeacher(teacher).signal(b, Needs()))
    labels = LOGIT_LOSSES[name].needs_labels
    rows = b.labelled() if labels else b.counted()
    s, t = student(b.inputs)[rows], teacher(b.inputs)[rows]
    expected = getattr(losses, name)(*((s, t, b.labels[rows]) if labels else (s, t)), **options)
    assert int(terms[name].count) == int(method.counts(b)[name]) == (10 if labels else 11)
    torch.testing.assert_close(terms[name].sum / terms[name].count, expected)
    assert method.weights == {name: 0.7, "ce": pytest.approx(0.3)}


def several(b: Batch, task: Task) -> Batch:
    """``b`` with targets for each of the classes, and a row without any."""
    torch.manual_seed(5)
    targets = torch.rand(12, 4)
    labels = torch.zeros(12, dtype=torch.long)
    labels[2] = -100
    return replace(b, task=task, labels=labels, targets=targets.round() if task == "multi-label" else targets)


@pytest.mark.parametrize(("task", "soft", "term"), [
    ("multi-label", "binary_kd", "bce"), ("regression", "mse", "squared_error"), ("multi-label", "mse", "bce"),
])  # fmt: skip
def test_labels_that_are_several_or_numbers(task: Task, soft: str, term: str) -> None:
    student, teacher = (m.eval() for m in pair())
    b = several(batch(mask=torch.arange(12) != 4), task)
    method = LogitMethod(alpha=0.7, task=task, **({} if soft == "binary_kd" else {"soft": soft}))
    terms = method(observe(student, b.inputs, Needs()), b, LiveTeacher(teacher).signal(b, Needs()))
    s, t, has = student(b.inputs), teacher(b.inputs), b.labelled()
    assert b.targets is not None
    each = F.binary_cross_entropy_with_logits if task == "multi-label" else F.mse_loss
    torch.testing.assert_close(terms[term].sum, each(s[has], b.targets[has], reduction="sum"))
    torch.testing.assert_close(terms[soft].sum, getattr(losses, soft)(s, t, mask=b.mask, reduction="sum"))
    assert {name: int(count) for name, count in method.counts(b).items()} == {soft: 11, term: 10}
    assert method.weights == {soft: 0.7, term: pytest.approx(0.3)}
    alone = SupervisedMethod(task=task)
    torch.testing.assert_close(alone(observe(student, b.inputs, Needs()), b, None)[term].sum, terms[term].sum)


def test_labels_of_another_task_are_an_error() -> None:
    student, _ = pair()
    with pytest.raises(CapabilityError, match=r"learns from classes.*multi-label"):
        DistillationModule(student, TeacherFreeMethod())(several(batch(), "multi-label"), None)
    with pytest.raises(ConfigError, match=r"'kd' is for classes, and the labels are regression"):
        LogitMethod(soft="kd", task="regression")


def test_formulas_say_temperature_options_and_weights() -> None:
    assert LogitMethod().formula() == "0.9 * kd(T=4) + 0.1 * ce"
    dkd = LogitMethod(soft="dkd", alpha=1.0, hard=1.0, soft_options={"beta": 8.0})
    assert dkd.formula() == "1 * dkd(T=4, beta=8) + 1 * ce"
    assert LogitMethod(soft="mse", alpha=0.5).formula() == "0.5 * mse + 0.5 * ce"
    assert (
        LogitMethod(soft="kd", soft_options={"standardize": True}).formula().startswith("0.9 * kd(T=4, standardize")
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"soft": "kdd"}, "did you mean 'kd'"),
        ({"soft": "mse", "temperature": 2.0}, "no temperature"),
        ({"alpha": 1.5}, "give at most 1"),
        ({"hard": -1.0}, "at least 0"),
        ({"soft": "dkd", "soft_options": {"gamma": 1.0}}, "its options: alpha, beta"),
        ({"soft": "js", "soft_options": {"beta": 3.0}}, "js: beta is 3.0"),
        ({"temperature": 0.0}, "above 0"),
    ],
)
def test_a_wrong_soft_term_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        LogitMethod(**options)
    with pytest.raises(ConfigError, match=says):
        build_recipe({**RECIPE, "method": {"kind": "logit", **options}})


# Features ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resnet", [False, True])
@pytest.mark.parametrize("name", OF_IMAGES)
def test_every_objective_pairs_by_itself_and_teaches(name: str, resnet: bool) -> None:
    student, teacher = pair(resnet)
    b = batch()
    method = fit(FeatureMethod(loss=name, alpha=0.0, hard=0.0), student, teacher, b)
    module, live = DistillationModule(student, method).train(), LiveTeacher(teacher)
    (first, *_) = (n for n in method.weights if n.startswith(name))
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=5e-3)
    values = []
    for _ in range(25):
        terms = module(b, live.signal(b, method.needs))
        loss = sum(method.weights[k] * t.sum / t.count for k, t in terms.items())
        values.append(terms[first].sum.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step()
    assert all(m.grad is not None for m in method.parameters() if m.requires_grad)
    assert values[-1] < values[0], values
    assert f"{method.weights[first]:g} * {first}" in method.formula()
    module.close()


def test_what_auto_pairs() -> None:
    student, teacher = pair(resnet=True)

    def taps(name: str) -> list[tuple[str, str]]:
        method = fit(FeatureMethod(loss=name), student, teacher, batch())
        return [(s.student, s.teacher) for link in method.hidden.losses for s in link.pairs]

    assert taps("hint") == [("stages.0", "stages.0"), ("stages.1", "stages.1")]
    assert taps("similarity") == [("stages.1", "stages.1")]
    assert taps("crd") == [("head:input", "head:input")]
    assert taps("overhaul") == [
        ("stages.0.0.relu2:input", "stages.0.1.relu2:input"), ("stages.1.0.relu2:input", "stages.1.1.relu2:input"),
    ]  # fmt: skip


def test_margins_are_those_of_the_norm_before_the_relu() -> None:
    student, teacher = pair()
    for norm in (m for m in teacher.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    method = fit(FeatureMethod(loss="overhaul"), student, teacher, batch())
    link = method.hidden.losses[0]
    assert [s.teacher for s in link.pairs] == ["stages.0.5:input", "stages.1.5:input"]
    for i in range(2):
        norm = teacher.stages[i][4]
        torch.testing.assert_close(link.get_buffer(f"margin{i}"), losses.overhaul_margin(norm.weight, norm.bias))


@pytest.mark.parametrize(
    ("name", "sums", "weight"),
    [("attention_transfer", "normalised", 1000), ("vid", "paper", 1), ("factor_transfer", "paper", 500)],
)
def test_weights_published_for_a_mean_fit_the_sum(name: str, sums: str, weight: float) -> None:
    student, teacher = pair()
    b = batch()
    seen = {}
    for variant in ("authors", sums):
        method = fit(FeatureMethod(loss=name, options={"variant": variant}), student, teacher, b)
        observed = observe(student.eval(), b.inputs, method.student_needs)
        terms = method(observed, b, LiveTeacher(teacher).signal(b, method.needs))
        seen[variant] = [(method.weights[k] * terms[k].sum).item() for k in terms if k.startswith(name)]
        if variant == "authors":
            assert {w for k, w in method.weights.items() if k.startswith(name)} == {weight}
    assert seen["authors"] == pytest.approx(seen[sums])


def test_vid_weighs_a_token_and_not_a_text() -> None:
    world = texts()
    b = world.to_batch(world.held[1])
    pairs = [{"student": "bert.embeddings", "teacher": "bert.embeddings"}]
    method = fit(FeatureMethod(pairs=pairs, loss="vid"), world.make(8), world.make(16), b)
    assert method.weights["vid(bert.embeddings)"] == 1 / 16


def test_two_paraphrasers_are_two() -> None:
    student, teacher = pair()
    pairs = [{"student": f"stages.{i}", "teacher": f"stages.{i}"} for i in range(2)]
    method = fit(FeatureMethod(pairs=pairs, loss="factor_transfer"), student, teacher, batch())
    assert [phase.name for phase in method.phases()] == ["paraphraser", "paraphraser#2"]
    with pytest.raises(ConfigError, match="none are left"):
        fit(FeatureMethod(pairs=pairs, loss="factor_transfer", options={"share": 0.5}), student, teacher, batch())


@pytest.mark.parametrize("name", ["hint", "vid", "overhaul", "factor_transfer", "review", "crd"])
def test_features_of_another_precision_reach_what_is_learned(name: str) -> None:
    student, teacher = pair()
    b = batch()
    method = fit(FeatureMethod(loss=name), student, teacher, b)
    half = Batch(b.inputs.bfloat16(), b.labels, ids=b.ids)
    seen = observe(student.bfloat16(), half.inputs, method.student_needs)
    terms = method(seen, half, LiveTeacher(teacher.bfloat16()).signal(half, method.needs))
    assert all(bool(torch.isfinite(t.sum)) for t in terms.values())


def test_margins_come_from_before_the_tap() -> None:
    _, teacher = pair(resnet=True)
    assert find_last_norm(teacher, batch(), "stages.0.0.relu2:input") is teacher.stages[0][0].conv2[1]
    assert find_last_norm(teacher, batch(), "stages.0.1.relu2:input") is teacher.stages[0][1].conv2[1]
    assert find_last_norm(teacher, batch(), "stages.0.1.conv1") is teacher.stages[0][1].conv1[1]


def test_a_loader_that_drops_rows_is_no_place_for_a_memory(tmp_path: Path) -> None:
    world = images()
    data = torch.utils.data.TensorDataset(torch.randn(30, 1, 8, 8), torch.randint(4, (30,)))
    loader = torch.utils.data.DataLoader(data, 8, shuffle=True, drop_last=True)
    with pytest.raises(tutelage.errors.DataError, match="drop_last=False"):
        tutelage.distill(
            teacher_for(world), world.make(8), loader, eval_data=world.held, method=FeatureMethod(loss="crd"),
            out=tmp_path / "run", verbose=False,
        )  # fmt: skip


def test_review_reaches_shallow_stages_of_the_teacher_from_deep_ones_of_the_student() -> None:
    student, teacher = pair(resnet=True)
    b = batch()
    method = fit(FeatureMethod(loss="review"), student, teacher, b)
    link = method.hidden.losses[0]
    features = [torch.randn(12, 4, 8, 8, requires_grad=True), torch.randn(12, 6, 4, 4, requires_grad=True)]
    targets = [torch.randn(12, 6, 8, 8), torch.randn(12, 10, 4, 4)]
    shallow = link.fusions[0](features[0], link.fusions[1](features[1], None, targets[1].shape[2:])[1], (8, 8))[0]
    shallow.sum().backward()
    assert features[1].grad is not None
    assert features[1].grad.abs().sum() > 0
    assert list(method.weights)[2:] == ["review(stages.0)"]


def test_the_contrast_remembers_whom_it_saw_after_the_step_and_not_before() -> None:
    student, teacher = pair()
    b = batch()
    method = fit(FeatureMethod(loss="crd", options={"negatives": 5, "width": 7}), student, teacher, b)
    link = method.hidden.losses[0]
    module, half = DistillationModule(student, method).train(), b.rows(0, 6)
    before = link.memory.student.clone()
    terms = module(half, LiveTeacher(teacher).signal(half, method.needs))
    assert torch.equal(link.memory.student, before)
    terms["crd(head:input)"].sum.backward()  # the memory is part of the graph, and unchanged
    method.after_step()
    changed = (link.memory.student != before).any(1)
    assert changed.tolist() == [True] * 6 + [False] * 6
    after = link.memory.student.clone()
    method.after_step()
    module.eval()(half, LiveTeacher(teacher).signal(half, method.needs))
    method.after_step()
    assert torch.equal(link.memory.student, after)
    assert {"hidden.losses.0.memory.student", "hidden.losses.0.memory.teacher"} <= set(method.state_dict())
    stranger = Batch(half.inputs, half.labels, ids=half.ids + 1)
    with pytest.raises(tutelage.errors.CapabilityError, match="is not in the contrastive memory"):
        module.train()(stranger, LiveTeacher(teacher).signal(half, method.needs))
    module.close()


def test_attention_and_value_relations_of_encoders() -> None:
    world = texts()
    student, teacher = world.make(8), world.make(16)
    for model in (student, teacher):
        model.set_attn_implementation("eager")
    b = world.to_batch(world.held[0])
    at, values = "bert.encoder.layer.0.attention.self", "bert.encoder.layer.0.attention.self.value"
    pairs = [
        {"student": f"{at}[1]", "teacher": f"{at}[1]", "loss": "attention_kl",
         "options": {"inputs": "probabilities"}},
        {"student": f"{at}[1]", "teacher": f"{at}[1]", "loss": "attention_mse"},
        {"student": values, "teacher": values, "loss": "value_relation", "options": {"heads": 4}},
    ]  # fmt: skip
    method = fit(FeatureMethod(pairs=pairs), student, teacher, b)
    module = DistillationModule(student, method).train()
    terms = module(b, LiveTeacher(teacher).signal(b, method.needs))
    for name in list(terms)[2:]:
        assert int(terms[name].count) == int(b.inputs["attention_mask"].sum())
        student.zero_grad()
        terms[name].sum.backward(retain_graph=True)
        assert student.bert.embeddings.word_embeddings.weight.grad.abs().sum() > 0, name
    module.close()


# What comes first ----------------------------------------------------------------------------------------

RECIPE: dict[str, Any] = {
    "name": "methods",
    "data": {"source": "digits", "labels": 100},
    "teacher": {"model": "convnet", "options": {"widths": [8, 16], "depth": 1}, "train": {"steps": 150}},
    "student": {"model": "convnet", "options": {"widths": [4, 8], "depth": 1}},
    "train": {"steps": 20, "batch_size": 32, "optimizer": {"lr": 0.02}},
    "baseline": False,
}


def run(method: dict[str, Any], out: Path, **changes: Any) -> tutelage.experiment.run.RunResult:
    recipe = {k: dict(v) if isinstance(v, dict) else v for k, v in {**RECIPE, **changes}.items()}
    return api.run(build_recipe({**recipe, "method": method}), out=out, terminal=Terminal(speaks=False))


def weights(folder: Path, training: str) -> dict[str, torch.Tensor]:
    found = newest(folder / "checkpoints" / training)
    assert found is not None
    return load_checkpoint(found)["model"]


def test_hints_come_first_and_leave_the_rest_of_the_student_alone(tmp_path: Path) -> None:
    pairs = [{"student": "stages.0", "teacher": "stages.0"}]
    found = run({"kind": "feature", "pairs": pairs, "stage1_fraction": 0.4}, tmp_path / "run")
    assert found.summary["formula"] == "100 * hint(stages.0) for 40% of the steps, then 0.9 * kd(T=4) + 0.1 * ce"
    hints, last = (weights(tmp_path / "run", f"distilled-seed0{n}") for n in ("-hints", ""))
    torch.manual_seed(0)
    start = ConvNet(classes=10, channels=1, widths=(4, 8), depth=1).state_dict()
    for name, tensor in start.items():
        same = torch.equal(hints[f"student.{name}"], tensor)
        guided = name.startswith("stages.0")
        assert same == (not guided) or name.endswith(("running_mean", "running_var", "num_batches_tracked")), name
        assert not torch.equal(last[f"student.{name}"], hints[f"student.{name}"]), name
    projectors = [k for k in hints if k.startswith("method.")]
    assert projectors
    lines = [
        line
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        if "distilled" in line and '"terms"' in line
    ]
    assert [("hint" in line, '"kd"' in line) for line in (lines[0], lines[-1])] == [(True, False), (False, True)]
    assert load_checkpoint(newest(tmp_path / "run/checkpoints/distilled-seed0-hints"))["progress"]["step"] == 8
    assert load_checkpoint(newest(tmp_path / "run/checkpoints/distilled-seed0"))["progress"]["step"] == 12


def test_the_paraphraser_is_trained_first_and_then_frozen(tmp_path: Path) -> None:
    run({"kind": "feature", "loss": "factor_transfer", "options": {"share": 0.5}}, tmp_path / "run")
    first, last = (weights(tmp_path / "run", f"distilled-seed0{n}") for n in ("-paraphraser", ""))
    here, there = "method.paraphraser.", "method.hidden.losses.0.paraphraser."
    kept = {k.removeprefix(here): v for k, v in first.items() if k.startswith(here)}
    assert kept
    assert all(torch.equal(last[there + k], v) for k, v in kept.items())
    torch.manual_seed(0)
    start = ConvNet(classes=10, channels=1, widths=(4, 8), depth=1).state_dict()
    assert all(torch.equal(first[f"student.{k}"], v) for k, v in start.items())


METHODS: dict[str, Method] = {
    "crd": FeatureMethod(loss="crd", options={"negatives": 6}),
    "hints first": FeatureMethod(stage1_fraction=0.5),
    "factor transfer": FeatureMethod(loss="factor_transfer", options={"share": 0.5}),
    "simkd": SimkdMethod(alpha=0.5),
    "review": FeatureMethod(loss="review"),
}


def numbered(raw: Any) -> Batch:
    b = tutelage.data.as_batch(raw)
    return Batch(b.inputs, b.labels, ids=(b.inputs.flatten(1)[:, 0] * 1e6).long())


def distil(method: Method, out: Path, die_at: int | None = None, **options: Any) -> tutelage.DistillResult:
    world = images()
    torch.manual_seed(7)
    return tutelage.distill(
        teacher_for(world), world.make(8), Shuffled(world.train, die_at), eval_data=world.held, to_batch=numbered,
        method=method, epochs=4, lr=5e-3, baseline=False, out=out, verbose=False,
        train={"accumulate": 2, "log_every": 1, "clip": 1.0, "ema": 0.9, "checkpoint_every": 3}, **options,
    )  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("batches", [6, 13])
def test_a_method_resumes_to_the_same_bits(name: str, batches: int, tmp_path: Path) -> None:
    whole = distil(METHODS[name], tmp_path / "whole")
    with pytest.raises(Interrupted):
        distil(METHODS[name], tmp_path / "cut", die_at=batches)
    resumed = distil(METHODS[name], tmp_path / "cut", resume=True)
    pairs = zip(whole.student.state_dict().items(), resumed.student.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for (_, a), b in pairs)
    first, second = (weights(tmp_path / run, "distilled-seed0") for run in ("whole", "cut"))
    assert all(torch.equal(v, second[k]) for k, v in first.items())
    assert (tmp_path / "whole" / "metrics.jsonl").read_text() == (tmp_path / "cut" / "metrics.jsonl").read_text()


# The teacher's classifier ----------------------------------------------------------------------------------


def test_simkd_exports_a_student_with_its_teachers_classifier(tmp_path: Path) -> None:
    found = run({"kind": "simkd"}, tmp_path / "run")
    model, teacher = load_model(found.path / "student"), load_model(found.path / "models" / "teacher")
    assert isinstance(model, ReusedHead)
    assert torch.equal(model.head.weight, teacher.head.weight)
    assert torch.equal(model.head.bias, teacher.head.bias)
    parts = sum(p.numel() for p in model.parameters())
    assert found.summary["parameters"]["student"] == parts > sum(p.numel() for p in model.model.parameters())
    x = torch.randn(3, 1, 8, 8)
    projected = model.projector(model.model.stages(x))
    torch.testing.assert_close(model(x), teacher.head(projected.mean((2, 3))))
    assert found.summary["formula"] == "1 * simkd"


def test_simkd_on_vectors_where_the_map_is_not_averaged() -> None:
    world = texts()
    student, teacher = world.make(8), world.make(16)
    b = world.to_batch(world.held[0])
    method = SimkdMethod(hard=1.0, alpha=1.0)
    reused = prepare_student(method, student, teacher, b.rows(0, 2), 0)
    method = prepare_method(method, reused, teacher, b.rows(0, 2), 0)
    module = DistillationModule(reused, method).train()
    terms = module(b, LiveTeacher(teacher).signal(b, method.needs))
    assert set(terms) == {"kd", "ce", "simkd"} == set(method.weights) == set(method.counts(b))
    sum(t.sum for t in terms.values()).backward()
    assert reused.head.weight.grad is None
    assert all(p.grad is not None for p in reused.parameters() if p.requires_grad)
    features = LiveTeacher(teacher).signal(b, method.needs).hidden[method.taps[0]]
    assert reused.card["signed"]
    assert (features < 0).any()
    assert (reused.projector(torch.randn(5, 8)) < 0).any()
    module.close()
