"""A harder set of real pictures, from packages: emoji as eight sets draw them, 64x64 in colour, 30 kinds of thing.

    python benchmarks/pictures.py --out runs/pictures-data        # half a minute
    tutelage run benchmarks/pictures.yaml --out runs/pictures

``npm`` fetches eight sets of drawings (27 MB, not installed: only the archives are read) and the names and groups of
Unicode's emoji; ``pip`` fetches the renderer into ``OUT/.packages``, so that your environment stays as it is. Pillow
must be there (``tutelage[vision]``). Versions are pinned and archives compared with their SHA-256; a second run needs
no network. ``OUT/{train,val,test}/CLASS/CODE.SET.png`` is written anew each time, the same to the pixel, and said not
to be where a renderer's build on another processor differs.

6,694 images to train, 1,232 for validation, 2,040 to test, on plain grey. The 30 classes are Unicode's subgroups,
some joined and some left out: from 66 training images (bugs) to 431 (people in a role); the most frequent class has
6.4 % of the test. Skin tones are left out, and of the flags all but a hundred.

What is hard: a class is a kind of thing, and the emoji of the test are in no training image, whoever drew them; the
nearest training image, both shrunk to 16x16, has the right class for 36 % of the test. The split keeps together:

- all sets' drawings of an emoji;
- emoji that vary one subject: man, woman and person doing the same; the cat and its face; facing right;
- those that look nearly alike in any one set (full moon and yellow circle; France and Clipperton Island).

Relatives remain on both sides where they look less alike than that: digits on the same key, boy and girl, the snowman
with snow and without. Of the test images 38 are nearer than 12 of 255 (root mean square, at 16x16) to a training
image, two nearer than 8. Left out are 14 drawings that look the same as one of another class.

Licences, of the drawings and so of the images: Noto (two generations) Apache-2.0; Twemoji CC BY 4.0; OpenMoji CC
BY-SA 4.0; EmojiOne (as EmojiTwo) CC BY 4.0; EmojiOne 1 CC BY-SA 4.0; Fluent and Fluent flat MIT. Names and groups:
emojibase, MIT. The images are no part of this project and are not to be added to it; pass them on as these licences
say.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

SIZE = 64
BACKGROUND = (128, 128, 128)
SHARES = {"val": 0.12, "test": 0.2}
NEAR, SAME = 8.0, 2.0
"""Root mean square difference, of 255, of two drawings shrunk to 16x16: nearer than NEAR stay together in the split;
nearer than SAME with different classes are left out, as nobody could tell which it is."""
MOST = 100
"""Themes of one class that are used; only the flags have more."""
EXPECTED = "4a187c6c9bcdb79709dac6bf8d8ea39d074bb03ed6b99ced50e0f8bea677679e"
"""SHA-256 of the paths and pixels of what is written."""

NAMES = ("emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a")
RENDERER = "resvg-py==0.5.0"
SETS = {
    "noto": ("1.2.9", "Apache-2.0", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    "noto-v1": ("1.2.5", "Apache-2.0", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"),
    "twemoji": ("1.2.5", "CC-BY-4.0", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"),
    "openmoji": ("1.2.29", "CC-BY-SA-4.0", "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5"),
    "emojione": ("1.2.3", "CC-BY-4.0", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"),
    "emojione-v1": ("1.2.3", "CC-BY-SA-4.0", "6641d59d48a42823fdc2b84e7427e9f302944eb98d2c7d94d6e67c139e7b37b3"),
    "fluent-emoji": ("1.2.7", "MIT", "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b"),
    "fluent-emoji-flat": ("1.2.6", "MIT", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"),
}
"""Drawings: version, licence and SHA-256 of the npm package ``@iconify-json/NAME``."""

CLASSES = {
    "animal-bug": ["animal-bug"],
    "animal-land": ["animal-mammal", "animal-reptile", "animal-amphibian", "cat-face", "monkey-face"],
    "animal-bird": ["animal-bird"],
    "animal-water": ["animal-marine"],
    "arrow": ["arrow", "av-symbol"],
    "book-paper": ["book-paper", "mail", "writing", "office"],
    "building": ["place-building", "place-religious"],
    "clothing": ["clothing"],
    "drink-dish": ["drink", "dishware"],
    "electronics": ["phone", "computer", "light-video"],
    "event-award": ["event", "award-medal"],
    "face-calm": ["face-smiling", "face-affection", "face-tongue", "face-hat", "face-glasses"],
    "face-upset": ["face-concerned", "face-negative", "face-unwell", "face-sleepy", "face-neutral-skeptical"],
    "flag": ["country-flag", "subdivision-flag"],
    "fruit-vegetable": ["food-fruit", "food-vegetable"],
    "hand": ["hand-fingers-open", "hand-fingers-partial", "hand-single-finger", "hand-fingers-closed", "hands"],
    "household": ["household"],
    "landscape-weather": ["place-geographic", "sky-weather"],
    "letter": ["alphanum", "keycap"],
    "meal": ["food-prepared", "food-asian", "food-sweet"],
    "music": ["musical-instrument", "music", "sound"],
    "people-activity": ["person-activity", "person-sport", "person-resting"],
    "people-face": ["person", "person-gesture"],
    "people-role": ["person-role", "person-fantasy"],
    "plant": ["plant-flower", "plant-other"],
    "shape": ["geometric", "heart"],
    "sign": ["warning", "transport-sign", "religion", "zodiac"],
    "sport-game": ["sport", "game"],
    "tool": ["tool", "science", "medical", "lock"],
    "vehicle": ["transport-ground", "transport-water", "transport-air"],
}


VARIANTS = {"man", "woman", "person", "men", "women", "people", "boy", "girl", "prince", "princess", "face"}


class Failed(Exception):
    """A step that could not be carried out, in words for the person at the terminal."""


def call(command: list[str], missing: str) -> None:
    """Run a command; its own words where it fails.

    Raises:
        Failed: no such command, or it ended with an error.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise Failed(missing) from None
    if done.returncode:
        raise Failed(f"`{' '.join(command)}` failed:\n{(done.stderr or done.stdout).strip()[-2000:]}")


