"""The page is whole, holds nothing but its data, and lets no data become markup."""

from __future__ import annotations

import html
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.fake_runs import CLASSES, CONFIG, make_run, make_summary
from tutelage.engine.run_directory import RunDirectory
from tutelage.errors import RunDirectoryError
from tutelage.files import TEMPORARY_PREFIX
from tutelage.reports import write_report
from tutelage.reports.page import as_json
from tutelage.reports.plotting import plot_text, thin

HOSTILE = "</script><script>alert(1)</script>"


def figures_in(page):
    (text,) = re.findall(r'<script type="application/json" id="figures">(.*?)</script>', page, flags=re.DOTALL)
    return json.loads(text)


def without_library(page):
    """The page less plotly.js, which is large and holds addresses in its texts."""
    return re.sub(r"<script>/\*\*.*?</script>", "", page, flags=re.DOTALL)


def test_the_verdict_comes_first_and_everything_is_there(tmp_path):
    run = make_run(tmp_path / "digits")
    out = write_report([run], tmp_path / "deep" / "report.html")
    page = out.read_text(encoding="utf-8")
    assert page.count("plotly.js v") == 1
    assert [p.name for p in out.parent.iterdir()] == ["report.html"]
    order = [
        'class="verdict"',
        "Results</caption>",
        "seed by seed",
        ">Validation accuracy",
        ">Loss<",
        "Calibration",
        "by class",
        "Dark knowledge",
    ]
    body = page[page.index("<body>") :]
    at = [body.index(text) for text in order]
    assert at == sorted(at)
    assert "temperature: 4.0" in body
    assert len(figures_in(page)) == 8
    assert len(page) < 6_000_000, "opened from a disk, it is there at once"


def test_the_page_refers_to_nothing_outside_itself(tmp_path):
    page = write_report([make_run(tmp_path / "digits")], tmp_path / "r.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in page
    assert not re.findall(r"""(?:src|href|action)\s*=\s*["']?(?!data:)[^"'\s]""", without_library(page))
    assert not re.findall(r"url\(|@import", without_library(page))


def test_no_string_of_a_run_becomes_markup(tmp_path):
    summary = make_summary(classes=[HOSTILE, "<b>x</b>", *CLASSES[2:]], name=HOSTILE)
    summary |= {"formula": HOSTILE, "device": HOSTILE, "exported": HOSTILE}
    run = make_run(tmp_path / "a'><script>alert(2)</script>", summary, config=f"# {HOSTILE}\n{CONFIG}")
    file = run / "metrics.jsonl"
    file.write_text(file.read_text().replace('"kd"', json.dumps(HOSTILE)).replace("baseline-", "'><script>alert(3)-"))
    other = make_run(tmp_path / "b", config=CONFIG.replace("4.0", json.dumps(HOSTILE)))
    for runs in ([run], [run, other]):
        page = write_report(runs, tmp_path / "r.html").read_text(encoding="utf-8")
        assert len(re.findall(r"<script", without_library(page))) == 2
        assert len(re.findall(r"</script", page)) == 3
        assert not re.search(r"<b>x</b>", page)
        (bars,) = [f for f in figures_in(page) if f["data"][0]["type"] == "bar"][:1]
        assert not any("<" in text for text in bars["layout"]["yaxis"]["ticktext"])


def test_json_in_a_script_keeps_its_values_and_has_no_markup():
    value = {"a": ["<!--<script>", "&amp;", "\u2028"], "b": [1.5, None]}
    text = as_json({**value, "c": [math.nan, math.inf]})
    assert not set(text) & set("<>&\u2028")
    assert json.loads(text) == {**value, "c": [None, None]}


def test_text_in_a_plot_is_short_and_no_markup():
    assert plot_text("<a href='x'>\n  y") == "&lt;a href='x'&gt; y"
    assert plot_text("x" * 50) == "x" * 27 + "…"


def test_a_long_curve_is_thinned_and_keeps_its_peaks():
    y = [math.sin(i / 50) for i in range(100_000)]
    y[54_321], y[77_777] = 40.0, -40.0
    kept = thin(range(len(y)), y)
    assert len(kept) <= 2000
    assert {54_321, 77_777} <= set(kept)
    assert kept == sorted(kept)
    assert thin(range(9), y[:9]) == list(range(9))


def test_a_long_run_makes_no_long_page(tmp_path):
    run = make_run(tmp_path / "digits", make_summary(seeds=1), epochs=100, logs=50)
    page = write_report([run], tmp_path / "r.html").read_text(encoding="utf-8")
    assert max(len(trace["x"]) for figure in figures_in(page) for trace in figure["data"]) <= 2000


def test_several_runs_are_compared_and_what_differs_is_shown(tmp_path):
    a = make_run(tmp_path / "digits")
    b = make_run(tmp_path / "digits-T8", make_summary(baseline=None, seeds=1), config=CONFIG.replace("4.0", "8.0"))
    page = write_report([a, b], tmp_path / "r.html").read_text(encoding="utf-8")
    assert "method.<wbr>temperature</th><td>4.0</td><td>8.0</td>" in page
    assert "seeds</th>" not in page
    levels = [f["layout"]["yaxis"]["range"] for f in figures_in(page)[1:3]]
    assert levels[0] == levels[1]


def test_bins_of_a_few_samples_are_set_apart(tmp_path):
    summary = make_summary()
    summary["teacher"]["reliability"]["count"][5] = 3.0
    page = write_report([make_run(tmp_path / "digits", summary)], tmp_path / "r.html").read_text(encoding="utf-8")
    full, thin = [t for t in figures_in(page)[3]["data"] if t["name"] == "teacher"]
    assert 3 in [n for n, _ in thin["customdata"]]
    assert "error_y" not in thin
    assert all(n >= 10 for n, _ in full["customdata"])
    for x, y, up, down in zip(
        full["x"], full["y"], full["error_y"]["array"], full["error_y"]["arrayminus"], strict=True
    ):
        assert y + up - down == pytest.approx(x, abs=1e-5)


ALIASES = "\n".join(["l0: &l0 x", *(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 20))])


