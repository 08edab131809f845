"""The page of a search: what it says, in words and in a browser, whatever the data calls itself."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from support.browser import BROWSER, HOSTILE, looked_at
from tutelage.errors import DataError
from tutelage.reports import search_verdict, write_report


def spread(values: list[float]) -> dict[str, Any]:
    return {"mean": sum(values) / len(values), "std": 0.01, "values": values}


def make_search(path: Path, **changes: Any) -> Path:
    """The folder of a search of temperature and of a choice, made without training anything."""
    rng = random.Random(0)
    trials = []
    for number in range(14):
        stopped = number % 3 == 2
        values = {
            "method.temperature": 4.0 if number == 0 else rng.uniform(1, 20),
            "method.soft": rng.choice(["kd", HOSTILE]),
        }
        evaluations = [0.5 + 0.03 * i + rng.uniform(0, 0.02) for i in range(3 if stopped else 10)]
        trials.append({
            "number": number, "state": "pruned" if stopped else "finished", "values": values,
            "validation": None if stopped else evaluations[-1], "seeds": [] if stopped else [evaluations[-1]],
            "evaluations": evaluations, "seconds": 3.0, "why": None,
        })  # fmt: skip
    trials[5] |= {"state": "diverged", "evaluations": [], "why": HOSTILE}
    best = max((t for t in trials if t["validation"]), key=lambda t: t["validation"])
    gain = {"mean": 0.012, "low": -0.001, "high": 0.025, "level": 0.95, "n": 2, "values": [0.01, 0.014]}
    arm = {"best": spread([0.8, 0.82]), "last": spread([0.79, 0.81])}
    found = {
        "name": HOSTILE, "objective": "validation accuracy", "seeds": [0, 1], "settings": {"seed": 0, "trials": 14},
        "space": [
            {"key": "method.temperature", "low": 1, "high": 20, "log": True, "own": 4.0},
            {"key": "method.soft", "values": ["kd", HOSTILE], "own": "kd"},
        ],
        "trials": trials, "importance": {"method.temperature": 0.7, "method.soft": 0.3}, "best": best["number"],
        "default": {"trial": 0, "validation": trials[0]["validation"], "seeds": trials[0]["seeds"]}, "same": False,
        "gain_on_validation": gain, "test": {"default": arm, "chosen": arm, "gain": {"best": gain, "last": gain}},
        "seconds": 42.0,
    }  # fmt: skip
    path.mkdir(parents=True)
    (path / "search.json").write_text(json.dumps({**found, **changes}), encoding="utf-8")
    (path / "best.yaml").write_text(f"# {HOSTILE}\nname: x\n", encoding="utf-8")
    return path


def words(path: Path) -> str:
    return search_verdict(json.loads((path / "search.json").read_text(encoding="utf-8")))


def test_the_verdict_tells_validation_from_test_and_shows_no_more_than_there_is(tmp_path: Path) -> None:
    said = words(make_search(tmp_path / "s"))
    assert said.startswith("14 trials, 3 stopped early, 1 diverged: method.temperature ")
    assert "for the best of 14. Test, measured once: 80.0 % against 80.0 %: +1.2 points, no difference shown" in said
    same = words(make_search(tmp_path / "same", same=True))
    assert "none is better on validation than the unchanged recipe" in same


def test_a_broken_file_is_named_with_its_key(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"search\.json: gain_on_validation"):
        write_report([make_search(tmp_path / "s", gain_on_validation=None)], tmp_path / "page.html")
    with pytest.raises(DataError, match="has no trial 99"):
        write_report([make_search(tmp_path / "t", best=99)], tmp_path / "page.html")


@pytest.mark.skipif(BROWSER is None, reason="needs chromium or google-chrome")
@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_the_page_in_a_browser(tmp_path: Path, scheme: str) -> None:
    write_report([make_search(tmp_path / "s")], tmp_path / "search.html")
    for f in looked_at(tmp_path, ["search.html"], scheme):
        assert f["title"] == "s – search"
        assert len(f["plots"]) == 5
        assert f["plots"][0] == ["finished", "stopped early", "unchanged recipe", "chosen"]