def npm_package(name: str, version: str, sha256: str, cache: Path) -> Path:
    """The tarball of an npm package, fetched by ``npm pack`` unless it lies in the cache.

    Raises:
        Failed: npm is missing, it cannot fetch the package, or the file is not the expected one.
    """
    path = cache / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if not path.exists():
        print(f"npm pack {name}@{version}", flush=True)
        call(
            ["npm", "pack", "--silent", "--pack-destination", str(cache), f"{name}@{version}"],
            "npm is not installed, and the pictures are npm packages: install Node.js (Debian: apt-get install npm)",
        )
    if not path.exists():
        raise Failed(f"npm pack {name}@{version} wrote no {path}: this needs npm 7 or newer")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise Failed(f"{path} has SHA-256 {found}, expected {sha256}: remove it and try again")
    return path


def renderer(cache: Path) -> Any:
    """The module that turns SVG into pixels, from pip, into the cache and not into your environment.

    Raises:
        Failed: pip is missing or cannot install it, or Pillow is missing.
    """
    if importlib.util.find_spec("PIL") is None:
        raise Failed("Pillow is not installed: pip install 'tutelage[vision]'")
    folder = cache / RENDERER.replace("==", "-")
    if not (folder / "resvg_py").is_dir():
        if importlib.util.find_spec("pip") is None:
            raise Failed(f"this Python ({sys.executable}) has no pip: python -m ensurepip")
        print(f"pip install {RENDERER}", flush=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        call([*pip, "--target", str(folder), RENDERER], "")
    sys.path.insert(0, str(folder))
    return importlib.import_module("resvg_py")


def members(path: Path, *names: str) -> list[Any]:
    """JSON files of a tarball; None for what it does not have."""
    with tarfile.open(path) as tar:
        files = [tar.extractfile(f"package/{n}") if f"package/{n}" in tar.getnames() else None for n in names]
        return [json.load(f) if f else None for f in files]


def slug(text: str) -> str:
    """A name as the icon sets spell it."""
    text = text.lower().replace("&", "and").replace("’", "").replace("'", "")
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")


def bare(code: str) -> str:
    """Code points without presentation selectors."""
    return "-".join(c for c in code.lower().split("-") if c not in ("fe0f", "fe0e"))


def theme(label: str) -> str:
    """What several emoji have in common that show one thing in variants: a man, a woman and a person do it."""
    words = slug(label).replace("-facing-right", "").replace("merperson", "mermaid").replace("merman", "mermaid")
    rest = [w for w in words.split("-") if w not in VARIANTS]
    return "-".join(rest) or words


def subjects(path: Path) -> list[dict[str, str]]:
    """The emoji to use: code, name, class and theme of each; skin tones are left out."""
    data, groups = members(path, "en/data.json", "meta/groups.json")
    kind = {sub: name for name, subs in CLASSES.items() for sub in subs}
    used = {slug(name) for name in groups["subgroups"].values()} & set(kind)
    if set(kind) - used:
        raise Failed(f"{path} has no groups {sorted(set(kind) - used)}")
    found = []
    for emoji in sorted(data, key=lambda e: e.get("order", 0)):
        group = slug(groups["subgroups"].get(str(emoji.get("subgroup")), ""))
        if group in kind:
            code, label = emoji["hexcode"], emoji["label"]
            found.append({"code": bare(code), "name": label, "kind": kind[group], "theme": theme(label)})
    return found


def drawings(path: Path, names: dict[str, str]) -> dict[str, str]:
    """The SVG documents of a set, by code; ``names`` are the icons' names by code."""
    icons, chars = members(path, "icons.json", "chars.json")
    own = {bare(code): name for code, name in (chars or {}).items()}
    found = {}
    for code, name in names.items():
        icon, name = None, own.get(code, name)
        for _ in range(4):  # an alias may stand for an alias
            icon = icons["icons"].get(name) or icons.get("aliases", {}).get(name)
            if icon is None or "body" in icon or "parent" not in icon or set(icon) & {"hFlip", "vFlip", "rotate"}:
                break
            name = icon["parent"]
        if icon is None or "body" not in icon:
            continue
        width, height = (icon.get(k, icons.get(k, 16)) for k in ("width", "height"))
        side = max(width, height)
        left = icon.get("left", 0) - (side - width) / 2
        top = icon.get("top", 0) - (side - height) / 2
        found[code] = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{SIZE}" height="{SIZE}" viewBox="{left} {top} {side} {side}">{icon["body"]}</svg>'
        )
    return found


