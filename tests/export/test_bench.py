"""Measuring models side by side: fair turns, figures worked by hand, every cell filled or excused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from support import exported
from tutelage.cli.bench_models import bench
from tutelage.errors import ConfigError, MissingDependencyError, RunDirectoryError
from tutelage.export.timing import count_flops, peak_memory, prepare_runner, summarise_times, time_interleaved
from tutelage.models import ModelSpec, build, save_model
from tutelage.reports.bench import BenchPoint, _even, _mega, _on_log, frontier, notes, table, write_bench

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported.images(tmp_path_factory.mktemp("images"))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_all_take_turns_in_changing_order() -> None:
    calls: list[str] = []
    cells = {(name, "eager", 1): (lambda name=name: calls.append(name)) for name in "abc"}
    times = time_interleaved(cells, rounds=20)
    rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert len(rounds) == 21  # one untimed
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) > 3
    assert all(len(t) == 20 for t in times.values())


def test_figures_are_those_worked_by_hand() -> None:
    found = summarise_times([0.001, 0.002, 0.003, 0.1], 4, [0.002, 0.004, 0.006, 0.1])
    assert found["p50_ms"] == pytest.approx(2.5)
    assert found["p95_ms"] == pytest.approx(100)
    assert found["per_second"] == pytest.approx(1600)
    assert found["faster"] == pytest.approx(2)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Flatten(), nn.Linear(3 * 16, 5))
    assert count_flops(model, ("image",), {"image": torch.zeros(1, 2, 4, 4)}) == 2 * (3 * 2 * 9 * 16) + 2 * (48 * 5)


def test_the_frontier_has_what_nothing_beats() -> None:
    def point(latency: float, quality: float) -> BenchPoint:
        return BenchPoint("m", "student", "eager", latency, quality)

    all_of = [point(1, 0.5), point(2, 0.4), point(3, 0.9), point(3, 0.8), point(9, 0.9), point(4, 0.95)]
    assert frontier(all_of) == [point(1, 0.5), point(3, 0.9), point(4, 0.95)]
    assert frontier(all_of, higher=False) == [point(1, 0.5), point(2, 0.4)]


@pytest.mark.parametrize(("low", "high"), [(0.61, 0.8), (1.2, 3.0), (0.07, 30.0), (1e-4, 9e3), (36.1, 36.2)])
def test_ticks_are_few_round_numbers_inside_of_the_axis(low: float, high: float) -> None:
    """An axis had none where all points lay close together, and odd ones elsewhere."""
    for ticks in (_on_log(low, high, 8), [value for value, _ in _even(low, high, 6)]):
        assert 2 <= len(ticks) <= 8
        assert all(low <= tick <= high * (1 + 1e-9) for tick in ticks)
        assert all(len(f"{tick:g}".replace(".", "").strip("0")) <= 4 for tick in ticks)
    for value, decimals in _even(low, high, 6):
        assert float(f"{value:.{decimals}f}") == pytest.approx(value)


def test_small_counts_are_not_nought() -> None:
    assert [_mega(n) for n in (None, 0, 2420, 99_000, 2_990_000, 2.5e8)] == [
        "",
        "0.00",
        "0.0024",
        "0.099",
        "2.99",
        "250",
    ]


def test_teacher_and_student_of_a_run_and_another_are_measured(cnn: Path) -> None:
    found = bench(
        [cnn, "mlp", cnn / "models" / "baseline-seed0"],
        batch_sizes=(1, 4), rounds=3, columns=("eager", "onnx", "int8"),
        memory=False, terminal=exported.QUIET,
    )  # fmt: skip
    written = json.loads((cnn / "bench.json").read_text())
    assert written["models"] == found["models"]
    models = {m["name"]: m for m in found["models"]}
    assert [m["role"] for m in found["models"]] == ["teacher", "student", "other", "other"]
    summary = json.loads((cnn / "summary.json").read_text())
    teacher, student = models["run teacher"], models["run student"]
    assert teacher["parameters"] == summary["parameters"]["teacher"]
    assert student["parameters"] == summary["parameters"]["student"]
    assert teacher["flops"] > student["flops"] > 0
    assert teacher["quality"] == summary["teacher"]["accuracy"]
    assert student["quality"] == summary["students"]["distilled"]["best"]["accuracy"]["mean"]
    assert models["baseline-seed0"]["quality"] == summary["students"]["baseline"]["best"]["accuracy"]["mean"]
    assert models["mlp"]["quality"] is None
    for model in found["models"]:
        for way in model["columns"].values():
            assert "failed" not in way
            for cell in way["batches"].values():
                assert 0 < cell["p50_ms"] <= cell["p95_ms"]
                assert cell["faster"] > 0
    assert student["columns"]["int8"]["quality"] == pytest.approx(student["quality"], abs=0.1)
    assert student["columns"]["onnx"]["agreement"] == 1.0
    assert student["columns"]["int8"]["agreement"] > 0.9
    assert "agreement" not in student["columns"]["eager"]
    found["models"][0]["columns"]["int8"]["batches"]["1"]["p50_ms"] = 1e6
    assert any("run teacher: int8 takes" in line for line in notes(found))
    assert student["columns"]["int8"]["bytes"] < teacher["columns"]["onnx"]["bytes"]
    assert teacher["columns"]["eager"]["batches"]["1"]["faster"] == 1.0
    head, rows = table(found)
    assert len(rows) == 12
    assert all(len(row) == len(head) for row in rows)
    found["models"][0]["name"] = "<script>alert(1)</script>"
    page = write_bench(found, Path("bench.html")).read_text()
    assert "<script" not in page
    assert page.count("<polyline") == 2  # for wide screens and for narrow ones
    assert "peak MB" not in head


def test_a_way_that_cannot_be_had_says_why(cnn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tutelage.export import timing

    def refused(*args: Any) -> None:
        raise MissingDependencyError("an ONNX graph needs the package onnxscript, which is not installed")

    monkeypatch.setattr(timing, "write_onnx", refused)
    found = bench(["mlp"], out="b.json", batch_sizes=(2,), rounds=1, columns=("eager", "onnx"), memory=False,
                  terminal=exported.QUIET)  # fmt: skip
    ways = found["models"][0]["columns"]
    assert "onnxscript" in ways["onnx"]["failed"]
    assert "failed" not in ways["eager"]
    assert "not available" in write_bench(found, Path("b.html")).read_text()


def test_memory_is_that_of_a_process_of_its_own(tmp_path: Path) -> None:
    spec = ModelSpec("mlp", {"hidden": [4000]}, 10, 1, 64)
    model = build(spec).eval()
    weights = 4 * sum(p.numel() for p in model.parameters())
    assert weights > 60e6
    save_model(model, tmp_path / "model", {"spec": spec.to_dict()})
    inputs = {"image": torch.zeros(2, 1, 64, 64)}
    held = torch.zeros(80_000_000)  # of this process: 320 MB that are no business of the other
    found = peak_memory("model", tmp_path / "model", ("image",), inputs, 1)
    del held
    assert weights <= found["peak"] - found["before"] < 6 * weights
    _, path = prepare_runner("onnx", model, ("image",), inputs, (), tmp_path)
    assert path is not None
    alone = peak_memory("onnx", path, ("image",), inputs, 1)
    assert alone["before"] < 0.6 * found["before"]  # it has no torch
    assert weights <= alone["peak"] - alone["before"] < 6 * weights


def test_the_command_prints_a_table_and_writes_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    from typer.main import get_command

    from tutelage.cli import app

    args = [
        "bench",
        "mlp",
        "--columns",
        "eager",
        "--batches",
        "1,2",
        "--rounds",
        "1",
        "--no-memory",
        "--out",
        "b.json",
    ]
    get_command(app)(args, standalone_mode=False)
    said = capsys.readouterr().out
    assert "Speed-up: over mlp (eager)" in said
    assert "Inputs are random for mlp" in said
    assert json.loads(Path("b.json").read_text())["base"] == "mlp"
    assert Path("b.html").exists()
    with pytest.raises(ConfigError, match="--batches 1;2"):
        get_command(app)(["bench", "mlp", "--batches", "1;2"], standalone_mode=False)


@pytest.mark.slow
def test_compiled_is_measured_too(cnn: Path) -> None:
    found = bench([cnn], batch_sizes=(1, 8), rounds=2, columns=("eager", "compiled"), terminal=exported.QUIET)
    for model in found["models"]:
        assert "failed" not in model["columns"]["compiled"]


@pytest.mark.parametrize(
    ("sources", "options", "error", "says"),
    [
        ([], {}, ConfigError, "nothing to measure"),
        (["mlp"], {"columns": ("egaer",)}, ConfigError, "did you mean 'eager'"),
        (["mlp"], {"batch_sizes": (0,)}, ConfigError, "batch sizes"),
        (["runs/nowhere"], {}, RunDirectoryError, "no such folder"),
    ],
)
def test_what_is_wrong_is_said(
    sources: list[str], options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        bench(sources, terminal=exported.QUIET, **options)
