"""Hooks of mkdocs: results are pages of the site too, and links to code become file names."""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Every file below ``results`` is a part of the site."""
    for path in sorted((ROOT / "results").rglob("*")):
        if path.is_file():
            files.append(
                File(path.relative_to(ROOT).as_posix(), str(ROOT), config["site_dir"], config["use_directory_urls"])
            )
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links out of ``docs``: to results within the site, to other files of the project as their names."""
    here = posixpath.dirname(page.file.src_uri)
    in_docs = not page.file.src_uri.startswith("results/")

    def mended(match: re.Match[str]) -> str:
        mark, text, target, anchor = match.groups()
        if "://" in target:
            return match[0]
        place = posixpath.normpath(posixpath.join("docs" if in_docs else ".", here, target))
        inside = place.removeprefix("docs/")
        if files.get_file_from_path(inside) is not None:
            return f"{mark}[{text}]({posixpath.relpath(inside, here or '.')}{anchor or ''})"
        if (ROOT / place).exists():
            return f"{text} (`{place}`)" if text.strip("`") != place else f"`{place}`"
        return match[0]

    return LINK.sub(mended, markdown)


def on_page_content(content: str, page: Any, config: Any, files: Any) -> str:
    """Formulas as MathML, which browsers render themselves: pages need no network."""
    return FORMULA.sub(
        lambda match: convert(html.unescape(match[2]).strip(), display="inline" if match[1] == "span" else "block"),
        content,
    )
