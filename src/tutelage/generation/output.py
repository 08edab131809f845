"""The files of a generation: conversations that `datasets` loads, the rejected ones, and a data card.

All are a function of recipe and journal: a run that was interrupted and continued leaves the same bytes as another.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from jinja2 import Environment, StrictUndefined

from tutelage.config import Generations
from tutelage.files import atomic_folder, write_text
from tutelage.generation.answers import Conversation, RejectedConversation
from tutelage.generation.diversity import diversity, most_frequent

SCHEMA = pa.schema([
    ("id", pa.string()),
    ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
    ("source", pa.string()),
    ("keys", pa.list_(pa.string())),
    ("finish", pa.list_(pa.string())),
    ("score", pa.float64()),
    ("model", pa.string()),
    ("templates", pa.string()),
])  # fmt: skip
"""A conversation, what it was made from, and the keys of its answers in the journal."""

SIZES = (10**3, 10**4, 10**5, 10**6, 10**7)
SIZE_CATEGORIES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "n>10M")


def render(template: str, **values: Any) -> str:
    """The text of a template of this package with these values."""
    text = resources.files(__package__).joinpath("page_templates", template).read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    environment.filters["quote"] = _quote
    environment.filters["percent"] = lambda share, digits: f"{share:.{digits}%}"
    return environment.from_string(text).render(values)


def _quote(text: str) -> str:
    """A text on one line, with special characters of Markdown and HTML escaped."""
    return re.sub(r"([\\`*_\[\]<>#|])", r"\\\1", " ".join(text.split())[:600])


def write_output(
    path: Path, name: str, settings: Generations, version: str, accepted: Sequence[Conversation],
    rejected: Sequence[RejectedConversation],
) -> dict[str, Any]:  # fmt: skip
    """Write the data, the rejected conversations and the card; returns their figures for ``summary.json``.

    ``version`` is the hash of the recipe's templates.
    """
    splits = split_conversations(accepted, settings.held_out)
    with atomic_folder(path / "data") as folder:
        for split, items in splits.items():
            rows = [
                {
                    "id": item.name, "messages": [dict(message) for message in item.messages], "source": item.source,
                    "keys": item.keys, "finish": item.finishes, "score": item.score,
                    "model": settings.endpoint.model, "templates": version,
                }
                for item in items
            ]  # fmt: skip
            file = folder / f"{split}.{settings.format}"
            if settings.format == "parquet":
                pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), file, compression="zstd")
            else:
                file.write_text(_json_lines(rows), encoding="utf-8")
    lines = [
        {"id": r.name, "reason": r.reason, "detail": r.detail, "messages": list(r.messages), "keys": list(r.keys)}
        for r in rejected
    ]
    write_text(path / "rejected.jsonl", _json_lines(lines))
    counts = Counter(r.reason for r in rejected)
    figures = {
        "kept": len(accepted),
        "splits": {split: len(items) for split, items in splits.items()},
        "rejected": dict(most_frequent(counts)),
        "diversity": diversity({i.prompt: i.instruction for i in accepted}.values()),
    }
    write_text(path / "README.md", data_card(name, settings, version, figures))
    return figures


def _json_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def split_conversations(items: Sequence[Conversation], held_out: int) -> dict[str, list[Conversation]]:
    """``train``, and with ``held_out`` prompts also ``test``: those whose instructions have the smallest hashes.

    So additional conversations change few of the test prompts. All answers to a prompt are in one split.
    """
    if not held_out:
        return {"train": list(items)}
    ranks = {item.prompt: hashlib.sha256(item.instruction.encode()).digest() for item in items}
    test = set(sorted(ranks, key=lambda prompt: (ranks[prompt], prompt))[:held_out])
    return {
        "train": [item for item in items if item.prompt not in test],
        "test": [item for item in items if item.prompt in test],
    }


def data_card(name: str, settings: Generations, version: str, figures: Mapping[str, Any]) -> str:
    """The data card: a header that `datasets` reads, and a description of the data.

    It contains what determines the data. The server's address and the cost do not, so they are left out.
    """
    files = [{"split": split, "path": f"data/{split}.{settings.format}"} for split in figures["splits"]]
    header = {
        "configs": [{"config_name": "default", "data_files": files}],
        **({"language": [settings.quality.language]} if settings.quality.language else {}),
        "pretty_name": name,
        "size_categories": [SIZE_CATEGORIES[sum(figures["kept"] >= size for size in SIZES)]],
        "tags": ["synthetic", "distillation"],
        "task_categories": ["text-generation"],
    }
    recipe = settings.model_dump(mode="json", exclude_none=True, exclude={"endpoint", "budget", "format"})
    return render(
        "card.md.jinja", name=name, settings=settings, version=version, accepted=figures["kept"],
        rejected=figures["rejected"], diversity=figures["diversity"],
        header=yaml.safe_dump(header, sort_keys=False, allow_unicode=True).strip(),
        recipe=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=118).rstrip(),
    )  # fmt: skip
