"""Print a constraints file that pins every dependency in pyproject.toml to the oldest version that it allows.

python .ci/oldest.py > oldest.txt; `make test-oldest` installs by it and runs tests.
"""

import re
import sys
import tomllib
from pathlib import Path

KEPT = ("dev", "docs")
"""Extras of whoever develops: their newest versions will do."""


def pins(pyproject: Path) -> dict[str, str]:
    """The oldest version of each package, by name; of several the highest, for all of them must fit."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(d for extra, ds in extras.items() if extra not in KEPT for d in ds)]
    found: dict[str, str] = {}
    for requirement in wanted:
        match = re.match(r"([A-Za-z0-9._-]+)>=([0-9.]+)", requirement)
        if match and tuple(map(int, match[2].split("."))) > tuple(map(int, found.get(match[1], "0").split("."))):
            found[match[1]] = match[2]
    return found


if __name__ == "__main__":
    for name, version in sorted(pins(Path(__file__).parents[1] / "pyproject.toml").items()):
        sys.stdout.write(f"{name}=={version}\n")
