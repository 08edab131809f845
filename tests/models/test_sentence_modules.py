"""A folder of sentence-transformers gives the embeddings that sentence-transformers gives, and so does an export."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tutelage
from support.sentence_folders import FOLDERS, OUT, PROMPTED, PROMPTS, TEXTS, WIDTH, sentence_folder
from support.text_worlds import encoder, sentences, table
from tutelage import api
from tutelage.cli.bench_models import bench
from tutelage.config import build_recipe
from tutelage.errors import CapabilityError, ConfigError, ModelError, TutelageError
from tutelage.experiment.caching import recipe_provenance
from tutelage.experiment.measure import fingerprint
from tutelage.experiment.recipe_source import RecipeSource, load_data
from tutelage.models import ModelSpec, build, load_model, load_tokenizer
from tutelage.progress import Terminal
from tutelage.teachers import LiveTeacher

pytest.importorskip("transformers")

EXPECTED = Path(__file__).with_name("sentence_embeddings.json")
"""Embeddings of sentence-transformers 6.2.0 for the folders and the texts; a slow test computes them again."""

EVERY = {**FOLDERS, **PROMPTED}

SIZES = {"in_features": WIDTH, "out_features": OUT}

THEIRS = """
import json, sys
from sentence_transformers import SentenceTransformer
folders, texts = json.loads(sys.argv[1]), json.loads(sys.argv[2])
print("RESULT" + json.dumps({
    name: SentenceTransformer(folder, device="cpu").encode(texts, show_progress_bar=False).tolist()
    for name, folder in folders.items()
}))
"""


def embed(model: Any, folder: Path) -> torch.Tensor:
    texts = [model.after.prompt + text for text in TEXTS]
    inputs = load_tokenizer(f"hf:{folder}")(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        result: torch.Tensor = model.eval()(inputs["input_ids"], inputs["attention_mask"])
    return result


def load(folder: Path) -> Any:
    return build(ModelSpec(f"hf:{folder}", task="embedding"))


def tokens_of(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_tokenizer(f"hf:{folder}")(TEXTS, padding=True, return_tensors="pt"))


def recipe(
    folder: Path, data: dict[str, Any] | None = None, teacher: dict[str, Any] | None = None, **student: Any
) -> Any:
    table(folder.parent / "d.jsonl", sentences(60))
    return build_recipe({
        "name": "t",
        "data": {"source": "table", "path": str(folder.parent / "d.jsonl"), "task": "embedding", "max_length": 32,
                 **(data or {})},
        "teacher": {"model": f"hf:{folder}", **(teacher or {})},
        "student": {"model": "teacher", "layers": 1, **student},
        "method": "embedding", "train": {"epochs": 1, "batch_size": 32}, "baseline": False,
    })  # fmt: skip


@pytest.mark.parametrize("name", EVERY)
def test_a_folder_gives_its_own_embeddings(name: str, tmp_path: Path) -> None:
    folder = sentence_folder(tmp_path / name, **EVERY[name])
    expected = torch.tensor(json.loads(EXPECTED.read_text())[name])
    torch.testing.assert_close(embed(load(folder), folder), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_a_saved_model_is_read_again_as_it_was(name: str, tmp_path: Path) -> None:
    folder = sentence_folder(tmp_path / name, **EVERY[name])
    model = load(folder)
    model.save_pretrained(tmp_path / "saved")
    load_tokenizer(f"hf:{folder}").save_pretrained(tmp_path / "saved")
    assert torch.equal(embed(load(tmp_path / "saved"), folder), embed(model, folder))


def test_a_student_keeps_the_modules_of_its_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = sentence_folder(tmp_path / "teacher", **FOLDERS["cls-dense-normalize"])
    api.run(recipe(folder), out="out", terminal=Terminal(speaks=False))
    embeddings = embed(load_model("out/student"), folder)
    assert embeddings.shape == (len(TEXTS), OUT)
    torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(len(TEXTS)))


def test_a_cache_of_another_pooling_is_another_cache(tmp_path: Path) -> None:
    prints = [fingerprint(load(sentence_folder(tmp_path / name, **FOLDERS[name]))) for name in ("mean", "cls")]
    assert prints[0]["weights"] == prints[1]["weights"]
    assert prints[0] != prints[1]


def test_prompts_and_similarity_are_saved_as_they_were(tmp_path: Path) -> None:
    folder = sentence_folder(tmp_path / "teacher", pooling={"pooling_mode": "cls", "include_prompt": False})
    settings = {"prompts": {"query": "song "}, "default_prompt_name": None, "similarity_fn_name": "dot"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"__version__": {}, **settings}))
    load(folder).save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config_sentence_transformers.json").read_text()) == settings
    assert json.loads((tmp_path / "saved" / "1_Pooling" / "config.json").read_text())["include_prompt"] is False


@pytest.mark.parametrize("to", ["onnx", "torch-export"])
@pytest.mark.parametrize("name", ["last-token-with-prompt", "max-without-prompt"])
def test_a_graph_has_the_modules_and_the_prompt(name: str, to: str, tmp_path: Path) -> None:
    folder = sentence_folder(tmp_path / "teacher", **PROMPTED[name])
    tutelage.export_student(folder, to, out=tmp_path / "graph", terminal=Terminal(speaks=False))
    ours = torch.tensor([row["embedding"] for row in tutelage.predict(tmp_path / "graph", TEXTS)])
    expected = torch.tensor(json.loads(EXPECTED.read_text())[name])
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


WITHOUT = PROMPTED["mean-sqrt-length-without-prompt"]
"""A folder whose pooling leaves out the prompt."""


@pytest.mark.parametrize(
    ("keys", "mine", "theirs"),
    [
        ({}, "song of ", "song of "),
        ({"teacher_prompt": "passage"}, "the ", "the "),
        ({"prompt": "passage", "teacher_prompt": "query"}, "the ", "song of "),
        ({"prompt": ""}, "", ""),
    ],
)
def test_a_recipe_chooses_the_prompts_of_student_and_teacher(
    keys: dict[str, str], mine: str, theirs: str, tmp_path: Path
) -> None:
    chosen = recipe(sentence_folder(tmp_path / "teacher", **WITHOUT), data=keys)
    data = load_data(chosen, Terminal(speaks=False))
    source = RecipeSource(chosen, data)
    batch, cutter = data.test.fetch(torch.arange(1)), data.tokenizer
    for prompt, inputs, model in (
        (mine, batch.inputs, source.build_student(0)), (theirs, batch.for_teacher().inputs, source.build_teacher(0)),
    ):  # fmt: skip
        begin = cutter(prompt)["input_ids"][:-1]
        assert inputs["input_ids"][0, : len(begin)].tolist() == begin
        assert model.after.prompt == prompt
        assert model.after.skip == (len(begin) if prompt else 0)


def test_a_student_keeps_its_prompt_wherever_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = sentence_folder(tmp_path / "teacher", **WITHOUT)
    asked = recipe(folder, data={"prompt": "passage"}, teacher={"cache": {}})
    api.run(asked, out="out", terminal=Terminal(speaks=False))
    settings = json.loads(Path("out/student/config_sentence_transformers.json").read_text())
    assert settings["default_prompt_name"] == "passage"
    assert settings["prompts"] == PROMPTS
    model = load_model("out/student")
    expected = embed(model, folder)
    assert model.after.prompt == "the "
    for to in ("safetensors", "hf", "onnx"):
        tutelage.export_student("out", to, terminal=Terminal(speaks=False))
        assert "after the prompt `the `" in Path(f"out/export/{to}/README.md").read_text()
        ours = torch.tensor([row["embedding"] for row in tutelage.predict(f"out/export/{to}", TEXTS)])
        torch.testing.assert_close(ours, expected, atol=2e-6, rtol=1e-5)
    summary = json.loads(Path("out/summary.json").read_text())
    measured = bench(["out"], columns=["eager"], memory=False, terminal=Terminal(speaks=False))
    student = next(row for row in measured["models"] if row["role"] == "student")
    assert student["quality"] == pytest.approx(summary["students"]["distilled"]["best"]["spearman"]["mean"])


def test_outputs_with_another_prompt_are_another_cache(tmp_path: Path) -> None:
    folder, known = sentence_folder(tmp_path / "teacher", **PROMPTED["max-without-prompt"]), []
    for prompt in ("query", "passage"):
        chosen = recipe(folder, data={"prompt": prompt})
        data = load_data(chosen, Terminal(speaks=False))
        teacher = LiveTeacher(RecipeSource(chosen, data).build_teacher(0))
        known.append(recipe_provenance(chosen, data, teacher))
    assert known[0]["data"] != known[1]["data"]
    assert known[0]["teacher"] != known[1]["teacher"], "the pooling leaves out another number of tokens"


def test_a_prompt_that_the_folder_does_not_have(tmp_path: Path) -> None:
    chosen = recipe(sentence_folder(tmp_path / "teacher", **WITHOUT), data={"prompt": "clustering"})
    with pytest.raises(ModelError, match=r"data\.\w*prompt: its config_sentence_transformers.json has no prompt 'cl"):
        load_data(chosen, Terminal(speaks=False))


def test_a_student_for_ranking_has_prompts_for_queries_and_answers(tmp_path: Path) -> None:
    encoder(tmp_path / "cross", "BertForSequenceClassification", num_labels=1)
    folder = sentence_folder(tmp_path / "student", **FOLDERS["mean"], settings={"prompts": PROMPTS})
    rows = [{"q": "song chord", "a": "matrix", "b": "prime"}] * 20
    table(tmp_path / "d.jsonl", rows)
    chosen = build_recipe({
        "name": "t", "data": {"source": "table", "path": str(tmp_path / "d.jsonl"), "task": "ranking",
                              "text": ["q", "a", "b"], "max_length": 32},
        "teacher": {"model": f"hf:{tmp_path / 'cross'}"}, "student": {"model": f"hf:{folder}"},
        "method": "logit", "train": {"epochs": 1},
    })  # fmt: skip
    data = load_data(chosen, Terminal(speaks=False))
    batch, cutter = data.test.fetch(torch.arange(1)), data.tokenizer
    for name, text in (("", "song of song chord"), ("positive_", "the matrix"), ("negative_", "the prime")):
        assert batch.inputs[f"{name}input_ids"][0].tolist() == cutter(text)["input_ids"]
    assert batch.for_teacher().inputs["positive_input_ids"][0].tolist() == cutter("song chord", "matrix")["input_ids"]
    student = RecipeSource(chosen, data).build_student(0)
    assert student.after.settings["prompts"] == {**PROMPTS, "document": "the "}, "as encode_document reads it"


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("config_sentence_transformers.json", {"activation_fn": "torch.nn.modules.activation.Sigmoid"}, nn.Sigmoid),
        ("config.json", {"sentence_transformers": {"activation_fn": "torch.nn.Sigmoid"}}, nn.Sigmoid),
        ("config.json", {"sbert_ce_default_activation_function": "torch.nn.Tanh"}, nn.Tanh),
        ("config.json", {}, nn.Identity),
    ],
)
def test_a_cross_encoder_applies_the_activation_that_its_files_name(
    file: str, content: dict[str, Any], expected: type[nn.Module], tmp_path: Path
) -> None:
    folder = encoder(tmp_path, "BertForSequenceClassification", num_labels=1)
    known = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps(known | content))
    model = build(ModelSpec(f"hf:{folder}", task="ranking"))
    inputs = {f"{side}_{k}": v for side in ("positive", "negative") for k, v in tokens_of(folder).items()}
    logits = model.model(**tokens_of(folder)).logits[:, 0]
    assert torch.equal(model(**inputs)[:, 0], expected()(logits))
    assert fingerprint(model)["activation"] == str(expected())


@pytest.mark.parametrize("settings", [
    {"activation_fn": "own.Act"}, {"prompts": {"q": "query: "}, "default_prompt_name": "q"},
])  # fmt: skip
def test_a_cross_encoder_that_is_not_known_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = encoder(tmp_path, "BertForSequenceClassification", num_labels=1)
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"a cross-encoder with the (activation|prompt)"):
        build(ModelSpec(f"hf:{folder}", task="ranking"))


def test_dense_weights_of_torch_are_read(tmp_path: Path) -> None:
    options = FOLDERS["cls-dense-normalize"]
    folder = sentence_folder(tmp_path / "binary", **options, binary=True)
    expected = torch.tensor(json.loads(EXPECTED.read_text())["cls-dense-normalize"])
    torch.testing.assert_close(embed(load(folder), folder), expected, atol=1e-6, rtol=1e-5)
    assert load(folder).read_layers(folder).keys() == {f"after.layers.0.linear.{k}" for k in ("weight", "bias")}


def test_texts_that_are_padded_on_the_left(tmp_path: Path) -> None:
    folder = sentence_folder(tmp_path / "teacher", **WITHOUT)
    states, length = torch.randn(1, 6, WIDTH), 5
    after = load(folder).after
    left = torch.cat([torch.zeros(1, 3, WIDTH), states[:, :length]], 1)
    right = torch.cat([states[:, :length], torch.zeros(1, 3, WIDTH)], 1)
    masks = [torch.tensor([[*[0] * 3, *[1] * length]]), torch.tensor([[*[1] * length, *[0] * 3]])]
    torch.testing.assert_close(after(left, masks[0]), after(right, masks[1]))


def hub_cache(root: Path, folder: Path) -> Path:
    """The folder in the layout of the hub's cache, as ``me/model``."""
    model, commit = root / "models--me--model", "a" * 40
    shutil.copytree(folder, model / "snapshots" / commit)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    return model