def paint(svg: str, resvg: Any) -> Any:
    """An SVG document on the plain background."""
    from PIL import Image

    drawn = Image.open(io.BytesIO(bytes(resvg.svg_to_bytes(svg_string=svg)))).convert("RGBA")
    image = Image.new("RGBA", (SIZE, SIZE), (*BACKGROUND, 255))
    image.alpha_composite(drawn)
    return image.convert("RGB")


def near_pairs(keys: list[tuple[str, str]], images: np.ndarray) -> list[tuple[int, int, float]]:
    """Pairs of drawings of one set that look nearly alike, with their distance."""
    small = images.reshape(len(images), 16, SIZE // 16, 16, SIZE // 16, 3).mean((2, 4)).reshape(len(images), -1)
    pairs = []
    for name in SETS:
        rows = np.array([i for i, key in enumerate(keys) if key[0] == name])
        for n, i in enumerate(rows[:-1]):
            distance = np.sqrt(((small[rows[n + 1 :]] - small[i]) ** 2).mean(1))
            pairs += [(int(i), int(rows[n + 1 + j]), float(distance[j])) for j in np.flatnonzero(distance < NEAR)]
    return pairs


def joined(names: Iterable[str], pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """For every name the first, in order, of those that it is connected with."""
    first = {n: n for n in names}

    def root(n: str) -> str:
        while first[n] != n:
            n = first[n]
        return n

    for a, b in pairs:
        low, high = sorted((root(a), root(b)))
        first[high] = low
    return {n: root(n) for n in first}


def order(text: str) -> str:
    """A shuffled order that is the same everywhere."""
    return hashlib.sha256(text.encode()).hexdigest()


def split_of(groups: dict[str, list[str]]) -> dict[str, str]:
    """The split of each group, given the classes of its images; a share of every class in each."""
    total = Counter(kind for kinds in groups.values() for kind in kinds)
    filled: dict[str, Counter[str]] = {split: Counter() for split in SHARES}
    result = {}
    for name in sorted(groups, key=order):
        kind, _ = Counter(groups[name]).most_common(1)[0]
        result[name] = "train"
        for split, share in SHARES.items():
            if filled[split][kind] + len(groups[name]) / 2 <= share * total[kind]:
                result[name] = split
                filled[split].update(groups[name])
                break
    return result


def build(out: Path) -> None:
    """Fetch, draw, check, split, write.

    Raises:
        Failed: see its message.
    """
    cache = out / ".packages"
    cache.mkdir(parents=True, exist_ok=True)
    resvg = renderer(cache)
    listed = subjects(npm_package(*NAMES, cache))
    kept: dict[str, set[str]] = defaultdict(set)
    for one in sorted(listed, key=lambda one: order(one["theme"])):
        if len(kept[one["kind"]]) < MOST:
            kept[one["kind"]].add(one["theme"])
    listed = [one for one in listed if one["theme"] in kept[one["kind"]]]
    by_code = {one["code"]: one for one in listed}

    keys, pixels = [], []
    for name, (version, licence, sha256) in SETS.items():
        found = drawings(
            npm_package(f"@iconify-json/{name}", version, sha256, cache),
            {one["code"]: slug(one["name"]) for one in listed},
        )
        print(f"{name} {version} ({licence}): {len(found)} drawings", flush=True)
        for code, svg in found.items():
            image = np.asarray(paint(svg, resvg))
            if image.std() < 1:
                raise Failed(f"{name}: the drawing of {by_code[code]['name']} is empty; is {RENDERER} whole?")
            keys.append((name, code))
            pixels.append(image)
    images = np.stack(pixels)

    themes, kinds = ([by_code[code][what] for _, code in keys] for what in ("theme", "kind"))
    pairs = near_pairs(keys, images)
    unclear = {i for a, b, d in pairs if d < SAME and kinds[a] != kinds[b] for i in (a, b)}
    group = joined(themes, ((themes[a], themes[b]) for a, b, _ in pairs))
    members_of: dict[str, list[str]] = defaultdict(list)
    for i, theme_ in enumerate(themes):
        if i not in unclear:
            members_of[group[theme_]].append(kinds[i])
    split = split_of(members_of)
    write(out, [(keys[i], by_code[keys[i][1]], split[group[themes[i]]], images[i]) for i in range(len(keys))
                if i not in unclear])  # fmt: skip
    print(
        f"left out: {len(unclear)} drawings that look the same in two classes; {len(members_of)} groups, the largest "
        f"of {max(map(len, members_of.values()))} images"
    )


def write(out: Path, rows: list[tuple[tuple[str, str], dict[str, str], str, np.ndarray]]) -> None:
    """The tree, in place of an older one, and what it holds."""
    from PIL import Image

    for split in ("train", *SHARES):
        shutil.rmtree(out / split, ignore_errors=True)
    digest = hashlib.sha256()
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for (name, code), one, split, image in sorted(rows, key=lambda row: (row[2], row[1]["kind"], row[0])):
        folder = out / split / one["kind"]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{code}.{name}.png")
        digest.update(f"{split}/{one['kind']}/{code}.{name}".encode() + image.tobytes())
        counts[one["kind"]][split] += 1
    for kind in sorted(counts):
        print(f"{kind:18s} " + "  ".join(f"{split} {counts[kind][split]:4d}" for split in ("train", *SHARES)))
    total = {split: sum(c[split] for c in counts.values()) for split in ("train", *SHARES)}
    train = np.stack([row[3] for row in rows if row[2] == "train"]).reshape(-1, 3) / 255
    print(f"{len(counts)} classes, " + ", ".join(f"{n:,} {split}" for split, n in total.items()))
    print(f"mean {train.mean(0).round(4).tolist()}, std {train.std(0).round(4).tolist()}")
    same = digest.hexdigest() == EXPECTED
    print(f"SHA-256 of paths and pixels {digest.hexdigest()}: {'as expected' if same else 'NOT the expected one'}")


def main() -> None:
    """Parse the command line and build."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/pictures-data"))
    try:
        build(parser.parse_args().out)
    except Failed as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
