"""Exports: the same answers in every format, all that their use needs beside them, and bad input told in words."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tutelage
from support import exported
from tutelage.cli import main
from tutelage.data import as_batch
from tutelage.errors import (
    CapabilityError,
    CheckpointError,
    ConfigError,
    DataError,
    MissingDependencyError,
    NumericsError,
    RunDirectoryError,
)
from tutelage.experiment.export_student import export_student
from tutelage.experiment.run_artifacts import find, rows_of
from tutelage.export import Export, formats, open_export, predict
from tutelage.export.runtimes import MANIFEST
from tutelage.models import load_model
from tutelage.models.small import ConvNet

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

WORLDS = {
    "cnn": exported.images,
    "bert": lambda folder: exported.texts(folder),
    "llama": lambda folder: exported.conversations(folder),
}
GRAPHS = ("onnx", "torch-export", "safetensors")


class Runs:
    """Finished runs and their exports, each made when it is first asked for."""

    def __init__(self, base: pytest.TempPathFactory) -> None:
        self.base, self.known = base, dict[str, Path]()

    def run(self, world: str) -> Path:
        if world not in self.known:
            self.known[world] = WORLDS[world](self.base.mktemp(world))
        return self.known[world]

    def export_student(self, world: str, to: str) -> Path:
        run = self.run(world)
        made = run / "export" / to
        if not made.exists():
            with exported.inside(run.parent):
                assert export_student(run, to, terminal=exported.QUIET).path == made
        return made


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory)


@pytest.fixture(scope="module", autouse=True)
def one_trace_for_each_student() -> Iterator[None]:
    """An int8 export quantises the graph that the float export of the same weights and inputs has written."""
    graphs: dict[Any, tuple[dict[str, Any], bytes]] = {}
    write = formats.write_onnx

    def write_once(model: nn.Module, names: tuple[str, ...], few: Any, path: Path, output: str = "logits") -> Any:
        weights = tuple(float(x.double().sum()) for x in model.state_dict().values())
        key = (type(model), names, tuple(few[name].shape for name in names), output, weights)
        if key in graphs and path.name == "whole.onnx":
            path.write_bytes(graphs[key][1])
            return dict(graphs[key][0])
        how = write(model, names, few, path, output)
        assert not path.with_name(f"{path.name}.data").exists()
        graphs[key] = how, path.read_bytes()
        return dict(how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "write_onnx", write_once)
        yield


@pytest.fixture(scope="module")
def cnn(runs: Runs) -> Path:
    return runs.run("cnn")


@pytest.fixture(scope="module")
def bert(runs: Runs) -> Path:
    return runs.run("bert")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def digits(folder: Path, count: int = 5) -> tuple[list[Path], torch.Tensor]:
    """Image files of digits, and their pixels as a model takes them."""
    from PIL import Image

    found = find(folder, exported.QUIET)
    data: Any = found.data()
    folder = Path("pictures")
    folder.mkdir()
    files = []
    for i in range(count):
        files.append(folder / f"{i}.png")
        Image.fromarray(data.test.pixels[i, 0].numpy(), mode=None).save(files[-1])
    return files, data.test.fetch(torch.arange(count)).inputs


# The same answers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", list(WORLDS))
@pytest.mark.parametrize("to", [*GRAPHS, "hf"])
def test_every_format_answers_as_the_student_on_256_rows_of_the_test_split(runs: Runs, world: str, to: str) -> None:
    run = runs.run(world)
    if to == "hf" and world == "cnn":
        with pytest.raises(CapabilityError, match="not a transformers model") as caught:
            export_student(run, "hf", terminal=exported.QUIET)
        assert "onnx" in str(caught.value)
        assert not (run / "export" / "hf").exists()
        return
    made = runs.export_student(world, to)
    check = json.loads((made / MANIFEST).read_text())["check"]
    assert check["rows"] == 256
    assert check["max_difference"] <= 1e-4
    with exported.inside(run.parent):
        found = find(run, exported.QUIET)
        data: Any = found.data()
    held = rows_of(data.test, 256, found.bundle.task)
    assert sum(len(next(iter(inputs.values()))) for inputs in held) == 256
    opened, model = open_export(made), load_model(run / "student")
    for inputs in (held[0], {k: v[:1] for k, v in held[1].items()}):
        if "input_ids" in inputs:  # other lengths than the graph was drawn with
            inputs = {k: torch.cat([v] * 2, 1) for k, v in inputs.items()}
        with torch.no_grad():
            said: Any = model(**inputs) if "input_ids" in inputs else model(inputs["image"])
        expected = said if isinstance(said, torch.Tensor) else said.logits
        assert torch.allclose(opened.run(inputs), expected, atol=1e-4)


@pytest.mark.parametrize("world", list(WORLDS))
def test_eight_bits_say_what_they_cost(runs: Runs, world: str) -> None:
    made = runs.export_student(world, "int8")
    manifest = json.loads((made / MANIFEST).read_text())
    measured, how = manifest["measured"], manifest["how"]
    assert "tolerance" not in manifest["check"]
    assert manifest["check"]["max_difference"] > 1e-4  # it is rounded, and not a copy
    assert measured["export"]["n"] == measured["source"]["n"] > 200
    assert measured["export"]["accuracy"] > measured["source"]["accuracy"] - 0.1
    assert how["quantisation"] == ("static" if world == "cnn" else "dynamic")
    assert (how.get("calibration_rows", 0) > 0) == (world == "cnn")
    assert "int8 weights" in (made / "README.md").read_text()
    assert manifest["check"]["time_ratio"] > 0
    assert "over that of the float32 student" in (made / "README.md").read_text()


def test_a_slow_int8_export_is_reported(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = {("source", "", 0): [1.0, 2.0, 1.0], ("export", "", 0): [5.0, 5.0, 9.0]}
    monkeypatch.setattr("tutelage.export.export.time_interleaved", lambda cells, rounds: seconds)
    main_(["export", str(runs.run("bert")), "--to", "int8", "--out", str(tmp_path / "int8")])
    assert "takes 5 times the time of the float32 student" in capsys.readouterr().out


@pytest.mark.parametrize("world", ["cnn", "bert"])
def test_no_weight_of_eight_bits_is_signed(runs: Runs, world: str) -> None:
    import onnx

    weights = onnx.load(runs.export_student(world, "int8") / "model.onnx").graph.initializer
    kinds = {onnx.TensorProto.DataType.Name(w.data_type) for w in weights if len(w.dims) > 1}
    assert "UINT8" in kinds
    assert "INT8" not in kinds


def test_a_graph_says_nothing_of_the_files_it_was_made_in(runs: Runs) -> None:
    content = (runs.export_student("cnn", "onnx") / "model.onnx").read_bytes()
    assert b"site-packages" not in content
    assert str(Path(tutelage.__file__).parent).encode() not in content


def test_a_difference_is_an_error_and_leaves_nothing(cnn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = formats.FORMATS["torch-export"]

    def slightly_off(job: formats.ExportJob) -> Any:
        other = ConvNet(classes=10, channels=1, widths=(8, 16), depth=1)
        other.load_state_dict(job.bundle.model.state_dict())
        with torch.no_grad():
            other.head.bias[3] += 2e-4
        return whole(replace(job, bundle=replace(job.bundle, model=other.eval())))

    monkeypatch.setitem(formats.FORMATS, "torch-export", slightly_off)
    with pytest.raises(NumericsError, match=r"up to 0\.0002 on 256 inputs"):
        export_student(cnn, "torch-export", out="there", terminal=exported.QUIET)
    assert not Path("there").exists()
    assert not list(Path().glob(".tutelage-tmp*"))


def test_an_export_replaces_an_export_and_nothing_else(cnn: Path) -> None:
    for _ in range(2):
        export_student(cnn, "safetensors", out="mine", terminal=exported.QUIET)
    Path("theirs").mkdir()
    Path("theirs/letter.txt").write_text("dear")
    with pytest.raises(RunDirectoryError, match="not an export"):
        export_student(cnn, "safetensors", out="theirs", terminal=exported.QUIET)
    assert Path("theirs/letter.txt").read_text() == "dear"


def test_a_module_of_ones_own_is_exported_with_ones_own_data() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    loader = [(torch.randn(40, 3, 2, 2), torch.zeros(40, dtype=torch.long)) for _ in range(10)]
    made = tutelage.export_student(model, "onnx", out="mine", data=loader, classes=list("abcde"))
    assert made.manifest["check"]["rows"] == 256
    assert model.training
    batch = as_batch(loader[0]).inputs
    assert torch.allclose(open_export("mine").run({"image": batch}), model(batch), atol=1e-5)


# Beside the model -----------------------------------------------------------------------------------------


def test_a_card_has_the_figures_of_the_run_and_invents_no_licence(runs: Runs, cnn: Path) -> None:
    import yaml

    text = (runs.export_student("cnn", "onnx") / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    known = yaml.safe_load(front)
    summary = json.loads((cnn / "summary.json").read_text())
    assert "license" not in known
    assert known["pipeline_tag"] == "image-classification"
    accuracy = summary["students"]["distilled"]["best"]["accuracy"]["mean"]
    assert known["model-index"][0]["results"][0]["metrics"][0]["value"] == round(accuracy, 6)
    for said in (
        f"{accuracy:.2%}", f"{summary['teacher']['accuracy']:.2%}", f"{summary['parameters']['student']:,}",
        f"{100 * summary['gain']['best']['mean']:+.2f} points", "Retention", "`convnet`", "`digits`", "no licence",
    ):  # fmt: skip
        assert said in body, said


def test_what_transformers_loads_knows_labels_and_tokenizer(runs: Runs) -> None:
    import transformers

    made = runs.export_student("bert", "hf")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(made)
    cutter = transformers.AutoTokenizer.from_pretrained(made)
    assert [model.config.id2label[i] for i in range(3)] == ["math", "net", "sound"]
    with torch.no_grad():
        said = model(**cutter("the matrix and the prime vector", return_tensors="pt")).logits.softmax(-1)[0]
    ours = predict(made, ["the matrix and the prime vector"])[0]["labels"]
    assert ours[0]["label"] == model.config.id2label[int(said.argmax())] == "math"
    assert ours[0]["probability"] == pytest.approx(float(said.max()), abs=1e-5)


# Asking ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["onnx", "torch-export", "safetensors", "int8"])
def test_images_are_answered_as_the_student_answers_them(
    runs: Runs, cnn: Path, to: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made = str(runs.export_student("cnn", to))
    files, pixels = digits(cnn)
    with torch.no_grad():
        expected = load_model(cnn / "student")(pixels).softmax(-1)
    main_(["predict", made, "pictures", "--json", "--top", "3"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["input"] for line in lines] == [str(f) for f in files]
    for line, row in zip(lines, expected, strict=True):
        assert len(line["labels"]) == 3
        near = 0.1 if to == "int8" else 1e-4
        for one in line["labels"]:
            assert one["probability"] == pytest.approx(float(row[int(one["label"])]), abs=near)
    main_(["predict", made, str(files[0])])
    assert "%" in capsys.readouterr().out


def main_(args: list[str]) -> None:
    """The command line, in this process."""
    from typer.main import get_command

    from tutelage.cli import app

    get_command(app)(args, standalone_mode=False)


@pytest.mark.parametrize("to", ["onnx", "torch-export", "hf", "safetensors"])
def test_texts_are_answered(
    runs: Runs, to: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    made = str(runs.export_student("bert", to))
    Path("texts.txt").write_text("a proxy for the dns packet\n\nmusic for the radio\n", encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.StringIO("the matrix of a prime\n"))
    main_(["predict", made, "-", "--file", "texts.txt", "--json"])
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    texts = ["the matrix of a prime", "a proxy for the dns packet", "music for the radio"]
    assert [one["input"] for one in found] == texts
    cutter, student = open_export(made).tokenizer, load_model(runs.run("bert") / "student")
    with torch.no_grad():
        expected = student(**cutter(texts, padding=True, return_tensors="pt")).logits.softmax(-1)
    for one, row in zip(found, expected, strict=True):
        said = {label["label"]: label["probability"] for label in one["labels"]}
        assert [said[name] for name in ("math", "net", "sound")] == pytest.approx(row.tolist(), abs=1e-4)
    assert len({one["labels"][0]["probability"] for one in found}) == 3  # each text has an answer of its own


def test_a_graph_writes_what_the_model_writes(runs: Runs) -> None:
    said = {
        to: [
            one["text"]
            for one in predict(runs.export_student("llama", to), ["What is 2 and 3?", "What is 9 and 9?"], tokens=8)
        ]
        for to in ("hf", "onnx", "torch-export")
    }
    assert said["hf"] == said["onnx"] == said["torch-export"]
    assert any(text.strip() for text in said["hf"])


@pytest.mark.parametrize("task", ["embedding", "mlm", "tokens", "multi-label", "regression"])
def test_other_tasks_of_texts_are_exported_and_asked(task: str, tmp_path: Path) -> None:
    import transformers

    from support import text_worlds

    kinds = {
        "embedding": "BertModel", "mlm": "BertForMaskedLM", "tokens": "BertForTokenClassification",
        "multi-label": "BertForSequenceClassification", "regression": "BertForSequenceClassification",
    }  # fmt: skip
    more = {"num_labels": 3} if task in ("tokens", "multi-label", "regression") else {}
    folder = text_worlds.encoder(tmp_path / "model", kinds[task], **more)
    card = {"task": task, "classes": ["a", "b", "c"] if more else [], "preprocessing": {"max_length": 24}}
    (folder / "model.json").write_text(json.dumps(card))
    to = "torch-export" if task in ("tokens", "regression") else "onnx"
    made = export_student(folder, to, out="made", terminal=exported.QUIET)
    if to == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession("made/model.onnx")
        assert [output.name for output in session.get_outputs()] == [made.manifest["output"]]
        assert [given.name for given in session.get_inputs()] == made.manifest["inputs"]
    assert "random inputs" in made.manifest["check"]["inputs"]
    text = "the [MASK] is a proxy" if task == "mlm" else "the matrix is a proxy"
    (found,) = predict("made", [text], top=2)
    cutter = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = cutter(text, return_tensors="pt")
    with torch.no_grad():
        said = load_model(folder)(**inputs)
    if task == "embedding":
        assert found["embedding"] == pytest.approx(said[0].tolist(), abs=1e-4)
    elif task == "mlm":
        at = inputs["input_ids"][0].tolist().index(cutter.mask_token_id)
        assert found["masks"][0][0]["label"] == cutter.decode([int(said.logits[0, at].argmax())])
    elif task == "tokens":
        assert [w["word"] for w in found["words"]] == text.split()
        assert found["words"][0]["label"] == "abc"[int(said.logits[0, 1].argmax())]
        (found,) = predict("made", [" ".join([text] * 20)])
        assert [w["word"] for w in found["words"]] == text.split() * 20, "words of later windows"
    elif task == "multi-label":
        assert found["labels"][0]["probability"] == pytest.approx(float(said.logits.sigmoid().max()), abs=1e-4)
    else:
        assert list(found["values"].values()) == pytest.approx(said.logits[0].tolist(), abs=1e-4)


# Bad input ------------------------------------------------------------------------------------------------


def test_what_is_wrong_is_said(runs: Runs, cnn: Path, tmp_path: Path) -> None:
    for source, error, says in (
        ("nowhere", CheckpointError, "no such folder"),
        (tmp_path, CheckpointError, "is not an export"),
    ):
        with pytest.raises(error, match=says):
            predict(source, ["a"])
    with pytest.raises(RunDirectoryError, match="no such folder"):
        export_student("nowhere", "onnx")
    with pytest.raises(ConfigError, match="did you mean 'onnx'"):
        export_student(cnn, "onx", terminal=exported.QUIET)
    Path("letter.png").write_text("dear")
    Path("empty").mkdir()
    for given, says in (
        ("letter.png", "is not an image"), ("gone.png", "no such file"), ("empty", "holds no image"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=says):
            predict(cnn, [given])
    broken = Path(shutil.copytree(runs.export_student("cnn", "onnx"), "broken"))
    (broken / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        open_export(broken)
    (broken / MANIFEST).write_text("{}")
    with pytest.raises(CheckpointError, match="is damaged"):
        open_export(broken)


def test_an_empty_text_and_no_mask_are_said(bert: Path) -> None:
    with pytest.raises(DataError, match="text 2 of 2 is empty"):
        predict(bert, ["music", "  "])
    with pytest.raises(DataError, match="no text"):
        predict(bert, [])


def test_two_texts_are_read_together_and_one_is_refused() -> None:
    from support import text_worlds
    from tutelage.export.inference import tokenize_texts

    cutter = text_worlds.tokenizer()
    names = ["input_ids", "attention_mask", "token_type_ids"]
    manifest = {"inputs": names, "pairs": True, "preprocessing": {"max_length": 16}}
    opened = Export(Path(), manifest, lambda inputs: inputs["input_ids"], cutter)
    found = tokenize_texts(opened, ["a proxy\tthe router"])
    expected = cutter("a proxy", "the router", return_tensors="pt")
    assert all(torch.equal(found[name], expected[name]) for name in names)
    with pytest.raises(DataError, match="reads pairs"):
        tokenize_texts(opened, ["a proxy"])


def test_a_missing_runtime_names_the_extra(runs: Runs, cnn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util as util

    made = runs.export_student("cnn", "onnx")
    real = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *a: None if name == "onnxruntime" else real(name, *a))
    for call in (
        lambda: open_export(made),
        lambda: export_student(cnn, "onnx", out="other", terminal=exported.QUIET),
    ):
        with pytest.raises(MissingDependencyError, match="onnxruntime") as caught:
            call()
        assert "tutelage[export]" in str(caught.value)


def test_a_program_that_would_run_code_is_refused(runs: Runs) -> None:
    import pickle
    import zipfile

    made = Path(shutil.copytree(runs.export_student("cnn", "torch-export"), "made")) / "model.pt2"
    with zipfile.ZipFile(made) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}

    class Bomb:
        def __reduce__(self) -> Any:
            return Path.touch, (Path("ran"),)

    for name in parts:
        if name.endswith(".pt"):
            parts[name] = pickle.dumps(Bomb())
    with zipfile.ZipFile(made, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    with pytest.raises(CheckpointError, match="would run code"):
        open_export("made")
    assert not Path("ran").exists()


def test_the_command_exits_with_2_and_no_traceback(cnn: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["export", str(cnn), "--to", "hf"])
    assert stop.value.code == 2


def test_the_command_says_what_was_checked(cnn: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main_(["export", str(cnn), "--to", "safetensors", "--out", "made"])
    said = capsys.readouterr().out
    assert "differs from the student by at most 0 (allowed 0.0001) on 256 inputs" in said
    assert "tutelage predict made IMAGE" in said
    with pytest.raises(ConfigError, match="there is no input"):
        main_(["predict", "made"])


def test_asking_imports_nothing_that_trains(runs: Runs, cnn: Path) -> None:
    made = runs.export_student("cnn", "onnx")
    files, _ = digits(cnn, 1)
    code = (
        "import sys; from tutelage.cli.export import predict; predict(sys.argv[1], [sys.argv[2]]); "
        "rooms = ('engine', 'methods', 'teachers', 'experiment', 'losses', 'config'); "
        "print([r for r in rooms if f'tutelage.{r}' in sys.modules], 'accelerate' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(made), str(files[0])], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[] False"