def test_a_model_of_the_hub_has_its_modules(tmp_path: Path) -> None:
    name = "cls-dense-normalize-with-prompt"
    folder = sentence_folder(tmp_path / "teacher", **PROMPTED[name])
    cached = hub_cache(tmp_path / "hub", folder)
    code = (
        "import sys, json, torch; sys.path.insert(0, sys.argv[1]); from models.test_sentence_modules import *\n"
        "print('RESULT' + json.dumps(embed(build(ModelSpec('hf:me/model', task='embedding')), 'me/model').tolist()))"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parents[1])]
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert found, done.stderr[-2000:]
    expected = torch.tensor(json.loads(EXPECTED.read_text())[name])
    torch.testing.assert_close(torch.tensor(json.loads(found[0][6:])), expected, atol=1e-6, rtol=1e-5)
    (cached / "snapshots" / ("a" * 40) / "modules.json").unlink()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "its modules.json, which names its pooling, is not in the local cache" in done.stderr, "not a mean"


@pytest.mark.parametrize(("kept", "expected"), [(32, 32), (10**30, None)])
def test_the_limit_of_texts_is_read_from_the_tokenizer_too(kept: int, expected: int | None, tmp_path: Path) -> None:
    folder = sentence_folder(tmp_path / "teacher", **FOLDERS["cls"])
    (folder / "sentence_bert_config.json").write_text(json.dumps({"transformer_task": "feature-extraction"}))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": kept}))
    assert load(folder).after.max_length == expected


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("modules.json", [{"type": "x.Transformer", "path": ""}, {"type": "x.Words", "path": "1"}], "Words"),
        ("1_Pooling/config.json", {"pooling_mode": "median"}, "median"),
        ("config_sentence_transformers.json", {"prompts": {}, "default_prompt_name": "p"}, "no prompt 'p'"),
        ("sentence_bert_config.json", {"max_seq_length": 32, "do_lower_case": True}, "do_lower_case"),
        ("2_Dense/config.json", SIZES | {"use_residual": True}, "use_residual"),
        ("2_Dense/config.json", SIZES | {"activation_function": "own.Act"}, "own.Act"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused(file: str, content: Any, says: str, tmp_path: Path) -> None:
    folder = sentence_folder(tmp_path / "teacher", **FOLDERS["cls-dense-normalize"])
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(ModelError, match=says):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "kind", "says"),
    [
        ({"data": {"max_length": 64}}, ConfigError, r"data\.max_length: texts of 64 tokens.* reads 32"),
        ({"student": {"width": 16}}, CapabilityError, "dense layer for 32 numbers"),
    ],
)
def test_a_recipe_that_does_not_fit_the_modules(
    changes: dict[str, Any], kind: type[TutelageError], says: str, tmp_path: Path
) -> None:
    folder = sentence_folder(tmp_path / "teacher", **FOLDERS["cls-dense-normalize"])
    base = recipe(folder, **changes.get("student", {}))
    if "data" in changes:
        base = base.model_copy(update={"data": base.data.model_copy(update=changes["data"])})
    with pytest.raises(kind, match=says):
        api.run(base, out=tmp_path / "out", terminal=Terminal(speaks=False))


