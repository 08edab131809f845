"""A run that cannot be reported is refused with the file and the remedy, never with a traceback or a half page."""

from __future__ import annotations

import json

import pytest

from support.fake_runs import make_run, make_summary
from tutelage.errors import DataError, RunDirectoryError
from tutelage.reports import write_report
from tutelage.reports.run_files import read_records


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "digits")


def refused(run, kind):
    out = run.parent / "report.html"
    with pytest.raises(kind) as error:
        write_report([run], out)
    assert not out.exists()
    return str(error.value)


def test_an_unfinished_run_says_how_to_go_on(run):
    (run / "summary.json").unlink()
    said = refused(run, RunDirectoryError)
    assert "not finished" in said
    assert "--resume" in said
    assert str(run) in said


def test_a_folder_that_is_no_run(tmp_path):
    assert "not a run directory" in refused(tmp_path, RunDirectoryError)
    assert "no such run directory" in refused(tmp_path / "absent", RunDirectoryError)


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl"])
def test_a_missing_file_is_named(run, name):
    (run / name).unlink()
    said = refused(run, RunDirectoryError)
    assert str(run / name) in said
    assert "copy" in said


def test_a_broken_summary_is_named(run):
    (run / "summary.json").write_text('{"name": ')
    said = refused(run, DataError)
    assert "summary.json" in said
    assert "is not JSON" in said


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda s: s["students"].pop("distilled"), "students.distilled"),
        (lambda s: s["teacher"].update(accuracy="high"), "teacher.accuracy"),
        (lambda s: s.pop("parameters"), "parameters"),
    ],
)
def test_a_summary_without_what_is_needed_names_the_key(run, change, key):
    summary = make_summary()
    change(summary)
    (run / "summary.json").write_text(json.dumps(summary))
    assert f"{key}: " in refused(run, DataError)


def test_a_summary_that_is_a_list(run):
    (run / "summary.json").write_text("[]")
    assert "the file: " in refused(run, DataError)


def test_a_line_cut_short_at_the_end_is_skipped(run):
    assert (run / "metrics.jsonl").read_text().endswith('{"training": "distilled-se')
    (read,) = read_records([run])
    assert read.metrics[-1]["training"] == "distilled-seed2"


@pytest.mark.parametrize("line", ['{"training": "teac', '{"training": "teacher"}', "7"])
def test_a_broken_line_amid_the_metrics_is_an_error_with_its_number(run, line):
    file = run / "metrics.jsonl"
    first, rest = file.read_text().split("\n", 1)
    file.write_text(f"{first}\n{line}\n{rest}")
    assert "metrics.jsonl, line 2: is not a line of metrics" in refused(run, DataError)


def test_bytes_that_are_no_text(run):
    (run / "config.yaml").write_bytes(b"\xff\xfe")
    assert "not UTF-8" in refused(run, DataError)


def test_no_run_at_all(tmp_path):
    with pytest.raises(DataError, match="no run directory"):
        write_report([], tmp_path / "report.html")


def test_runs_of_one_name_are_told_apart_and_one_run_named_twice_is_one(tmp_path):
    a, b = make_run(tmp_path / "a" / "digits"), make_run(tmp_path / "b" / "digits")
    assert [r.label for r in read_records([a, b, a])] == [str(a), str(b)]
    assert [r.label for r in read_records([a])] == ["digits"]
