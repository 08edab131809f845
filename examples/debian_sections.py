"""A data set that any Debian or Ubuntu system holds: descriptions of its packages, and the section of each.

    python examples/debian_sections.py data          # data/debian-sections-train.parquet and ...-validation.parquet

Long descriptions are there where apt has its translations (``apt-get update`` fetches them but on bare images).
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

LEAST, MOST = 350, 20
"""Descriptions that a section has at least, and how many sections are kept."""


def described(listing: str) -> Iterator[tuple[str, str, str]]:
    """Package, section and description of every entry of ``apt-cache dumpavail``."""
    for entry in listing.split("\n\n"):
        fields: dict[str, str] = {}
        key = ""
        for line in entry.splitlines():
            if line.startswith(" "):
                fields[key] += "\n" + line.strip()
            else:
                key, _, value = line.partition(": ")
                fields[key] = value
        text = fields.get("Description-en") or fields.get("Description") or ""
        words = " ".join(line for line in text.split("\n") if line != ".").split()
        if "Package" in fields and words:
            yield fields["Package"], fields.get("Section", "").rpartition("/")[2], " ".join(words)


def main(folder: str = "data") -> None:
    """Write both files."""
    listing = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout
    seen: set[str] = set()
    rows = []
    for package, section, text in described(listing):
        if text not in seen and not package.endswith(("-dbg", "-dbgsym", "-doc", "-dev")):
            seen.add(text)
            rows.append((package, section, text))
    common = {name for name, count in Counter(s for _, s, _ in rows).most_common(MOST) if count >= LEAST}
    rows = sorted(row for row in rows if row[1] in common)
    held = [int(hashlib.sha256(package.encode()).hexdigest(), 16) % 9 == 0 for package, _, _ in rows]
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, wanted in (("train", False), ("validation", True)):
        kept = [row for row, out in zip(rows, held, strict=True) if out == wanted]
        columns = dict(zip(("package", "label", "text"), map(list, zip(*kept, strict=True)), strict=True))
        path = Path(folder) / f"debian-sections-{name}.parquet"
        parquet.write_table(pa.table(columns), path)
        print(f"{path}: {len(kept):,} descriptions of {len(common)} sections")


if __name__ == "__main__":
    main(*sys.argv[1:])
