"""A folder of sentence-transformers gives the embeddings that sentence-transformers gives, and so does an export."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from support.sentence_folders import FOLDERS, OUT, TEXTS, WIDTH, sentence_folder
from support.text_worlds import sentences, table
from tutelage import api
from tutelage.config import build_recipe
from tutelage.errors import CapabilityError, ConfigError, ModelError, TutelageError
from tutelage.experiment.measure import fingerprint
from tutelage.models import ModelSpec, build, load_model, load_tokenizer
from tutelage.progress import Terminal

pytest.importorskip("transformers")

EXPECTED = Path(__file__).with_name("sentence_embeddings.json")
"""Embeddings of sentence-transformers 6.2.0 for the folders and the texts; a slow test computes them again."""

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
    inputs = load_tokenizer(f"hf:{folder}")(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        result: torch.Tensor = model.eval()(inputs["input_ids"], inputs["attention_mask"])
    return result


def load(folder: Path) -> Any:
    return build(ModelSpec(f"hf:{folder}", task="embedding"))


def recipe(folder: Path, **student: Any) -> Any:
    table(folder.parent / "d.jsonl", sentences(60))
    return build_recipe({
        "name": "t",
        "data": {"source": "table", "path": str(folder.parent / "d.jsonl"), "task": "embedding", "max_length": 32},
        "teacher": {"model": f"hf:{folder}"}, "student": {"model": "teacher", "layers": 1, **student},
        "method": "embedding", "train": {"epochs": 1, "batch_size": 32}, "baseline": False,
    })  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_gives_its_own_embeddings(name: str, tmp_path: Path) -> None:
    folder = sentence_folder(tmp_path / name, **FOLDERS[name])
    expected = torch.tensor(json.loads(EXPECTED.read_text())[name])
    torch.testing.assert_close(embed(load(folder), folder), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_saved_model_is_read_again_as_it_was(name: str, tmp_path: Path) -> None:
    folder = sentence_folder(tmp_path / name, **FOLDERS[name])
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
        ("config_sentence_transformers.json", {"prompts": {"q": "query: "}, "default_prompt_name": "q"}, "query: "),
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
    folders = {name: sentence_folder(tmp_path / name, **options) for name, options in FOLDERS.items()}
    for name in FOLDERS:
        load(folders[name]).save_pretrained(tmp_path / f"saved-{name}")
        load_tokenizer(f"hf:{folders[name]}").save_pretrained(tmp_path / f"saved-{name}")
    everything = {**folders, **{f"saved-{name}": tmp_path / f"saved-{name}" for name in FOLDERS}}
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
        EXPECTED.write_text(json.dumps({name: theirs[name] for name in FOLDERS}) + "\n")
    expected = json.loads(EXPECTED.read_text())
    for name, folder in folders.items():
        ours = embed(load(folder), folder)
        for values in (theirs[name], theirs[f"saved-{name}"], expected[name]):
            torch.testing.assert_close(ours, torch.tensor(values), atol=1e-6, rtol=1e-5)
