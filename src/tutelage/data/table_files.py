"""Files of tables: CSV, JSON lines, Parquet, CoNLL, and data sets that were saved by ``datasets``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tutelage.errors import DataError, did_you_mean, first_line, require, shorten

CONLL = (".conll", ".conllu", ".bio", ".iob", ".iob2")
"""Suffixes of files with a word and its tags in each line."""

TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", *CONLL)
"""Suffixes of table files."""

DELIMITERS = (",", ";", "\t", "|")
"""What may separate the columns of a CSV file; of two that are as frequent in its first line the first is taken."""

CONLLU = ("words", "lemmas", "upos", "xpos", "features", "heads", "relations", "dependencies", "misc")
"""Columns of a CoNLL-U file after the number of the word."""

SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"
"""Files of a saved data set of ``datasets``, and of one with several splits."""


def read_table(path: Path, texts: Sequence[str] = ()) -> Any:
    """Read a table (a file with a suffix of :data:`TABLES`, or a data set saved by ``datasets``) as an Arrow table.

    Texts that look like dates stay texts, and so do numbers with leading zeros and all cells of ``texts`` in CSV. The
    columns of CSV may be separated by commas, semicolons, tabs or bars; the first line tells. Classes of a saved data
    set are read by their names. For CoNLL files see :func:`_conll`.

    Raises:
        DataError: the file is missing, broken, or has another suffix.
    """
    import pyarrow as pa
    from pyarrow import compute, csv, json, parquet

    if is_saved_dataset(path):
        return _saved_dataset(path)
    if not path.is_file():
        raise DataError("no such file", where=str(path), remedy=did_you_mean(path, "check data.path"))
    if path.suffix not in TABLES:
        ending = f"the suffix {path.suffix}" if path.suffix else "no suffix"
        raise DataError(
            f"has {ending}, so its format is unknown", where=str(path), remedy=f"use one of {', '.join(TABLES)}"
        )
    # A block must fit the longest line; the default is 1 MiB, the maximum 2 GiB.
    block = min(max(path.stat().st_size + 1, 2**20), 2**31 - 1)
    try:
        if path.suffix in CONLL:
            return _conll(path)
        if path.suffix == ".parquet":
            return parquet.read_table(path)
        if path.suffix in (".json", ".jsonl"):
            options = json.ReadOptions(block_size=block)
            table = json.read_json(path, read_options=options)
            schema = pa.schema([(field.name, _times_as_texts(field.type)) for field in table.schema])
            if schema.equals(table.schema):
                return table
            return json.read_json(path, read_options=options, parse_options=json.ParseOptions(explicit_schema=schema))
        delimiter = "\t" if path.suffix == ".tsv" else _delimiter(path)
        parse = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)  # a quoted text may have line breaks

        def read(**convert: Any) -> Any:
            return csv.read_csv(path, csv.ReadOptions(block_size=block), parse, csv.ConvertOptions(**convert))

        table = read(column_types=dict.fromkeys(texts, pa.string()))
        doubtful = [f.name for f in table.schema if pa.types.is_temporal(f.type) or pa.types.is_integer(f.type)]
        if doubtful:
            cells = read(column_types=dict.fromkeys(doubtful, pa.string()), include_columns=doubtful)
            for name in doubtful:
                zeros = compute.any(compute.match_substring_regex(cells[name], r"^\s*[+-]?0\d")).as_py()
                if zeros or pa.types.is_temporal(table[name].type):
                    table = table.set_column(table.column_names.index(name), name, cells[name])
        return table
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot be read as {path.suffix[1:]}: {first_line(error)}",
            where=str(path),
            remedy="repair the file, or download it again",
        ) from None


def _times_as_texts(kind: Any) -> Any:
    """An Arrow type with texts in place of dates and times, nested ones included."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _times_as_texts(field.type)) for field in kind])
    if pa.types.is_list(kind):
        return pa.list_(_times_as_texts(kind.value_type))
    return pa.string() if pa.types.is_temporal(kind) else kind


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder was written by ``Dataset.save_to_disk``."""
    return (path / SAVED).is_file()


def table_parts(path: Path) -> list[Path]:
    """The files of a table."""
    return sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]


def _saved_dataset(path: Path) -> Any:
    require("datasets", "text", f"the data set {path}")
    import datasets

    try:
        loaded: Any = datasets.load_from_disk(str(path))
    except Exception as error:  # noqa: BLE001 - the library raises what its readers raise
        raise DataError(
            f"cannot be read as a saved data set: {first_line(error)}", where=str(path), remedy="save it again"
        ) from None
    table = loaded.with_format("arrow")[:]
    for name, feature in loaded.features.items():
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, datasets.ClassLabel):
            named = [_named(value, inner.names) for value in table[name].to_pylist()]
            import pyarrow as pa

            table = table.set_column(table.column_names.index(name), name, pa.array(named))
    return table


def _named(value: Any, names: Sequence[str]) -> Any:
    if isinstance(value, list):
        return [_named(one, names) for one in value]
    return None if value is None or value < 0 else names[value]


def _delimiter(path: Path) -> str:
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        first = file.readline()
    outside = "".join(first.split('"')[::2])  # names in quotes may contain any of them
    return max(DELIMITERS, key=outside.count)


def _conll(path: Path) -> Any:
    """A row for each sentence: ``words``, ``tags`` (the last column), and columns between them as ``column_2`` ...

    Sentences are separated by empty lines, columns by tabs or spaces. Lines of ``-DOCSTART-`` are left out. A CoNLL-U
    file (with ``.conllu``, comments and ranges of words left out) has the columns :data:`CONLLU`.

    Raises:
        DataError: a line has another number of columns than the lines before.
    """
    import pyarrow as pa

    universal = path.suffix == ".conllu"
    sentences: list[list[list[str]]] = [[]]
    width = 0
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            line = line.rstrip("\r\n")
            cells = line.split("\t") if "\t" in line else line.split()
            if not line.strip() or cells[0] == "-DOCSTART-":
                sentences.append([])
                continue
            if universal and (line.startswith("#") or not cells[0].isdigit()):
                continue
            width = width or len(cells)
            if len(cells) != width or width < 2 or (universal and width != len(CONLLU) + 1):
                expected = len(CONLLU) + 1 if universal else max(width, 2)
                raise DataError(
                    f"{shorten(line)} has {len(cells)} columns, not {expected}",
                    where=f"{path}:{number}",
                    remedy="give each word and its tags in one line, separated by tabs or spaces",
                )
            sentences[-1].append(cells[1:] if universal else cells)
    names = CONLLU if universal else ("words", *(f"column_{i}" for i in range(2, width)), "tags")
    rows = [list(zip(*sentence, strict=True)) for sentence in sentences if sentence]
    columns = {name: [list(row[i]) for row in rows] for i, name in enumerate(names)}
    return pa.table({name: pa.array(values, pa.list_(pa.string())) for name, values in columns.items()})
