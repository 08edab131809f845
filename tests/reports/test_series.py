"""Pages of workflows and of the lab: what they say, and in a browser, whatever the data calls itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support.browser import BROWSER, HOSTILE, looked_at
from support.fake_runs import make_run
from tutelage.errors import DataError
from tutelage.files import write_text
from tutelage.lab.claims import ExperimentPlot, ExperimentResult, gain, point
from tutelage.lab.page import lab_page, markdown
from tutelage.reports import multistage_table, write_report


def spread(values: list[float]) -> dict[str, Any]:
    return {"mean": sum(values) / len(values), "std": 0.01, "values": values}


def make_series(path: Path, **changes: Any) -> Path:
    """The folder of three generations, made without training anything."""
    pair = {"mean": 0.012, "low": -0.001, "high": 0.025, "level": 0.95, "n": 2, "values": [0.01, 0.014]}
    shown = {"accuracy": spread([0.8, 0.82]), "loss": spread([0.5, 0.5]), "ece": spread([0.02, 0.03])}
    rows = [
        {
            "name": name, "role": role, "parameters": 1210, "taught_by": by, "step": n, "best": shown, "last": shown,
            "validation": spread([0.8, 0.8]), "against": {} if by is None else {by: {"best": pair, "last": pair}},
        }
        for n, (name, role, by) in enumerate(
            [
                ("generation 0", "baseline", None), (HOSTILE, "distilled", "generation 0"),
                ("later", "distilled", HOSTILE),
            ]
        )
    ]  # fmt: skip
    found = {
        "workflow": "born-again", "name": HOSTILE, "verdict": "Generation 1 +1.20 points over generation 0.",
        "seeds": [0, 1], "rows": rows, "stages": ["seed0/generation-1"], "exported": "stages/x/models/y",
    }  # fmt: skip
    path.mkdir(parents=True)
    (path / "summary.json").write_text(json.dumps({**found, **changes}), encoding="utf-8")
    (path / "config.yaml").write_text(f"name: x # {HOSTILE}\n", encoding="utf-8")
    return path


def make_lab() -> dict[str, Any]:
    """What two experiments found, made without training anything."""
    arms = {HOSTILE: [0.80, 0.81], "attention and soft labels": [0.83, 0.85], "none of both": [0.8, 0.8]}
    marks = [point(label, v) for label, v in arms.items()]
    words = ExperimentPlot(
        "", "test accuracy", {"last epoch": marks, "best": marks}, percent=True, caption="Accuracy."
    )
    curve = [point(t, [1 / t, 1.1 / t]) for t in (1.0, 2.0, 4.0, 8.0, 128.0)]
    numbers = ExperimentPlot("temperature", "norm", {"a": curve},
                     log_x=True, log_y=True, caption="Norm.")  # fmt: skip
    part = gain("it helps", arms["attention and soft labels"], arms[HOSTILE])
    each = {label: {"last": v, "best": v} for label, v in arms.items()}
    result = ExperimentResult([part], [words, numbers], [HOSTILE], each)
    one = json.loads(json.dumps({"claim": HOSTILE, "source": HOSTILE, "design": "two arms", **result.as_json()}))
    recipe = {"data": {"source": "digits", "labels": 300}, "train": {"epochs": 3}}
    return {"budget": "full", "seeds": [0, 1], "recipe": recipe, "experiments": {"soft-labels": one, "fitnets": one}}


def test_the_table_in_the_terminal_names_the_first_difference(tmp_path: Path) -> None:
    rows = multistage_table(json.loads((make_series(tmp_path / "s") / "summary.json").read_text()))
    assert [row["over"] for row in rows] == ["–", "+1.2 over generation 0", f"+1.2 over {HOSTILE}"]


def test_a_broken_file_is_named_with_its_key(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"summary\.json: verdict"):
        write_report([make_series(tmp_path / "s", verdict=None)], tmp_path / "page.html")


def test_the_lab_in_markdown_shows_every_part_arm_and_picture() -> None:
    files = markdown(make_lab())
    assert (
        "| it helps | +3.50 points (−2.85 to +9.85) | inconclusive (about 3 seeds would decide) |" in files["lab.md"]
    )
    assert "| attention and soft labels | 84.00 ± 1.41 | 84.00 ± 1.41 |" in files["lab.md"]
    pictures = [name for name in files if name.endswith(".svg")]
    assert pictures == ["lab-soft-labels.svg", "lab-soft-labels-2.svg", "lab-fitnets.svg", "lab-fitnets-2.svg"]
    assert all(name in files["lab.md"] for name in pictures)
    assert "<script" not in files["lab-soft-labels.svg"]
    assert markdown(make_lab()) == files, "pictures are the same bytes each time"


@pytest.mark.skipif(BROWSER is None, reason="needs chromium or google-chrome")
@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_pages_in_a_browser(tmp_path: Path, scheme: str) -> None:
    write_report([make_series(tmp_path / "s")], tmp_path / "series.html")
    write_report([tmp_path / "s", make_run(tmp_path / "run")], tmp_path / "both.html")
    write_text(tmp_path / "lab.html", lab_page(make_lab()))
    found = looked_at(tmp_path, ["series.html", "both.html", "lab.html"], scheme)
    assert [f["title"] for f in found[::2]] == [
        "s – distillation report", "s and run – distillation report", "Claims from the literature, measured",
    ]  # fmt: skip
    assert [len(f["plots"]) > 1 for f in found[::2]] == [False, True, True]