@pytest.mark.slow
def test_with_sentence_transformers(tmp_path: Path) -> None:
    """Install it: pip install --no-deps --target FOLDER sentence-transformers==6.2.0, and set PEERS=FOLDER."""
    peers = os.environ.get("PEERS", "")
    if not (Path(peers) / "sentence_transformers").is_dir():
        pytest.skip("pip install --no-deps --target FOLDER sentence-transformers==6.2.0; PEERS=FOLDER")
    folders = {name: sentence_folder(tmp_path / name, **options) for name, options in EVERY.items()}
    for name in EVERY:
        load(folders[name]).save_pretrained(tmp_path / f"saved-{name}")
        load_tokenizer(f"hf:{folders[name]}").save_pretrained(tmp_path / f"saved-{name}")
    everything = {**folders, **{f"saved-{name}": tmp_path / f"saved-{name}" for name in EVERY}}
    command = [
        sys.executable,
        "-c",
        THEIRS,
        json.dumps({k: str(v) for k, v in everything.items()}),
        json.dumps(TEXTS),
    ]
    environment = {**os.environ, "PYTHONPATH": peers, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert lines, done.stderr[-3000:]
    theirs = json.loads(lines[0].removeprefix("RESULT"))
    if os.environ.get("WRITE_EXPECTED"):
        EXPECTED.write_text(json.dumps({name: theirs[name] for name in EVERY}) + "\n")
    expected = json.loads(EXPECTED.read_text())
    for name, folder in folders.items():
        ours = embed(load(folder), folder)
        for values in (theirs[name], theirs[f"saved-{name}"], expected[name]):
            torch.testing.assert_close(ours, torch.tensor(values), atol=1e-6, rtol=1e-5)
