"""A search: chosen on validation only, the same after any interruption, wrong spaces refused before step 0."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from support import python
from tutelage import api
from tutelage.cli import main
from tutelage.config import Recipe, build_recipe, load_recipe
from tutelage.data.images import ImageSet
from tutelage.engine import RunDirectory
from tutelage.errors import ConfigError, MissingDependencyError, NumericsError, RunDirectoryError
from tutelage.experiment import image_inputs
from tutelage.experiment import run as run_module
from tutelage.progress import Terminal
from tutelage.search import search as search_module
from tutelage.search import search_space as space_module
from tutelage.search import trials as trials_module
from tutelage.search import trials as workers_module
from tutelage.search.study import SearchStudy, TrialRequest, TrialResult

RECIPE: dict[str, Any] = {
    "name": "small",
    "data": {"source": "digits", "labels": 100},
    "teacher": {"model": "mlp", "options": {"hidden": [48]}, "train": {"steps": 120, "optimizer": {"lr": 0.01}}},
    "student": {"model": "mlp", "options": {"hidden": [8]}},
    "method": "logit",
    "train": {"steps": 40, "batch_size": 64, "optimizer": {"lr": 0.01}, "evaluate_every": 8, "checkpoint_every": 12},
    "seeds": [0, 1],
    "baseline": False,
    "search": {
        "space": {
            "method.temperature": {"low": 1, "high": 20, "log": True},
            "train.optimizer.lr": {"low": 1e-4, "high": 3e-2, "log": True},
        },
        "trials": 8,
        "startup": 2,
        "warmup": 0.3,
    },
}
SILENT = Terminal(speaks=False)


def recipe(**changes: Any) -> Recipe:
    return build_recipe({**json.loads(json.dumps(RECIPE)), **changes})


def timeless(found: dict[str, Any]) -> dict[str, Any]:
    """What must be the same however often the search was interrupted."""
    trials = [{k: v for k, v in t.items() if k != "seconds"} for t in found["trials"]]
    return {**{k: v for k, v in found.items() if k not in ("seconds", "elapsed")}, "trials": trials}


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> api.SearchResult:
    return api.run_search(recipe(), out=tmp_path_factory.mktemp("search") / "small", terminal=SILENT)


def test_what_a_search_leaves(searched: api.SearchResult) -> None:
    found, path = searched.summary, searched.path
    assert found == json.loads((path / "search.json").read_text())
    assert [t["number"] for t in found["trials"]] == list(range(8))
    states = [t["state"] for t in found["trials"]]
    assert set(states) == {"finished", "pruned"}, "some trials are worth ending, some are not"
    for t in found["trials"]:
        full = t["state"] == "finished"
        assert len(t["evaluations"]) == 5 if full else len(t["evaluations"]) >= 2
        assert len(t["seeds"]) == 2 if full else len(t["seeds"]) < 2
        folder = path / "trials" / f"{t['number']:04d}"
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert config["method"]["temperature"] == t["values"]["method.temperature"]
        assert config["train"]["optimizer"]["lr"] == t["values"]["train.optimizer.lr"]
        assert not (folder / "checkpoints").exists()
        assert not (folder / "summary.json").exists()
    done = [t for t in found["trials"] if t["state"] == "finished"]
    assert max(t["validation"] for t in done) == next(
        t["validation"] for t in done if t["number"] == found["best"]
    )  # fmt: skip
    assert all(t["validation"] == pytest.approx(sum(t["seeds"]) / 2) for t in done)
    assert (path / "search.html").stat().st_size > 10_000


def test_the_recipe_as_it_is_comes_first_and_is_what_its_full_run_finds(searched: api.SearchResult) -> None:
    first = searched.summary["trials"][0]
    assert first["values"] == {"method.temperature": 4.0, "train.optimizer.lr": 0.01}
    assert searched.summary["default"] == {"trial": 0, "validation": first["validation"], "seeds": first["seeds"]}
    lines = [json.loads(text) for text in (searched.path / "default" / "metrics.jsonl").read_text().splitlines()]
    for seed, value in zip((0, 1), first["seeds"], strict=True):
        seen = [
            m["validation"]["accuracy"]
            for m in lines
            if m["training"] == f"distilled-seed{seed}" and "validation" in m
        ]
        assert seen[-1] == value


def test_the_test_figures_are_those_of_the_two_full_runs(searched: api.SearchResult) -> None:
    test, values = searched.summary["test"], {}
    for name in searched.runs:
        summary = json.loads((searched.path / name / "summary.json").read_text())
        values[name] = summary["students"]["distilled"]["last"]["accuracy"]["values"]
        assert test[name]["last"]["values"] == values[name]
        assert not (searched.path / name / "models" / "teacher").exists(), "the teacher is trained once, before"
    assert searched.runs == ["default", "chosen"]
    differences = [a - b for a, b in zip(values["chosen"], values["default"], strict=True)]
    assert test["gain"]["last"]["values"] == differences


def test_the_best_recipe_is_one_that_runs(searched: api.SearchResult) -> None:
    text = (searched.path / "best.yaml").read_text()
    assert text.startswith("# The best of 8 trials")
    best = load_recipe(searched.path / "best.yaml")
    assert best == load_recipe(searched.path / "chosen" / "config.yaml")
    chosen = searched.summary["trials"][searched.summary["best"]]["values"]
    assert best.train.optimizer.lr == chosen["train.optimizer.lr"]


def test_searches_and_runs_side_by_side(searched: api.SearchResult, tmp_path: Path) -> None:
    api.write_report([searched.path, searched.path / "chosen"], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "small/chosen" in page
    assert "small/default" in page


def test_a_finished_search_is_shown_again(searched: api.SearchResult) -> None:
    again = search_module.search_recipe(recipe(), out=searched.path, resume=True, terminal=SILENT)
    assert again.summary == searched.summary
    with pytest.raises(RunDirectoryError, match=r"other settings: search\.space\.method\.temperature\.high"):
        search_module.search_recipe(
            recipe(), keys=["method.temperature=1:30:log", "train.optimizer.lr=1e-4:3e-2:log"],
            out=searched.path, resume=True, terminal=SILENT,
        )  # fmt: skip


class Gone(BaseException):
    """What a killed process leaves undone, in a process that lives on."""


@pytest.mark.parametrize("moment", [3, 26])
def test_interrupted_and_resumed_gives_the_same_search(
    searched: api.SearchResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    tell, told = trials_module._Reporter._evaluated, 0

    def until(watch: Any, line: dict[str, Any]) -> None:
        nonlocal told
        told += 1
        if told == moment:
            raise Gone
        tell(watch, line)

    monkeypatch.setattr(trials_module._Reporter, "_evaluated", until)
    with pytest.raises(Gone):
        search_module.search_recipe(recipe(), out=tmp_path / "s", terminal=SILENT)
    with open(tmp_path / "s" / "search.journal", "a") as journal:
        journal.write('{"op_code":4,"wor')  # a line that a kill cut short
    resumed = search_module.search_recipe(recipe(), out=tmp_path / "s", resume=True, terminal=SILENT)
    assert _plain(timeless(resumed.summary)) == _plain(timeless(searched.summary))


@pytest.mark.parametrize("moment", [3, 26])
def test_a_search_goes_on_after_its_folder_was_moved(
    searched: api.SearchResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    evaluated, count = trials_module._Reporter._evaluated, 0

    def until(watch: Any, line: dict[str, Any]) -> None:
        nonlocal count
        count += 1
        if count == moment:
            raise Gone
        evaluated(watch, line)

    monkeypatch.setattr(trials_module._Reporter, "_evaluated", until)
    with pytest.raises(Gone):
        search_module.search_recipe(recipe(), out=tmp_path / "s", terminal=SILENT)
    (tmp_path / "s").rename(tmp_path / "renamed")
    monkeypatch.chdir(tmp_path)
    resumed = search_module.search_recipe(recipe(), out="renamed", resume=True, terminal=SILENT)
    assert _plain(timeless(resumed.summary)) == _plain(timeless(searched.summary))


def _plain(found: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(found))


@pytest.mark.slow
@pytest.mark.parametrize("i", range(8))
def test_killed_and_resumed_gives_the_same_search(searched: api.SearchResult, tmp_path: Path, i: int) -> None:
    file, out = tmp_path / "small.yaml", tmp_path / "s"
    file.write_text(yaml.safe_dump(RECIPE))
    command = ["-m", "tutelage", "search", str(file), "--out", str(out)]
    process = python.Popen(command, stdout=python.DEVNULL, stderr=python.DEVNULL)
    deadline = time.monotonic() + 60
    while not (out / "config.yaml").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(random.Random(i).uniform(0, 10))
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = python.run([*command, "--resume"])
    assert done.returncode == 0, done.stderr
    found = json.loads((out / "search.json").read_text())
    assert _plain(timeless(found)) == _plain(timeless(searched.summary))
    assert not list(out.rglob(".tutelage-tmp.*")), "a killed writer's drafts are swept away"


@pytest.mark.usefixtures("forked_workers")
def test_two_workers_try_as_many(searched: api.SearchResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # workers look whether their parent lives, which of forks is the server that forks
    parent = SimpleNamespace(getpid=python.server_pid, getppid=os.getppid, cpu_count=os.cpu_count)
    monkeypatch.setattr(workers_module, "os", parent)
    found = search_module.search_recipe(recipe(), workers=2, out=tmp_path / "s", terminal=SILENT).summary
    assert [t["number"] for t in found["trials"]] == list(range(8))
    assert {t["state"] for t in found["trials"]} <= {"finished", "pruned"}
    assert found["trials"][0]["seeds"] == searched.summary["trials"][0]["seeds"]
    best = found["trials"][found["best"]]
    assert best["validation"] == max(t["validation"] for t in found["trials"] if t["state"] == "finished")


def test_more_trials_for_a_finished_search(tmp_path: Path) -> None:
    small = recipe(seeds=[0], train={"steps": 4, "evaluate_every": 2})
    first = search_module.search_recipe(small, trials=2, out=tmp_path / "s", terminal=SILENT).summary
    more = search_module.search_recipe(small, trials=4, out=tmp_path / "s", resume=True, terminal=SILENT).summary
    assert len(more["trials"]) == 4
    assert [t["values"] for t in more["trials"][:2]] == [t["values"] for t in first["trials"]]


# The test split -----------------------------------------------------------------------------------


class Reached(Exception):
    """The trials are over."""


@dataclass(frozen=True)
class Sealed(ImageSet):
    """A split that nobody may read."""

    def fetch(self, rows: Tensor, views: Tensor | None = None) -> Any:
        raise AssertionError("the test split is read")


def test_no_trial_reads_the_test_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = image_inputs.load_images

    def sealed(*args: Any, **kwargs: Any) -> Any:
        data = load(*args, **kwargs)
        return replace(data, test=Sealed(**vars(data.test)))

    def reached(*args: Any, **kwargs: Any) -> None:
        raise Reached

    monkeypatch.setattr(image_inputs, "load_images", sealed)
    monkeypatch.setattr(search_module, "run_recipe", reached)
    with pytest.raises(Reached):
        search_module.search_recipe(recipe(), trials=3, out=tmp_path / "s", terminal=SILENT)
    with pytest.raises(AssertionError, match="the test split is read"):
        run_module.run_recipe(recipe(search=None), out=tmp_path / "run", terminal=SILENT)


def test_a_teacher_whose_head_alone_is_trainable_keeps_its_other_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_spec, build_teacher = trials_module.recipe_spec, trials_module.build_teacher
    initial: dict[str, Tensor] = {}

    def head_only(*args: Any) -> Any:
        spec = build_spec(*args)
        assert spec.teacher is not None
        return replace(
            spec, teacher=replace(spec.teacher, members=(replace(spec.teacher.members[0], head_only=True),))
        )

    def pretrained(spec: Any) -> Any:
        model: Any = build_teacher(spec)
        initial.update({name: tensor.clone() for name, tensor in model.state_dict().items()})
        model.fresh = list(initial)[-2:]
        return model

    monkeypatch.setattr(trials_module, "recipe_spec", head_only)
    monkeypatch.setattr(trials_module, "build_teacher", pretrained)
    runner = trials_module.TrialRunner(SILENT, lambda: False, 0.3)
    runner.train_teacher(recipe(), RunDirectory(tmp_path))
    trained = load_file(tmp_path / "models" / "teacher" / "model.safetensors")
    changed = [name for name in initial if not torch.equal(initial[name], trained[name])]
    assert changed == list(initial)[-2:]


def test_the_teacher_is_asked_once_for_each_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled = []
    ask = trials_module.store_in_memory
    monkeypatch.setattr(trials_module, "store_in_memory", lambda *a: filled.append(1) or ask(*a))
    small = recipe(seeds=[0], train={"steps": 4, "evaluate_every": 2})
    search_module.search_recipe(small, trials=3, out=tmp_path / "s", terminal=SILENT)
    assert len(filled) == 1


# Trials that end otherwise -----------------------------------------------------------------------------


def test_a_trial_that_diverges_is_recorded_and_the_search_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = trials_module.fit

    def fails_at_one(training: Any, accelerator: Any) -> Any:
        if training.config.optimizer.lr == 1.0:
            raise NumericsError("the loss is no longer finite")
        return fit(training, accelerator)

    monkeypatch.setattr(trials_module, "fit", fails_at_one)
    small = recipe(seeds=[0], train={"steps": 4, "evaluate_every": 2, "optimizer": {"lr": 0.01}})
    found = search_module.search_recipe(
        small, trials=6, keys=["train.optimizer.lr=0.01,1.0"], out=tmp_path / "s", terminal=SILENT
    ).summary
    states = {(t["state"], t["values"]["train.optimizer.lr"]) for t in found["trials"]}
    assert states == {("finished", 0.01), ("diverged", 1.0)}
    assert next(t["why"] for t in found["trials"] if t["state"] == "diverged") == "the loss is no longer finite"


def test_what_a_killed_process_reported_is_not_judged_before_its_last(tmp_path: Path) -> None:
    """A trial that had passed an evaluation before the kill must not be given up there after it."""
    small = recipe()
    assert small.search is not None
    space = space_module.build_dimensions(small, small.search.space)

    def opened() -> SearchStudy:
        return SearchStudy(tmp_path / "search.journal", space, small.search)  # type: ignore[arg-type]

    known = opened()
    for _ in range(3):
        ticket = known.next()
        for step, value in enumerate((0.2, 0.5, 0.8), 1):
            known.report(ticket.number, step, value)
        known.finish(ticket.number, TrialResult("finished", [0.8]))
    ticket = known.next()
    assert [known.report(ticket.number, step, v) for step, v in ((1, 0.3), (2, 0.6), (3, 0.9))] == [False] * 3
    again = opened()
    assert again.next() == ticket
    assert [again.report(ticket.number, step, v) for step, v in ((1, 0.3), (2, 0.6), (3, 0.9))] == [False] * 3
    worse = TrialRequest(again.next().number, {})
    assert [again.report(worse.number, step, v) for step, v in ((1, 0.3), (2, 0.3))] == [False, True]


# Wrong spaces -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("method.temprature=1:20", ["no key 'method.temprature'", "did you mean 'method.temperature'"]),
        ("temperature=1:20", ["no key 'temperature'", "did you mean 'method.temperature'"]),
        ("train.lr=0.1:1", ["no key 'train.lr'", "did you mean 'train.optimizer.lr'"]),
        ("train.optimizer.momentum=0.1:0.9", ["adamw", "momentum"]),
        ("train.optimizer=1:2", ["is a section", "train.optimizer.lr"]),
        ("method.alpha=0:2", ["refuses method.alpha=2", "alpha: 2 leaves"]),
        ("method.temperature=0:20", ["refuses method.temperature=0", "above 0"]),
        ("method.temperature=0:20:log", ["logarithmic", "above 0"]),
        ("method.temperature=20:1", ["low must be below high"]),
        ("method.kind=logit,featur", ["refuses method.kind", "did you mean 'feature'"]),
        ("method.soft=kd,dkd,kld", ["unknown soft loss 'kld'"]),
        ("train.batch_size=16:64.5", ["refuses train.batch_size=64.5", "whole number"]),
        ("method.alpha=0.5", ["at least two values", "method.alpha=0.5"]),
        ("method.alpha", ["gives no range and no values"]),
        ("method.alpha=0:1:lin", ["'lin' follows the range"]),
        ("seeds=0,1", ["decides what is measured"]),
        ("data.split_seed=0:5", ["decides what is measured"]),
        ("teacher.options.hidden=[8],[16]", ["changes the teacher"]),
        ("student.options.hiden=[8],[16]", ["hiden"]),
    ],
)
def test_a_wrong_space_is_refused_before_any_trial(
    key: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials_module.TrialRunner, "run", lambda *a: pytest.fail("a trial ran"))
    with pytest.raises(ValueError) as caught:
        search_module.search_recipe(recipe(), keys=[key], out=tmp_path / "s", terminal=SILENT)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"spase": {}}, ["unknown key 'search.spase'", "did you mean 'space'"]),
        ({"space": {"method.alpha": {"low": 0}}}, ["search.space.method.alpha", "give 'low' and 'high'"]),
        ({"space": {"method.alpha": {"low": 0, "hihg": 1}}}, ["did you mean 'high'"]),
        ({"space": {"method.alpha": [0.5, 0.5]}}, ["holds a value twice"]),
        ({"space": {"method.alpha": {"low": 0, "high": 1, "values": [0, 1]}}}, ["both 'values' and a range"]),
        ({"trials": 0}, ["search.trials", "at least 1"]),
    ],
)
def test_a_wrong_search_section_is_refused(section: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe(search=section)
    for word in words:
        assert word in str(caught.value)


def test_the_command_refuses_without_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump({**RECIPE, "search": {"space": {"method.temprature": {"low": 1, "high": 2}}}}))
    with pytest.raises(SystemExit) as left:
        main(["search", str(file), "--out", str(tmp_path / "s")])
    assert left.value.code == 2
    assert "did you mean 'method.temperature'" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_without_optuna_there_is_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'tutelage\[search\]'"):
        search_module.search_recipe(recipe(), out=tmp_path / "s", terminal=SILENT)


# What a space becomes ---------------------------------------------------------------------------------


def test_the_default_space_is_temperature_and_alpha() -> None:
    space = space_module.resolve_search(recipe(search=None)).space
    assert {k: (s.low, s.high, s.log) for k, s in space.items()} == {
        "method.temperature": (1, 20, True),
        "method.alpha": (0.0, 1.0, False),
    }
    without = space_module.resolve_search(recipe(search=None, method={"kind": "logit", "soft": "mse"})).space
    assert list(without) == ["method.alpha"]


def test_whole_numbers_where_the_key_takes_no_others() -> None:
    keys = ["method.temperature=1:20", "train.batch_size=16:64:log", "student.options.depth=1:3", "train.clip=0.5:2"]
    config = space_module.resolve_search(recipe(), keys)
    whole = {d.key: d.whole for d in space_module.build_dimensions(recipe(), config.space)}
    assert whole == {
        "method.temperature": False, "train.batch_size": True, "student.options.depth": True, "train.clip": False,
    }  # fmt: skip


def test_suggestions_stay_in_the_space_and_on_its_steps(tmp_path: Path) -> None:
    section = {
        "space": {
            "method.temperature": {"low": 1.0, "high": 10.0, "step": 2.5},
            "train.batch_size": {"low": 16, "high": 70, "step": 16},
            "train.optimizer.lr": {"low": 1.23456e-3, "high": 1.3e-3},
            "student.options.hidden": [[8], [16, 8]],
        }
    }
    small = recipe(search=section)
    assert small.search is not None
    known = SearchStudy(tmp_path / "j", space_module.build_dimensions(small, small.search.space), small.search)
    drawn = []
    for _ in range(12):
        ticket = known.next()
        known.finish(ticket.number, TrialResult("finished", [torch.rand(()).item()]))
        drawn.append(ticket.values)
    assert {d["method.temperature"] for d in drawn} <= {1.0, 3.5, 6.0, 8.5}
    assert {d["train.batch_size"] for d in drawn} <= {16, 32, 48, 64}
    assert all(1.23456e-3 <= d["train.optimizer.lr"] <= 1.3e-3 for d in drawn)
    assert {json.dumps(d["student.options.hidden"]) for d in drawn} == {"[8]", "[16, 8]"}
