"""Tables of every kind are read as the rows that they hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.text_worlds import sentences, tokenizer
from tutelage.data import load_texts
from tutelage.data.table_files import read_table
from tutelage.errors import DataError
from tutelage.init.detect_data import describe_data

datasets = pytest.importorskip("datasets")
CONLL = """-DOCSTART- -X- O O

EU NNP I-NP B-ORG
rejects VBZ I-VP O

"Peter" NNP I-NP B-PER
"""
CONLLU = """# text = They buy it.
1-2\tThey'd\t_\t_\t_\t_\t_\t_\t_\t_
1\tThey\tthey\tPRON\tPRP\t_\t2\tnsubj\t_\t_
2\tbuy\tbuy\tVERB\tVBP\t_\t0\troot\t_\t_

1\tNow\tnow\tADV\tRB\t_\t0\troot\t_\t_
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("delimiter", "name"), [(",", "d.csv"), (";", "d.csv"), ("\t", "d.csv"), ("|", "d.csv"), ("\t", "d.tsv")]
)
def test_the_first_line_tells_what_separates_columns(delimiter: str, name: str) -> None:
    Path(name).write_text(f'text{delimiter}"a, b; c"{delimiter}label\nyes, no; "x"{delimiter}1{delimiter}red\n')
    if delimiter == ",":
        Path(name).write_text('text,"a, b; c",label\n"yes, no; ""x""",1,red\n')
    if delimiter == ";":
        Path(name).write_text('text;"a, b; c";label\n"yes, no; ""x""";1;red\n')
    assert read_table(Path(name)).to_pylist() == [{"text": 'yes, no; "x"', "a, b; c": 1, "label": "red"}]


def test_conll_files_have_a_row_for_each_sentence() -> None:
    Path("d.conll").write_text(CONLL)
    first, second = read_table(Path("d.conll")).to_pylist()
    assert first == {
        "words": ["EU", "rejects"], "column_2": ["NNP", "VBZ"], "column_3": ["I-NP", "I-VP"], "tags": ["B-ORG", "O"],
    }  # fmt: skip
    assert second["words"] == ['"Peter"']
    Path("d.conllu").write_text(CONLLU)
    rows = read_table(Path("d.conllu")).to_pylist()
    assert [row["words"] for row in rows] == [["They", "buy"], ["Now"]]
    assert [row["upos"] for row in rows] == [["PRON", "VERB"], ["ADV"]]
    Path("d.iob").write_text("EU B-ORG\nrejects\n")
    with pytest.raises(DataError, match=r"d\.iob:2.*has 1 columns, not 2"):
        read_table(Path("d.iob"))


def test_init_finds_words_and_tags_of_conll_files() -> None:
    Path("d.conll").write_text(CONLL * 20)
    found = describe_data("d.conll")
    assert (found.task, found.text, found.label, found.rows) == ("tokens", "words", "tags", 40)


def test_a_saved_data_set_is_read_with_the_names_of_its_classes() -> None:
    rows = sentences(60)
    names = ["math", "net", "sound"]
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    columns = {"text": [r["text"] for r in rows], "label": [names.index(r["label"]) for r in rows]}
    whole = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict({"train": whole.select(range(40)), "test": whole.select(range(40, 60))}).save_to_disk(
        "saved"
    )
    found = describe_data("saved")
    assert (found.task, found.label, found.rows) == ("classes", "label", 60)
    assert found.path == {"train": str(Path("saved/train")), "test": str(Path("saved/test"))}
    data = load_texts("table", tokenizer=tokenizer(), path=found.path, label="label")
    assert data.classes == names
    assert len(data.test) == 20
    whole.save_to_disk("one")
    assert describe_data("one").classes == dict.fromkeys(names, 20)
    assert (
        load_texts("table", tokenizer=tokenizer(), path="one", label="label").settings["content"]
        != data.settings["content"]
    )
