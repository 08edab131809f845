"""The files of a generation: conversations that `datasets` loads, what was rejected, and a card that describes both.

All are a function of recipe and journal: an interrupted run leaves the same bytes as one that was not.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from tutelage.config import Generations
from tutelage.files import atomic_folder, write_text
from tutelage.generation.conversations import Conversation, RejectedConversation
from tutelage.generation.diversity import diversity

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
"""A conversation, what it was made from, and the journal's keys of the answers in it."""


def rows(items: Sequence[Conversation], settings: Generations, version: str) -> list[dict[str, Any]]:
    """Items as they are written."""
    return [
        {
            "id": item.name,
            "messages": [{"role": m["role"], "content": m["content"]} for m in item.messages],
            "source": item.source,
            "keys": item.keys,
            "finish": item.finishes,
            "score": item.score,
            "model": settings.endpoint.model,
            "templates": version,
        }
        for item in items
    ]


def _parquet(found: list[dict[str, Any]], path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(found, schema=SCHEMA), path, compression="zstd")


def _jsonl(found: list[dict[str, Any]], path: Path) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found), encoding="utf-8")


WRITERS = {"jsonl": _jsonl, "parquet": _parquet}


def write(
    path: Path,
    name: str,
    settings: Generations,
    version: str,
    kept: Sequence[Conversation],
    rejected: Sequence[RejectedConversation],
) -> dict[str, Any]:
    """Write data, rejected items and card; gives what the card counts.

    Args:
        path: the folder.
        name: of the recipe.
        settings: the recipe's section.
        version: the hash of its templates.
        kept: in order.
        rejected: in order.

    Raises:
        RunDirectoryError: the disk refuses.
    """
    splits = divided(kept, settings.held_out)
    with atomic_folder(path / "data") as folder:
        for split, items in splits.items():
            WRITERS[settings.format](rows(items, settings, version), folder / f"{split}.{settings.format}")
    lines = [
        json.dumps(
            {
                "id": r.name,
                "reason": r.reason,
                "detail": r.detail,
                "messages": list(r.messages),
                "keys": list(r.keys),
            },
            ensure_ascii=False,
        )
        for r in rejected
    ]
    write_text(path / "rejected.jsonl", "".join(line + "\n" for line in lines))
    counts = dict(sorted(Counter(r.reason for r in rejected).items(), key=lambda pair: (-pair[1], pair[0])))
    found = {
        "kept": len(kept),
        "splits": {split: len(items) for split, items in splits.items()},
        "rejected": counts,
        "diversity": diversity({i.prompt: i.instruction for i in kept}.values()),
    }
    write_text(path / "README.md", card(name, settings, version, found))
    return found


def divided(kept: Sequence[Conversation], held_out: int) -> dict[str, list[Conversation]]:
    """``train``, and with ``held_out`` prompts also ``test``: those whose words have the smallest hashes.

    More conversations then move few of them, and all answers to a prompt are on one side.
    """
    if not held_out:
        return {"train": list(kept)}
    ranks = {item.prompt: hashlib.sha256(item.instruction.encode()).digest() for item in kept}
    away = set(sorted(ranks, key=lambda prompt: (ranks[prompt], prompt))[:held_out])
    return {
        "train": [item for item in kept if item.prompt not in away],
        "test": [item for item in kept if item.prompt in away],
    }


SIZES = (10**3, 10**4, 10**5, 10**6, 10**7)
SIZE_WORDS = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "n>10M")


def card(name: str, settings: Generations, version: str, found: dict[str, Any]) -> str:
    """The data card: a header that `datasets` reads, and what a person wants to know."""
    kept = found["kept"]
    header = {
        "configs": [
            {
                "config_name": "default",
                "data_files": [
                    {"split": split, "path": f"data/{split}.{settings.format}"} for split in found["splits"]
                ],
            }
        ],
        **({"language": [settings.quality.language]} if settings.quality.language else {}),
        "pretty_name": name,
        "size_categories": [SIZE_WORDS[sum(kept >= size for size in SIZES)]],
        "tags": ["synthetic", "distillation"],
        "task_categories": ["text-generation"],
    }
    made = yaml.safe_dump(
        settings.model_dump(mode="json", exclude_none=True, include=_described(settings)), sort_keys=False,
        allow_unicode=True, width=118,
    )  # fmt: skip
    varied = found["diversity"]
    lines = [
        "---", yaml.safe_dump(header, sort_keys=False, allow_unicode=True).strip(), "---", "", f"# {name}", "",
        f"{kept:,} conversations by the model {settings.endpoint.model}, made by `tutelage generate` "
        f"(kind: {settings.kind}). Whoever uses them is bound by the terms of that model.", "",
        "Each row has `messages`, its `source`, the `keys` of its answers in `journal.jsonl`, and why each answer "
        f"ended. Templates are of version {version}. What was not kept is in `rejected.jsonl`.", "",
        "| not kept, because | conversations |", "| --- | ---: |",
        *(f"| {reason} | {count:,} |" for reason, count in found["rejected"].items()),
        *(["| – | 0 |"] if not found["rejected"] else []), "",
        "## What the instructions ask for", "",
        f"{varied['with_verb']:,} of {varied['instructions']:,} instructions have a verb of the list: "
        f"{varied['verbs']:,} different verbs, {varied['pairs']:,} pairs of verb and noun, "
        f"{varied['bits']:.2f} bits.", "",
        "| verb | instructions | with |", "| --- | ---: | --- |",
        *(f"| {one['verb']} | {one['count']:,} | {', '.join(f'{n} ({c})' for n, c in one['nouns'].items())} |"
          for one in varied["top"]), "",
        "## How it was made", "", "```yaml", made.rstrip(), "```", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _described(settings: Generations) -> set[str]:
    """What of the recipe says how the data came about: not where the server is, nor what was paid."""
    return set(type(settings).model_fields) - {"endpoint", "budget", "format"}