@pytest.mark.parametrize("config", ["&a {b: *a}", "{name}: [unclosed", "a: 2001-99-99", ALIASES])
def test_a_config_that_is_no_plain_yaml_is_still_shown(tmp_path, config):
    runs = [make_run(tmp_path / name, config=config) for name in ("a", "b")]
    page = write_report(runs, tmp_path / "r.html").read_text(encoding="utf-8")
    assert page.count(html.escape(config)) == 2


def test_a_run_with_the_least_it_can_have(tmp_path):
    summary = make_summary(baseline=None, seeds=1)
    summary |= {"classes": None, "latency": None}
    for row in (summary["teacher"], summary["students"]["distilled"]):
        del row["reliability"], row["per_class"]
    del summary["teacher"]["validation"]
    run = make_run(tmp_path / "digits", summary)
    (run / "metrics.jsonl").write_text("")
    shutil.rmtree(run / "similarity")
    page = write_report([run], tmp_path / "r.html").read_text(encoding="utf-8")
    assert len(figures_in(page)) == 1


def test_curves_that_are_not_finite_do_not_break_the_page(tmp_path):
    run = make_run(tmp_path / "digits")
    file = run / "metrics.jsonl"
    file.write_text(re.sub(r'"loss": [0-9.]+', '"loss": NaN', file.read_text()))
    page = write_report([run], tmp_path / "r.html").read_text(encoding="utf-8")
    assert None in [v for trace in figures_in(page)[2]["data"] for v in trace["y"]]


def test_an_old_report_stays_when_the_new_one_cannot_be_written(tmp_path):
    run = make_run(tmp_path / "digits")
    out = tmp_path / "folder"
    out.mkdir()
    with pytest.raises(RunDirectoryError, match="cannot be written"):
        write_report([run], out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["digits", "folder"]


def test_a_page_that_a_kill_leaves_half_written_is_known_for_a_draft(tmp_path, monkeypatch):
    run = make_run(tmp_path / "digits")
    drafts = []
    monkeypatch.setattr(os, "replace", lambda draft, path: drafts.append(Path(draft)))
    write_report([run], run / "report.html")
    assert [draft.name.startswith(TEMPORARY_PREFIX) for draft in drafts] == [True]
    RunDirectory(run).sweep()
    assert not drafts[0].exists()


def test_reports_load_no_torch():
    code = "import sys; import tutelage.reports.page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
